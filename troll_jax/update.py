"""One optimizer step on one minibatch: update(loss ∘ projection ∘ model)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from troll_jax.models import decoder as decoders
from troll_jax.models.head import sparse_head
from troll_jax.ops.losses import ResponseLogProbs, TokenLosses
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.support import needs_own_support
from troll_jax.sharding import constrain
from troll_jax.types import Batch, Progress, Rollout, SparseLogProbs, TrainState

Objective = Callable[[ResponseLogProbs, jax.Array, Progress], TokenLosses]
Aggregation = Callable[[jax.Array], jax.Array]
TailRule = Callable[[jax.Array, SparseLogProbs | None, SparseLogProbs], tuple[SparseLogProbs, SparseLogProbs]]

# What the log shows the quantiles of, and not only the mean.
_QUANTILES = ('kl', 'kl_unprojected', 'kl_projected', 'weight', 'eta', 'ratio', 'evaluations')


class UpdateLog(NamedTuple):
    """What an update tells of itself."""

    metrics: dict[str, jax.Array]  # scalars: over the batch's tokens
    seen: jax.Array  # [V] int32, how often each token of the vocabulary was in the batch
    held: jax.Array  # [V] int32, how often it was projected or clipped


def response_mask(batch: Batch) -> jax.Array:
    """[R, T] bool, true at the tokens of the responses. From lengths, never from token ids."""
    room = batch.old_log_probs.shape[1]
    return jnp.arange(room)[None, :] < batch.response_lengths[:, None]


def make_batch(rollout: Rollout, advantages: jax.Array) -> Batch:
    """The batch that a rollout and the advantages [R] of its responses make."""
    return Batch(
        tokens=rollout.tokens,
        prompt_lengths=rollout.prompt_lengths,
        response_lengths=rollout.response_lengths,
        advantages=advantages,
        old_log_probs=rollout.log_probs,
        old=rollout.support,
    )


def minibatches(batch: Batch, count: int, samples_per_prompt: int) -> Iterator[Batch]:
    """Splits a batch of B prompts into `count` of B / count prompts, each with all of its samples."""
    for i in range(count):
        yield _minibatch(batch, i, count, samples_per_prompt)


@partial(jax.jit, static_argnums=(2, 3))
def _minibatch(batch: Batch, i: int, count: int, samples_per_prompt: int) -> Batch:
    def select(x):
        # Every count-th prompt, so that a sharded axis stays where it is.
        groups = x.reshape(-1, count, samples_per_prompt, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(groups, i, 1, keepdims=False).reshape(-1, *x.shape[1:])

    return jax.tree.map(select, batch)


def make_update(
    config: decoders.DecoderConfig,
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective,
    aggregation: Aggregation,
    temperature: float,
    tail_rule: TailRule,
    max_tokens: int,
    mass: float,
    micro_batches: int = 1,
    head_chunk: int = 1024,
) -> Callable[[TrainState, Batch], tuple[TrainState, UpdateLog]]:
    """Builds the jitted update(state, batch) → (state, log). The state that is passed in is consumed.

    The weight of every token in the loss is fixed by the aggregation over the whole batch before it is split, so the
    gradient does not depend on the number of micro-batches. A gradient that is not finite changes nothing: the step is
    skipped and `skipped` is 1.

    Args:
      config: of the decoder.
      optimizer: from optax.
      objective: the loss of one response's tokens, see `troll_jax.ops.losses`.
      aggregation: weights of the tokens in the loss.
      temperature: at which the responses were sampled.
      tail_rule: puts both policies on common tokens, `default_tail` or `bucket_tail` of `troll_jax.ops.support`.
      max_tokens, mass: of the sparse distributions, as the responses were sampled with, see `troll_jax.sparsify`.
      micro_batches: how many parts the batch is worked through in, to save memory. Divides R.
      head_chunk: tokens per chunk of the head.
    """
    graphdef, _ = decoders.abstract(config)

    def loss_and_logs(params, progress: Progress, batch: Batch, weights):
        decoder = decoders.bind(graphdef, params)
        response, logs = _evaluate_policy(
            decoder,
            batch,
            temperature=temperature,
            tail_rule=tail_rule,
            max_tokens=max_tokens,
            mass=mass,
            head_chunk=head_chunk,
        )
        mask = response.mask
        with jax.named_scope('objective'):
            advantages = jnp.broadcast_to(batch.advantages[:, None], mask.shape)
            losses = jax.vmap(partial(objective, progress=progress))(response, advantages)
            # Where there is no token, there is no loss, whatever was computed: not even NaN · 0.
            loss = jnp.sum(jnp.where(mask, losses.loss * weights, 0.0))
        logs |= losses.logs | {
            'kl': jax.vmap(jax.vmap(kl_divergence))(response.new.log_probs, response.old.log_probs),
            'ratio': jnp.exp(jnp.minimum(response.new_log_probs - response.old_log_probs, 80.0)),
        }
        return loss, jax.lax.stop_gradient((logs, response.tokens, mask))

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch) -> tuple[TrainState, UpdateLog]:
        weights = aggregation(response_mask(batch))
        parts = jax.tree.map(partial(_split, parts=micro_batches), (batch, weights))

        def accumulate(gradients, part):
            (loss, logs), new = jax.value_and_grad(loss_and_logs, has_aux=True)(state.params, state.progress, *part)
            return jax.tree.map(jnp.add, gradients, new), (loss, logs)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        gradients, (losses, (logs, tokens, mask)) = jax.lax.scan(accumulate, zeros, parts)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm)
        with jax.named_scope('optimizer'):
            changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, changes)
        keep = lambda new, old: jnp.where(finite, new, old)
        metrics = {'loss': jnp.sum(losses), 'gradient_norm': norm, 'skipped': 1.0 - finite, **_summarise(logs, mask)}
        progress = state.progress._replace(
            updates=state.progress.updates + 1,
            projected=state.progress.projected + metrics.get('projected_share', 0.0),
        )
        new_state = jax.tree.map(keep, TrainState(progress, params, opt_state), state)
        held = logs.get('projected', logs.get('clipped', jnp.zeros_like(mask)))
        count = lambda which: jnp.zeros(config.vocab_size, jnp.int32).at[tokens].add(which & mask)
        log = UpdateLog(metrics, seen=count(mask), held=count(held))
        return new_state, log

    return update


def _evaluate_policy(decoder, batch: Batch, *, temperature, tail_rule, max_tokens, mass, head_chunk):
    """The current policy on the batch's responses: ResponseLogProbs [R, T, …], and logs [R, T]."""
    rows, length = batch.tokens.shape
    room = batch.old_log_probs.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    valid = index < (batch.prompt_lengths + batch.response_lengths)[:, None]
    hidden = decoder(batch.tokens, index, valid.astype(jnp.int32))
    # The hidden state before a token predicts it. Past the response's end anything will do.
    at = jnp.minimum(batch.prompt_lengths[:, None] + jnp.arange(room)[None, :], length - 1)
    tokens = jnp.take_along_axis(batch.tokens, at, axis=1)
    before = jnp.take_along_axis(hidden, at[:, :, None] - 1, axis=1)
    flatten = lambda x: constrain(x.reshape(rows * room, *x.shape[2:]), 'batch', *[None] * (x.ndim - 2))
    head = sparse_head(
        flatten(before),
        decoder.unembedding,
        flatten(tokens),
        flatten(batch.old.tokens),
        temperature=temperature,
        max_tokens=max_tokens if needs_own_support(tail_rule) else None,
        mass=mass,
        chunk=head_chunk,
        dtype=decoder.config.compute_dtype,
    )
    head = jax.tree.map(lambda x: x.reshape(rows, room, *x.shape[1:]), head)
    new, old = jax.vmap(jax.vmap(tail_rule))(head.at_old, head.own, batch.old)
    mask = response_mask(batch)
    response = ResponseLogProbs(tokens, mask, head.log_probs, batch.old_log_probs, new, old)
    # The mass that the current policy gives to what the old one did not list, whatever the tail rule makes of it.
    tail_mass = jnp.maximum(1 - jnp.sum(jnp.exp(head.at_old), axis=-1), 0.0)
    return response, {'entropy': head.entropy, 'tail_mass': tail_mass}


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[R, ...] → [parts, R / parts, ...], in strides, so that a sharded axis stays where it is."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def _summarise(logs: dict[str, jax.Array], mask: jax.Array) -> dict[str, jax.Array]:
    """Of a bool the share of tokens, of a float the mean, and of some the quantiles."""
    count = jnp.maximum(jnp.sum(mask), 1)
    metrics = {}
    for name, value in logs.items():
        metrics[f'{name}_share' if value.dtype == bool else f'{name}_mean'] = jnp.sum(jnp.where(mask, value, 0)) / count
        if name in _QUANTILES:
            ranks = jnp.round(jnp.array([0.01, 0.5, 0.99]) * (count - 1)).astype(jnp.int32)
            quantiles = _order_statistics(jnp.where(mask, value, jnp.inf), ranks)
            p01, p50, p99 = jnp.where(jnp.any(mask), quantiles, 0.0)
            largest = jnp.max(jnp.where(mask, value, 0))
            metrics |= {f'{name}_p01': p01, f'{name}_p50': p50, f'{name}_p99': p99, f'{name}_max': largest}
    return metrics


def _order_statistics(values: jax.Array, ranks: jax.Array) -> jax.Array:
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
