"""RoPE, rotary positions (Su et al., arXiv 2104.09864): a head is rotated by angles that grow with the position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Angles = tuple[jax.Array, jax.Array]  # cosine and sine, each [B, S, 1, F/2] float32


class RopeScaling(NamedTuple):
    """Llama 3.1's context extension (rope_type 'llama3'): in a context longer than that of the first training, slow
    planes rotate no further than they did there."""

    factor: float  # of the extension
    low_freq_factor: float  # planes that rotate less often than this in `original_length` tokens are slowed by `factor`
    high_freq_factor: float  # planes that rotate more often than this are not, those in between in part
    original_length: int  # tokens


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per token of the F/2 planes of a head, [F/2] float32."""
    # In float32 as in the reference: far from the start of a text, its rounding is part of what a model has learnt.
    frequencies = 1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if scaling is not None:
        turns = scaling.original_length * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> Angles:
    """The angles of tokens at `positions` [B, S]."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def angles_where(rotates: jax.Array | None, angles: Angles) -> Angles:
    """The angles of a layer: `angles` if it `rotates` ([] bool, or None for all layers), else none."""
    if rotates is None:
        return angles
    cos, sin = angles
    return jnp.where(rotates, cos, 1.0), jnp.where(rotates, sin, 0.0)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Applies RoPE: rotates plane i of a head, spanned by components i and i + F/2 (Hugging Face's layout)."""
    cos, sin = angles
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    first, second = halves[..., 0, :], halves[..., 1, :]
    # Stacked, not concatenated: XLA's compiler for GPUs then fuses it with the norm before it.
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return rotated.reshape(x.shape).astype(x.dtype)
