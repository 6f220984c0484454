"""The largest entries of a long row, exactly, without sorting the row."""

import jax
import jax.numpy as jnp

BLOCK = 64


def to_blocks(x: jax.Array, *, fill: float = -jnp.inf) -> jax.Array:
    """x [V] in blocks of neighbours [V / 64, 64]; the last one is filled up."""
    (size,) = x.shape
    count = -(-size // BLOCK)
    if size % BLOCK:
        x = jnp.pad(x, (0, count * BLOCK - size), constant_values=fill)
    return x.reshape(count, BLOCK)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of x [V], largest first, and their indices; of equal ones those with the lowest index.

    The same as `jax.lax.top_k`, in two stages: the k largest lie in the k blocks with the largest maxima.
    """
    (size,) = x.shape
    if k >= -(-size // BLOCK):
        return jax.lax.top_k(x, k)
    blocks = to_blocks(x)
    _, best = jax.lax.top_k(jnp.max(blocks, axis=1), k)
    best = jnp.sort(best)  # so that the candidates are in the order of the vocabulary, for ties
    values, places = jax.lax.top_k(blocks[best].reshape(-1), k)
    return values, best[places // BLOCK] * BLOCK + places % BLOCK
