"""Regions of a minibatch by hand: the row is one response, the minibatch has more tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.losses import LossInputs, Minibatch
from troll_jax.ops.minibatch_losses import kl_cov, m2po


def test_m2po_by_hand():
    """Guards the greedy choice, the tokens that it is made among, and tokens of none.

    Of log² r 0.01, 0.04, 0.09 and 0.36 that lead out the mean of the first three is 0.047.
    """
    log_ratio = jnp.array([0.1, -0.2, 0.3, 0.6, -0.9, 5.0])
    advantages = jnp.array([1.0, -1.0, 2.0, 0.5, 1.0, 1.0])
    inside = jnp.array([True, True, True, True, True, False])
    minibatch = Minibatch(log_ratio - 1, jnp.full(6, -1.0), advantages, inside)
    row = LossInputs(None, jnp.ones(6, jnp.int32), minibatch.new_log_probs, minibatch.old_log_probs, None, None, None)
    for budget, dropped in [(0.05, [0, 0, 0, 1, 0]), (0.04, [0, 0, 1, 1, 0]), (0.2, [0] * 5), (0.005, [1, 1, 1, 1, 0])]:
        result = jax.jit(functools.partial(m2po, budget=budget))(row, advantages, minibatch=minibatch)
        np.testing.assert_array_equal(result.constrained[:5], np.array(dropped, bool))
        kept = ~np.array(dropped, bool)
        expected = -np.exp(np.array(log_ratio[:5])) * np.array(advantages[:5]) * kept
        np.testing.assert_allclose(result.loss[:5], expected, rtol=1e-5)


def test_kl_cov_by_hand():
    """Guards means over the tokens that count, the share, and a pull that leads back from both sides."""
    new, old = np.array([-0.1, -3.0, -0.2, -1.0]), np.array([-0.5, -2.0, -0.2, -1.5])
    advantages, inside = np.array([2.0, -2.0, 1.0, 9.0]), np.array([True, True, True, False])
    minibatch = Minibatch(*map(jnp.asarray, (new, old, advantages, inside)))
    covariance = (advantages - advantages[:3].mean()) * (new - new[:3].mean())
    assert covariance[1] > covariance[0] > covariance[2]

    def total(new_log_probs, share):
        row = LossInputs(None, jnp.ones(4, jnp.int32), new_log_probs, minibatch.old_log_probs, None, None, None)
        result = kl_cov(row, minibatch.advantages, minibatch=minibatch, share=share, coefficient=0.5)
        return jnp.sum(result.loss[:3]), result

    for share, pulled in [(0.1, [0, 1, 0]), (0.7, [1, 1, 0])]:
        gradient, result = jax.grad(total, has_aux=True)(minibatch.new_log_probs, share)
        expected = -np.exp(new - old) * advantages + np.append(pulled, 0) * 0.5 * np.sign(new - old)
        np.testing.assert_allclose(gradient[:3], expected[:3], rtol=1e-5)
        np.testing.assert_array_equal(result.constrained[:3], np.array(pulled, bool))
    with pytest.raises(ValueError, match='share must be'):
        total(minibatch.new_log_probs, 0.0)
