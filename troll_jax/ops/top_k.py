"""The largest entries of a long row, exactly, without sorting the row."""

import jax
import jax.numpy as jnp

BLOCK = 128
"""Neighbours in a block: as many as a register of a TPU has lanes, so that an array in blocks has no padding."""
SORTED_AT_ONCE = 4096
"""Entries up to which XLA sorts a row in a single kernel of a GPU."""


def to_blocks(x: jax.Array, *, block: int = BLOCK, fill: float = -jnp.inf) -> jax.Array:
    """x [V] in blocks of neighbours [V / block, block]; the last one is filled up."""
    (size,) = x.shape
    count = -(-size // block)
    if size % block:
        x = jnp.pad(x, (0, count * block - size), constant_values=fill)
    return x.reshape(count, block)


def best_blocks(maxima: jax.Array, k: int) -> jax.Array:
    """The k blocks, or all, that hold the k largest entries, by the maxima [n] of all; in their order, for ties."""
    (count,) = maxima.shape
    return jnp.arange(count) if k >= count else jnp.sort(jax.lax.top_k(maxima, k)[1])


def top_k(x: jax.Array, k: int, *, block: int = BLOCK) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of x [V], largest first, and their indices; of equal ones those with the lowest index.

    The same as `jax.lax.top_k`, in stages: the k largest lie in the k blocks with the largest maxima, and of these in k
    smaller blocks.
    """
    (size,) = x.shape
    if size <= SORTED_AT_ONCE or block < 16:
        return jax.lax.top_k(x, k)
    if k >= -(-size // block):
        return top_k(x, k, block=block // 8)
    blocks = to_blocks(x, block=block)
    best = best_blocks(jnp.max(blocks, axis=1), k)
    values, places = top_k(blocks[best].reshape(-1), k, block=block // 8)
    return values, best[places // block] * block + places % block
