"""Policy objectives on the tokens of one row of responses, and the weights that aggregate them over a batch.

An objective sees log-probabilities of the current and the old policy, never a model. It returns a loss per token; which
mean is taken of those is the aggregation's business. Swapping one objective for another is one line of gin.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from troll_jax.ops.projection import Projection, kl_divergence, project_sparse, project_sparse_sequence
from troll_jax.ops.schedules import bound_at
from troll_jax.ops.support import at_token
from troll_jax.types import START, Progress, SparseLogProbs

# log π/π_old beyond which a ratio is held, so that one absurd token gives a large number and not an infinite one.
_LOG_RATIO_LIMIT = 20.0


class TokenLogProbs(NamedTuple):
    """What an objective sees of a row of responses. `new` is the current policy, the only part with a gradient."""

    tokens: jax.Array  # [T] int32, sampled from the old policy
    segments: jax.Array  # [T] int32, the response that a token belongs to; 0: none, what is computed there is not used
    new_log_probs: jax.Array  # [T] of those tokens
    old_log_probs: jax.Array  # [T]
    new: SparseLogProbs  # [T, K]
    old: SparseLogProbs  # [T, K], on the same tokens as `new`


class TokenLosses(NamedTuple):
    """The loss of every token and what the log shows of it. Only `loss` carries a gradient."""

    loss: jax.Array  # [T]
    logs: dict[str, jax.Array]  # [T] each; of a bool the log shows the share of tokens, of a float mean and quantiles


def token_region(new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound) -> Projection:
    """A trust region for each token, as in the paper. From [T, K] to a Projection [T, …]."""
    del segments
    return jax.vmap(partial(project_sparse, bound=bound))(new, old)


def sequence_region(new: SparseLogProbs, old: SparseLogProbs, segments: jax.Array, *, bound) -> Projection:
    """One trust region for a whole response, which bounds the mean KL of its tokens, see `project_sequence`."""
    return project_sparse_sequence(new, old, segments, bound=bound)


def troll(
    row: TokenLogProbs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound=0.05,
    alpha: float = 1.0,
    region=token_region,
) -> TokenLosses:
    """TROLL (arXiv 2510.03817, equations 4 to 6): the ratio of the projected policy, and a pull towards it.

        loss = − π(o_t)/π_old(o_t) · A_t + α KL(π̃ ‖ ⌊π⌋),     π = project(π̃, π_old, ε)

    Args:
      row: T tokens; `old` holds the sampled token at every one that belongs to a response.
      advantages: [T]
      progress: of the run, for a bound that changes.
      bound: ε, nats per token, or a schedule of it, see `troll_jax.ops.schedules`.
      alpha: α ≥ 0.
      region: `token_region` or `sequence_region`.
    """
    chex.assert_equal_shape([row.tokens, row.segments, advantages])
    chex.assert_equal_shape([row.new.tokens, row.new.log_probs, row.old.tokens, row.old.log_probs])
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
    return TokenLosses(regression - _bounded_exp(log_ratio) * advantages, jax.lax.stop_gradient(logs))


def ppo_clip(
    row: TokenLogProbs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    lower: float = 0.2,
    upper: float = 0.2,
    dual: float | None = 10.0,
) -> TokenLosses:
    """PPO's clipped surrogate (arXiv 1707.06347) with its own bound on each side and dual clip (arXiv 1912.09729).

        loss = − min( r A, clip(r, 1 − lower, 1 + upper) A ),   for A < 0 at most  − dual · A

    Args:
      row: T tokens; only the log-probabilities of the sampled tokens are used.
      advantages: [T]
      progress: not used.
      lower, upper: the ratio is clipped to [1 − lower, 1 + upper].
      dual: the ratio at which the loss of a token with a negative advantage stops growing, more than 1 + upper; None
        turns this off.

    Raises:
      ValueError: `dual` is within the clip.
    """
    del progress
    chex.assert_equal_shape([row.new_log_probs, row.old_log_probs, advantages])
    if dual is not None and not dual > 1 + upper:
        raise ValueError(f'dual must be more than 1 + upper = {1 + upper}, or None; got {dual}')
    ratio = _bounded_exp(row.new_log_probs - row.old_log_probs)
    plain = -ratio * advantages
    clipped = -jnp.clip(ratio, 1 - lower, 1 + upper) * advantages
    loss = jnp.maximum(plain, clipped)
    ceiling = jnp.where(advantages < 0, -dual * advantages, jnp.inf) if dual is not None else jnp.inf
    return TokenLosses(jnp.minimum(loss, ceiling), {'clipped': (clipped > plain) | (loss > ceiling)})


def token_mean(lengths: jax.Array, *, max_length: int) -> jax.Array:
    """Weights of a mean over all tokens of a batch (GRPO and PPO in the paper).

    Args:
      lengths: [R] tokens of each response; those without any do not count.
      max_length: T, tokens of the longest possible response.

    Returns:
      [R] the weight of each token of a response in the loss.
    """
    del max_length
    return jnp.full(lengths.shape, 1 / jnp.maximum(jnp.sum(lengths), 1))


def sequence_mean(lengths: jax.Array, *, max_length: int) -> jax.Array:
    """Weights of a mean over responses of the mean over their tokens (GRPO as published, GSPO); as `token_mean`."""
    del max_length
    return 1 / (jnp.maximum(lengths, 1) * jnp.maximum(jnp.sum(lengths > 0), 1))


def constant_length(lengths: jax.Array, *, max_length: int) -> jax.Array:
    """Weights of a mean over responses of the sum of their tokens / T (Dr.GRPO, arXiv 2503.20783); as `token_mean`."""
    return jnp.full(lengths.shape, 1 / (max_length * jnp.maximum(jnp.sum(lengths > 0), 1)))


def _bounded_exp(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT))
