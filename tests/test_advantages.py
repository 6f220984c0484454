"""Advantages, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.advantages import group_normalised


def test_by_hand():
    """Guards the standard deviation's denominator: G − 1, as published."""
    np.testing.assert_allclose(group_normalised(jnp.array([1.0, 0.0])), [np.sqrt(0.5), -np.sqrt(0.5)], rtol=1e-5)
    np.testing.assert_allclose(
        group_normalised(jnp.array([1.0, 0.0, 0.0, 0.0, 0.0])), np.array([4, -1, -1, -1, -1]) / np.sqrt(5), rtol=1e-5
    )


def test_units_of_the_reward_do_not_matter():
    """Guards the invariance that normalisation is for: shift and scale of the rewards."""
    rewards = jax.random.normal(jax.random.key(0), 7)
    expected = group_normalised(rewards)
    np.testing.assert_allclose(group_normalised(3 * rewards - 11), expected, atol=1e-5)
    np.testing.assert_allclose(group_normalised(-rewards), -expected, atol=1e-6)
    np.testing.assert_allclose([expected.mean(), expected.std(ddof=1)], [0, 1], atol=1e-5)


@pytest.mark.parametrize('reward', [0.0, 1.0, 0.1])
def test_equal_rewards_teach_nothing(reward):
    """Guards 0/0, and a mean whose rounding error the normalisation would blow up to one."""
    for size in (2, 3, 7, 8):
        assert np.all(np.abs(group_normalised(jnp.full(size, reward))) < 0.1)


def test_a_group_of_one_is_refused():
    """Guards a division by G − 1 = 0, and a batch where one group was expected."""
    with pytest.raises(ValueError, match=r'got shape \(1,\)'):
        group_normalised(jnp.ones(1))
    with pytest.raises(ValueError, match=r'got shape \(3, 4\)'):
        group_normalised(jnp.ones((3, 4)))
