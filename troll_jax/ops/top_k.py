"""The largest entries of a long row, exactly, without sorting the row."""

import jax
import jax.numpy as jnp

_BLOCK = 64


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of x [V], largest first, and their indices; of equal ones those with the lowest index.

    The same as `jax.lax.top_k`, in two stages: the k largest lie in the k blocks with the largest maxima.
    """
    (size,) = x.shape
    count = -(-size // _BLOCK)
    if k >= count:
        return jax.lax.top_k(x, k)
    blocks = jnp.pad(x, (0, count * _BLOCK - size), constant_values=-jnp.inf).reshape(count, _BLOCK)
    _, best = jax.lax.top_k(jnp.max(blocks, axis=1), k)
    best = jnp.sort(best)  # so that the candidates are in the order of the vocabulary, for ties
    values, places = jax.lax.top_k(blocks[best].reshape(-1), k)
    return values, best[places // _BLOCK] * _BLOCK + places % _BLOCK
