"""Policy objectives on the tokens of one row of responses.

An objective sees log-probabilities of the current and the old policy, never a model. It returns a loss per token; which
mean is taken of those is the business of `troll_jax.ops.aggregation`. What is added to any objective is in
`troll_jax.ops.regularisers`. TROLL and the clip are here, other trust regions in `masked_losses`, `smooth_losses` and
`minibatch_losses`.
"""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp

from troll_jax.ops.projection import Projection, kl_divergence
from troll_jax.ops.ranges import check_range, is_not_negative
from troll_jax.ops.regions import token_region
from troll_jax.ops.schedules import Schedule, bound_at
from troll_jax.ops.segments import segment_mean
from troll_jax.ops.support import at_token
from troll_jax.types import START, Progress, SparseLogProbs

# log π/π_old beyond which a ratio is clipped, so that one absurd token gives a large number and not an infinite one.
LOG_RATIO_LIMIT = 20.0
# The same of a response's ratio, from above (TROLL's authors).
_LOG_SEQUENCE_RATIO_LIMIT = 10.0


class ReferenceView(NamedTuple):
    """A policy beside a reference model, on the tokens that the old policy lists and one entry for all others."""

    log_probs: jax.Array  # [T] of the sampled tokens, by the reference model
    policy: SparseLogProbs  # [T, K + 1]; with a gradient if the policy is the current one
    reference: SparseLogProbs  # [T, K + 1]


class LossInputs(NamedTuple):
    """The inputs of an objective: a row of responses. Only what comes from the current policy has a gradient."""

    tokens: jax.Array  # [T] int32, sampled from the old policy
    segments: jax.Array  # [T] int32, the response that a token belongs to; 0: none, what is computed there is not used
    new_log_probs: jax.Array  # [T] of those tokens, by the current policy
    old_log_probs: jax.Array  # [T]
    new: SparseLogProbs  # [T, K]
    old: SparseLogProbs  # [T, K], on the same tokens as `new`
    entropy: jax.Array  # [T] nats, of the current policy over the whole vocabulary; with a gradient
    reference: ReferenceView | None = None  # if there is a reference model


class LossOutputs(NamedTuple):
    """The loss of every token and what the log shows of it. Only `loss` carries a gradient."""

    loss: jax.Array  # [T]
    constrained: jax.Array  # [T] bool, tokens at which the objective bounds the step: projected, clipped or left out
    logs: dict[str, jax.Array]  # [T] each; of a bool the log shows the share of tokens, of a float mean and quantiles


class Minibatch(NamedTuple):
    """All tokens of an update [...], by the policy before it, without a gradient."""

    new_log_probs: jax.Array
    old_log_probs: jax.Array
    advantages: jax.Array
    inside: jax.Array  # bool; of others nothing counts


Objective = Annotated[Callable[[LossInputs, jax.Array, Progress], LossOutputs], 'reference', 'minibatch']
"""The loss of every token of a row [T], from its advantages [T] and the progress of the run; with a parameter
`reference` it is given the `ReferenceView`, with `minibatch` the `Minibatch`, which costs a forward pass."""
Region = Annotated[Callable[[SparseLogProbs, SparseLogProbs, jax.Array], Projection], 'bound']
"""Projects the current policy towards π_old [T, K], given the response [T] that each token belongs to."""
Ratio = Callable[[jax.Array, jax.Array], jax.Array]
"""π/π_old [T] from its log [T], given the response [T] that each token belongs to."""


def token_ratio(log_ratio: jax.Array, segments: jax.Array) -> jax.Array:
    """The ratio π/π_old of each token on its own, from its log [T]; clipped to e^±20."""
    del segments
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def sequence_ratio(log_ratio: jax.Array, segments: jax.Array) -> jax.Array:
    """The ratio of a whole response at each of its tokens (GSPO-token, arXiv 2507.18071, section 4.3).

        s_t = ⌊exp(mean_t log r_t)⌋ · π(o_t) / ⌊π(o_t)⌋,   log s_t at most 10

    Its value is the geometric mean of the response's ratios, its gradient that of the token's own log-probability.

    Args:
      log_ratio: [T] log r_t
      segments: [T] the response that a token belongs to; 0: none.
    """
    mean = jax.lax.stop_gradient(segment_mean(log_ratio, segments))
    own = log_ratio - jax.lax.stop_gradient(log_ratio)
    return jnp.exp(jnp.minimum(mean + own, _LOG_SEQUENCE_RATIO_LIMIT))


def capped_ratio(log_ratio: jax.Array, segments: jax.Array, *, limit: float = 20.0) -> jax.Array:
    """⌊min(r_t, limit)⌋ · π(o_t) / ⌊π(o_t)⌋ [T], as `token_ratio`: truncated importance weights.

    The weight is capped, and the gradient of log π(o_t) is lost nowhere.

    Raises:
      ValueError: a limit below 1, which tokens of equal probability exceed.
    """
    del segments
    check_range('limit of a ratio', limit, lambda x: x >= 1, 'at least 1')
    value = jax.lax.stop_gradient(log_ratio)
    return jnp.exp(jnp.minimum(value, math.log(limit)) + (log_ratio - value))


def troll(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float | jax.Array | Schedule = 0.05,
    alpha: float = 1.0,
    region: Region = token_region,
    ratio: Ratio = token_ratio,
) -> LossOutputs:
    """TROLL (arXiv 2510.03817, equations 4 to 6): the ratio of the projected policy, and a pull towards it.

        loss = − π(o_t)/π_old(o_t) · A_t + α KL(π̃ ‖ ⌊π⌋),     π = project(π̃, π_old, ε)

    Args:
      row: T tokens; `old` holds the sampled token at every one that belongs to a response.
      advantages: [T]
      progress: progress of the run, for a schedule of the bound.
      bound: ε, nats per token, or a schedule of it, see `troll_jax.ops.schedules`.
      alpha: α ≥ 0.
      region: `token_region`, `sequence_region` or another one of `troll_jax.ops.regions`.
      ratio: ratio of π to π_old, `token_ratio` or `sequence_ratio`.

    Raises:
      ValueError: `alpha` is negative.
    """
    chex.assert_equal_shape([row.tokens, row.segments, advantages])
    chex.assert_equal_shape([row.new.tokens, row.new.log_probs, row.old.tokens, row.old.log_probs])
    check_range('alpha', alpha, is_not_negative, 'at least 0')
    bound = bound_at(bound, progress)
    projection = region(row.new, row.old, row.segments, bound=bound)
    projected = SparseLogProbs(row.new.tokens, projection.log_probs)
    at_sampled = jax.vmap(at_token)
    log_ratio = at_sampled(projected, row.tokens) - at_sampled(row.old, row.tokens)
    # Both distributions give the same mass to the tail, so this is the KL over the whole vocabulary. Its terms
    # −p + q do not change the value; without them the gradient would push mass out of the support.
    target = jax.lax.stop_gradient(projection.log_probs)
    regression = alpha * jax.vmap(kl_divergence)(row.new.log_probs, target)
    # Kept from infinity by hand: a mean of logs should survive one token that is at a distance without end.
    bounded = lambda x: jnp.minimum(x, 1e6)
    logs = {
        'projected': projection.violated,
        'unconverged': ~projection.converged,
        'bound': jnp.full_like(regression, bound),
        'regression': regression,
        'weight': projection.weight,
        'eta': bounded(1 / projection.weight - 1),
        'kl_unprojected': bounded(projection.kl_unprojected),
        'kl_projected': projection.kl,
        'evaluations': projection.evaluations.astype(jnp.float32),
    }
    loss = regression - ratio(log_ratio, row.segments) * advantages
    return LossOutputs(loss, projection.violated, jax.lax.stop_gradient(logs))


def ppo_clip(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    lower: float = 0.2,
    upper: float = 0.2,
    dual: float | None = 10.0,
    ratio: Ratio = token_ratio,
) -> LossOutputs:
    """PPO's clipped surrogate (arXiv 1707.06347) with its own bound on each side and dual clip (arXiv 1912.09729).

        loss = − min( r A, clip(r, 1 − lower, 1 + upper) A ),   for A < 0 at most  − dual · A

    With upper > lower it is DAPO's clip-higher (arXiv 2503.14476, section 3.1), with `sequence_ratio` GSPO
    (arXiv 2507.18071, section 4).

    Args:
      row: T tokens; only the log-probabilities of the sampled tokens are used.
      advantages: [T]
      lower, upper: the ratio is clipped to [1 − lower, 1 + upper].
      dual: the ratio at which the loss of a token with a negative advantage stops growing, more than 1 + upper; None
        turns this off.
      ratio: r, `token_ratio`, `sequence_ratio` or `capped_ratio`.

    Raises:
      ValueError: `dual` is within the clip, or the clip does not hold the ratio 1.
    """
    del progress
    chex.assert_equal_shape([row.new_log_probs, row.old_log_probs, advantages])
    _check_clip(lower, upper)
    if dual is not None and not dual > 1 + upper:
        raise ValueError(f'dual must be more than 1 + upper = {1 + upper}, or None; got {dual}')
    r = ratio(row.new_log_probs - row.old_log_probs, row.segments)
    plain = -r * advantages
    clipped = -jnp.clip(r, 1 - lower, 1 + upper) * advantages
    loss = jnp.maximum(plain, clipped)
    ceiling = jnp.where(advantages < 0, -dual * advantages, jnp.inf) if dual is not None else jnp.inf
    constrained = (clipped > plain) | (loss > ceiling)
    return LossOutputs(jnp.minimum(loss, ceiling), constrained, {'clipped': constrained})


def cispo(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    lower: float = 1.0,
    upper: float = 4.0,
) -> LossOutputs:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equations 4 and 5): the ratio is clipped as a weight, and no token is lost.

        loss = − ⌊clip(r, 1 − lower, 1 + upper)⌋ A log π(o_t)

    Args:
      row: T tokens; only the log-probabilities of the sampled tokens are used.
      advantages: [T]
      lower, upper: the weight is clipped to [1 − lower, 1 + upper]; lower = 1 is no lower bound.

    Raises:
      ValueError: the clip does not hold the ratio 1.
    """
    del progress
    chex.assert_equal_shape([row.new_log_probs, row.old_log_probs, advantages])
    _check_clip(lower, upper)
    r = token_ratio(row.new_log_probs - row.old_log_probs, row.segments)
    weight = jax.lax.stop_gradient(jnp.clip(r, 1 - lower, 1 + upper))
    return LossOutputs(-weight * advantages * row.new_log_probs, weight != r, {'clipped': weight != r})


def importance_weighted(
    row: LossInputs, advantages: jax.Array, progress: Progress = START, *, ratio: Ratio = token_ratio
) -> LossOutputs:
    """The policy gradient by importance sampling, without a bound on the step: loss = − r A. As `ppo_clip`."""
    del progress
    chex.assert_equal_shape([row.new_log_probs, row.old_log_probs, advantages])
    r = ratio(row.new_log_probs - row.old_log_probs, row.segments)
    return LossOutputs(-r * advantages, jnp.zeros_like(r, bool), {})


def _check_clip(lower: float, upper: float) -> None:
    check_range('lower', lower, lambda x: 0 <= x <= 1, 'in [0, 1]')
    check_range('upper', upper, is_not_negative, 'at least 0')
