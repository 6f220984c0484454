"""One optimizer step on one batch: update(loss ∘ projection ∘ model)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from troll_jax.models import decoder as decoders
from troll_jax.models.head import HeadOutput, sparse_head
from troll_jax.models.layers import exact_products
from troll_jax.ops.losses import ReferenceView, TokenLogProbs, TokenLosses
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.regularisers import Regulariser, truncated_importance_weights
from troll_jax.ops.support import bucket_tail, needs_own_support
from troll_jax.optimizer import apply_gradients, state_shapes
from troll_jax.sharding import constrain, constrain_like
from troll_jax.types import Batch, Progress, Reference, SparseLogProbs, TrainState

Objective = Callable[[TokenLogProbs, jax.Array, Progress], TokenLosses]
TailRule = Callable[[jax.Array, SparseLogProbs | None, SparseLogProbs], tuple[SparseLogProbs, SparseLogProbs]]

# What the log shows the quantiles of, and not only the mean.
_QUANTILES = ('kl', 'kl_unprojected', 'kl_projected', 'weight', 'eta', 'ratio', 'evaluations')


class Gradient(NamedTuple):
    """The gradient of a batch's loss, and what its tokens show."""

    params: Any  # nested dict, as the parameters
    loss: jax.Array  # [] float32
    logs: Any  # arrays [M, Z, S]; zero in micro-batches that hold nothing


class UpdateLog(NamedTuple):
    """What an update tells of itself."""

    metrics: dict[str, jax.Array]  # scalars: over the batch's tokens
    seen: jax.Array  # [V] int32, how often each token of the vocabulary was in the batch
    held: jax.Array  # [V] int32, how often it was projected or clipped


class _Policy(NamedTuple):
    """How log-probabilities of a row are computed."""

    temperature: float
    tail_rule: TailRule
    max_tokens: int
    mass: float
    head_chunk: int


def make_gradient(
    config: decoders.DecoderConfig,
    *,
    objective: Objective,
    temperature: float,
    tail_rule: TailRule,
    max_tokens: int,
    mass: float,
    head_chunk: int = 1024,
) -> Callable[[Any, Progress, Batch], Gradient]:
    """Builds gradient(params, progress, batch) → Gradient, to be called under `jax.jit`.

    The weight of every token in the loss comes with the batch, so the gradient depends neither on how responses are
    packed into rows nor on the number of micro-batches.

    Args:
      config: of the decoder.
      objective: the loss of one row's tokens, see `troll_jax.ops.losses`.
      temperature: at which the responses were sampled.
      tail_rule: puts both policies on common tokens, `default_tail` or `bucket_tail` of `troll_jax.ops.support`.
      max_tokens, mass: of the sparse distributions, as the responses were sampled with, see `troll_jax.sparsify`.
      head_chunk: tokens per chunk of the head.
    """
    graphdef, _ = decoders.abstract(config)
    policy = _Policy(temperature, tail_rule, max_tokens, mass, head_chunk)

    def loss_and_logs(params, progress: Progress, part: Batch):
        row, logs = _evaluate_policy(decoders.bind(graphdef, params), part, policy)
        mask = part.weights > 0
        with jax.named_scope('objective'):
            losses = jax.vmap(partial(objective, progress=progress))(row, part.advantages)
            # Where there is no token, there is no loss, whatever was computed: not even NaN · 0.
            loss = jnp.sum(jnp.where(mask, losses.loss * part.weights, 0.0))
        logs |= losses.logs | {
            'kl': jax.vmap(jax.vmap(kl_divergence))(row.new.log_probs, row.old.log_probs),
            'ratio': jnp.exp(jnp.minimum(row.new_log_probs - row.old_log_probs, 80.0)),
        }
        return loss, jax.lax.stop_gradient(logs)

    def gradient(params, progress: Progress, batch: Batch) -> Gradient:
        with exact_products(config.compute_dtype):
            total = gradients_of(lambda params, part: loss_and_logs(params, progress, part), params, batch)
        return total._replace(params=constrain_like(total.params, lambda mesh: decoders.abstract(config, mesh)[1]))

    return gradient


def abstract_policy(config: decoders.DecoderConfig, optimizer: optax.GradientTransformation, mesh) -> tuple[Any, Any]:
    """Shapes and shardings of the policy's parameters and of its optimizer's state."""
    _, params = decoders.abstract(config, mesh)
    return params, state_shapes(optimizer, params)


def make_update(
    config: decoders.DecoderConfig, optimizer: optax.GradientTransformation, **loss: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, UpdateLog]]:
    """Builds the jitted update(state, batch) → (state, log). The state that is passed in is consumed.

    A gradient that is not finite changes nothing: the step is skipped and `skipped` is 1.

    Args:
      config: of the decoder.
      optimizer: from optax.
      loss: the other arguments of `make_gradient`.
    """
    gradient = make_gradient(config, **loss)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, batch: Batch) -> tuple[TrainState, UpdateLog]:
        gradients, loss, logs = gradient(state.params, state.progress, batch)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm)
        with jax.named_scope('optimizer'):
            result = apply_gradients(optimizer, gradients, state.opt_state, state.params, finite)
            params, opt_state = constrain_like(result, lambda mesh: abstract_policy(config, optimizer, mesh))
        mask = batch.weights > 0
        metrics = {'loss': loss, 'gradient_norm': norm, 'skipped': 1.0 - finite, **_summarise(logs, mask)}
        progress = state.progress._replace(
            updates=state.progress.updates + 1,
            projected=state.progress.projected + metrics.get('projected_share', 0.0),
        )
        progress = jax.tree.map(lambda new, old: jnp.where(finite, new, old), progress, state.progress)
        held = logs.get('projected', logs.get('clipped', jnp.zeros_like(mask)))
        count = lambda which: jnp.zeros(config.vocab_size, jnp.int32).at[batch.tokens].add(which & mask)
        log = UpdateLog(metrics, seen=count(mask), held=count(held))
        return state._replace(progress=progress, params=params, opt_state=opt_state), log

    return update


def gradients_of(loss: Callable[..., tuple[jax.Array, Any]], params, batch: Batch) -> Gradient:
    """The gradient of a loss that is a sum over tokens, micro-batch by micro-batch.

    Args:
      loss: (params, micro-batch [Z, S, …]) → loss, logs [Z, S].
      params: of the loss.
      batch: arrays [M, Z, S, …].
    """

    def of_part(i) -> Gradient:
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        (value, logs), gradients = jax.value_and_grad(loss, has_aux=True)(params, part)
        return Gradient(gradients, value, logs)

    def accumulate(i, total: Gradient) -> Gradient:
        part = of_part(i)
        write = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0)
        return Gradient(
            jax.tree.map(jnp.add, total.params, part.params),
            total.loss + part.loss,
            jax.tree.map(write, total.logs, part.logs),
        )

    count = batch.tokens.shape[0]
    if count == 1:
        whole = of_part(0)
        return whole._replace(logs=jax.tree.map(lambda x: x[None], whole.logs))
    _, log_shapes = jax.eval_shape(loss, params, jax.tree.map(lambda x: x[0], batch))
    empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), log_shapes)
    total = Gradient(jax.tree.map(jnp.zeros_like, params), jnp.float32(0), empty)
    # How many micro-batches there are is known at run time only: one program, whatever the lengths.
    return jax.lax.fori_loop(0, micro_batches(batch), accumulate, total)


def make_recompute(
    config: decoders.DecoderConfig,
    *,
    temperature: float,
    tail_rule: TailRule,
    max_tokens: int,
    mass: float,
    head_chunk: int = 1024,
    importance_limit: float | None = None,
) -> Callable[[dict, Batch], tuple[Batch, jax.Array, jax.Array]]:
    """Builds the jitted recompute(params, batch) → (batch, kl [], importance [M, Z, S]).

    π_old as the forward pass of training computes it takes the place of what the sampler recorded, which is how the
    paper does it. `kl` is the mean over the tokens of KL(recomputed ‖ recorded), the noise between the two, and
    `importance` what advantages are to be multiplied by. Arguments are those of `make_gradient`; the parameters must be
    the ones that sampled.

    Args:
      importance_limit: of the `truncated_importance_weights`; None: all are 1.
    """
    graphdef, _ = decoders.abstract(config)
    policy = _Policy(temperature, tail_rule, max_tokens, mass, head_chunk)

    @jax.jit
    def recompute(params, batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
        decoder = decoders.bind(graphdef, params)

        def one(part: Batch):
            mask = part.weights > 0
            head = _run_head(decoder, part, policy, own_support=True)
            new, old = jax.vmap(jax.vmap(tail_rule))(head.at_old, head.own, _stand_in(mask, part.old))
            kl = jnp.where(mask, jax.vmap(jax.vmap(kl_divergence))(new.log_probs, old.log_probs), 0.0)
            return head.log_probs, head.own, kl

        empty = batch.old_log_probs, batch.old, jnp.zeros_like(batch.weights)
        log_probs, old, kl = for_each_micro_batch(one, batch, empty)
        importance = jnp.ones_like(log_probs)
        if importance_limit is not None:
            importance = truncated_importance_weights(log_probs, batch.old_log_probs, limit=importance_limit)
        batch = batch._replace(old_log_probs=log_probs, old=old)
        return batch, jnp.sum(kl) / jnp.maximum(jnp.sum(batch.weights > 0), 1), importance

    return recompute


def make_reference(
    config: decoders.DecoderConfig,
    *,
    temperature: float,
    head_chunk: int = 1024,
    penalty: Regulariser | None = None,
) -> Callable[[dict, Batch], tuple[Batch, jax.Array]]:
    """Builds the jitted reference(params, batch) → (batch, penalties [M, Z, S]).

    What the reference model with these parameters says of the batch's tokens becomes a part of it. `penalties` are what
    to take off the reward of each token: those of `penalty`, such as `kl_to_reference`, at the old policy.

    Args:
      config, temperature, head_chunk: as of `make_gradient`.
      penalty: None: all are 0.
    """
    graphdef, _ = decoders.abstract(config)
    policy = _Policy(temperature, bucket_tail, 0, 1.0, head_chunk)

    @jax.jit
    def reference(params, batch: Batch) -> tuple[Batch, jax.Array]:
        decoder = decoders.bind(graphdef, params)

        def one(part: Batch):
            mask = part.weights > 0
            head = _run_head(decoder, part, policy, own_support=False)
            said = Reference(head.log_probs, head.at_old)
            if penalty is None:
                return said, jnp.zeros_like(part.weights)
            old = _stand_in(mask, part.old)
            row = _row(part, part.old_log_probs, old, old, jnp.zeros_like(part.weights), old.log_probs, said)
            return said, jnp.where(mask, jax.vmap(penalty)(row), 0.0)

        empty = Reference(batch.old_log_probs, batch.old.log_probs), jnp.zeros_like(batch.weights)
        said, penalties = for_each_micro_batch(one, batch, empty)
        return batch._replace(reference=said), penalties

    return reference


def for_each_micro_batch(function: Callable[[Batch], Any], batch: Batch, empty: Any) -> Any:
    """`function` of each micro-batch that holds a sequence, stacked [M, …]; of the others what `empty` holds."""

    def write(i, results):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        put = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0)
        return jax.tree.map(put, results, function(part))

    return jax.lax.fori_loop(0, micro_batches(batch), write, empty)


def micro_batches(batch: Batch) -> jax.Array:
    """How many micro-batches hold a sequence; the others come last."""
    return jnp.sum(jnp.any(batch.segment_ids > 0, axis=(1, 2)))


def _stand_in(mask: jax.Array, listed: SparseLogProbs) -> SparseLogProbs:
    """Distributions [Z, S, K], with one that is certain of token 0 where the mask is false.

    A NaN that is computed there from nothing would come back through the gradient of a `where`.
    """
    first = jnp.arange(listed.tokens.shape[-1]) == 0
    return SparseLogProbs(
        jnp.where(mask[..., None], listed.tokens, jnp.where(first, 0, -1)[None, None]),
        jnp.where(mask[..., None], listed.log_probs, jnp.where(first, 0.0, -jnp.inf)[None, None]),
    )


def _run_head(decoder, part: Batch, policy: _Policy, own_support: bool) -> HeadOutput:
    """HeadOutput [Z, S, …] of each token, given what stands before it in its sequence; harmless at other tokens."""
    hidden = decoder(part.tokens, part.positions, part.segment_ids)
    # The hidden state before a token predicts it. A sequence begins with a prompt, of which nothing is learnt.
    before = jnp.roll(hidden, 1, axis=1)
    rows, length = part.tokens.shape
    mask = part.weights > 0
    flatten = lambda x: constrain(x.reshape(rows * length, *x.shape[2:]), 'batch', *[None] * (x.ndim - 2))
    head = sparse_head(
        flatten(before),
        decoder.unembedding,
        flatten(part.tokens),
        flatten(part.old.tokens),
        flatten(mask),
        temperature=policy.temperature,
        max_tokens=policy.max_tokens if own_support else None,
        mass=policy.mass,
        chunk=policy.head_chunk,
        dtype=decoder.config.compute_dtype,
    )
    head = jax.tree.map(lambda x: x.reshape(rows, length, *x.shape[1:]), head)
    at_old = _stand_in(mask, SparseLogProbs(part.old.tokens, head.at_old)).log_probs
    own = None if head.own is None else _stand_in(mask, head.own)
    return head._replace(log_probs=jnp.where(mask, head.log_probs, 0.0), at_old=at_old, own=own)


def _evaluate_policy(decoder, part: Batch, policy: _Policy) -> tuple[TokenLogProbs, dict[str, jax.Array]]:
    """The current policy on one micro-batch: TokenLogProbs [Z, S, …], and logs [Z, S]."""
    mask = part.weights > 0
    head = _run_head(decoder, part, policy, own_support=needs_own_support(policy.tail_rule))
    new, old = jax.vmap(jax.vmap(policy.tail_rule))(head.at_old, head.own, _stand_in(mask, part.old))
    row = _row(part, head.log_probs, new, old, head.entropy, head.at_old, part.reference)
    # The mass that the current policy gives to what the old one did not list, whatever the tail rule makes of it.
    tail_mass = jnp.maximum(1 - jnp.sum(jnp.exp(head.at_old), axis=-1), 0.0)
    return row, {'entropy': head.entropy, 'tail_mass': tail_mass}


def _row(part: Batch, new_log_probs, new, old, entropy, at_old: jax.Array, said: Reference | None) -> TokenLogProbs:
    """What objectives and regularisers see [Z, S, …]; at_old [Z, S, K] is the policy on the tokens that π_old lists."""
    mask = part.weights > 0
    tokens, old_log_probs, segments = (
        jnp.where(mask, x, 0) for x in (part.tokens, part.old_log_probs, part.segment_ids)
    )
    view = None
    if said is not None:
        listed = _stand_in(mask, SparseLogProbs(part.old.tokens, said.at_old))
        bucket = jax.vmap(jax.vmap(lambda at_old, listed: bucket_tail(at_old, None, listed)))
        policy, reference = bucket(at_old, listed)
        view = ReferenceView(jnp.where(mask, said.log_probs, 0.0), policy, reference)
    return TokenLogProbs(tokens, segments, new_log_probs, old_log_probs, new, old, entropy, view)


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
