"""The projection against the theory: feasible, tight, optimal, and differentiable by the closed form.

Everything is measured in float64 numpy, whatever the projection itself was computed in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.special import logsumexp

import troll_jax
from troll_jax.ops.projection import kl_divergence, project, project_sparse
from troll_jax.types import SparseLogProbs

INF = np.inf
BOUNDS = (1e-4, 1e-3, 1e-2, 0.05, 0.25, 1.0, 2.0)
DTYPES = ('float32', 'float64')
CASES = [(2, 'float32'), (2, 'float64'), (7, 'float32'), (67, 'float32'), (67, 'float64'), (1009, 'float32')]


def normalise(scores) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    return scores - logsumexp(scores)


def kl(log_p, log_q) -> float:
    """KL(p ‖ q) in nats, of the distributions that two lists of log-probabilities stand for."""
    p, q = normalise(log_p), normalise(log_q)
    on = p > -INF
    return np.sum(np.exp(p[on]) * (p[on] - q[on]))


def peak(size: int, at: int, height: float) -> np.ndarray:
    scores = np.zeros(size)
    scores[at] = height
    return normalise(scores)


def zeroed(log_probs, where) -> np.ndarray:
    scores = np.array(log_probs)
    scores[where] = -INF
    return normalise(scores)


def pairs(size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs (log π̃, log π_old) [V], each hard for its own reason."""
    rng = np.random.default_rng(size)
    normal = lambda scale=1.0: normalise(scale * rng.normal(size=size))
    base, uniform = normal(2), np.full(size, -np.log(size))
    families = {
        'equal': (base, base),
        'nearly equal': (normalise(base + 1e-3 * rng.normal(size=size)), base),
        'close': (normalise(base + 3e-2 * rng.normal(size=size)), base),
        'unrelated': (normal(2), base),
        'ties': (uniform, normalise(np.arange(size) < size / 2)),
        'masses of 1e-12': (peak(size, 0, np.log(1e12)), peak(size, size - 1, np.log(1e12))),
    }
    for height in (10, 40, 80):
        families[f'opposite peaks {height}'] = peak(size, 0, height), peak(size, size - 1, height)
        families[f'peak {height} from uniform'] = peak(size, 0, height), uniform
        families[f'uniform from peak {height}'] = uniform, peak(size, 0, height)
    zipf = -3 * np.log(np.arange(1, size + 1))
    families['like a language model'] = normalise(zipf + normal()), normalise(zipf + normal())
    families['like a language model, close'] = normalise(zipf + 0.1 * normal()), normalise(zipf)
    far = np.full(size, -30.0)
    far[0] = 0
    families['far modes'] = normalise(far), normalise(far[::-1])
    one_hot = np.where(np.arange(size) == 1, 0.0, -INF)
    even, odd = np.arange(size) % 2 == 0, np.arange(size) % 2 == 1
    families['new has zeros'] = zeroed(normal(), even), normal()
    families['old has zeros'] = normal(), zeroed(normal(), even)
    families['disjoint'] = zeroed(normal(), even), zeroed(normal(), odd)
    # KL(π ‖ π_old) = −log π_old(support of π̃) ≈ 12 at least for any π on the support of π̃.
    families['one-hot where old has little'] = one_hot, peak(size, 0, 12)
    families['old is one-hot'] = peak(size, 0, 12), one_hot
    if size > 2:
        both = zeroed(normal(), [0])
        families['zeros in common'] = zeroed(normal(), [0]), both
        families['zeros on either side'] = zeroed(both, [1]), zeroed(both, [size - 1])
    return families


def restricted(log_probs, old_log_probs) -> np.ndarray:
    """π̃ on the support of π_old."""
    return zeroed(log_probs, old_log_probs == -INF)


@functools.partial(jax.jit, static_argnames='max_evaluations')
def project_all(log_probs, old_log_probs, bounds, max_evaluations=32):
    """Pairs [M, V] by bounds [E]."""
    one = functools.partial(project, max_evaluations=max_evaluations)
    by_bound = jax.vmap(lambda new, old, bound: one(new, old, bound=bound), (None, None, 0))
    return jax.vmap(by_bound, (0, 0, None))(log_probs, old_log_probs, bounds)


@functools.cache
def projected_pairs(size: int, dtype: str):
    """All families × bounds: (name, bound, new, old, Projection), the inputs in the dtype they were projected in."""
    families = pairs(size)
    with jax.enable_x64(dtype == 'float64'):
        new, old = (np.stack([pair[i] for pair in families.values()]).astype(dtype) for i in (0, 1))
        results = jax.tree.map(np.asarray, project_all(new, old, np.asarray(BOUNDS, dtype)))
    return [
        (name, bound, new[i], old[i], jax.tree.map(lambda x, i=i, j=j: x[i, j], results))
        for i, name in enumerate(families)
        for j, bound in enumerate(BOUNDS)
    ]


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


def test_few_evaluations_are_enough(cases):
    """Guards the speed of convergence: bisection would need dozens."""
    for name, bound, _, _, result in cases:
        assert 1 <= result.evaluations <= 16, (name, bound, result.evaluations)


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


def exact_weight(new, old, bound) -> float:
    """w by bracketing, in float64: the definition of κ and nothing else."""
    on = old > -INF

    def excess(log_w):
        return kl(old[on] + np.exp(log_w) * (new[on] - old[on]), old[on]) - bound

    return 1.0 if excess(0.0) <= 0 else np.exp(brentq(excess, -40.0, 0.0, xtol=1e-15, rtol=1e-15, maxiter=300))


def exact(new, old, bound, weight=None) -> np.ndarray:
    """log π by bracketing, for π̃ without zeros inside the support of π_old."""
    weight = exact_weight(new, old, bound) if weight is None else weight
    on = old > -INF
    return normalise(np.where(on, old + weight * (np.where(on, new, 0.0) - np.where(on, old, 0.0)), -INF))


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
            bounds=[(1e-9, 1)] * 7,
            constraints=constraints,
            options={'ftol': 1e-14, 'maxiter': 300},
        )
        assert best.success, best.message
        with jax.enable_x64(True):
            result = solution(new, old, bound)
        assert result.violated
        np.testing.assert_allclose(np.exp(result.log_probs), best.x, atol=2e-5)
        np.testing.assert_allclose(kl(result.log_probs, new), best.fun, rtol=1e-6)


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


# --- the derivative ---------------------------------------------------------------------------------------------------


def of_scores(new_scores, old_scores, bound):
    """The projection of unnormalised inputs: every direction of an input is one in which distributions can move."""
    return project(jax.nn.log_softmax(new_scores), jax.nn.log_softmax(old_scores), bound=bound)


def smooth_pairs() -> list[tuple[str, np.ndarray, np.ndarray, float]]:
    rng = np.random.default_rng(3)
    normal = lambda scale=1.0: normalise(scale * rng.normal(size=7))
    return [
        ('outside', normal(), normal(), 0.05),
        ('far outside', normal(4), normal(4), 0.01),
        ('small bound', normal(), normal(), 1e-4),
        ('large bound', normal(3), normal(3), 1.0),
        ('peaks', peak(7, 0, 9.0), peak(7, 4, 9.0), 0.05),
        ('inside', base := normal(), normalise(base + 0.01 * rng.normal(size=7)), 0.05),
    ]


def central(function, x, step):
    """Jacobian of a numpy function by central differences, output first."""
    x = np.atleast_1d(np.asarray(x, np.float64))
    columns = []
    for i in range(x.size):
        change = np.zeros_like(x)
        change[i] = step
        columns.append((function(x + change) - function(x - change)) / (2 * step))
    return np.stack(columns, axis=-1)


def float_outputs(new_scores, old_scores, bound):
    result = of_scores(new_scores, old_scores, bound)
    return result.log_probs, result.weight, result.kl


jacobians_forward = jax.jit(jax.vmap(jax.jacfwd(float_outputs, argnums=(0, 1, 2))))
jacobians_reverse = jax.jit(jax.vmap(jax.jacrev(float_outputs, argnums=(0, 1, 2))))
jacobians_of_one = jax.jit(jax.jacrev(float_outputs, argnums=(0, 1, 2)))


@functools.cache
def stacked_pairs():
    """Inputs of `float_outputs`: [M, V], [M, V], [M]."""
    return tuple(np.stack(x) for x in list(zip(*smooth_pairs(), strict=True))[1:])


@pytest.mark.parametrize('jacobians', [jacobians_forward, jacobians_reverse], ids=['forward', 'reverse'])
def test_jacobians_equal_central_differences(jacobians):
    """Guards the implicit function theorem in all three arguments, in forward and reverse mode, under jit and vmap.

    The differences are those of the independent solution, so that no error of the solver can cancel. kl stays at the
    bound outside: no direction of the policies changes it, and the bound changes it by one.
    """

    def reference(new, old, bound):
        new, old = normalise(new), normalise(old)
        weight = exact_weight(new, old, bound)
        log_probs = exact(new, old, bound, weight)
        return np.concatenate([log_probs, [weight, kl(log_probs, old)]])

    with jax.enable_x64(True):
        got = jax.tree.map(np.asarray, jacobians(*stacked_pairs()))
    step = 1e-5
    for i, (name, new, old, bound) in enumerate(smooth_pairs()):
        expected = (
            central(lambda x, y=old, e=bound: reference(x, y, e), new, step),
            central(lambda y, x=new, e=bound: reference(x, y, e), old, step),
            central(lambda e, x=new, y=old: reference(x, y, e[0]), bound, step * bound)[:, 0],
        )
        for argument in range(3):
            for output, rows in zip(got, (slice(0, 7), 7, 8), strict=True):
                np.testing.assert_allclose(
                    output[argument][i], expected[argument][rows], atol=1e-6, rtol=1e-6, err_msg=f'{name} {argument}'
                )


def test_derivative_equals_the_closed_form():
    """Guards the formulas: dw/dd_i = −w π_i (d_i − μ)/σ², δ log π = w [δd − E δd − (d − μ) Cov(d, δd)/σ²]."""
    direction = np.random.default_rng(5).normal(size=7)
    with jax.enable_x64(True):
        result = jax.tree.map(np.asarray, jax.jit(jax.vmap(of_scores))(*stacked_pairs()))
        jacobian = jax.tree.map(np.asarray, jacobians_forward(*stacked_pairs()))
    for i, (name, new, old, _) in enumerate(smooth_pairs()):
        by_new, weight_by_new = jacobian[0][0][i], jacobian[1][0][i]
        w, p, d = result.weight[i], np.exp(result.log_probs[i]), new - old
        centred = direction - np.sum(p * direction)
        mean = np.sum(p * d)
        if name == 'inside':
            np.testing.assert_allclose(by_new @ direction, centred, atol=1e-12)
            assert np.all(weight_by_new == 0)
            continue
        variance = np.sum(p * (d - mean) ** 2)
        np.testing.assert_allclose(weight_by_new, -w * p * (d - mean) / variance, rtol=1e-6, err_msg=name)
        expected = w * (centred - (d - mean) * np.sum(p * (d - mean) * direction) / variance)
        np.testing.assert_allclose(by_new @ direction, expected, atol=1e-9, err_msg=name)


def test_derivative_under_vmap_equals_one_at_a_time():
    """Guards the batching of the custom rule: a solver that stops for all rows when one has converged."""
    with jax.enable_x64(True):
        batched = jax.tree.map(np.asarray, jacobians_reverse(*stacked_pairs()))
        for i, (_, new, old, bound) in enumerate(smooth_pairs()):
            one = jacobians_of_one(new, old, np.float64(bound))
            jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-9), batched, one)


@functools.partial(jax.jit, static_argnames='max_evaluations')
def gradients_all(log_probs, old_log_probs, bounds, coefficients, max_evaluations=32):
    """Gradients of a linear function of log π on its support, pairs [M, V] by bounds [E]."""

    def value(new, old, bound):
        log_probs = project(new, old, bound=bound, max_evaluations=max_evaluations).log_probs
        return jnp.sum(jnp.where(log_probs > -INF, log_probs, 0.0) * coefficients)

    by_bound = jax.vmap(jax.grad(value, argnums=(0, 1, 2)), (None, None, 0))
    return jax.vmap(by_bound, (0, 0, None))(log_probs, old_log_probs, bounds)


@pytest.mark.parametrize('max_evaluations', [32, 2])
def test_gradients_are_finite_for_hard_inputs(max_evaluations):
    """Guards 0/0 where the variance vanishes (one-hot inputs, equal inputs) and inf − inf; entries of −inf get zero."""
    families = pairs(7)
    # What is inside up to rounding, and exactly at the bound.
    new, old = (np.stack([pair[i] for pair in families.values()]).astype(np.float32) for i in (0, 1))
    bounds = np.array([*BOUNDS, kl(*families['close']), np.nextafter(kl(*families['close']), 0)], np.float32)
    gradients = gradients_all(new, old, bounds, np.linspace(-1, 1, 7, dtype=np.float32), max_evaluations)
    by_new, by_old, by_bound = (np.asarray(x) for x in gradients)
    for i, name in enumerate(families):
        assert np.isfinite(by_new[i]).all() and np.isfinite(by_old[i]).all() and np.isfinite(by_bound[i]).all(), name
        assert np.all(by_new[i][:, new[i] == -INF] == 0), name
        assert np.all(by_old[i][:, old[i] == -INF] == 0), name
    assert np.any(by_bound != 0) or max_evaluations == 2


def test_weight_of_one_that_the_bound_does_not_hold():
    """Guards the derivative where π_old has no mass on a part of π̃ and the rest is inside: w = 1 does not move."""
    new = normalise([0.1, 0.2, 0.0, 0.5, 0.3, 0.0, -0.2])
    old = zeroed(normalise([0.0, 0.3, 0.1, 0.9, 0.3, 0.1, 0.0]), [3, 6])
    on = old > -INF
    expected = central(lambda x: normalise(np.where(on, x, -INF))[on], new, 1e-6)
    with jax.enable_x64(True):
        (by_new, _, by_bound), (weight_by_new, *_), _ = jacobians_of_one(new, old, np.float64(0.5))
    by_new, by_bound, weight_by_new = (np.asarray(x) for x in (by_new, by_bound, weight_by_new))
    np.testing.assert_allclose(by_new[on], expected, atol=1e-8)
    assert np.all(by_bound == 0) and np.all(weight_by_new == 0)


def primitives(jaxpr) -> list[str]:
    """Names of all primitives of a jaxpr, those inside of others included."""
    names = []
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        names.append(equation.primitive.name)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                names += primitives(value)
    return names


def is_jaxpr(value) -> bool:
    return hasattr(getattr(value, 'jaxpr', value), 'eqns')


@pytest.mark.parametrize('transform', [jax.grad, jax.jacfwd])
def test_the_solver_is_not_differentiated(transform):
    """Guards memory and exactness: one loop in the derivative's program, the solver's own, and nothing unrolled."""
    old = jnp.log(jnp.array([0.2, 0.3, 0.5]))

    def names(max_evaluations):
        value = lambda x: project(jax.nn.log_softmax(x), old, bound=0.05, max_evaluations=max_evaluations).log_probs[0]
        return primitives(jax.make_jaxpr(transform(value))(jnp.array([1.0, 0.0, 2.0])))

    few, many = names(8), names(64)
    assert few == many
    assert many.count('while') == 1 and 'scan' not in many


# --- sparse -----------------------------------------------------------------------------------------------------------


def sparse(log_probs) -> SparseLogProbs:
    return SparseLogProbs(jnp.arange(len(log_probs), dtype=jnp.int32), jnp.asarray(log_probs, jnp.float32))


@jax.jit
def sparse_solution(new, old, bound):
    return project_sparse(new, old, bound=bound)


def test_whole_vocabulary_kept_equals_dense():
    """Guards K = V: what is sparse must be the oracle when nothing is left out."""
    for name, bound, new, old, dense in projected_pairs(7, 'float32'):
        result = sparse_solution(sparse(new), sparse(old), bound)
        np.testing.assert_allclose(np.exp(result.log_probs), np.exp(dense.log_probs), atol=1e-5, err_msg=name)
        assert result.violated == dense.violated, name


def truncated():
    """A pair of which 5 of 11 tokens are kept; outside of the region on those."""
    rng = np.random.default_rng(11)
    new, old = (normalise(2 * rng.normal(size=11)) for _ in range(2))
    return new, old, np.array([2, 10, 5, 7, 3])


def test_result_keeps_the_mass_of_the_support():
    """Guards the normalisation: on the support, π is the projected conditional times π̃(S)."""
    new, old, kept = truncated()
    result = sparse_solution(sparse(new[kept]), sparse(old[kept]), 0.05)
    assert result.violated
    expected = logsumexp(new[kept]) + exact(normalise(new[kept]), normalise(old[kept]), 0.05)
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-3)
    np.testing.assert_allclose(logsumexp(result.log_probs), logsumexp(new[kept]), atol=1e-6)
    assert 0.05 * (1 - 1e-3) < kl(result.log_probs, old[kept]) < 0.05


def test_padding_does_no_harm():
    """Guards −inf in both: values and gradients of the real entries stay, those of the padding are zero."""
    new, old, kept = truncated()
    padding = np.full(3, -INF)

    def value(new_log_probs, old_log_probs):
        result = project_sparse(sparse(new_log_probs), sparse(old_log_probs), bound=0.05)
        return jnp.sum(jnp.exp(result.log_probs) * jnp.arange(len(new_log_probs))), result

    run = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))
    (by_new, by_old), plain = run(jnp.float32(new[kept]), jnp.float32(old[kept]))
    padded_inputs = (jnp.float32(np.concatenate([x[kept], padding])) for x in (new, old))
    (padded_by_new, padded_by_old), padded = run(*padded_inputs)
    np.testing.assert_allclose(padded.log_probs[:5], plain.log_probs, atol=1e-6)
    assert np.all(padded.log_probs[5:] == -INF)
    np.testing.assert_allclose(padded_by_new, np.concatenate([by_new, np.zeros(3)]), atol=1e-5)
    np.testing.assert_allclose(padded_by_old, np.concatenate([by_old, np.zeros(3)]), atol=1e-5)


def test_sparse_identity_inside():
    """Guards the identity to the bit: taking the mass out and putting it back would round."""
    new, _, kept = truncated()
    inputs = sparse(new[kept])
    shifted = sparse(new[kept] + 1e-3 * np.arange(5))
    result = sparse_solution(inputs, shifted, 0.05)
    assert not result.violated
    np.testing.assert_array_equal(result.log_probs, inputs.log_probs)


def test_renormalised_input_gives_the_form_of_the_paper():
    """Guards the two forms against each other: with π̃(S) = 1 the result is a distribution on the support."""
    new, old, kept = truncated()
    full = sparse_solution(sparse(new[kept]), sparse(old[kept]), 0.05)
    paper = sparse_solution(sparse(normalise(new[kept])), sparse(normalise(old[kept])), 0.05)
    np.testing.assert_allclose(logsumexp(paper.log_probs), 0, atol=1e-6)
    np.testing.assert_allclose(paper.log_probs, full.log_probs - logsumexp(new[kept]), atol=1e-5)


def test_gradient_reaches_tokens_that_were_not_kept():
    """Guards against a tail whose mass grows unseen: more of it must lower log π on the support, as it lowers π̃'s."""
    new, old, kept = truncated()
    tail = np.setdiff1d(np.arange(11), kept)

    def value(scores):
        log_probs = jax.nn.log_softmax(scores)[kept]
        return project_sparse(SparseLogProbs(jnp.asarray(kept), log_probs), sparse(old[kept]), bound=0.05).log_probs[1]

    gradient = jax.jit(jax.grad(value))(jnp.float32(new))
    np.testing.assert_allclose(gradient[tail], -np.exp(new[tail]), rtol=1e-4)
    assert abs(gradient.sum()) < 1e-6


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
