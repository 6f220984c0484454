"""The projection against the theory: feasible, tight, optimal.

Everything is measured in float64 numpy, whatever the projection itself was computed in.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import (
    BOUNDS,
    DTYPES,
    INF,
    exact,
    exact_weight,
    kl,
    normalise,
    project_all,
    projected_pairs,
    restricted,
)
from scipy.optimize import brentq, minimize

import troll_jax
from experiments.benchmarks.projection import HOSTILE, hostile_pairs
from troll_jax.ops.projection import kl_divergence, project, project_sparse
from troll_jax.types import SparseLogProbs

CASES = [(2, 'float32'), (2, 'float64'), (7, 'float32'), (67, 'float32'), (67, 'float64'), (1009, 'float32')]


LARGE = 151_936, (1e-3, 0.05)  # the vocabulary of Qwen3, and bounds


@pytest.fixture(params=CASES, ids=lambda case: f'{case[0]}-{case[1]}')
def cases(request):
    return projected_pairs(*request.param)


def test_result_is_a_distribution_within_the_bound(cases):
    """Guards the promise itself: a solver that stops at the infeasible end, or loses small KLs to rounding."""
    for name, bound, new, old, result in cases:
        label = name, bound
        slack = 1e-5 if new.dtype == np.float32 else 1e-9
        assert not np.isnan(result.log_probs).any(), label
        assert abs(np.exp(result.log_probs.astype(np.float64)).sum() - 1) < 1e-5, label
        assert kl(result.log_probs, old) <= bound * (1 + slack), label
        assert result.kl <= bound * (1 + slack), label
        assert np.all(result.log_probs[old == -INF] == -INF) or not result.violated, label
        assert result.converged and 0 <= result.weight <= 1, label


def test_bound_is_reached_wherever_the_input_violates_it(cases):
    """Guards against a solver that is feasible because it gives up early.

    The one exception: π̃ has mass where π_old has none, and what is left of it is within the region. Then nothing has
    to be given up but that mass: w = 1, and π is π̃ restricted to the support of π_old.
    """
    for name, bound, new, old, result in cases:
        label = name, bound
        if kl(new, old) <= bound:
            continue
        if np.all((new == -INF) | (old == -INF)):  # no support in common: nothing of π̃ can be kept
            np.testing.assert_allclose(result.log_probs, old, atol=1e-6, err_msg=str(label))
        elif kl(restricted(new, old), old) <= bound:
            assert result.weight == 1 and result.violated, label
            np.testing.assert_allclose(result.log_probs, restricted(new, old), rtol=1e-5, err_msg=str(label))
        else:
            assert result.violated and result.weight < 1, label
            assert kl(result.log_probs, old) >= bound * (1 - 1e-3), label
            np.testing.assert_allclose(result.kl, kl(result.log_probs, old), rtol=1e-3, err_msg=str(label))


def test_inside_the_region_nothing_changes(cases):
    """Guards the identity, to the bit: against normalising again, or searching where nothing is to be found."""
    seen = 0
    for name, bound, new, old, result in cases:
        if kl(new, old) < bound * (1 - 1e-5):
            seen += 1
            np.testing.assert_array_equal(result.log_probs, new, err_msg=name)
            assert not result.violated and result.weight == 1 and result.evaluations == 1, (name, bound)
    assert seen >= 3 * len(BOUNDS)


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_large_vocabulary_keeps_the_promise(dtype):
    """Guards sums over 151,936 entries: small divergences of nearly equal tails must not drown in their rounding."""
    size, bounds = LARGE
    slack = 1e-5 if dtype == 'float32' else 1e-9
    reached = 0
    for name, bound, new, old, result in projected_pairs(size, dtype, bounds):
        label = name, bound
        got = kl(result.log_probs, old)
        assert result.converged and result.evaluations <= 16, label
        assert not np.isnan(result.log_probs).any(), label
        assert abs(np.exp(result.log_probs.astype(np.float64)).sum() - 1) < 1e-5, label
        if kl(new, old) <= bound * (1 - 1e-5):
            np.testing.assert_array_equal(result.log_probs, new, err_msg=str(label))
        else:
            assert result.violated and got <= bound * (1 + slack), label
        if 0 < result.weight < 1:
            reached += 1
            assert got >= bound * (1 - 1e-3), label
    assert reached >= 30


def test_few_evaluations_are_enough(cases):
    """Guards the speed of convergence: bisection would need dozens."""
    for name, bound, _, _, result in cases:
        assert 1 <= result.evaluations <= 16, (name, bound, result.evaluations)


@pytest.mark.parametrize('family', HOSTILE)
def test_hostile_pairs_need_few_evaluations(family):
    """Guards against steps that creep or jump to and fro, which pairs that are far apart provoke; and zeros."""
    seen = 0
    for size in (2, 16, 512):
        new, old, bounds = (
            x.astype(np.float32) for x in hostile_pairs(family, np.random.default_rng(size), 1000, size)
        )
        result = jax.tree.map(np.asarray, project_pairs(new, old, bounds))
        assert result.converged.all() and result.evaluations.max() <= 16
        moved = result.violated & (result.weight < 1)
        seen += moved.sum()
        ratio = result.kl[moved] / bounds[moved]
        assert ratio.min() >= 1 - 1e-3 and ratio.max() <= 1
    assert seen > 300


@jax.jit
@jax.vmap
def project_pairs(new, old, bound):
    return project(new, old, bound=bound)


@pytest.mark.parametrize('dtype', DTYPES)
def test_no_search_is_longer_than_proved(dtype):
    """Guards theorem 3 of docs/projection.md: that the search ends by its own rules, however slow κ is made.

    A single rare token makes κ a step that is as steep as π_old allows, far from where the search begins.
    """
    tolerance = 2e-4 if dtype == 'float32' else 2e-12
    rare = -np.linspace(5, 100, 20)
    old = np.stack([normalise([x, 0.0, -1.0]) for x in rare])
    new = np.stack([normalise([0.0, -60.0, -50.0]) for _ in rare])
    bounds = np.geomspace(1e-6, 5, 20)
    with jax.enable_x64(dtype == 'float64'):
        result = project_all(new.astype(dtype), old.astype(dtype), bounds.astype(dtype), max_evaluations=None)
        flat = project(*(jnp.asarray(x, dtype) for x in ([-49.063, 0.0], [-10.278, -3.4377e-5])), bound=3.43766e-5)
        broken = project(jnp.log(jnp.full(3, 1 / 3, dtype)), jnp.full(3, np.nan, dtype), bound=0.05)
    assert flat.converged and flat.evaluations <= 20, 'κ is flat at the target'
    assert not broken.converged and broken.evaluations <= 2, 'a NaN must not hold up the others'
    spread = np.ptp(new - old, axis=-1)[:, None]
    kappa = np.array([kl(*pair) for pair in zip(new, old, strict=True)])[:, None]
    target = bounds * (1 - 2.5 * tolerance)
    widths = np.log(spread / np.sqrt(2 * target)) * (2 - old.min(-1)[:, None]) / tolerance
    proved = 2 * np.ceil(np.log2(widths)) + 2 * np.ceil(np.log2(np.log(kappa / target) / tolerance))
    outside = kappa > bounds
    assert result.converged.all() and outside.sum() > 300
    assert np.all(result.evaluations[outside] <= proved[outside])


def test_too_few_evaluations_are_reported_and_harmless():
    """Guards the feasible end: what is returned unconverged must not be the last point tried, which may be outside."""
    cases = projected_pairs(7, 'float32')
    new, old = (np.stack([case[i] for case in cases[:: len(BOUNDS)]]) for i in (2, 3))
    for limit in (1, 3):
        results = jax.tree.map(np.asarray, project_all(new, old, np.float32(BOUNDS), max_evaluations=limit))
        for k, (name, bound, _, old_log_probs, complete) in enumerate(cases):
            at = divmod(k, len(BOUNDS))
            result = jax.tree.map(lambda x, at=at: x[at], results)
            assert result.evaluations <= limit
            assert result.converged == (complete.evaluations <= limit), (name, bound)
            assert not result.violated or kl(result.log_probs, old_log_probs) <= bound * (1 + 1e-5), (name, bound)
        assert not results.converged.all()


def test_equals_an_independent_solution(cases):
    """Guards the root itself, not only its KL: the family π_old · exp(w d) and the weight in it."""
    checked = 0
    for name, bound, new, old, result in cases:
        new, old, dtype = new.astype(np.float64), old.astype(np.float64), new.dtype
        if np.any((new == -INF) & (old > -INF)):
            continue
        checked += 1
        weight = exact_weight(new, old, bound)
        expected = exact(new, old, bound, weight)
        # π ends under the bound by at most 7e-4 of it, and log w moves by at most that over the slope of log κ.
        tolerance = 1e-3 if dtype == np.float32 else 1e-8
        assert np.abs(np.exp(result.log_probs) - np.exp(expected)).max() <= tolerance, (name, bound)
        np.testing.assert_allclose(result.weight, weight, rtol=2 * tolerance, err_msg=name)
    assert checked > 100


@pytest.mark.parametrize('dtype', DTYPES)
def test_mass_that_cannot_be_given_up_stays_as_it_was(dtype):
    """Guards π̃ = 0 where π_old is not, when −log π_old(S) > ε for the support S of π̃: not all of that mass may go.

    The limit of the problem for π̃ → 0 there: π_old on S and π_old off S, in the proportion that meets the bound.
    """
    old = normalise([0.0, 1.0, 8.0, 7.0, 6.0])
    new = np.array([np.log(0.3), np.log(0.7), -INF, -INF, -INF])
    bounds = 1e-4, 0.05, 2.0
    on = new > -INF
    mass = np.exp(old[on]).sum()
    with jax.enable_x64(dtype == 'float64'):
        results = project_all(new[None].astype(dtype), old[None].astype(dtype), np.asarray(bounds, dtype))
    assert np.all(results.violated) and np.all(results.converged)
    for j, bound in enumerate(bounds):
        assert -np.log(mass) > bound
        excess = lambda x, bound=bound: x * np.log(x / mass) + (1 - x) * np.log((1 - x) / (1 - mass)) - bound
        share = brentq(excess, mass, 1 - 1e-12, xtol=1e-15)
        expected = old + np.where(on, np.log(share / mass), np.log((1 - share) / (1 - mass)))
        np.testing.assert_allclose(results.log_probs[0, j], expected, atol=2e-3 if dtype == 'float32' else 1e-4)


def test_no_feasible_distribution_is_closer():
    """Guards the problem that is solved: KL(π ‖ π̃) is minimised, not KL(π̃ ‖ π); by a solver that knows no family."""
    for seed, bound in enumerate((0.01, 0.05, 0.25, 1e-3)):
        rng = np.random.default_rng(seed)
        new, old = normalise(1.5 * rng.normal(size=7)), normalise(1.5 * rng.normal(size=7))
        constraints = [
            {'type': 'eq', 'fun': lambda p: p.sum() - 1},
            {'type': 'ineq', 'fun': lambda p, old=old, bound=bound: bound - np.sum(p * (np.log(p) - old))},
        ]
        best = minimize(
            lambda p, new=new: np.sum(p * (np.log(p) - new)),
            np.exp(old),
            jac=lambda p, new=new: np.log(p) - new + 1,  # with differences it may end without a step that it trusts
            bounds=[(1e-9, 1)] * 7,
            constraints=constraints,
            options={'ftol': 1e-14, 'maxiter': 300},
        )
        assert best.success, best.message
        with jax.enable_x64(True):
            result = solution(new, old, bound)
        assert result.violated
        np.testing.assert_allclose(np.exp(result.log_probs), best.x, atol=1e-7)
        np.testing.assert_allclose(kl(result.log_probs, new), best.fun, rtol=1e-10)


@jax.jit
def solution(new, old, bound):
    return project(new, old, bound=bound)


scores = st.lists(
    st.tuples(*[st.one_of(st.floats(-40, 40, width=32), st.just(-INF))] * 2), min_size=11, max_size=11
).map(lambda rows: np.array(rows, np.float64).T)


@settings(max_examples=150, deadline=None)
@given(scores, st.floats(1e-4, 2.0))
def test_any_pair(scores, bound):
    """Guards the cases that nobody thought of: feasible, tight or the identity, for any scores with any zeros."""
    if np.any(np.all(scores == -INF, axis=1)):
        return
    new, old = (normalise(row).astype(np.float32) for row in scores)
    bound = np.float32(bound)
    result = jax.tree.map(lambda x: np.asarray(x)[0, 0], project_all(new[None], old[None], bound[None]))
    assert not np.isnan(result.log_probs).any()
    assert kl(result.log_probs, old) <= bound * (1 + 1e-5) or not result.violated
    assert result.converged and result.evaluations <= 24
    divergence, shared = kl(new, old), (new > -INF) & (old > -INF)
    if divergence <= bound * (1 - 1e-4):
        np.testing.assert_array_equal(result.log_probs, new)
    elif divergence > bound * (1 + 1e-4):
        assert result.violated
        if shared.any() and kl(restricted(new, old), old) > bound * (1 + 1e-4):
            assert kl(result.log_probs, old) >= bound * (1 - 1e-3)


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_equals_float64_and_is_never_negative():
    """Guards small KLs of a truncated support, which a plain Σ p log(p/q) makes negative."""
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1e-4, 1e-2, 1.0, 10.0):
        p = normalise(rng.normal(size=97)) - 0.01
        q = p + scale * rng.normal(size=97)
        p32, q32 = np.float32(p), np.float32(q)
        got = kl_divergence(jnp.asarray(p32), jnp.asarray(q32))
        p, q = p32.astype(np.float64), q32.astype(np.float64)
        np.testing.assert_allclose(got, np.sum(np.exp(p) * (p - q) - np.exp(p) + np.exp(q)), rtol=1e-4, atol=1e-12)
        assert got >= 0
    assert kl_divergence(jnp.asarray(p32), jnp.asarray(p32)) == 0


def test_divergence_with_zeros():
    """Guards 0 · log 0, padding in both, and the infinity that mass without counterpart must give."""
    p, q = jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0])), jnp.log(jnp.array([0.25, 0.5, 0.25, 0.0]))
    np.testing.assert_allclose(kl_divergence(p, q), np.log(2) / 2, rtol=1e-6)
    assert kl_divergence(q, p) == INF
    gradient = jax.jit(jax.grad(kl_divergence))(p, q)
    np.testing.assert_allclose(gradient, [0.5 * np.log(2), 0, 0, 0], atol=1e-7)


def test_gradient_of_divergence():
    """Guards its two formulas, near p = q and far: with respect to log p it is p log(p/q), of log q it is q − p."""
    rng = np.random.default_rng(1)
    p = normalise(rng.normal(size=7))
    q = normalise(p + rng.normal(size=7) * np.array([1e-3, 1e-3, 0.1, 0.5, 2, 2, 5]))
    with jax.enable_x64(True):
        by_p, by_q = jax.jit(jax.grad(kl_divergence, argnums=(0, 1)))(jnp.asarray(p), jnp.asarray(q))
    np.testing.assert_allclose(by_p, np.exp(p) * (p - q), atol=1e-12)
    np.testing.assert_allclose(by_q, np.exp(q) - np.exp(p), atol=1e-12)


def test_bad_inputs_are_refused():
    """Guards messages that say what was got and what would do; a bound of zero is the most likely of all mistakes."""
    x = jnp.log(jnp.full(3, 1 / 3))
    with pytest.raises(ValueError, match=r'got \(2, 3\).*vmap'):
        project(jnp.stack([x, x]), jnp.stack([x, x]), bound=0.05)
    with pytest.raises(ValueError, match=r'got \(3,\) and \(2,\)'):
        project(x, x[:2], bound=0.05)
    with pytest.raises(ValueError, match='float32 and bfloat16'):
        project(x, x.astype(jnp.bfloat16), bound=0.05)
    for bound in (0, -0.1, float('nan')):
        with pytest.raises(ValueError, match='must be positive'):
            project(x, x, bound=bound)


def test_public_names():
    """Guards the names that notebooks use."""
    assert troll_jax.project is project and troll_jax.project_sparse is project_sparse
    assert troll_jax.SparseLogProbs is SparseLogProbs and troll_jax.kl_divergence is kl_divergence
    assert 'sparsify' in dir(troll_jax)


@pytest.mark.parametrize('bound', [-0.1, np.nan])
def test_a_bound_that_is_no_bound_gives_the_old_distribution(bound):
    """Guards a traced bound, which cannot be checked: the region must not be switched off without a sign."""
    new, old = (jax.nn.log_softmax(jax.random.normal(jax.random.key(i), (7,))) for i in range(2))
    result = jax.jit(lambda bound: project(new, old, bound=bound))(jnp.float32(bound))
    assert result.violated and not result.converged
    np.testing.assert_allclose(result.log_probs, old, atol=1e-5)
