"""The top-K in stages against a full sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from troll_jax.ops.top_k import top_k


@functools.cache
def largest(k: int):
    return jax.jit(functools.partial(top_k, k=k))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 70]), st.integers(1, 6))
def test_equals_a_full_sort_with_ties(seed, k, levels):
    """Guards blocks whose maxima are equal: of equal entries those with the lowest index, as a stable sort has them."""
    values = np.random.default_rng(seed).integers(0, levels, 10_007).astype(np.float32)
    best, index = largest(k)(values)
    expected = np.argsort(-values, kind='stable')[:k]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(best, values[expected])


@pytest.mark.parametrize('size', [64, 4097, 151_936])
@pytest.mark.parametrize('k', [1, 64])
def test_equals_the_librarys(size, k):
    """Guards sizes that are no multiple of a block, k as large as the row, as many blocks as k or fewer, and entries
    that are infinite or the largest there are."""
    values = jax.random.normal(jax.random.key(size), size)
    extreme = values.at[jnp.arange(0, size, 5)].set(jnp.finfo(values.dtype).min).at[::7].set(-jnp.inf)
    extreme = extreme.at[jnp.array([size // 2, size - 1])].set(jnp.finfo(values.dtype).max).at[size // 3].set(jnp.inf)
    thirds = jnp.where(jnp.arange(size) % 3 == 0, values, -jnp.inf)
    for row in (values, thirds, extreme, jnp.full(size, -jnp.inf)):
        jax.tree.map(np.testing.assert_array_equal, list(largest(k)(row)), list(jax.lax.top_k(row, k)))


def test_all_of_a_row():
    """Guards k as large as the row, where no stage leaves anything out."""
    row = jnp.round(jax.random.normal(jax.random.key(0), 10_007))
    jax.tree.map(np.testing.assert_array_equal, list(largest(10_007)(row)), list(jax.lax.top_k(row, 10_007)))
