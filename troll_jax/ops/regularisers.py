"""Regularisers that can be added to any objective, and estimates of the KL divergence of two policies."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp

from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import LOG_RATIO_LIMIT, LossInputs, LossOutputs, ReferenceView
from troll_jax.ops.needs import give, needs
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.ranges import check_range, is_not_negative
from troll_jax.types import START, Progress

Regulariser = Annotated[Callable[[LossInputs], jax.Array], 'reference']
"""A loss [T] of a row; of one with a parameter `reference`, the `ReferenceView` is given."""
Estimator = Callable[[jax.Array, jax.Array], jax.Array]
"""Estimate of a KL divergence [T] from log-probabilities of the sampled tokens."""


def regularised(
    objective: Callable[..., LossOutputs], regularisers: Sequence[Regulariser]
) -> Callable[..., LossOutputs]:
    """An objective and regularisers, each a loss [T] of a row, as one objective: their losses are added up.

    The log has each regulariser's loss under its name.
    """
    functions = [getattr(regulariser, 'func', regulariser) for regulariser in regularisers]
    names = [getattr(function, '__name__', type(function).__name__) for function in functions]
    if len(set(names)) < len(names):
        raise ValueError(f'regularisers are logged by their names, and each may be given once; got {", ".join(names)}')

    def with_regularisers(row: LossInputs, advantages, progress: Progress = START, minibatch=None) -> LossOutputs:
        given = give(objective, reference=row.reference, minibatch=minibatch)
        losses = objective(row, advantages, progress, **given)
        if taken := losses.logs.keys() & set(names):
            raise ValueError(f'the objective has figures of the name {", ".join(taken)}; rename the regulariser')
        added = {name: evaluate(regulariser, row) for name, regulariser in zip(names, regularisers, strict=True)}
        return losses._replace(loss=losses.loss + sum(added.values()), logs=losses.logs | added)

    return with_regularisers if needs(objective, 'minibatch') else partial(with_regularisers, minibatch=None)


def evaluate(regulariser: Regulariser, row: LossInputs) -> jax.Array:
    """A regulariser of a row [T], given the reference model if it needs one."""
    return regulariser(row, **give(regulariser, reference=row.reference))


def entropy_bonus(row: LossInputs, *, coefficient: float) -> jax.Array:
    """loss = − coefficient · H(π̃), the entropy over the whole vocabulary in nats; [T]."""
    return -coefficient * row.entropy


def trust_region_entropy(row: LossInputs, *, coefficient: float, mass: float = 0.99) -> jax.Array:
    """TRE-P (arXiv 2602.03635): an entropy bonus among the most probable tokens alone; [T].

        loss = − coefficient · H(π̃ | A) / log |A|,   A the fewest listed tokens that hold the mass

    It pushes no probability into the tail. The paper's α is coefficient / log V. Where |A| = 1 it is zero.

    Args:
      row: T tokens.
      coefficient: weight of the entropy, whose largest value is one.
      mass: probability that A holds, in (0, 1].

    Raises:
      ValueError: the mass is out of its range.
    """
    check_range('mass of trust_region_entropy', mass, lambda x: 0 < x <= 1, 'in (0, 1]')
    listed = jnp.where(row.new.tokens >= 0, row.new.log_probs, -jnp.inf)
    falling = -jnp.sort(-listed, axis=-1)
    probs = jnp.exp(falling)
    inside = (jnp.cumsum(probs, axis=-1) - probs < mass) & (probs > 0)
    size = jnp.maximum(jnp.sum(inside, axis=-1), 2)
    within = jax.nn.log_softmax(jnp.where(inside, falling, -jnp.inf), axis=-1)
    return -coefficient * jax.vmap(entropy)(within) / jnp.log(size.astype(within.dtype))


def kl_to_old(row: LossInputs, *, coefficient: float, estimator: Estimator | None = None) -> jax.Array:
    """loss = coefficient · KL(π̃ ‖ π_old), exact on the tokens that the supports list, or as `estimator` has it; [T].

    Added to `ppo_clip`, it is the control for TROLL's regression: a pull towards π_old itself, at every token, in place
    of one towards the projection.
    """
    check_range('coefficient of a KL divergence', coefficient, is_not_negative, 'at least 0')
    if estimator is not None:
        return coefficient * estimator(row.new_log_probs, row.old_log_probs)
    return coefficient * jax.vmap(kl_divergence)(row.new.log_probs, row.old.log_probs)


def kl_to_reference(
    row: LossInputs, reference: ReferenceView | None, *, coefficient: float, estimator: Estimator | None = None
) -> jax.Array:
    """loss = coefficient · KL(π̃ ‖ π_ref) at every token: the pull towards a reference model; [T].

    In a reward (`reward_penalty`) the policy is π_old, and this is taken off at every token.

    Args:
      row: T tokens.
      reference: policy and reference model at these tokens.
      coefficient: β ≥ 0.
      estimator: estimate from the sampled tokens, `k1`, `k2` or `k3`; GRPO's is `k3`. None: exact on the
        tokens that the old policy lists, with all others as one entry, which is never more than the KL of the whole
        vocabulary. The estimates suppose that the policy has sampled: off-policy they are biased, this is not.

    Raises:
      ValueError: there is no reference model.
    """
    check_range('coefficient of a KL divergence', coefficient, is_not_negative, 'at least 0')
    if reference is None:
        raise ValueError('kl_to_reference needs a reference model, and this row has none')
    if estimator is None:
        kl = jax.vmap(kl_divergence)(reference.policy.log_probs, reference.reference.log_probs)
    else:
        kl = estimator(row.new_log_probs, reference.log_probs)
    return coefficient * kl


def k1(log_probs: jax.Array, other_log_probs: jax.Array) -> jax.Array:
    """log p/q: unbiased for KL(p ‖ q) at tokens that were sampled from p, negative at some, of high variance.

    The names k1 to k3 are Schulman's ("Approximating KL divergence", joschu.net/blog/kl-approx.html, 2020). This one
    belongs into a reward: as a loss its expected gradient is zero.

    Args:
      log_probs: [T] log p of the sampled tokens.
      other_log_probs: [T] log q of them.
    """
    return log_probs - other_log_probs


def k2(log_probs: jax.Array, other_log_probs: jax.Array) -> jax.Array:
    """½ (log p/q)²: biased, with little variance; as a loss its expected gradient is that of KL(p ‖ q). As `k1`."""
    return 0.5 * (log_probs - other_log_probs) ** 2


def k3(log_probs: jax.Array, other_log_probs: jax.Array) -> jax.Array:
    """q/p − 1 − log q/p: unbiased and never negative; as a loss its expected gradient is that of KL(q ‖ p). As `k1`.

    Beyond log q/p = 20 it continues as a straight line, so that one absurd token gives a large number and no infinite
    one. Its gradient still points back, as that of a clipped ratio would not.
    """
    x = other_log_probs - log_probs
    is_far = x >= LOG_RATIO_LIMIT
    near, slope = jnp.where(is_far, 0.0, x), math.expm1(LOG_RATIO_LIMIT)
    far = slope * (x - LOG_RATIO_LIMIT) + (slope - LOG_RATIO_LIMIT)
    return jnp.where(is_far, far, jnp.expm1(near) - near)
