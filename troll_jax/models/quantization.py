"""Simulated quantisation of a sampler's weights and KV cache: rounded as on the device, kept in the compute dtype.

It shows what a quantised sampler would do to training, and saves neither memory nor time.
"""

import jax
import jax.numpy as jnp

PRECISIONS = ('bfloat16', 'int8', 'fp8')  # the first computes in that dtype, the others are simulated
_LARGEST = {'int8': 127.0, 'fp8': 448.0}  # fp8 is E4M3


def quantise(x: jax.Array, precision: str | None, *, axis: int) -> jax.Array:
    """Rounds to what `precision` can represent, with one scale for all values along an axis; None does nothing.

    Args:
      x: any shape.
      precision: one of `PRECISIONS`.
      axis: of a weight [I, O] the inputs, so that each output channel has its scale; of keys and values the head's.
    """
    if precision not in _LARGEST:
        return x
    x32 = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=axis, keepdims=True), 1e-30) / _LARGEST[precision]
    scaled = x32 / scale
    rounded = jnp.round(scaled) if precision == 'int8' else scaled.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return (rounded * scale).astype(x.dtype)
