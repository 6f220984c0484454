"""Scores: log-probabilities of responses by the policy, by a recomputed π_old and by the reference model."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.models import decoder as decoders
from troll_jax.models.head import HeadOutput, sparse_head
from troll_jax.ops.importance import Importance
from troll_jax.ops.losses import LossInputs, Minibatch, ReferenceView
from troll_jax.ops.needs import give, needs
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.regularisers import Regulariser, evaluate
from troll_jax.ops.support import bucket_tail
from troll_jax.types import Batch, Reference, SparseLogProbs

TailRule = Annotated[Callable[[jax.Array, SparseLogProbs], tuple[SparseLogProbs, SparseLogProbs]], 'new']
"""Puts the current policy and π_old on the same tokens, see `troll_jax.ops.support`."""


class Scoring(NamedTuple):
    """Settings of log-probabilities, as the responses were sampled."""

    temperature: float  # sampling temperature
    tail_rule: TailRule  # puts both policies on common tokens: `default_tail` or `bucket_tail`
    support_size: int  # K, tokens that a sparse distribution lists at most
    support_mass: float  # 1 − δ, probability that they are to hold, see `troll_jax.sparsify`
    head_chunk: int = 1024  # tokens whose logits are in memory at a time, on each device


def make_recompute(
    config: decoders.DecoderConfig, scoring: Scoring, *, importance: Importance | None = None
) -> Callable[[dict, Batch], tuple[Batch, jax.Array, jax.Array]]:
    """Builds the jitted recompute(params, batch) → (batch, kl [], weights [M, Z, S]).

    Replaces the π_old that the sampler recorded by that of a forward pass of training, as the paper does. `kl` is the
    mean over the tokens of KL(recomputed ‖ recorded), and `weights` are what advantages are to be multiplied by.

    Args:
      config: sizes of the decoder.
      scoring: temperature, tail rule and support.
      importance: weights from the ratio of recomputed to recorded; None: all are 1.
    """
    graphdef, _ = decoders.abstract(config)

    @jax.jit
    def recompute(params, batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
        decoder = decoders.bind(graphdef, params)

        def one(part: Batch):
            mask = part.loss_weights > 0
            head = run_head(decoder, part, scoring, own_support=True)
            new, old = _apply_tail_rule(scoring.tail_rule, head, one_hot_where_masked(mask, part.old))
            kl = jnp.where(mask, jax.vmap(jax.vmap(kl_divergence))(new.log_probs, old.log_probs), 0.0)
            return head.log_probs, head.own, kl

        empty = batch.old_log_probs, batch.old, jnp.zeros_like(batch.loss_weights)
        log_probs, old, kl = for_each_micro_batch(one, batch, empty)
        weights, mask = jnp.ones_like(log_probs), batch.loss_weights > 0
        if importance is not None:
            responses = jnp.where(mask, batch.segment_ids, 0)
            weights = jax.vmap(jax.vmap(importance))(log_probs - batch.old_log_probs, responses)
        batch = batch._replace(old_log_probs=log_probs, old=old)
        return batch, jnp.sum(kl) / jnp.maximum(jnp.sum(mask), 1), weights

    return recompute


def make_reference(
    config: decoders.DecoderConfig, scoring: Scoring, *, penalty: Regulariser | None = None
) -> Callable[[dict, Batch], tuple[Batch, jax.Array]]:
    """Builds the jitted reference(params, batch) → (batch, penalties [M, Z, S]).

    Adds the log-probabilities of the reference model with these parameters to the batch. `penalties` are to be taken
    off the reward of each token.

    Args:
      config: sizes of the decoder.
      scoring: temperature and chunk of the head.
      penalty: regulariser, such as `kl_to_reference`, taken at the old policy; None: all penalties are 0.
    """
    graphdef, _ = decoders.abstract(config)

    @jax.jit
    def reference(params, batch: Batch) -> tuple[Batch, jax.Array]:
        decoder = decoders.bind(graphdef, params)

        def one(part: Batch):
            mask = part.loss_weights > 0
            head = run_head(decoder, part, scoring, own_support=False)
            found = Reference(head.log_probs, head.on_old_support)
            if penalty is None:
                return found, jnp.zeros_like(part.loss_weights)
            old = one_hot_where_masked(mask, part.old)
            row = make_row(part, part.old_log_probs, old, old, jnp.zeros_like(part.loss_weights), old.log_probs, found)
            return found, jnp.where(mask, jax.vmap(partial(evaluate, penalty))(row), 0.0)

        empty = Reference(batch.old_log_probs, batch.old.log_probs), jnp.zeros_like(batch.loss_weights)
        found, penalties = for_each_micro_batch(one, batch, empty)
        return batch._replace(reference=found), penalties

    return reference


def whole_minibatch(decoder, batch: Batch, scoring: Scoring) -> Minibatch:
    """All tokens of a batch [M, Z, S], by a forward pass of the current policy."""
    log_probs = lambda part: run_head(decoder, part, scoring, own_support=False).log_probs
    new = for_each_micro_batch(log_probs, batch, jnp.zeros_like(batch.old_log_probs))
    return Minibatch(new, batch.old_log_probs, batch.advantages, batch.loss_weights > 0)


def for_each_micro_batch(function: Callable[[Batch], Any], batch: Batch, empty: Any) -> Any:
    """`function` of each micro-batch that holds a sequence, stacked [M, …]; of the others what `empty` holds."""

    def write(i, results):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        put = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0)
        return jax.tree.map(put, results, function(part))

    return jax.lax.fori_loop(0, micro_batches(batch), write, empty)


def micro_batches(batch: Batch) -> jax.Array:
    """The number [] of micro-batches that hold a sequence; the others come last."""
    return jnp.sum(jnp.any(batch.segment_ids > 0, axis=(1, 2)))


def one_hot_where_masked(mask: jax.Array, listed: SparseLogProbs) -> SparseLogProbs:
    """Distributions [Z, S, K], with a one-hot where the mask is false.

    A NaN of padding would otherwise leak through the gradient of `where`.
    """
    first = jnp.arange(listed.tokens.shape[-1]) == 0
    return SparseLogProbs(
        jnp.where(mask[..., None], listed.tokens, jnp.where(first, 0, -1)[None, None]),
        jnp.where(mask[..., None], listed.log_probs, jnp.where(first, 0.0, -jnp.inf)[None, None]),
    )


def run_head(decoder, part: Batch, scoring: Scoring, *, own_support: bool) -> HeadOutput:
    """The HeadOutput [Z, S, …] of every token of a micro-batch; finite where its loss weight is zero."""
    hidden = decoder(part.tokens, part.positions, part.segment_ids)
    # The hidden state before a token predicts it. A sequence begins with a prompt, whose loss weights are zero.
    before = jnp.roll(hidden, 1, axis=1)
    mask = part.loss_weights > 0
    head = sparse_head(
        before,
        decoder.unembedding,
        part.tokens,
        part.old.tokens,
        mask,
        temperature=scoring.temperature,
        support_size=scoring.support_size if own_support else None,
        support_mass=scoring.support_mass,
        chunk=scoring.head_chunk,
        dtype=decoder.config.compute_dtype,
        tokenizer_size=decoder.config.tokenizer_size,
        frozen=decoder.config.lora is not None,
    )
    on_old_support = one_hot_where_masked(mask, SparseLogProbs(part.old.tokens, head.on_old_support)).log_probs
    own = None if head.own is None else one_hot_where_masked(mask, head.own)
    return head._replace(log_probs=jnp.where(mask, head.log_probs, 0.0), on_old_support=on_old_support, own=own)


def evaluate_policy(decoder, part: Batch, scoring: Scoring) -> tuple[LossInputs, dict[str, jax.Array]]:
    """The current policy on one micro-batch: LossInputs [Z, S, …], and logs [Z, S]."""
    mask = part.loss_weights > 0
    head = run_head(decoder, part, scoring, own_support=needs(scoring.tail_rule, 'new'))
    new, old = _apply_tail_rule(scoring.tail_rule, head, one_hot_where_masked(mask, part.old))
    row = make_row(part, head.log_probs, new, old, head.entropy, head.on_old_support, part.reference)
    # The mass that the current policy gives to what the old one did not list, whatever the tail rule makes of it.
    tail_mass = jnp.maximum(1 - jnp.sum(jnp.exp(head.on_old_support), axis=-1), 0.0)
    return row, {'entropy': head.entropy, 'tail_mass': tail_mass}


def _apply_tail_rule(rule: TailRule, head: HeadOutput, old: SparseLogProbs) -> tuple[SparseLogProbs, SparseLogProbs]:
    """Policy and π_old on the same tokens, [Z, S, …] each."""
    return jax.vmap(jax.vmap(rule))(head.on_old_support, old, **give(rule, new=head.own))


def make_row(
    part: Batch, new_log_probs, new, old, entropy, on_old_support: jax.Array, reference: Reference | None
) -> LossInputs:
    """The inputs of objectives and regularisers [Z, S, …]; `on_old_support` [Z, S, K] is the policy's."""
    mask = part.loss_weights > 0
    tokens, old_log_probs, segments = (
        jnp.where(mask, x, 0) for x in (part.tokens, part.old_log_probs, part.segment_ids)
    )
    view = None
    if reference is not None:
        listed = one_hot_where_masked(mask, SparseLogProbs(part.old.tokens, reference.on_old_support))
        view = ReferenceView(
            jnp.where(mask, reference.log_probs, 0.0), *jax.vmap(jax.vmap(bucket_tail))(on_old_support, listed)
        )
    return LossInputs(tokens, segments, new_log_probs, old_log_probs, new, old, entropy, view)
