"""The optimizer of the paper's experiments, from optax."""

import jax
import jax.numpy as jnp
import optax


def adamw(
    learning_rate: float = 1e-6,
    *,
    warmup_updates: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW with a constant learning rate after a linear warm-up, and gradients clipped by their global norm.

    Args:
      learning_rate: after the warm-up.
      warmup_updates: optimizer updates, not rollout batches, of which the i-th has i / warmup_updates of that rate.
      b1, b2: decay of the two moments.
      weight_decay: per unit of learning rate.
      clip_norm: largest global norm of a gradient.
    """
    schedule = lambda done: learning_rate * jnp.minimum(1.0, (done + 1) / warmup_updates)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule if warmup_updates else learning_rate, b1=b1, b2=b2, weight_decay=weight_decay),
    )


def state_shapes(optimizer: optax.GradientTransformation, params) -> optax.OptState:
    """Shapes of the optimizer's state, with moments sharded like their parameters and all else replicated.

    Args:
      optimizer: from optax.
      params: nested dict of `jax.ShapeDtypeStruct` with shardings.
    """
    shapes = jax.eval_shape(optimizer.init, params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with_sharding = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return optax.tree_map_params(
        optimizer,
        lambda moment, param: with_sharding(moment, param.sharding),
        shapes,
        params,
        transform_non_params=lambda x: with_sharding(x, replicated),
    )
