"""The optimizer of the paper's experiments, from optax, and where its state lives."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.sharding import constrain_like

Optimizer = Callable[[], optax.GradientTransformation]
"""Builds an optimizer, such as `functools.partial(adamw, learning_rate=1e-6)`."""

S = TypeVar('S')  # state of a model that is trained: `TrainState`, `CriticState`
MU_DTYPES = ('float32', 'bfloat16', 'float16')
SCHEDULES = ('constant', 'linear', 'cosine')


def adamw(
    learning_rate: float = 1e-6,
    *,
    warmup_updates: int = 0,
    schedule: str = 'linear',
    decay_updates: int = 0,
    final_fraction: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    mu_dtype: str | None = None,
) -> optax.GradientTransformation:
    """AdamW with a warm-up and a decay of the learning rate, and gradients clipped by their global norm.

    Args:
      learning_rate: after the warm-up.
      warmup_updates: optimizer updates, not rollout batches, of which the i-th has i / warmup_updates of that rate.
      schedule: decay after the warm-up: 'constant', 'linear' or 'cosine', as half a period.
      decay_updates: updates after the warm-up over which the rate falls; 0 keeps it constant.
      final_fraction: share of the rate that is left after them.
      b1, b2: decay of the two moments.
      weight_decay: decay per unit of learning rate, of weights and embeddings; norms and biases do not decay.
      clip_norm: largest global norm of a gradient.
      mu_dtype: dtype of the first moment, such as 'bfloat16' to save memory; that of the parameters if None.

    Raises:
      ValueError: a number out of its range, another type, or a schedule that does not go with `decay_updates`.
    """
    is_decay = lambda x: 0 <= x < 1
    for name, value, fits, expected in [
        ('learning_rate', learning_rate, is_not_negative, 'at least 0'),
        ('warmup_updates', warmup_updates, is_not_negative, 'at least 0'),
        ('decay_updates', decay_updates, is_not_negative, 'at least 0'),
        ('final_fraction', final_fraction, lambda x: 0 <= x <= 1, 'between 0 and 1'),
        ('b1', b1, is_decay, 'at least 0 and below 1'),
        ('b2', b2, is_decay, 'at least 0 and below 1'),
        ('weight_decay', weight_decay, is_not_negative, 'at least 0'),
        ('clip_norm', clip_norm, is_positive, 'positive'),
    ]:
        check_range(f'{name} of AdamW', value, fits, expected)
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule of AdamW must be one of {SCHEDULES}; got {schedule!r}')
    if decay_updates and schedule == 'constant' or not decay_updates and (schedule == 'cosine' or final_fraction):
        raise ValueError(
            f'schedule = {schedule!r} and final_fraction = {final_fraction} of AdamW do not go with decay_updates = '
            f'{decay_updates}; a decay needs both a schedule, linear or cosine, and its updates'
        )
    if mu_dtype not in (None, *MU_DTYPES):
        raise ValueError(f'mu_dtype of AdamW must be None or one of {MU_DTYPES}; got {mu_dtype!r}')

    def rate(done: jax.Array) -> jax.Array:
        risen = learning_rate * (jnp.minimum(1.0, (done + 1) / warmup_updates) if warmup_updates else 1.0)
        after = jnp.clip(done - warmup_updates, 0, decay_updates)
        if schedule == 'cosine':
            return risen * optax.cosine_decay_schedule(1.0, decay_updates, final_fraction)(after)
        return risen * (decay_updates - (1.0 - final_fraction) * after) / decay_updates if decay_updates else risen

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.chain(  # AdamW, in which some parameters do not decay: a mask would change the state's tree
            optax.scale_by_adam(b1=b1, b2=b2, mu_dtype=mu_dtype),
            optax.stateless(partial(_decay, rate=weight_decay)),
            optax.scale_by_learning_rate(rate if warmup_updates or decay_updates else learning_rate),
        ),
    )


def _decay(changes: optax.Updates, params: optax.Params, *, rate: float) -> optax.Updates:
    """Adds the decay of all parameters but the scales of norms and biases, by their names."""
    if isinstance(rate, float | int) and rate == 0:  # 0 · param is not free: XLA keeps the zeros, as an array
        return changes

    def one(path, change, param):
        names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
        return change if any(name.endswith(('norm', 'bias')) for name in names) else change + rate * param

    return jax.tree.map_with_path(one, changes, params)


class Offloaded(optax.GradientTransformation):
    """An optimizer whose moments are to live in the host's memory, see `state_shapes` and `apply_gradients`.

    `Offloaded(*optimizer)` wraps any optimizer of optax. It has to be the outermost: what wraps it does not know of it.
    """


def apply_gradients(
    optimizer: optax.GradientTransformation, gradients, state: S, shapes: Callable[[jax.sharding.AbstractMesh], Any]
) -> tuple[S, dict[str, jax.Array]]:
    """One step of the optimizer, under `jax.jit`; if a gradient is not finite, the state stays as it is.

    What of the state lives in the host's memory is brought to the device for the step, and goes back there.

    Args:
      optimizer: optimizer of optax.
      gradients: as the parameters.
      state: named tuple with `params` and `opt_state`.
      shapes: these two with shardings, for a mesh.

    Returns:
      the state after the step, and the metrics `gradient_norm` and `skipped`.
    """
    gradients = constrain_like(gradients, lambda mesh: shapes(mesh)[0])
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm)
    with jax.named_scope('optimizer'):
        result = _step(optimizer, gradients, state.opt_state, state.params, finite)
        # The compiler for GPUs replicates what comes out of a branch.
        params, opt_state = constrain_like(result, lambda mesh: tuple(shapes(mesh)))
    return state._replace(params=params, opt_state=opt_state), {'gradient_norm': norm, 'skipped': 1.0 - finite}


def _step(optimizer: optax.GradientTransformation, gradients, opt_state, params, finite: jax.Array):
    if not isinstance(optimizer, Offloaded):  # in place: what comes out of a branch would be a copy
        changes, new_state = optimizer.update(gradients, opt_state, params)
        result = optax.apply_updates(params, changes), new_state
        return jax.tree.map(partial(jnp.where, finite), result, (params, opt_state))
    home = jax.tree.map(lambda x: jax.typeof(x).memory_space, opt_state)

    # In a branch, because a compiler starts copies as early as it can: outside of one, the state would be on the device
    # while gradients are computed, and nothing would be saved. Nothing else holds it back, not an optimization barrier.
    def step(gradients, opt_state, params):
        on_device = jax.device_put(opt_state, jax.memory.Space.Device)
        changes, new_state = optimizer.update(gradients, on_device, params)
        return optax.apply_updates(params, changes), jax.device_put(new_state, home)

    return jax.lax.cond(finite, step, lambda gradients, *old: old[::-1], gradients, opt_state, params)


def state_shapes(optimizer: optax.GradientTransformation, params) -> optax.OptState:
    """Shapes of the optimizer's state, with moments sharded like their parameters and all else replicated.

    Args:
      optimizer: optimizer of optax. The moments of an `Offloaded` one are in the memory 'pinned_host'.
      params: nested dict of `jax.ShapeDtypeStruct` with shardings.
    """
    shapes = jax.eval_shape(optimizer.init, params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with_sharding = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    kind = 'pinned_host' if isinstance(optimizer, Offloaded) else None
    return optax.tree_map_params(
        optimizer,
        lambda moment, param: with_sharding(moment, param.sharding.with_memory_kind(kind)),
        shapes,
        params,
        transform_non_params=lambda x: with_sharding(x, replicated),
    )
