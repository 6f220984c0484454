"""Regions of TROLL: what each promises, on random distributions of a vocabulary of 11."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.categorical import entropy, total_variation
from troll_jax.ops.regions import (
    chi_squared_region,
    detached_region,
    entropy_region,
    token_region,
    total_variation_region,
)
from troll_jax.types import SparseLogProbs


def chi_squared(p, q) -> np.ndarray:
    return np.sum((np.exp(p) - np.exp(q)) ** 2 / np.exp(q), axis=-1)


def variation(p, q) -> np.ndarray:
    return np.asarray(jax.vmap(total_variation)(p, q))


def pairs(count=200, size=11) -> tuple[SparseLogProbs, SparseLogProbs]:
    """Pairs of distributions at distances of all sizes, with one padded entry each."""
    scores = jax.random.normal(jax.random.key(0), (2, count, size))
    old = 2 * scores[0]
    new = old + jnp.linspace(0, 3, count)[:, None] * scores[1]
    tokens = jnp.tile(jnp.arange(size).at[-1].set(-1), (count, 1))
    hide = lambda x: jax.nn.log_softmax(jnp.where(tokens >= 0, x, -jnp.inf))
    return SparseLogProbs(tokens, hide(new)), SparseLogProbs(tokens, hide(old))


@pytest.mark.parametrize('bound', [1e-4, 0.05, 0.3])
@pytest.mark.parametrize(
    ('region', 'divergence'), [(total_variation_region, variation), (chi_squared_region, chi_squared)]
)
def test_a_ball_of_another_divergence_holds(region, divergence, bound):
    """Guards the bound: reached where π̃ is outside, and π̃ to the bit where it is inside."""
    new, old = pairs()
    result = jax.jit(functools.partial(region, bound=bound))(new, old, None)
    listed = np.asarray(new.tokens[0]) >= 0
    before, after = (divergence(x[:, listed], old.log_probs[:, listed]) for x in (new.log_probs, result.log_probs))
    np.testing.assert_array_equal(result.violated, before > bound)
    assert 0 < result.violated.sum() < len(before)
    np.testing.assert_allclose(after[result.violated], bound, rtol=2e-3)
    np.testing.assert_array_equal(result.log_probs[~result.violated], new.log_probs[~result.violated])
    np.testing.assert_allclose(np.exp(result.log_probs).sum(axis=1), 1, rtol=1e-5)
    if divergence is variation:  # no point of the ball can be closer than by the triangle inequality
        np.testing.assert_allclose(variation(new.log_probs, result.log_probs), np.maximum(before - bound, 0), atol=1e-5)


@pytest.mark.parametrize('region', [token_region, entropy_region, total_variation_region, chi_squared_region])
def test_a_bound_that_is_not_positive_is_an_error(region):
    """Guards a projection of NaN, or one onto the old policy."""
    for bound in (0.0, -0.1):
        with pytest.raises(ValueError, match='bound .* must be positive; got'):
            region(*pairs(2), None, bound=bound)


def test_a_bound_by_entropy():
    """Guards the scale: nats per nat of the old policy's entropy."""
    new, old = pairs()
    result = entropy_region(new, old, None, bound=0.1)
    bounds = 0.1 * jax.vmap(entropy)(old.log_probs)
    assert np.all(result.kl <= bounds * (1 + 1e-3) + 1e-7) and result.violated.any()
    np.testing.assert_allclose(result.kl[result.violated], bounds[result.violated], rtol=2e-3)


def test_detached_is_the_projection_with_the_gradient_of_the_policy():
    """Guards the weight, and that no derivative passes through the projection."""
    new, old = pairs()
    project = lambda region, x: region(new._replace(log_probs=x), old, None, bound=0.05).log_probs[:, 0]
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(project(detached_region, x)))(new.log_probs)
    np.testing.assert_allclose(value, jnp.sum(project(token_region, new.log_probs)), rtol=1e-5)
    np.testing.assert_array_equal(gradient, np.tile(np.arange(11) == 0, (200, 1)))
