"""Reductions over the tokens of each response, where several responses are packed in one row."""

import jax
import jax.numpy as jnp


def segment_mean(values: jax.Array, segments: jax.Array) -> jax.Array:
    """The mean over the tokens of a segment, at each of its tokens.

    Args:
      values: [T]
      segments: [T] int, at most T: the segment that a token belongs to. Tokens of segment 0 belong to none; their
        values do not matter, and they get zero.

    Returns:
      [T]
    """
    return segment_sum(values, segments) / jnp.maximum(segment_sum(jnp.ones_like(values), segments), 1)


def segment_max(values: jax.Array, segments: jax.Array) -> jax.Array:
    """The largest value of a segment, at each of its tokens; as `segment_mean`, but 0 is a segment like any other."""
    return jax.ops.segment_max(values, segments, num_segments=len(segments) + 1)[segments]


def segment_sum(values: jax.Array, segments: jax.Array) -> jax.Array:
    """The sum over the tokens of a segment, at each of its tokens; as `segment_mean`."""
    inside = jnp.where(segments > 0, values, 0)
    return jax.ops.segment_sum(inside, segments, num_segments=len(segments) + 1)[segments]
