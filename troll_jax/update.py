"""One optimizer step on one minibatch: update(loss ∘ projection ∘ model), with gradient accumulation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from troll_jax.models import decoder as decoders
from troll_jax.models.layers import exact_products
from troll_jax.models.lora import split
from troll_jax.ops.losses import Minibatch, Objective
from troll_jax.ops.needs import needs
from troll_jax.ops.order_statistics import order_statistics
from troll_jax.ops.projection import kl_divergence
from troll_jax.optimizer import apply_gradients, state_shapes
from troll_jax.score import Scoring, evaluate_policy, micro_batches, whole_minibatch
from troll_jax.sharding import constrain_like
from troll_jax.types import Batch, Progress, TrainState, join

_CONSTRAINED = 'constrained'  # in the logs of a gradient: tokens that are projected or clipped
BINS = 0.05, 0.5, 0.95, 1.0  # of the sampled token's probability under π_old: the upper edges
# Logged with quantiles, and not only their mean.
_QUANTILES = ('kl', 'kl_unprojected', 'kl_projected', 'weight', 'eta', 'ratio', 'evaluations')


class Gradient(NamedTuple):
    """The gradient of a batch's loss, and the logs of its tokens."""

    params: Any  # nested dict, as the parameters
    loss: jax.Array  # [] float32
    logs: Any  # arrays [M, Z, S]; zero in micro-batches that hold nothing


class UpdateLog(NamedTuple):
    """The metrics of one update."""

    metrics: dict[str, jax.Array]  # scalars: over the batch's tokens
    flags: jax.Array  # [M, Z, S] int8: 0 not in the loss, 1 in the loss, 2 and projected or clipped (constrained)


def make_gradient(config: decoders.DecoderConfig, objective: Objective, scoring: Scoring) -> Callable[..., Gradient]:
    """Builds gradient(params, progress, batch, base=None) → Gradient, to be called under `jax.jit`.

    If the decoder has adapters, these are `params`, and `base` is what they adapt.

    The weight of every token in the loss comes with the batch, so the gradient depends neither on how responses are
    packed into rows nor on the number of micro-batches.

    Args:
      config: sizes of the decoder.
      objective: loss of one row's tokens, see `troll_jax.ops.losses`.
      scoring: temperature, tail rule and support, as the responses were sampled with.
    """
    graphdef, _ = decoders.abstract(config)

    def loss_and_logs(params, base, progress: Progress, minibatch: dict[str, Minibatch], part: Batch):
        row, logs = evaluate_policy(decoders.bind(graphdef, join(base, params)), part, scoring)
        mask = part.loss_weights > 0
        with jax.named_scope('objective'):
            losses = jax.vmap(partial(objective, progress=progress, **minibatch))(row, part.advantages)
            # Where there is no token, there is no loss, whatever was computed: not even NaN · 0.
            loss = jnp.sum(jnp.where(mask, losses.loss * part.loss_weights, 0.0))
        logs |= losses.logs | {
            'kl': jax.vmap(jax.vmap(kl_divergence))(row.new.log_probs, row.old.log_probs),
            'ratio': jnp.exp(jnp.minimum(row.new_log_probs - row.old_log_probs, 80.0)),
            _CONSTRAINED: losses.constrained,
        }
        return loss, jax.lax.stop_gradient(logs)

    def gradient(params, progress: Progress, batch: Batch, base=None) -> Gradient:
        with exact_products(config.compute_dtype):
            minibatch = {}
            if needs(objective, 'minibatch'):
                minibatch = {'minibatch': whole_minibatch(decoders.bind(graphdef, join(base, params)), batch, scoring)}
            loss = lambda params, part: loss_and_logs(params, base, progress, minibatch, part)
            total = gradients_of(loss, params, batch)
        return total._replace(params=constrain_like(total.params, lambda mesh: _trained(config, mesh)))

    return gradient


def abstract_policy(config: decoders.DecoderConfig, optimizer: optax.GradientTransformation, mesh) -> tuple[Any, Any]:
    """Shapes and shardings of the policy's parameters that are trained, and of its optimizer's state."""
    params = _trained(config, mesh)
    return params, state_shapes(optimizer, params)


def _trained(config: decoders.DecoderConfig, mesh) -> Any:
    return split(decoders.abstract(config, mesh)[1])[1]


def make_update(
    config: decoders.DecoderConfig, optimizer: optax.GradientTransformation, objective: Objective, scoring: Scoring
) -> Callable[[TrainState, Batch], tuple[TrainState, UpdateLog]]:
    """Builds the jitted update(state, batch) → (state, log). The state that is passed in is consumed.

    A gradient that is not finite changes nothing: the step is skipped and `skipped` is 1.

    Args:
      config: sizes of the decoder.
      optimizer: optimizer of optax.
      objective, scoring: see `make_gradient`.
    """
    gradient = make_gradient(config, objective, scoring)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch) -> tuple[TrainState, UpdateLog]:
        gradients, loss, logs = gradient(state.params, state.progress, batch, state.base)
        layout = partial(abstract_policy, config, optimizer)
        new_state, metrics = apply_gradients(optimizer, gradients, state, layout)
        mask = batch.loss_weights > 0
        flags = jnp.where(mask, 1 + logs[_CONSTRAINED], 0).astype(jnp.int8)
        place = jnp.searchsorted(jnp.array(BINS[:-1]), jnp.exp(batch.old_log_probs))
        logs |= {f'{_CONSTRAINED}_up_to_{edge:g}': logs[_CONSTRAINED] & (place == i) for i, edge in enumerate(BINS)}
        metrics |= {'loss': loss, **summarise_tokens(logs, mask)}
        progress = state.progress._replace(
            updates=state.progress.updates + 1,
            projected=state.progress.projected + metrics.get('projected_share', 0.0),
        )
        progress = jax.tree.map(partial(jnp.where, metrics['skipped'] == 0), progress, state.progress)
        return new_state._replace(progress=progress), UpdateLog(metrics, flags)

    return update


def gradients_of(loss: Callable[..., tuple[jax.Array, Any]], params, batch: Batch) -> Gradient:
    """The gradient of a loss that is a sum over tokens, micro-batch by micro-batch.

    Args:
      loss: (params, micro-batch [Z, S, …]) → loss, logs [Z, S].
      params: parameters of the loss.
      batch: arrays [M, Z, S, …].
    """

    def accumulate(i, total: Gradient) -> Gradient:
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        value, backward, logs = jax.vjp(lambda params: loss(params, part), params, has_aux=True)
        # Each layer's gradient is added in place, as soon as there is one: no second copy of all.
        sums = jax.tree.map(jax.new_ref, total.params)
        backward.with_refs(sums)(jnp.ones_like(value))
        write = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0)
        return Gradient(jax.tree.map(jax.freeze, sums), total.loss + value, jax.tree.map(write, total.logs, logs))

    count = batch.tokens.shape[0]
    _, log_shapes = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], batch))
    empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), log_shapes)
    total = Gradient(jax.tree.map(jnp.zeros_like, params), jnp.float32(0), empty)
    # How many micro-batches there are is known at run time only: one program, whatever the lengths.
    return jax.lax.fori_loop(0, micro_batches(batch), accumulate, total)


def summarise_tokens(logs: dict[str, jax.Array], mask: jax.Array) -> dict[str, jax.Array]:
    """Metrics of a batch's logs [M, Z, S]: of a bool the share of tokens, of a float the mean, of some quantiles."""
    count = jnp.maximum(jnp.sum(mask), 1)
    metrics = {}
    for name, value in logs.items():
        metrics[f'{name}_share' if value.dtype == bool else f'{name}_mean'] = jnp.sum(jnp.where(mask, value, 0)) / count
    if with_quantiles := [name for name in logs if name in _QUANTILES]:
        ranks = jnp.round(jnp.array([0.01, 0.5, 0.99]) * (count - 1)).astype(jnp.int32)
        rows = jnp.stack([jnp.where(mask, logs[name], jnp.inf) for name in with_quantiles]).reshape(
            len(with_quantiles), -1
        )
        quantiles = jnp.where(jnp.any(mask), order_statistics(rows, ranks), 0.0)
        for name, (p01, p50, p99) in zip(with_quantiles, quantiles, strict=True):
            largest = jnp.max(jnp.where(mask, logs[name], 0))
            metrics |= {f'{name}_p01': p01, f'{name}_p50': p50, f'{name}_p99': p99, f'{name}_max': largest}
    return metrics
