"""Bounds that change during a run: where they start and end, and that they depend on its progress alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.schedules import adaptive_bound, bound_at, linear_bound
from troll_jax.types import START, Progress


def test_a_number_stays_as_it_is():
    """Guards a bound that is known when a program is traced: only then is a bad one refused with a message."""
    assert bound_at(0.05, Progress(step=jnp.int32(3))) == 0.05
    assert isinstance(bound_at(0.05, START), float)


@pytest.mark.parametrize(('step', 'expected'), [(0, 0.2), (3, 0.155), (5, 0.125), (10, 0.05), (11, 0.05), (1000, 0.05)])
def test_linear_bound(step, expected):
    """Guards both ends, the middle, and what comes after the end; integer division would stay at the start."""
    schedule = functools.partial(linear_bound, start=0.2, end=0.05, steps=10)
    for given in (step, jnp.int32(step)):
        np.testing.assert_allclose(schedule(Progress(step=given)), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(Progress(step=jnp.int32(step))), expected, rtol=1e-6)


adaptive = functools.partial(adaptive_bound, start=0.05, target=0.1, gain=0.05, range=10.0)


def after(*shares) -> Progress:
    """Progress after updates that projected these shares of their tokens."""
    return Progress(updates=jnp.int32(len(shares)), projected=jnp.float32(sum(shares)))


def test_adaptive_bound_follows_the_share():
    """Guards the sign: more projected tokens than wanted widen the region, fewer tighten it, the target keeps it."""
    np.testing.assert_allclose(adaptive(START), 0.05, rtol=1e-6)
    np.testing.assert_allclose(adaptive(after(0.1, 0.1, 0.1)), 0.05, rtol=1e-5)
    np.testing.assert_allclose(adaptive(after(0.2)), 0.05 * np.exp(0.05), rtol=1e-5)
    np.testing.assert_allclose(adaptive(after(0.0)), 0.05 * np.exp(-0.05), rtol=1e-5)
    wider = [adaptive(after(*[0.3] * n)) for n in range(5)]
    assert np.all(np.diff(wider) > 0)
    tighter = [adaptive(after(*[0.02] * n)) for n in range(5)]
    assert np.all(np.diff(tighter) < 0)
    np.testing.assert_allclose(adaptive(after(0.3, 0.0, 0.0)), adaptive(after(0.1, 0.1, 0.1)), rtol=1e-5)


def test_adaptive_bound_has_limits():
    """Guards a region that closes, or opens for good, in a long run that cannot meet the target."""
    np.testing.assert_allclose(adaptive(after(*[1.0] * 50)), 0.5, rtol=1e-5)
    np.testing.assert_allclose(adaptive(after(*[0.0] * 500)), 0.005, rtol=1e-5)
    assert np.isfinite(adaptive(Progress(updates=jnp.int32(10**6), projected=jnp.float32(10**6))))


@pytest.mark.parametrize(
    'schedule', [adaptive, functools.partial(linear_bound, start=0.2, end=0.05, steps=10)], ids=['adaptive', 'linear']
)
def test_schedules_depend_on_progress_alone(schedule):
    """Guards a controller that remembers: called twice, or out of order, it must give the same."""
    seen = [Progress(step=jnp.int32(n), updates=jnp.int32(4 * n), projected=jnp.float32(0.7 * n)) for n in range(4)]
    forward = [float(schedule(progress)) for progress in seen]
    assert [float(schedule(progress)) for progress in reversed(seen)] == forward[::-1]
    assert len(set(forward)) == 4 and schedule(seen[0]).dtype == jnp.float32


@pytest.mark.parametrize(
    'schedule',
    [
        functools.partial(linear_bound, start=0.1, end=-0.01, steps=5),
        functools.partial(linear_bound, start=0.1, end=0.01, steps=0),
        functools.partial(adaptive_bound, start=0.1, target=1.5),
        functools.partial(adaptive_bound, start=0.1, target=0.1, range=0.5),
    ],
)
def test_a_schedule_that_would_end_the_region_is_an_error(schedule):
    """Guards against a bound that becomes negative or NaN in the middle of a run, where nothing can be raised."""
    with pytest.raises(ValueError, match='got'):
        schedule(Progress(3, 3, 0.1))
