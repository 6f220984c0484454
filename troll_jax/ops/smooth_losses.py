"""Trust regions without a step: the factor on a token's or a response's gradient is a smooth function of the ratio.

Every function here takes a row of T tokens, of which it uses the log-probabilities of the sampled ones, advantages [T]
and the progress of the run, which it does not use. r = π̃(o_t) / π_old(o_t).
"""

import jax
import jax.numpy as jnp

from troll_jax.ops.losses import LOG_RATIO_LIMIT, LossInputs, LossOutputs, sequence_ratio, token_ratio
from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.ops.segments import segment_sum
from troll_jax.types import START, Progress


def drpo(row: LossInputs, advantages: jax.Array, progress: Progress = START, *, bound: float = 0.15) -> LossOutputs:
    """DRPO (arXiv 2606.09821, equation 8): a pull towards the edge of DPPO's binary total variation.

        loss = − r A + |A| m (r − 1)² / (2 bound),     m = π_old(o_t), p = π̃(o_t)

    The factor on the gradient of −r A is 1 − sign(A (r − 1)) |p − m| / bound: zero at p = m + sign(A) bound, and it
    leads back beyond. Tokens beyond count as constrained.
    """
    check_range('bound', bound, is_positive, 'positive')
    return _quadratic(row, advantages, bound * jnp.exp(-row.old_log_probs))


def spo(row: LossInputs, advantages: jax.Array, progress: Progress = START, *, bound: float = 0.2) -> LossOutputs:
    """SPO (arXiv 2401.16025, equation 16), an estimate of the chi-squared divergence; DRPO's control, without m.

        loss = − r A + |A| (r − 1)² / (2 bound)

    The factor on the gradient of −r A is 1 − sign(A (r − 1)) |r − 1| / bound.
    """
    check_range('bound', bound, is_positive, 'positive')
    return _quadratic(row, advantages, bound)


def _quadratic(row: LossInputs, advantages: jax.Array, width: jax.Array | float) -> LossOutputs:
    """loss = − r A + |A| (r − 1)² / (2 width), whose minimum is at r = 1 + sign(A) width."""
    distance = token_ratio(row.new_log_probs - row.old_log_probs, row.segments) - 1
    loss = -(distance + 1) * advantages + jnp.abs(advantages) * distance**2 / (2 * width)
    beyond = jnp.sign(advantages) * distance > width
    return LossOutputs(loss, beyond, {'clipped': beyond})


def sapo(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    positive: float = 1.0,
    negative: float = 1.05,
) -> LossOutputs:
    """SAPO (arXiv 2511.20347): a soft gate around r = 1 in place of the clip.

        loss = − 4/τ σ(τ (r − 1)) A,     τ = positive where A > 0, else negative

    The factor on the gradient of −r A is 4 σ (1 − σ), which is 1 at r = 1.

    Raises:
      ValueError: a temperature τ is not positive.
    """
    for name, value in (('positive', positive), ('negative', negative)):
        check_range(name, value, is_positive, 'positive')
    r = token_ratio(row.new_log_probs - row.old_log_probs, row.segments)
    tau = jnp.where(advantages > 0, positive, negative)
    loss = -4 / tau * jax.nn.sigmoid(tau * (r - 1)) * advantages
    return LossOutputs(loss, jnp.zeros_like(r, bool), {})


def vespo(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> LossOutputs:
    """VESPO (arXiv 2602.10693, equation 20): a weight of the whole response, from the product of its ratios.

        loss = − ⌊φ(W)⌋ A log π̃(o_t),     φ(W) = W^k exp(λ (1 − W)),   W = Π_t r_t

    φ is 1 at W = 1 and goes to zero on both sides; log W is clipped to ±20, as by the authors.

    Args:
      positive: (k, λ) where A ≥ 0.
      negative: (k, λ) where A < 0.

    Raises:
      ValueError: a number is negative.
    """
    for name, pair in (('positive', positive), ('negative', negative)):
        for value in pair:
            check_range(name, value, is_not_negative, 'two numbers of at least 0')
    limited = lambda x: jnp.clip(x, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_w = limited(segment_sum(limited(row.new_log_probs - row.old_log_probs), row.segments))
    k, decay = (jnp.where(advantages >= 0, *pair) for pair in zip(positive, negative, strict=True))
    weight = jax.lax.stop_gradient(jnp.exp(k * log_w + decay * (1 - jnp.exp(log_w))))
    return LossOutputs(
        -weight * advantages * row.new_log_probs, jnp.zeros_like(log_w, bool), {'response_weight': weight}
    )


def gmpo(
    row: LossInputs, advantages: jax.Array, progress: Progress = START, *, lower: float = 0.4, upper: float = 0.4
) -> LossOutputs:
    """GMPO (arXiv 2507.20673): the geometric mean of a response's ratios, of which each was clipped.

        loss = − exp( mean_t c_t ) A,     c_t = log r_t, for A > 0 at most upper, for A < 0 at least −lower

    With `sequence_mean` it is the paper's mean over responses. A clipped token has no gradient of its own, but its
    bound is part of the mean.

    Raises:
      ValueError: a bound is negative.
    """
    for name, value in (('lower', lower), ('upper', upper)):
        check_range(name, value, is_not_negative, 'at least 0')
    log_ratio = row.new_log_probs - row.old_log_probs
    clipped = jnp.minimum(log_ratio, jnp.where(advantages > 0, upper, jnp.inf))
    clipped = jnp.maximum(clipped, jnp.where(advantages < 0, -lower, -jnp.inf))
    held = clipped != log_ratio
    return LossOutputs(-sequence_ratio(clipped, row.segments) * advantages, held, {'clipped': held})
