"""Quantiles without a sort."""

import jax
import jax.numpy as jnp


def order_statistics(values: jax.Array, ranks: jax.Array) -> jax.Array:
    """The entries [n] of `values`, not negative, at these ranks [n] of their order; NaN counts as infinite.

    By bisection over the bits of a float, which are in the order of the numbers: a sort would take a TPU's compiler
    half a minute.
    """
    values = jnp.where(jnp.isnan(values), jnp.inf, jnp.maximum(values, 0.0))
    bits = jax.lax.bitcast_convert_type(values, jnp.int32).reshape(-1)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(bits[None, :] <= middle[:, None], axis=1) > ranks
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    infinite = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(ranks), jnp.full_like(ranks, infinite)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
