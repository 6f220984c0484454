"""Trust regions that leave tokens or whole responses out: masks by a ratio, a probability or a divergence.

The loss of the rest is that of another objective, importance weighting if none is given:

    loss = 0 where the rule says drop, else − r A,    r = π̃(o_t) / π_old(o_t)

Every function here takes a row of T tokens, advantages [T], the progress of the run and the `objective`. m and p are
the probabilities of the sampled token under π_old and π̃.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from troll_jax.ops.categorical import entropy, total_variation
from troll_jax.ops.losses import LossInputs, LossOutputs, importance_weighted, ppo_clip, token_ratio
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.ranges import check_range, is_positive
from troll_jax.ops.segments import segment_max, segment_mean
from troll_jax.ops.support import sampled_or_not
from troll_jax.types import START, Progress

Divergence = Callable[[jax.Array, jax.Array], jax.Array]
"""Divergence [] of two distributions, from their log-probabilities [K]."""
Masked = Callable[[LossInputs, jax.Array, Progress], LossOutputs]
"""An objective that needs nothing but a row, advantages and progress."""


def dppo(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float = 0.15,
    divergence: Divergence = total_variation,
    objective: Masked = importance_weighted,
) -> LossOutputs:
    """DPPO (arXiv 2602.04879, equation 12): a token that leads further out of the trust region is left out.

        drop where D(π_old ‖ π̃) > bound and r is on A's side of one

    D is taken over the tokens that the supports list. With `bucket_tail` that is the paper's top-K approximation
    (equations 15 and 16).

    Args:
      bound: δ; the paper's are 0.15 or 0.2 for the total variation and 0.05 nats for the KL divergence.
      divergence: `total_variation` or `kl_divergence`.

    Raises:
      ValueError: `bound` is not positive.
    """
    _check(bound)
    outside = jax.vmap(divergence)(row.old.log_probs, row.new.log_probs) > bound
    return _without(outside & leads_out(row, advantages), objective, row, advantages, progress)


def dppo_binary(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float = 0.15,
    divergence: Divergence = total_variation,
    objective: Masked = importance_weighted,
) -> LossOutputs:
    """DPPO's binary approximation (arXiv 2602.04879): as `dppo`, with D of the sampled token against all others.

    The total variation is |p − m|. The authors cap r, which `importance_weighted.ratio = @capped_ratio` does.
    """
    _check(bound)
    outside = _binary(row, divergence) > bound
    return _without(outside & leads_out(row, advantages), objective, row, advantages, progress)


def ipo(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float = 0.1,
    objective: Masked = importance_weighted,
) -> LossOutputs:
    """IPO, the default of prime-rl (github.com/PrimeIntellect-ai/prime-rl): drop where |p − m| > bound, whatever A is.

    Its penalty of 1e-3 log² r at every token is `kl_to_old` with the estimator `k2` and a coefficient of 2e-3.
    """
    _check(bound)
    return _without(_binary(row, total_variation) > bound, objective, row, advantages, progress)


def icepop(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    lower: float = 0.5,
    upper: float = 5.0,
    objective: Masked = importance_weighted,
) -> LossOutputs:
    """IcePop (Ring-1T, arXiv 2510.18855; as an objective of its own arXiv 2512.16144, equation 1).

        drop where r is not in [lower, upper], whatever A is

    Raises:
      ValueError: the interval does not hold the ratio 1.
    """
    check_range('lower', lower, lambda x: 0 <= x <= 1, 'in [0, 1]')
    check_range('upper', upper, lambda x: x >= 1, 'at least 1')
    r = token_ratio(row.new_log_probs - row.old_log_probs, row.segments)
    return _without((r < lower) | (r > upper), objective, row, advantages, progress)


def kpop(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float = 0.1,
    objective: Masked = importance_weighted,
) -> LossOutputs:
    """KPop (Guo et al., ringtech.notion.site/kpop, 2026): the KL divergence of sampled against others, both ways.

    drop where KL(p ‖ m) > bound or KL(m ‖ p) > bound, of the distributions (p, 1 − p) and (m, 1 − m) in nats
    """
    _check(bound)
    both = jnp.maximum(_binary(row, kl_divergence), _binary(row, lambda old, new: kl_divergence(new, old)))
    return _without(both > bound, objective, row, advantages, progress)


def trm(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float = 0.05,
    objective: Masked = importance_weighted,
) -> LossOutputs:
    """Trust region masking (arXiv 2512.23075): drop a response if any of its tokens has KL(π_old ‖ π̃) > bound, nats.

    The paper bounds the largest divergence of a response; here it is exact on the tokens that the supports list.
    """
    _check(bound)
    kl = jax.vmap(kl_divergence)(row.old.log_probs, row.new.log_probs)
    return _without(segment_max(kl, row.segments) > bound, objective, row, advantages, progress)


def opsm(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float = 0.5,
    objective: Masked = ppo_clip,
) -> LossOutputs:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556, section 3.1), of responses with A < 0.

    drop where A < 0 and the response's mean of log π_old(o_t) − log π̃(o_t) > bound, in nats
    """
    _check(bound)
    mean = segment_mean(row.old_log_probs - row.new_log_probs, row.segments)
    return _without((advantages < 0) & (mean > bound), objective, row, advantages, progress)


def vaco(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    bound: float = 0.2,
    objective: Masked = importance_weighted,
) -> LossOutputs:
    """The filter of VACO (arXiv 2603.01365) in open-instruct's form for responses (github.com/allenai/open-instruct).

        drop where the response's mean of |r − 1| > bound and r is on A's side of one

    The mean estimates twice the total variation. The paper's realignment of advantages by V-trace is left out.
    """
    _check(bound)
    r = token_ratio(row.new_log_probs - row.old_log_probs, row.segments)
    outside = segment_mean(jnp.abs(r - 1), row.segments) > bound
    return _without(outside & leads_out(row, advantages), objective, row, advantages, progress)


def erc(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    lower: float = 0.95,
    upper: float = 1.05,
    objective: Masked = ppo_clip,
) -> LossOutputs:
    """Entropy ratio clipping (arXiv 2512.05591): drop where H(π̃) / H(π_old) is not in (lower, upper).

    Both entropies are those of the tokens that the supports list, the same for both; the paper's are of the whole
    vocabulary.

    Raises:
      ValueError: the interval does not hold the ratio 1.
    """
    check_range('lower', lower, lambda x: 0 <= x < 1, 'in [0, 1)')
    check_range('upper', upper, lambda x: x > 1, 'more than 1')
    new, old = (jax.vmap(entropy)(x.log_probs) + 1e-8 for x in (row.new, row.old))  # the authors' 1e-8
    return _without((new <= lower * old) | (new >= upper * old), objective, row, advantages, progress)


def leads_out(row: LossInputs, advantages: jax.Array) -> jax.Array:
    """[T] bool: the ratio is on the side of one to which the advantage moves it."""
    return advantages * (row.new_log_probs - row.old_log_probs) > 0


def _binary(row: LossInputs, divergence: Divergence) -> jax.Array:
    """The divergence [T] of π_old and π̃, each as the sampled token and all others."""
    return jax.vmap(lambda old, new: divergence(sampled_or_not(old), sampled_or_not(new)))(
        row.old_log_probs, row.new_log_probs
    )


def _without(drop: jax.Array, objective: Masked, row: LossInputs, advantages: jax.Array, progress) -> LossOutputs:
    """The objective's outputs with a loss of zero where `drop` [T] is true."""
    losses = objective(row, advantages, progress)
    constrained = drop | losses.constrained
    return LossOutputs(jnp.where(drop, 0.0, losses.loss), constrained, losses.logs | {'clipped': constrained})


def _check(bound: float) -> None:
    check_range('bound', bound, is_positive, 'positive')
