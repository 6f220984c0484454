"""The projection's derivative, against differences in float64 and the closed form, in batches and on many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import BOUNDS, INF, central, exact, exact_weight, kl, normalise, pairs, peak, zeroed

from troll_jax.ops.projection import project, project_sequence
from troll_jax.sharding import make_mesh, named_sharding


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


def scalar(inputs, coefficients):
    """Some function of all that the projection gives, of π̃'s and π_old's scores and the bound in one array."""
    result = of_scores(inputs[:7], inputs[7:14], inputs[14])
    return jnp.dot(coefficients, jnp.concatenate([result.log_probs, result.weight[None], result.kl[None]]))


def scalar_of_response(inputs, coefficients):
    """The same of three tokens that share a region."""
    new, old = jax.nn.log_softmax(inputs[:-1].reshape(2, 3, 7))
    result = project_sequence(new, old, jnp.ones(3, bool), bound=inputs[-1])
    return jnp.dot(coefficients, jnp.concatenate([jnp.ravel(result.log_probs), result.weight, result.kl]))


@pytest.mark.parametrize('function', [scalar, scalar_of_response])
def test_derivatives_of_any_order(function):
    """Guards a rule that is right once and wrong when it is differentiated again, in either mode: it must take w from
    what it is the rule of. Against differences of the derivative before."""
    rng = np.random.default_rng(0)
    if function is scalar:
        inputs = np.stack([np.concatenate([new, old, [bound]]) for _, new, old, bound in smooth_pairs()])
        coefficients = rng.normal(size=9)
    else:
        scale = np.array([1.0, 3.0, 0.3])[None, :, None]  # two tokens outside, one inside of what they share
        inputs = np.concatenate([(scale * rng.normal(size=(2, 3, 7))).ravel(), [0.05]])[None]
        coefficients = rng.normal(size=27)
    direction = rng.normal(size=inputs.shape[1]) * np.append(np.ones(inputs.shape[1] - 1), 1e-2)  # ε stays positive
    gradient = jax.grad(function)
    along = lambda f: lambda x, c: jax.jvp(lambda x: f(x, c), (x,), (direction,))[1]
    second = {'forward': along(gradient), 'reverse': jax.grad(lambda x, c: jnp.dot(gradient(x, c), direction))}
    third = along(second['forward'])
    with jax.enable_x64(True):
        for x in inputs:
            step = 1e-5 * min(1.0, x[-1])
            sides = [x + step * direction, x - step * direction]
            difference = lambda f, sides=sides, step=step: (
                (np.asarray(f(sides[0], coefficients)) - np.asarray(f(sides[1], coefficients))) / (2 * step)
            )
            expected = difference(gradient)
            for mode, hessian in second.items():
                got = np.asarray(jax.jit(hessian)(x, coefficients))
                np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max(), err_msg=mode)
            expected = difference(second['forward'])
            got = np.asarray(jax.jit(third)(x, coefficients))
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg='third')


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


def boundary_pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(12)
    normal = lambda: normalise(rng.normal(size=5))
    return [(normal(), normal()), (normalise(base := normal()), normalise(base + 0.1 * rng.normal(size=5)))]


def test_one_sided_derivatives_at_the_boundary():
    """Guards the kink at KL(π̃ ‖ π_old) = ε: what leads inside passes, what leads out loses its part along d.

    δ log π = δ log π̃ − E δ log π̃ − (d − μ) max(0, c) / σ², where c is the rate at which the divergence leaves the
    bound, under π = π̃. It is checked by one-sided differences of the independent solution, and the derivative of
    `project` a little outside and a little inside against its two branches, in π̃, π_old and the bound.
    """
    rng = np.random.default_rng(13)
    push = jax.jit(lambda point, change: jax.jvp(of_scores, point, change)[1].log_probs)
    for new, old in boundary_pairs():
        bound, d, q = kl(new, old), new - old, np.exp(new)
        expect = lambda x, q=q: np.sum(q * x)
        centred = d - expect(d)
        variance = expect(centred**2)
        sides = set()
        for which in range(3):
            change = [rng.normal(size=5), rng.normal(size=5), np.float64(0.3)]
            change = [x if i == which else 0.0 * x for i, x in enumerate(change)]
            by_old = change[1] - np.sum(np.exp(old) * change[1])  # the normaliser of π_old
            rate = expect(centred * change[0]) - expect(by_old) - change[2]
            plain = change[0] - expect(change[0])
            outward = plain - centred * rate / variance
            for sign in (1, -1):
                sides.add(sign * rate > 0)
                step = 1e-6 * sign
                changed = [x + step * y for x, y in zip((new, old, bound), change, strict=True)]
                moved = exact(normalise(changed[0]), normalise(changed[1]), changed[2])
                expected = sign * (plain if sign * rate <= 0 else outward)
                np.testing.assert_allclose((moved - new) / 1e-6, expected, rtol=1e-4, atol=1e-4)
            with jax.enable_x64(True):
                inside = push((new, old, np.float64(bound * (1 + 1e-7))), tuple(change))
                outside = push((new, old, np.float64(bound * (1 - 1e-7))), tuple(change))
            np.testing.assert_allclose(inside, plain, atol=1e-12)
            np.testing.assert_allclose(outside, outward, atol=1e-5)
        assert sides == {True, False}


def test_at_the_bound_a_token_is_inside():
    """Guards equality: at ε = KL(π̃ ‖ π_old) as it is computed, result and derivative are those of the inside."""
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            run = jax.jit(project)
            for new, old in boundary_pairs():
                new, old = new.astype(dtype), old.astype(dtype)
                bound = run(new, old, bound=dtype(0.01)).kl_unprojected
                result = run(new, old, bound=bound)
                np.testing.assert_array_equal(result.log_probs, new)
                assert not result.violated and result.weight == 1
                below = run(new, old, bound=np.nextafter(np.asarray(bound), dtype(0)))
                assert below.violated and below.weight < 1 and kl(below.log_probs, old) < bound


def test_sharded_gradients_equal_those_of_one_device():
    """Guards the custom rule and the solver's loop under a mesh: rows that are spread out, as tokens are in a run."""
    rng = np.random.default_rng(14)
    new, old = (np.stack([normalise(2 * rng.normal(size=67)) for _ in range(32)]).astype(np.float32) for _ in range(2))
    old[:8] = new[:8]  # a device with nothing to do
    bounds = np.geomspace(1e-3, 1, 32, dtype=np.float32)

    def value(new, old, bound):
        result = jax.vmap(lambda a, b, e: project(a, b, bound=e))(new, old, bound)
        return jnp.sum(jnp.cos(jnp.arange(67.0)) * jnp.exp(result.log_probs).sum(axis=0)) + jnp.sum(result.weight)

    run = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))
    mesh = make_mesh(8, 1, 1)
    with jax.set_mesh(mesh):
        rows = [jax.device_put(x, named_sharding(mesh, ('batch', *[None] * (x.ndim - 1)))) for x in (new, old, bounds)]
        total, gradients = run(*rows)
        for gradient, row in zip(gradients, rows, strict=True):
            assert gradient.sharding.is_equivalent_to(row.sharding, row.ndim) and len(row.sharding.device_set) == 8
    expected, expected_gradients = run(new, old, bounds)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


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
