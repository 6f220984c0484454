"""Smooth trust regions by hand: losses, and the factor on the gradient of log π."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.losses import LossInputs
from troll_jax.ops.smooth_losses import drpo, gmpo, sapo, spo, vespo

OLD = np.array([0.5, 0.02, 0.5, 0.02])
NEW = np.array([0.7, 0.2, 0.2, 0.01])
RATIO = NEW / OLD


def found(objective, advantages, segments=(1, 2, 3, 4), **settings):
    """The LossOutputs and the derivative [T] of the summed loss by log π̃ of the tokens above."""
    advantages, segments = jnp.asarray(advantages), jnp.asarray(segments)

    def total(new_log_probs):
        row = LossInputs(jnp.zeros(4, jnp.int32), segments, new_log_probs, jnp.log(jnp.array(OLD)), None, None, None)
        result = objective(row, advantages, **settings)
        return jnp.sum(result.loss), result

    gradient, result = jax.grad(total, has_aux=True)(jnp.log(jnp.array(NEW)))
    return result, np.asarray(gradient)


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_quadratic_penalties_by_hand(sign):
    """Guards the factors of the papers' tables, and the sign beyond the edge, where it leads back."""
    advantages = sign * np.array([1.0, 2.0, 1.0, 0.5])
    for objective, distance, bound in [(drpo, np.abs(NEW - OLD), 0.1), (spo, np.abs(RATIO - 1), 0.3)]:
        result, gradient = found(objective, advantages, bound=bound)
        factor = 1 - np.sign(advantages * (RATIO - 1)) * distance / bound
        np.testing.assert_allclose(gradient, -RATIO * advantages * factor, rtol=1e-4)
        np.testing.assert_array_equal(result.constrained, factor < 0)
    penalty = np.abs(advantages) * (RATIO - 1) ** 2 / (2 * 0.3)
    np.testing.assert_allclose(result.loss, -RATIO * advantages + penalty, rtol=1e-5)


def test_where_drpo_comes_to_rest():
    """Guards the region's shape: a change of probability by δ, whatever the probability was; SPO's is a ratio."""
    old = jnp.log(jnp.array([0.4, 0.02]))
    for objective, edge in [(drpo, jnp.array([0.5, 0.12])), (spo, jnp.array([0.44, 0.022]))]:

        def total(new, objective=objective):
            return jnp.sum(objective(LossInputs(None, None, new, old, None, None, None), jnp.ones(2), bound=0.1).loss)

        np.testing.assert_allclose(jax.grad(total)(jnp.log(edge)), [0, 0], atol=1e-5)


def test_sapo_by_hand():
    """Guards both temperatures: the gate's derivative is 4 σ (1 − σ), which is one on the old policy."""
    advantages = np.array([1.0, 2.0, -1.0, -0.5])
    tau = np.array([1.0, 1.0, 3.0, 3.0])
    result, gradient = found(sapo, advantages, positive=1.0, negative=3.0)
    gate = 1 / (1 + np.exp(-tau * (RATIO - 1)))
    np.testing.assert_allclose(result.loss, -4 / tau * gate * advantages, rtol=1e-5)
    np.testing.assert_allclose(gradient, -4 * gate * (1 - gate) * RATIO * advantages, rtol=1e-3)


def test_vespo_by_hand():
    """Guards the product over a response, detached, and numbers for each sign of the advantage."""
    advantages, segments = np.array([1.0, 1.0, -2.0, -2.0]), (1, 1, 2, 2)
    product = np.array([RATIO[0] * RATIO[1]] * 2 + [RATIO[2] * RATIO[3]] * 2)
    k, decay = np.array([2.0, 2, 3, 3]), np.array([3.0, 3, 2, 2])
    weight = product**k * np.exp(decay * (1 - product))
    result, gradient = found(vespo, advantages, segments)
    np.testing.assert_allclose(result.logs['response_weight'], weight, rtol=1e-4)
    np.testing.assert_allclose(gradient, -weight * advantages, rtol=1e-4)
    assert weight[0] < 1e-5 < weight[2], 'one response was meant to be far off, one near'


def test_gmpo_by_hand():
    """Guards the clip before the mean, on A's side alone, and a gradient that is the token's own."""
    advantages, segments = np.array([1.0, 1.0, -2.0, -2.0]), (1, 1, 2, 2)
    result, gradient = found(gmpo, advantages, segments, lower=0.8, upper=0.4)
    first = np.exp((np.log(1.4) + 0.4) / 2)  # log 10 is clipped to 0.4
    second = np.exp((-0.8 + np.log(0.5)) / 2)  # log 0.4 is clipped to −0.8
    np.testing.assert_allclose(result.loss, [-first, -first, 2 * second, 2 * second], rtol=1e-5)
    np.testing.assert_allclose(gradient, [-first, 0, 0, 2 * second], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(result.constrained, [False, True, True, False])
