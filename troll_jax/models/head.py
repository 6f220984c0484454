"""The sparse head, hidden states to log-probabilities: no array of N × V numbers exists, forward or backward.

Tokens with zero loss weight, such as those of prompts, are moved to the end, and chunks of only such tokens are not
computed.

The derivative is written out, because of all logits it needs no more than the log-sum-exp of every token: they are
computed again, chunk by chunk, and a token that is not listed has the gradient −p · Σ g. With the vocabulary sharded
each shard does this for its part. Of a token travel K candidates per shard, sums (log-sum-exp, entropy, listed
log-probabilities) and the gradient [D] of its hidden state, but no logits. Axis letters: `troll_jax/types.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.models.layers import exact_products
from troll_jax.ops.categorical import largest, summarise
from troll_jax.ops.support import select
from troll_jax.sharding import RULES, platform, shard_map
from troll_jax.types import SparseLogProbs

_TOKENS, _VOCAB, _EMBED = (*RULES['rows'], RULES['length']), RULES['vocab'], RULES['embed']
_ROWS = ('rows', 'length')
_NOTHING = -1e30  # a logit


class HeadOutput(NamedTuple):
    """Outputs for the tokens of Z rows: the inputs of losses and metrics."""

    log_probs: jax.Array  # [Z, S] of the tokens given
    entropy: jax.Array  # [Z, S] nats
    on_old_support: jax.Array  # [Z, S, K] log π̃ of the tokens that π_old lists
    own: SparseLogProbs | None  # [Z, S, K'] π̃ on its own most probable tokens


class _Settings(NamedTuple):
    tokenizer_size: int | None
    temperature: float
    support_size: int | None
    support_mass: float
    chunk: int
    dtype: str
    frozen: bool


def logits(
    hidden: jax.Array,
    unembedding: jax.Array,
    *,
    temperature: float,
    dtype,
    tokenizer_size: int | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """[..., V'] float32 logits of hidden states [..., D] at a temperature. The product is taken in `dtype`.

    Args:
      hidden: [..., D]
      unembedding: [V', D] of the tokens from `first` on.
      temperature: sampling temperature.
      dtype: dtype of the matrix product.
      tokenizer_size: ids from here on belong to no token; they get no probability and no gradient. None: all do.
      first: the first token of this part of the vocabulary.
    """
    with exact_products(dtype):
        product = jnp.einsum(
            '...d,vd->...v', hidden.astype(dtype), unembedding.astype(dtype), preferred_element_type=jnp.float32
        )
    scores = product / temperature
    if tokenizer_size is None:
        return scores
    # Not −inf: probabilities are multiplied by their logarithms, and 0 · −inf is NaN.
    return jnp.where(first + jnp.arange(unembedding.shape[0]) < tokenizer_size, scores, _NOTHING)


def sparse_head(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    old_tokens: jax.Array,
    mask: jax.Array,
    *,
    temperature: float,
    support_size: int | None,
    support_mass: float,
    chunk: int,
    dtype,
    tokenizer_size: int | None = None,
    frozen: bool = False,
) -> HeadOutput:
    """Log-probabilities of the tokens of Z rows, and of those that the current policy and the old one list.

    Args:
      hidden: [Z, S, D]
      unembedding: [V, D]
      tokens: [Z, S] int32
      old_tokens: [Z, S, K] the support of the distribution that each token was sampled from, padded with −1.
      mask: [Z, S] bool; outputs of a token where it is false have no meaning, and no gradient.
      temperature: sampling temperature; the policy is the one that sampled.
      support_size, support_mass: size and mass of the current policy's own support, see `troll_jax.sparsify`; those
        that the old one was made with. None: the current policy's own support is not needed.
      chunk: tokens whose logits are in memory at a time, on each device that holds tokens.
      dtype: dtype of the matrix product.
      tokenizer_size: ids from here on belong to no token, see `logits`.
      frozen: true: the gradient of `unembedding` is not computed, and taken as zero.

    Returns:
      HeadOutput, differentiable in `hidden` and `unembedding`.
    """
    settings = _Settings(tokenizer_size, temperature, support_size, support_mass, chunk, str(jnp.dtype(dtype)), frozen)
    with jax.named_scope('head'):
        return _head(settings, hidden, unembedding, tokens, old_tokens, mask)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head(settings, hidden, unembedding, tokens, old_tokens, mask) -> HeadOutput:
    return _head_forward(settings, hidden, unembedding, tokens, old_tokens, mask)[0]


def _head_forward(settings, hidden, unembedding, tokens, old_tokens, mask):
    output, normaliser = shard_map(
        partial(_forward, settings),
        (_ROWS, ('vocab', 'embed'), _ROWS, _ROWS, _ROWS),
        (_ROWS, _ROWS),
    )(hidden, unembedding, tokens, old_tokens, mask)
    own_tokens = None if output.own is None else output.own.tokens
    return output, (hidden, unembedding, tokens, old_tokens, mask, own_tokens, normaliser, output.entropy)


def _head_backward(settings, residuals, gradients: HeadOutput):
    hidden, unembedding, tokens, old_tokens, mask, own_tokens, normaliser, entropy = residuals
    # Tokens and their gradients: one list per position, of which padding gets nothing.
    listed = [(tokens[..., None], gradients.log_probs[..., None]), (old_tokens, gradients.on_old_support)]
    if own_tokens is not None:
        listed.append((own_tokens, gradients.own.log_probs))
    at, at_gradients = (jnp.concatenate(x, axis=-1) for x in zip(*listed, strict=True))
    at_gradients = jnp.where((at >= 0) & mask[..., None], at_gradients, 0.0)
    d_entropy = jnp.where(mask, gradients.entropy, 0.0)
    d_hidden, d_unembedding = shard_map(
        partial(_backward, settings),
        (_ROWS, ('vocab', 'embed'), *[_ROWS] * 6),
        (_ROWS, ('vocab', 'embed')),
    )(hidden, unembedding, mask, normaliser, entropy, d_entropy, at, at_gradients)
    return d_hidden, d_unembedding, None, None, None


_head.defvjp(_head_forward, _head_backward)


def _forward(settings: _Settings, hidden, unembedding, tokens, old_tokens, mask):
    """HeadOutput of one device's tokens, and their normaliser [Z, S, 2]: largest logit, log Σ exp(logit − largest).

    Kept apart: their sum would be rounded at the size of the logits, and every log-probability with it.
    """
    part = _gather(unembedding.astype(settings.dtype), _EMBED)
    first = jax.lax.axis_index(_VOCAB) * part.shape[0]  # the first token of this part of the vocabulary

    def one_chunk(inputs):
        hidden, tokens, old_tokens = inputs
        scores = _logits(settings, hidden, part, first)
        # The blocks of this part; maximum, normaliser and entropy of the whole vocabulary.
        blocks = jax.vmap(partial(summarise, axis_name=_VOCAB, one_pass=platform() != 'cpu', gather=False))(scores)
        normaliser = jnp.stack([blocks.largest, blocks.log_sum], axis=1)
        at = jnp.concatenate([tokens[:, None], old_tokens], axis=1)
        local, here = _local(at, first, part.shape[0])
        at_log_probs = _normalised(jnp.take_along_axis(scores, local, axis=1), normaliser)
        at_log_probs = jax.lax.psum(jnp.where(here, at_log_probs, 0.0), _VOCAB)
        at_log_probs = jnp.where(at >= 0, at_log_probs, -jnp.inf)
        own = None
        if settings.support_size is not None:
            count = min(settings.support_size, part.shape[0])
            best, best_log_probs = jax.vmap(partial(largest, k=count))(blocks)
            best_log_probs, best = _gather(best_log_probs, _VOCAB), _gather(best, _VOCAB)
            best_log_probs, places = jax.lax.top_k(best_log_probs, settings.support_size)
            best = jnp.take_along_axis(best, places, axis=1)
            own = jax.vmap(partial(select, support_mass=settings.support_mass))(
                best, best_log_probs, tokens, at_log_probs[:, 0]
            )
        return HeadOutput(at_log_probs[:, 0], blocks.entropy, at_log_probs[:, 1:], own), normaliser

    # One chunk after the other; those of zero loss weight give nothing but zeros.
    chunks = _Chunks.of(mask, settings.chunk)
    inputs = chunks.split((hidden, tokens, old_tokens))
    skip = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    empty = jax.eval_shape(one_chunk, jax.tree.map(lambda x: x[0], inputs))
    outputs = jax.lax.map(
        lambda chunk: jax.lax.cond(chunk[0], one_chunk, lambda _: skip(empty), chunk[1]), (chunks.needed, inputs)
    )
    return chunks.join(outputs)


def _backward(settings: _Settings, hidden, unembedding, mask, normaliser, entropy, d_entropy, at, d_at):
    """Gradients by one device's hidden states and its part of the unembedding."""
    part = _gather(unembedding.astype(settings.dtype), _EMBED)
    first = jax.lax.axis_index(_VOCAB) * part.shape[0]  # the first token of this part of the vocabulary

    def one_chunk(d_part, inputs):
        hidden, normaliser, entropy, d_entropy, at, d_at = inputs
        scores = _logits(settings, hidden, part, first)
        total = jnp.sum(d_at, axis=1, keepdims=True)

        def d_score(score, d_listed=0.0):
            # Of log p(i) the gradient by logit j is [i = j] − p(j), of the entropy −p(j) (log p(j) + H).
            log_prob = _normalised(score, normaliser)
            dense = -jnp.exp(log_prob) * (total + d_entropy[:, None] * (log_prob + entropy[:, None]))
            return ((dense + d_listed) / settings.temperature).astype(settings.dtype)

        # Written once, in the dtype of the products; then what is listed, each token once.
        local, here = _local(at, first, part.shape[0])
        same = at[:, :, None] == at[:, None, :]
        listed = jnp.sum(jnp.where(same, d_at[:, None, :], 0.0), axis=2)
        here &= ~jnp.any(jnp.tril(same, -1), axis=2)
        d_listed = d_score(jnp.take_along_axis(scores, local, axis=1), listed)
        place = jnp.where(here, local, part.shape[0] + jnp.arange(at.shape[1]))  # of no token: past the end
        write = lambda row, at, values: row.at[at].set(values, mode='drop', unique_indices=True)
        d_scores = jax.vmap(write)(d_score(scores), place, d_listed)
        with exact_products(settings.dtype):
            d_hidden = jnp.einsum('nv,vd->nd', d_scores, part, preferred_element_type=jnp.float32)
            if not settings.frozen:
                d_part += jnp.einsum(
                    'nv,nd->vd', d_scores, hidden.astype(part.dtype), preferred_element_type=jnp.float32
                )
        return d_part, d_hidden

    chunks = _Chunks.of(mask, settings.chunk)
    inputs = chunks.split((hidden, normaliser, entropy, d_entropy, at, d_at))

    def step(d_part, chunk):
        # No round or one. Not `cond`, out of which XLA copies the whole gradient for every chunk.
        needed, inputs = chunk
        carry = d_part, jnp.zeros(inputs[0].shape, jnp.float32)
        return jax.lax.fori_loop(0, needed.astype(int), lambda _, carry: one_chunk(carry[0], inputs), carry)

    d_part = None if settings.frozen else jnp.zeros(part.shape, jnp.float32)
    d_part, d_hidden = jax.lax.scan(step, d_part, (chunks.needed, inputs))
    d_hidden = jax.lax.psum(chunks.join(d_hidden), _VOCAB).astype(hidden.dtype)
    if settings.frozen:
        return d_hidden, None
    # The sum over the tokens of all devices, of which each keeps its part of D.
    d_part = jax.lax.psum_scatter(d_part, _EMBED, scatter_dimension=1, tiled=True)
    d_part = jax.lax.psum(d_part, tuple(axis for axis in _TOKENS if axis not in _EMBED))
    return d_hidden, d_part.astype(unembedding.dtype)


def _normalised(scores: jax.Array, normaliser: jax.Array) -> jax.Array:
    """Log-probabilities of logits [N, …]; in this order, or they would be rounded at the size of the logits."""
    return (scores - normaliser[:, :1]) - normaliser[:, 1:]


def _logits(settings: _Settings, hidden: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    return logits(
        hidden,
        part,
        temperature=settings.temperature,
        dtype=settings.dtype,
        tokenizer_size=settings.tokenizer_size,
        first=first,
    )


_gather = partial(jax.lax.all_gather, axis=1, tiled=True)  # along the second axis, over a mesh axis


def _local(tokens: jax.Array, first: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
    """Indices of tokens [N, K] in the part of the vocabulary that begins at `first`, and a mask of those inside it."""
    local = tokens - first
    here = (local >= 0) & (local < size) & (tokens >= 0)
    return jnp.where(here, local, 0), here


class _Chunks(NamedTuple):
    """The N tokens of a device in C chunks of one size, those that are needed first."""

    place: jax.Array  # [Z, S] index of a token in the concatenated chunks
    order: jax.Array  # [C, size] the token at that index; N past the last
    needed: jax.Array  # [C] bool, chunks that hold a token of the mask, on any device

    @classmethod
    def of(cls, mask: jax.Array, chunk: int) -> '_Chunks':
        shape, count, mask = mask.shape, mask.size, mask.reshape(-1)
        size = min(chunk, count)
        total = -(-count // size) * size
        needed = jnp.sum(mask)
        place = jnp.where(mask, jnp.cumsum(mask) - 1, needed + jnp.cumsum(~mask) - 1)
        order = jnp.full(total, count, jnp.int32).at[place].set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
        # The same on all devices, which have to meet in the sums of a chunk.
        needed = jnp.arange(0, total, size) < jax.lax.pmax(needed, _TOKENS)
        return cls(place.reshape(shape), order.reshape(-1, size), needed)

    def split(self, inputs):
        """[Z, S, ...] → [C, size, ...], filled up with zeros."""
        flat = lambda x: x.reshape(self.place.size, *x.shape[self.place.ndim :])
        return jax.tree.map(lambda x: flat(x).at[self.order].get(mode='fill', fill_value=0), inputs)

    def join(self, outputs):
        """[C, size, ...] → [Z, S, ...]."""
        return jax.tree.map(lambda x: x.reshape(self.order.size, *x.shape[2:])[self.place], outputs)
