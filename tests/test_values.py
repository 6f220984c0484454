"""The critic's loss by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.ops.values import explained_variance, value_loss


def test_value_loss_by_hand():
    """Guards the side of the clip: a value that runs away from the old one must not be pulled further by the clip."""
    old, returns = jnp.zeros(4), jnp.array([1.0, 1.0, -1.0, 0.2])
    values = jnp.array([0.3, 0.8, 0.8, 0.1])
    plain = value_loss(values, old, returns, clip=None)
    np.testing.assert_allclose(plain, 0.5 * np.array([0.7, 0.2, 1.8, 0.1]) ** 2, rtol=1e-6)
    clipped = value_loss(values, old, returns, clip=0.5)
    # The second went past the clip towards its return: as if it stood there. The third went away from its return.
    np.testing.assert_allclose(clipped, 0.5 * np.array([0.7, 0.5, 1.8, 0.1]) ** 2, rtol=1e-6)
    gradient = jax.grad(lambda v: value_loss(v, old, returns, clip=0.5).sum())(values)
    np.testing.assert_allclose(gradient, [-0.7, 0, 1.8, -0.1], atol=1e-6)


def test_explained_variance():
    """Guards 1 for what is right, 0 for a constant, less for what is worse, and no number where there is none."""
    returns = np.array([0.0, 1.0, 1.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(np.full(4, 7.0), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert np.isnan(explained_variance(returns, np.ones(4)))
