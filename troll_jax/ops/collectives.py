"""Collectives over a mesh axis, for a function that also runs on one device: without an axis they do nothing."""

import jax


def psum(x: jax.Array, axis: str | None) -> jax.Array:
    return x if axis is None else jax.lax.psum(x, axis)


def pmax(x: jax.Array, axis: str | None) -> jax.Array:
    return x if axis is None else jax.lax.pmax(x, axis)


def all_gather(x: jax.Array, axis: str | None) -> jax.Array:
    """The parts of all devices, one after the other along the first axis."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def axis_index(axis: str | None) -> jax.Array | int:
    return 0 if axis is None else jax.lax.axis_index(axis)
