"""Schedules: of the trust region, functions from the progress of a run to the bound ε in nats; and of a curriculum.

They keep no state of their own, so a run that is resumed has the bound and level that it would have had.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from troll_jax.ops.ranges import check_range, is_positive
from troll_jax.types import Progress

Schedule = Callable[[Progress], jax.Array]


def bound_at(bound: float | jax.Array | Schedule, progress: Progress) -> jax.Array | float:
    """The current bound: a number as it is, a schedule at this progress."""
    return bound(progress) if callable(bound) else bound


def linear_bound(progress: Progress, *, start: float, end: float, steps: int) -> jax.Array:
    """Linear from `start` to `end` over `steps` rollout batches, constant afterwards.

    Raises:
      ValueError: a number is not positive.
    """
    _check_positive(start=start, end=end, steps=steps)
    return start + (end - start) * jnp.minimum(progress.step / steps, 1.0)


def adaptive_bound(
    progress: Progress, *, start: float, target: float, gain: float = 0.05, range: float = 100.0
) -> jax.Array:
    """Holds the share of projected tokens at a target: more of them than that widens the region, fewer tighten it.

        ε = start · exp(gain · Σ_updates (share − target) / target),

    an integral controller on log ε, within [start / range, start · range]. The sum has no such limits: after a long
    time at one of them it takes as long to come back.

    Args:
      start: ε of the first update.
      target: share of tokens to be projected, within (0, 1).
      gain: change of log ε by an update whose share is twice the target.
      range: limits ε to this factor around `start`.

    Raises:
      ValueError: a number is not positive, the target not below 1, or the range not above 1.
    """
    _check_positive(start=start, target=target, gain=gain)
    if not (target < 1 < range):
        raise ValueError(f'target is a share below 1 and range a factor above 1; got {target} and {range}')
    excess = jnp.asarray(progress.projected / target - progress.updates, jnp.float32)
    limit = jnp.log(jnp.asarray(range, jnp.float32))
    return start * jnp.exp(jnp.clip(gain * excess, -limit, limit))


def linear_level(draw: int, *, end: float, draws: int, start: float = 0.0) -> float:
    """The highest level of prompts, for `Sampling.level`: linear from `start` to `end` over `draws`, then constant.

    Raises:
      ValueError: `draws` is not positive, or the level falls.
    """
    _check_positive(draws=draws)
    if end < start:
        raise ValueError(f'linear_level goes from {start} to {end}; expected no fall, or prompts may run out')
    return start + (end - start) * min(draw / draws, 1.0)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        check_range(f'{name} of a schedule', value, is_positive, 'positive')
