"""One trust region for a whole response: what its tokens share, what the bound holds, and its derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BOUNDS, INF, central, kl, normalise, pairs, project_all, restricted
from scipy.optimize import brentq, minimize

from troll_jax.ops.projection import project_sequence, project_sparse_sequence
from troll_jax.types import SparseLogProbs

LENGTH = 4
CASES = [(2, 'float64'), (7, 'float32'), (7, 'float64'), (67, 'float32')]
ALL = np.ones(LENGTH, bool)


def responses(size: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, and log π̃ and log π_old [M, T, V]: families of hard pairs, every one next to others of another kind."""
    families = list(pairs(size).items())
    rows = [[families[(i + 3 * t) % len(families)] for t in range(LENGTH)] for i in range(len(families))]
    rows += [[families[0]] * (LENGTH - 1) + [family] for family in families]  # one that moved, the others did not
    names = [', '.join(name for name, _ in row) for row in rows]
    return names, *(np.stack([[pair[side] for _, pair in row] for row in rows]) for side in (0, 1))


@jax.jit
def project_responses(log_probs, old_log_probs, mask, bounds):
    """Responses [M, T, V] by bounds [E]."""
    by_bound = jax.vmap(lambda new, old, bound: project_sequence(new, old, mask, bound=bound), (None, None, 0))
    return jax.vmap(by_bound, (0, 0, None))(log_probs, old_log_probs, bounds)


@jax.jit
def solution(log_probs, old_log_probs, mask, bound):
    return project_sequence(log_probs, old_log_probs, mask, bound=bound)


@functools.cache
def projected_responses(size: int, dtype: str):
    names, new, old = responses(size)
    with jax.enable_x64(dtype == 'float64'):
        new, old = new.astype(dtype), old.astype(dtype)
        results = jax.tree.map(np.asarray, project_responses(new, old, ALL, np.asarray(BOUNDS, dtype)))
    return [
        (name, bound, new[i], old[i], jax.tree.map(lambda x, i=i, j=j: x[i, j], results))
        for i, name in enumerate(names)
        for j, bound in enumerate(BOUNDS)
    ]


@pytest.fixture(params=CASES, ids=lambda case: f'{case[0]}-{case[1]}')
def cases(request):
    return projected_responses(*request.param)


def mean_kl(log_p, log_q) -> float:
    return np.mean([kl(p, q) for p, q in zip(log_p, log_q, strict=True)])


def mean_kl_at_one(new, old) -> float:
    """mean κ(1): what is left of each π̃ on the support of π_old; a token without common ground stays at π_old."""
    total = 0.0
    for p, q in zip(new, old, strict=True):
        total += kl(restricted(p, q), q) if np.any((p > -INF) & (q > -INF)) else 0.0
    return total / len(new)


def test_mean_divergence_is_within_the_bound_and_reaches_it(cases):
    """Guards the promise: a mean over the wrong tokens, or a region that is feasible because it gives up early."""
    reached = 0
    for name, bound, new, old, result in cases:
        label = name, bound
        slack = 1e-5 if new.dtype == np.float32 else 1e-9
        assert all(np.all(x == x[0]) for x in (result.violated, result.weight, result.converged, result.evaluations))
        got = mean_kl(result.log_probs, old) if result.violated[0] else np.mean(result.kl)
        assert not np.isnan(result.log_probs).any(), label
        np.testing.assert_allclose(np.exp(result.log_probs.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
        assert result.converged[0] and 0 <= result.weight[0] <= 1 and result.evaluations[0] <= 24, label
        assert got <= bound * (1 + slack), label
        if mean_kl_at_one(new, old) > bound * (1 + 1e-5):
            reached += 1
            assert result.violated[0] and result.weight[0] < 1, label
            assert got >= bound * (1 - 1e-3), label
            np.testing.assert_allclose(np.mean(result.kl), got, rtol=1e-3, err_msg=str(label))
    assert reached >= 100


def test_inside_the_region_nothing_changes(cases):
    """Guards the identity, to the bit, also of a token that alone would be outside."""
    seen = alone_outside = 0
    for name, bound, new, old, result in cases:
        divergences = [kl(p, q) for p, q in zip(new, old, strict=True)]
        if np.mean(divergences) < bound * (1 - 1e-5):
            seen += 1
            alone_outside += max(divergences) > bound
            np.testing.assert_array_equal(result.log_probs, new, err_msg=name)
            assert not result.violated.any() and np.all(result.weight == 1) and np.all(result.evaluations == 1), name
    assert seen >= 10 and alone_outside >= 1


def tilted(new, old, weight) -> np.ndarray:
    return normalise(old + weight * (new - old))


def exact_weight(new, old, bound) -> float:
    """The one w of a response [T, V] by bracketing the mean of κ_t(w), in float64."""
    excess = lambda x: mean_kl([tilted(p, q, np.exp(x)) for p, q in zip(new, old, strict=True)], old) - bound
    return 1.0 if excess(0.0) <= 0 else np.exp(brentq(excess, -40.0, 0.0, xtol=1e-14, rtol=1e-14))


def test_equals_an_independent_solution(cases):
    """Guards the root and that all tokens share it: π_t is π_old,t · exp(w d_t), normalised, with one w."""
    checked = 0
    for name, bound, new, old, result in cases:
        if bound not in (1e-3, 0.05, 1.0) or np.any(np.isinf(new)) or np.any(np.isinf(old)):
            continue
        checked += 1
        tolerance = 1e-3 if new.dtype == np.float32 else 1e-8
        new, old = new.astype(np.float64), old.astype(np.float64)
        weight = exact_weight(new, old, bound)
        # Where κ is flat, the same divergence leaves w more room than the probabilities.
        np.testing.assert_allclose(result.weight[0], weight, rtol=10 * tolerance, err_msg=name)
        expected = np.stack([tilted(p, q, weight) for p, q in zip(new, old, strict=True)])
        assert np.abs(np.exp(result.log_probs) - np.exp(expected)).max() <= tolerance, (name, bound)
    assert checked >= 50


def test_no_feasible_response_is_closer():
    """Guards the problem that is solved, by a solver that knows no family: a sum under a bound on a mean."""
    rng = np.random.default_rng(0)
    new, old = (np.stack([normalise(scale * rng.normal(size=4)) for scale in (0.5, 2.0)]) for _ in range(2))
    bound = 0.05
    best = minimize(
        lambda p: np.sum(p * (np.log(p) - new.ravel())),
        np.exp(old).ravel(),
        jac=lambda p: np.log(p) - new.ravel() + 1,
        bounds=[(1e-9, 1)] * 8,
        constraints=[
            {'type': 'eq', 'fun': lambda p: p.reshape(2, 4).sum(axis=1) - 1},
            {'type': 'ineq', 'fun': lambda p: bound - np.sum(p * (np.log(p) - old.ravel())) / 2},
        ],
        options={'ftol': 1e-14, 'maxiter': 300},
    )
    assert best.success, best.message
    with jax.enable_x64(True):
        result = jax.tree.map(np.asarray, solution(new, old, np.ones(2, bool), bound))
    assert result.violated.all()
    np.testing.assert_allclose(np.exp(result.log_probs).ravel(), best.x, atol=2e-5)
    # Not what a region for each token would give: one token is beyond the bound, the other within.
    assert result.kl.min() < 0.8 * bound < bound < 0.9 * result.kl.max()


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_one_token_is_the_projection_of_a_token(dtype):
    """Guards the two against each other: with T = 1 there is nothing to share."""
    new, old = (np.stack([pair[i] for pair in pairs(7).values()]).astype(dtype) for i in (0, 1))
    with jax.enable_x64(dtype == 'float64'):
        bounds = np.asarray(BOUNDS, dtype)
        one = project_all(new, old, bounds)
        response = project_responses(new[:, None], old[:, None], np.ones(1, bool), bounds)
    squeezed = jax.tree.map(lambda x: x[:, :, 0], response)
    # Where the last point but one is just within the solver's tolerance, rounding decides whether it was the last.
    np.testing.assert_allclose(squeezed.evaluations, one.evaluations, atol=1)
    same = squeezed.evaluations == one.evaluations
    assert same.mean() > 0.99
    np.testing.assert_allclose(squeezed.kl, one.kl, rtol=2e-4 if dtype == 'float32' else 1e-11)
    tolerance = 1e-6 if dtype == 'float32' else 1e-12
    for a, b in zip(squeezed, one, strict=True):
        np.testing.assert_allclose(a[same], b[same], rtol=10 * tolerance, atol=tolerance)


# --- the mask ---------------------------------------------------------------------------------------------------------


def garbage(size: int) -> np.ndarray:
    """Rows past the end of a response, [3, V]."""
    return np.stack([np.full(size, np.nan), np.full(size, -INF), np.where(np.arange(size) % 2, 7.0, INF)])


PLACES = np.array([0, 2, 3, 5])  # of the tokens, when garbage is at 1, 4 and 6


def with_garbage(real, other) -> np.ndarray:
    padded = np.empty((7, real.shape[1]), real.dtype)
    padded[PLACES], padded[[1, 4, 6]] = real, other
    return padded


def test_masked_tokens_change_nothing_and_come_back():
    """Guards sums in which NaN · 0 is NaN, a mean over the padded length, and a result that overwrites the padding."""
    names, new, old = responses(7)
    mask = np.isin(np.arange(7), PLACES)
    for i in (3, 11, 20, len(names) - 1):
        for bound in (1e-3, 0.25):
            one, other = (x[i].astype(np.float32) for x in (new, old))
            noise = garbage(7).astype(np.float32)
            expected = solution(one, other, ALL, bound)
            spoiled = with_garbage(one, noise), with_garbage(other, noise[::-1])
            got = jax.tree.map(np.asarray, solution(*spoiled, mask, bound))
            np.testing.assert_allclose(got.log_probs[PLACES], expected.log_probs, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(got.log_probs[~mask], spoiled[0][~mask])
            np.testing.assert_allclose(got.weight[PLACES], expected.weight, rtol=1e-5)
            np.testing.assert_array_equal(got.violated[PLACES], expected.violated)
            assert got.converged.all() and not got.violated[~mask].any() and np.all(got.weight[~mask] == 1)
            np.testing.assert_allclose(got.kl[PLACES], expected.kl, rtol=1e-4, atol=1e-8)
            assert np.all(got.kl[~mask] < 1e-12) and np.all(got.kl_unprojected[~mask] < 1e-12)


@jax.jit
def gradient_where_masked(new, old, mask, bound):
    def value(new, old, bound):
        log_probs = project_sequence(new, old, mask, bound=bound).log_probs
        return jnp.sum(jnp.where(mask[:, None] > 0, log_probs, 0.0) @ jnp.linspace(-1, 1, log_probs.shape[1]))

    return jax.grad(value, argnums=(0, 1, 2))(new, old, bound)


def test_masked_tokens_get_no_gradient():
    """Guards NaN from garbage in the backward pass, and tokens past the end that pull on the others."""
    rng = np.random.default_rng(4)
    new, old = (np.stack([normalise(rng.normal(size=7)) for _ in range(LENGTH)]).astype(np.float32) for _ in range(2))
    noise, bound = garbage(7).astype(np.float32), np.float32(0.05)
    mask = np.isin(np.arange(7), PLACES)
    got = gradient_where_masked(with_garbage(new, noise), with_garbage(old, noise[::-1]), mask, bound)
    expected = gradient_where_masked(new, old, ALL, bound)
    for a, b in zip(got[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a[PLACES], b, atol=1e-5)
        assert np.all(np.asarray(a)[~mask] == 0) and np.abs(b).max() > 0.01
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-4)


def test_responses_in_a_row_do_not_touch_each_other():
    """Guards packed rows: each response has the region, w and gradient that it has alone, whatever is next to it."""
    rng = np.random.default_rng(5)
    far = np.array([1.0, 1.0, 1.0, 0.01, 0.01, 3.0, 1.0])[:, None]
    old = np.stack([normalise(rng.normal(size=7)) for _ in range(7)])
    new = np.stack([normalise(row) for row in old + far * rng.normal(size=(7, 7))])
    new, old, bound = new.astype(np.float32), old.astype(np.float32), np.float32(0.05)
    segments = np.array([2, 2, 2, 1, 1, 0, 3])  # one outside, one inside, a gap, one of a single token
    together = jax.tree.map(np.asarray, solution(new, old, segments, bound))
    gradients = gradient_where_masked(new, old, segments, bound)
    for segment in (1, 2, 3):
        alone = solution(new, old, segments == segment, bound)
        at = segments == segment
        jax.tree.map(
            lambda a, b, at=at: np.testing.assert_allclose(a[at], np.asarray(b)[at], rtol=2e-5, atol=1e-7),
            together,
            alone,
        )
        expected = gradient_where_masked(new, old, at, bound)
        for a, b in zip(gradients[:2], expected[:2], strict=True):
            np.testing.assert_allclose(np.asarray(a)[at], np.asarray(b)[at], atol=1e-5)
    np.testing.assert_array_equal(together.violated, [True] * 3 + [False] * 3 + [True])
    assert len(set(together.weight[[0, 3, 6]])) == 3 and len(set(together.evaluations)) > 1


def test_a_response_without_tokens_is_harmless():
    """Guards 0/0 in the mean, forward and backward."""
    none = np.zeros(3, bool)
    noise = garbage(7).astype(np.float32)
    result = solution(noise, noise[::-1], none, 0.05)
    np.testing.assert_array_equal(result.log_probs, noise)
    assert not result.violated.any() and result.converged.all() and np.all(result.weight == 1)
    assert np.all(result.kl < 1e-12)
    for gradient in gradient_where_masked(noise, noise[::-1], none, np.float32(0.05)):
        assert np.all(gradient == 0)


# --- the derivative ---------------------------------------------------------------------------------------------------


def smooth_responses() -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray, float]]:
    """Scores [3, 4] of π̃ and π_old, a mask and a bound."""
    rng = np.random.default_rng(8)
    normal = lambda *scales: np.array(scales)[:, None] * rng.normal(size=(3, 4))
    every, some = np.ones(3, bool), np.array([True, False, True])
    base = normal(1, 1, 1)
    return [
        ('outside', normal(1, 1, 1), normal(1, 1, 1), every, 0.05),
        ('one moved, the others hardly', base + normal(2, 0.01, 0), base, every, 0.05),
        ('small bound', normal(3, 1, 0.1), normal(3, 1, 0.1), every, 1e-4),
        ('a token is masked', normal(1, 2, 1), normal(1, 1, 1), some, 0.1),
        ('inside', base + normal(0.1, 0.1, 0.1), base, every, 0.05),
    ]


def float_outputs(new_scores, old_scores, mask, bound):
    result = project_sequence(jax.nn.log_softmax(new_scores), jax.nn.log_softmax(old_scores), mask, bound=bound)
    return jnp.where(mask[:, None], result.log_probs, 0.0), result.weight, jnp.where(mask, result.kl, 0.0)


@pytest.mark.parametrize('transform', [jax.jacfwd, jax.jacrev])
def test_jacobians_equal_central_differences(transform):
    """Guards the implicit function theorem across tokens, in both policies and the bound, forward and reverse.

    The differences are those of the independent solution. One token's scores move all others through the shared w.
    """

    def reference(new, old, mask, bound):
        new, old = (np.stack([normalise(row) for row in x.reshape(3, 4)]) for x in (new, old))
        weight = exact_weight(new[mask], old[mask], bound)
        log_probs = np.stack([tilted(p, q, weight) for p, q in zip(new, old, strict=True)]) * mask[:, None]
        divergences = [kl(p, q) if m else 0.0 for p, q, m in zip(log_probs, old, mask, strict=True)]
        return np.concatenate([log_probs.ravel(), np.where(mask, weight, 1), divergences])

    names, *inputs = zip(*smooth_responses(), strict=True)
    inputs = [np.stack(x) for x in inputs]
    with jax.enable_x64(True):
        got = jax.tree.map(np.asarray, jax.jit(jax.vmap(transform(float_outputs, argnums=(0, 1, 3))))(*inputs))
    step = 1e-5
    for i, name in enumerate(names):
        new, old, mask, bound = (x[i] for x in inputs)
        expected = (
            central(lambda x, y=old, m=mask, e=bound: reference(x, y, m, e), new.ravel(), step),
            central(lambda y, x=new, m=mask, e=bound: reference(x, y, m, e), old.ravel(), step),
            central(lambda e, x=new, y=old, m=mask: reference(x, y, m, e[0]), bound, step * bound),
        )
        for argument in range(3):
            columns = np.concatenate(
                [np.reshape(output[argument][i], (size, -1)) for output, size in zip(got, (12, 3, 3), strict=True)]
            )
            np.testing.assert_allclose(columns, expected[argument], atol=1e-6, rtol=1e-6, err_msg=f'{name} {argument}')
        if name == 'outside':
            assert np.abs(got[0][0][i][0, :, 1]).max() > 1e-3, 'a token was meant to move another'


# --- on supports ------------------------------------------------------------------------------------------------------


def test_supports_keep_their_mass_and_share_the_region():
    """Guards the sparse form: conditionals are projected together, each support keeps its own mass; padding stays."""
    rng = np.random.default_rng(6)
    new, old = (np.stack([normalise(2 * rng.normal(size=11)) for _ in range(3)])[:, :5] for _ in range(2))
    pad = lambda x: np.concatenate([x, np.full((3, 2), -INF)], axis=1).astype(np.float32)
    tokens = jnp.broadcast_to(jnp.array([0, 1, 2, 3, 4, -1, -1]), (3, 7))
    inputs = SparseLogProbs(tokens, jnp.asarray(pad(new))), SparseLogProbs(tokens, jnp.asarray(pad(old)))
    run = jax.jit(lambda a, b, mask, bound: project_sparse_sequence(a, b, mask, bound=bound))
    mask = np.array([True, True, False])
    result = jax.tree.map(np.asarray, run(*inputs, mask, 0.05))
    conditional = [np.stack([normalise(row) for row in x]) for x in (new, old)]
    weight = exact_weight(conditional[0][:2], conditional[1][:2], 0.05)
    np.testing.assert_array_equal(result.violated, mask)
    assert weight < 1
    for t in range(2):
        mass = np.log(np.exp(new[t]).sum())
        expected = mass + tilted(conditional[0][t], conditional[1][t], weight)
        np.testing.assert_allclose(result.log_probs[t, :5], expected, atol=1e-3)
        np.testing.assert_allclose(np.exp(result.log_probs[t]).sum(), np.exp(mass), rtol=1e-5)
    assert np.all(result.log_probs[:, 5:] == -INF)
    np.testing.assert_allclose(result.log_probs[2, :5], new[2], rtol=1e-6)
    inside = run(*inputs, mask, 50.0)
    assert not inside.violated.any()
    np.testing.assert_array_equal(inside.log_probs, inputs[0].log_probs)


def test_bad_inputs_are_refused():
    """Guards the message where one token is passed in place of a response."""
    x = jnp.log(jnp.full(3, 1 / 3))
    with pytest.raises(ValueError, match=r'\[T, V\]; got \(3,\)'):
        project_sequence(x, x, jnp.ones(3, bool), bound=0.05)
    with pytest.raises(ValueError, match='must be positive'):
        project_sequence(x[None], x[None], jnp.ones(1, bool), bound=0.0)
