"""Trust regions that leave tokens or whole responses out: masks by a ratio, a probability or a divergence.

`masked` is an objective, every other function a rule: from a row of T tokens and their advantages [T] to the tokens
that are left out, [T] bool. m and p are the probabilities of the sampled token under π_old and π̃, r = p / m. A rule
raises a ValueError for a bound that is out of its range.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from troll_jax.ops.categorical import entropy, total_variation
from troll_jax.ops.losses import (
    LossInputs,
    LossOutputs,
    Minibatch,
    Objective,
    importance_weighted,
    ppo_clip,
    token_ratio,
)
from troll_jax.ops.needs import give
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.ranges import check_range, is_positive
from troll_jax.ops.segments import segment_max, segment_mean
from troll_jax.ops.support import sampled_or_not
from troll_jax.types import START, Progress

Divergence = Callable[[jax.Array, jax.Array], jax.Array]
"""Divergence [] of two distributions, from their log-probabilities [K]."""
Rule = Annotated[Callable[[LossInputs, jax.Array], jax.Array], 'progress']
"""The tokens [T] bool that are left out of a row, from the row and its advantages [T]; with a parameter `progress` it
is given that of the run."""


def masked(
    row: LossInputs,
    advantages: jax.Array,
    progress: Progress = START,
    *,
    drop: Rule,
    objective: Callable[[LossInputs, jax.Array, Progress], LossOutputs] = importance_weighted,
) -> LossOutputs:
    """loss = 0 where the rule says drop, else that of the objective, which is − r A if none is given."""
    dropped = drop(row, advantages, **give(drop, progress=progress))
    losses = objective(row, advantages, progress)
    constrained = dropped | losses.constrained
    return LossOutputs(jnp.where(dropped, 0.0, losses.loss), constrained, losses.logs | {'clipped': constrained})


def dppo(
    row: LossInputs, advantages: jax.Array, *, bound: float = 0.15, divergence: Divergence = total_variation
) -> jax.Array:
    """DPPO (arXiv 2602.04879, equation 12): drop where D(π_old ‖ π̃) > bound and r is on A's side of one.

    D is taken over the tokens that the supports list. With `bucket_tail` that is the paper's top-K approximation
    (equations 15 and 16). The paper's bounds are 0.15 or 0.2 for the total variation and 0.05 nats for the KL.
    """
    _check(bound)
    return (jax.vmap(divergence)(row.old.log_probs, row.new.log_probs) > bound) & leads_out(row, advantages)


def dppo_binary(
    row: LossInputs, advantages: jax.Array, *, bound: float = 0.15, divergence: Divergence = total_variation
) -> jax.Array:
    """DPPO's binary approximation: as `dppo`, with D of the sampled token and all others, (m, 1 − m) and (p, 1 − p).

    The total variation is |p − m|. The authors cap r, which `importance_weighted.ratio = @capped_ratio` does.
    """
    _check(bound)
    return (_binary(row, divergence) > bound) & leads_out(row, advantages)


def ipo(row: LossInputs, advantages: jax.Array, *, bound: float = 0.1) -> jax.Array:
    """IPO, the default of prime-rl (github.com/PrimeIntellect-ai/prime-rl): drop where |p − m| > bound.

    The bound was 0.1 from August 2026 on (#3418), and is 0.3 since September (#3586).
    """
    _check(bound)
    return _binary(row, total_variation) > bound


def icepop(row: LossInputs, advantages: jax.Array, *, lower: float = 0.5, upper: float = 5.0) -> jax.Array:
    """IcePop (Ring-1T, arXiv 2510.18855; on − r A arXiv 2512.16144, equation 1): drop where r ∉ [lower, upper]."""
    check_range('lower', lower, lambda x: 0 <= x <= 1, 'in [0, 1]')
    check_range('upper', upper, lambda x: x >= 1, 'at least 1')
    r = token_ratio(row.new_log_probs - row.old_log_probs, row.segments)
    return (r < lower) | (r > upper)


def kpop(row: LossInputs, advantages: jax.Array, *, bound: float = 0.1) -> jax.Array:
    """KPop (Guo et al., 2026, ringtech.notion.site/kpop): drop where KL(p ‖ m) or KL(m ‖ p) > bound, nats.

    These are of the sampled token and all others, (p, 1 − p) and (m, 1 − m).
    """
    _check(bound)
    return (_binary(row, kl_divergence) > bound) | (_binary(row, lambda m, p: kl_divergence(p, m)) > bound)


def trm(row: LossInputs, advantages: jax.Array, *, bound: float = 0.05) -> jax.Array:
    """Trust region masking (arXiv 2512.23075): drop a response if any of its tokens has KL(π_old ‖ π̃) > bound, nats.

    The KL is exact on the tokens that the supports list.
    """
    _check(bound)
    kl = jax.vmap(kl_divergence)(row.old.log_probs, row.new.log_probs)
    return segment_max(kl, row.segments) > bound


def opsm(row: LossInputs, advantages: jax.Array, *, bound: float = 0.5) -> jax.Array:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556, section 3.1), of responses with A < 0.

    Drop where the response's mean of − log r, an estimate of KL(π_old ‖ π̃), is more than the bound in nats.
    """
    _check(bound)
    return (advantages < 0) & (segment_mean(row.old_log_probs - row.new_log_probs, row.segments) > bound)


def vaco(row: LossInputs, advantages: jax.Array, *, bound: float = 0.2) -> jax.Array:
    """The filter of VACO (arXiv 2603.01365), in open-instruct's form (github.com/allenai/open-instruct).

    Drop where the response's mean of |r − 1|, an estimate of twice the total variation, is more than the bound and r is
    on A's side of one. The paper's realignment of advantages by V-trace is left out.
    """
    _check(bound)
    r = token_ratio(row.new_log_probs - row.old_log_probs, row.segments)
    return (segment_mean(jnp.abs(r - 1), row.segments) > bound) & leads_out(row, advantages)


def erc(row: LossInputs, advantages: jax.Array, *, lower: float = 0.95, upper: float = 1.05) -> jax.Array:
    """Entropy ratio clipping (arXiv 2512.05591): drop where H(π̃) / H(π_old) ∉ (lower, upper).

    Both entropies are of the listed tokens, which are the same; the paper's are of the whole vocabulary.
    """
    check_range('lower', lower, lambda x: 0 <= x < 1, 'in [0, 1)')
    check_range('upper', upper, lambda x: x > 1, 'more than 1')
    new, old = (jax.vmap(entropy)(x.log_probs) + 1e-8 for x in (row.new, row.old))  # the authors' 1e-8
    return (new <= lower * old) | (new >= upper * old)


def shuffled(
    row: LossInputs, advantages: jax.Array, progress: Progress = START, *, of: Objective = ppo_clip
) -> jax.Array:
    """A control: drop as many tokens of a response as the objective `of` constrains there, but random ones.

    Not for an `of` that needs the whole minibatch. Which ones is a function of the update and of a token's place in the
    row alone.
    """
    constrained = of(row, advantages, progress).constrained
    draw = jax.random.uniform(jax.random.fold_in(jax.random.key(0), progress.updates), constrained.shape)
    # Both orders go response by response: the constrained tokens of one are dealt out among its own.
    in_order, at_random = jnp.argsort(row.segments), jnp.lexsort((draw, row.segments))
    return jnp.zeros_like(constrained).at[at_random].set(constrained[in_order])


def leads_out(row: LossInputs | Minibatch, advantages: jax.Array) -> jax.Array:
    """Bool: the ratio is on A's side of one."""
    return advantages * (row.new_log_probs - row.old_log_probs) > 0


def _binary(row: LossInputs, divergence: Divergence) -> jax.Array:
    """The divergence [T] of π_old and π̃, each as the sampled token and all others."""
    of_token = lambda old, new: divergence(sampled_or_not(old), sampled_or_not(new))
    return jax.vmap(of_token)(row.old_log_probs, row.new_log_probs)


def _check(bound: float) -> None:
    check_range('bound', bound, is_positive, 'positive')
