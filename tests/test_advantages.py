"""Advantages, by hand and by what defines them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.advantages import (
    gae,
    greedy_baseline,
    group_normalised,
    leave_one_out,
    mean_centred,
    no_baseline,
    whiten,
)

CENTRED = [group_normalised, mean_centred, leave_one_out]


def test_group_normalised_by_hand():
    """Guards the standard deviation's denominator: G − 1, as published."""
    np.testing.assert_allclose(group_normalised(jnp.array([1.0, 0.0])), [np.sqrt(0.5), -np.sqrt(0.5)], rtol=1e-5)
    np.testing.assert_allclose(
        group_normalised(jnp.array([1.0, 0.0, 0.0, 0.0, 0.0])), np.array([4, -1, -1, -1, -1]) / np.sqrt(5), rtol=1e-5
    )


@pytest.mark.parametrize('dtype', [bool, np.uint8, np.int32])
def test_rewards_that_are_no_floats(dtype):
    """Guards differences of bools and of unsigned numbers, which have no sign."""
    rewards = jnp.array([0, 1, 0, 1], dtype)
    np.testing.assert_allclose(mean_centred(rewards), [-0.5, 0.5, -0.5, 0.5])
    np.testing.assert_allclose(whiten(rewards[None])[0], group_normalised(rewards), rtol=1e-5)


def test_baselines_by_hand():
    """Guards which mean is taken off: that of all, of the others, the greedy response's, none."""
    rewards = jnp.array([1.0, 0.0, 0.0, 3.0, 1.0])
    np.testing.assert_allclose(mean_centred(rewards), [0, -1, -1, 2, 0], atol=1e-6)
    others = [np.mean([0, 0, 3, 1]), np.mean([1, 0, 3, 1]), np.mean([1, 0, 3, 1]), 0.5, np.mean([1, 0, 0, 3])]
    np.testing.assert_allclose(leave_one_out(rewards), rewards - np.array(others), atol=1e-6)
    np.testing.assert_allclose(greedy_baseline(rewards, jnp.float32(0.5)), [0.5, -0.5, -0.5, 2.5, 0.5])
    np.testing.assert_array_equal(no_baseline(rewards), rewards)


@pytest.mark.parametrize('estimator', CENTRED)
def test_units_of_the_reward_do_not_matter(estimator):
    """Guards what a baseline is for: a shift of the rewards; and with the standard deviation their scale too."""
    rewards = jax.random.normal(jax.random.key(0), 7)
    expected = estimator(rewards)
    scale = 1 if estimator is group_normalised else 3
    np.testing.assert_allclose(estimator(3 * rewards - 11), scale * expected, atol=1e-5)
    np.testing.assert_allclose(estimator(-rewards), -expected, atol=1e-6)
    np.testing.assert_allclose(expected.mean(), 0, atol=1e-6)
    if estimator is group_normalised:
        np.testing.assert_allclose(expected.std(ddof=1), 1, atol=1e-5)


@pytest.mark.parametrize('estimator', CENTRED)
def test_equal_rewards_teach_nothing(estimator):
    """Guards 0/0, and a mean whose rounding error the normalisation blows up: jitted, eight rewards of 100.3 had an
    advantage of 0.83 each."""
    rewards = np.append([0.0, 1.0, 0.1, 0.3, 1.3, 100.3, -7e5], np.random.default_rng(0).normal(size=200))
    estimate = jax.jit(jax.vmap(estimator))
    whitened = jax.jit(jax.vmap(lambda group: whiten(group[None])[0]))
    for size in (2, 3, 7, 8):
        groups = np.repeat(rewards.astype(np.float32)[:, None], size, axis=1)
        np.testing.assert_array_equal(estimate(groups), 0)
        np.testing.assert_array_equal(whitened(groups), 0)
    # Of a batch, where some do not count.
    batch = np.where(np.arange(8) < 5, np.float32(100.3), np.float32(-3.0))[None]
    np.testing.assert_array_equal(jax.jit(whiten)(batch, batch > 0)[batch > 0], 0)


@pytest.mark.parametrize('estimator', CENTRED)
def test_a_group_of_one_is_refused(estimator):
    """Guards a division by G − 1 = 0, and a batch where one group was expected."""
    with pytest.raises(ValueError, match=r'got shape \(1,\)'):
        estimator(jnp.ones(1))
    with pytest.raises(ValueError, match=r'got shape \(3, 4\)'):
        estimator(jnp.ones((3, 4)))


def test_whitening_by_hand():
    """Guards REINFORCE++: one mean and one standard deviation for all prompts, after the baseline of each."""
    rewards = jnp.array([[1.0, 0.0], [4.0, 2.0]])
    deviation = np.std([1, 0, 4, 2], ddof=1)
    np.testing.assert_allclose(whiten(rewards), (np.array([[1, 0], [4, 2]]) - 1.75) / deviation, rtol=1e-5)
    centred = jax.vmap(mean_centred)(rewards)
    expected = np.array([[0.5, -0.5], [1, -1]]) / np.sqrt(2.5 / 3)
    np.testing.assert_allclose(whiten(centred), expected, rtol=1e-5)
    # Groups of one, which is what REINFORCE++ without a baseline is for.
    np.testing.assert_allclose(whiten(jnp.array([[1.0], [0.0]])), [[np.sqrt(0.5)], [-np.sqrt(0.5)]], rtol=1e-5)


def test_whitening_is_invariant_and_of_unit_scale():
    """Guards the defining property, for advantages of any shift and scale; and one response or one group."""
    advantages = jax.random.normal(jax.random.key(1), (3, 5))
    expected = whiten(advantages)
    np.testing.assert_allclose([expected.mean(), expected.std(ddof=1)], [0, 1], atol=1e-5)
    np.testing.assert_allclose(whiten(7 * advantages + 5), expected, atol=1e-5)
    for shape in [(1, 1), (4,)]:
        with pytest.raises(ValueError, match=r'at least two advantages, .* got shape'):
            whiten(jnp.ones(shape))


def test_gae_by_hand():
    """Guards the recursion and the value of zero behind the end, which an end by the length limit has too."""
    rewards, values = jnp.array([0.0, 1.0, 3.0]), jnp.array([2.0, 1.0, 0.5])
    errors = [0 + 0.5 * 1 - 2, 1 + 0.5 * 0.5 - 1, 3 - 0.5]
    last = errors[2]
    middle = errors[1] + 0.5 * 0.8 * last
    expected = [errors[0] + 0.5 * 0.8 * middle, middle, last]
    np.testing.assert_allclose(gae(rewards, values, gamma=0.5, lam=0.8), expected, rtol=1e-6)


def test_gae_at_its_ends():
    """Guards λ: at one it is the return less the value, at zero one step's error; padding of zeros changes nothing."""
    rewards, values = jax.random.normal(jax.random.key(2), (2, 7))
    returns = np.array([sum(0.9 ** (k - t) * rewards[k] for k in range(t, 7)) for t in range(7)])
    np.testing.assert_allclose(gae(rewards, values, gamma=0.9, lam=1.0), returns - values, rtol=1e-4, atol=1e-5)
    errors = rewards + 0.9 * np.append(values[1:], 0) - values
    np.testing.assert_allclose(gae(rewards, values, gamma=0.9, lam=0.0), errors, rtol=1e-5)
    run = functools.partial(gae, gamma=0.9, lam=0.7)
    padded = run(jnp.pad(rewards, (0, 4)), jnp.pad(values, (0, 4)))
    np.testing.assert_allclose(padded, np.pad(run(rewards, values), (0, 4)), rtol=1e-6)


def test_gae_of_a_critic_that_knows_is_zero():
    """Guards the bootstrap: values that are the returns leave no advantage, whatever γ and λ."""
    rewards = jnp.array([0.0, 2.0, 0.0, 1.0, -1.0])
    values = jnp.array([sum(0.9 ** (k - t) * rewards[k] for k in range(t, 5)) for t in range(5)])
    for lam in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(gae(rewards, values, gamma=0.9, lam=lam), np.zeros(5), atol=1e-6)
