"""Paged attention for decoding: queries are brought to the pages, and partial softmaxes are merged by log-sum-exp.

It reads the tokens that there are and not those that there could be. Queries, which are small, move; pages do not.
`attend` is the seat for a hand-written decode kernel. Axis letters: `troll_jax/types.py`.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.models.paged_cache import Pages
from troll_jax.sharding import constrain


class Prefixes(NamedTuple):
    """Prompts in Q places, each shared by the samples that slots are decoding of it."""

    pages: Pages  # W = Q
    lengths: jax.Array  # [E, Q] int32; 0: a free place
    sample_of_slot: jax.Array  # [E, U] int32, place · G + sample that each slot decodes; Q · G: idle
    slot_of_sample: jax.Array  # [E, Q, G] int32, the slot that decodes each sample; U: none


class View(NamedTuple):
    """The part of a pool that attention reads, the same in all layers."""

    limits: jax.Array  # [E, NP] int32, tokens of each page that its sequence sees
    chunks: jax.Array  # [] int32, how many chunks of the pool, of W pages each, hold all pages with any such token


class Partial(NamedTuple):
    """A softmax over some of the keys: Σ exp(logit − max) · value and Σ exp(logit − max)."""

    mixed: jax.Array  # [..., F] float32
    total: jax.Array  # [...] float32
    largest: jax.Array  # [...] float32; a large negative number where no key is seen


_NOTHING = jnp.finfo(jnp.float32).min


def view(pages: Pages, lengths: jax.Array) -> View:
    """The view of sequences of `lengths` [E, W] tokens."""
    seen = jax.vmap(lambda lengths, owner: jnp.append(lengths, 0)[owner])(lengths, pages.owner)
    limits = jnp.clip(seen - pages.first, 0, pages.size)
    last = jnp.max(jnp.where(limits > 0, jnp.arange(1, limits.shape[1] + 1)[None], 0))
    return View(limits, -(-last // pages.table.shape[1]))


def scratch(pages: Pages, queries: int) -> Partial:
    """Memory for `attend`: the partial softmax of each page, [E, NP, KH, X], handed from layer to layer."""
    shards, count = pages.owner.shape
    kv_heads, head_dim = (pages.k.shape[3 + pages.order.index(name)] for name in 'kf')
    shape = (shards, count, kv_heads, queries)
    zeros = lambda *shape: constrain(jnp.zeros(shape), 'batch', None, 'kv_heads', *[None] * (len(shape) - 3))
    return Partial(zeros(*shape, head_dim), zeros(*shape), zeros(*shape))


def attend(q: jax.Array, pages: Pages, layer: jax.Array, view: View, by_page: Partial) -> tuple[Partial, Partial]:
    """Attention of each sequence's queries over its own pages.

    Args:
      q: [E, W, KH, X, F].
      pages, layer: keys and values.
      view: tokens that are seen; there is one in every page of a sequence.
      by_page: `scratch`, overwritten.

    Returns:
      Partial over [E, W, KH, X], and the scratch.
    """
    shards, chunk, _ = pages.table.shape
    head_dim = q.shape[-1]

    def read(at, partials: Partial) -> Partial:
        begin = at * chunk
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, chunk, axis=1)
        zero = jnp.zeros_like(begin)
        block = (1, shards, chunk, *pages.k.shape[3:])
        k, v = (jax.lax.dynamic_slice(pool, (layer, zero, begin, zero, zero, zero), block)[0] for pool in pages[:2])
        mine = jax.vmap(lambda q, owner: q.at[owner].get(mode='fill', fill_value=0))(q, part(pages.owner))
        logits = (
            jnp.einsum(f'enkxf,en{pages.order}->enkxp', mine, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        )
        seen = jnp.arange(pages.size)[None, None, None, None] < part(view.limits)[:, :, None, None, None]
        logits = jnp.where(seen, logits, _NOTHING)
        largest = jnp.max(logits, axis=-1)
        weights = jnp.where(seen, jnp.exp(logits - largest[..., None]), 0.0)
        mixed = jnp.einsum(
            f'enkxp,en{pages.order}->enkxf', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        new = Partial(mixed, jnp.sum(weights, axis=-1), largest)
        return jax.tree.map(partial(jax.lax.dynamic_update_slice_in_dim, start_index=begin, axis=1), partials, new)

    by_page = jax.lax.fori_loop(0, view.chunks, read, by_page)

    def pick(j: int) -> Partial:
        """The partial softmax of the j-th page of each sequence."""
        page = pages.table[:, :, j]
        get = lambda x, fill: jax.vmap(lambda x, page: x.at[page].get(mode='fill', fill_value=fill))(x, page)
        return Partial(get(by_page.mixed, 0.0), get(by_page.total, 0.0), get(by_page.largest, _NOTHING))

    return merge([pick(j) for j in range(pages.table.shape[2])]), by_page


def merge(parts: Sequence[Partial]) -> Partial:
    """Merges softmaxes over different keys into one, by log-sum-exp."""
    # Sums of few terms instead of reductions of stacked ones: a compiler makes one pass of all this.
    largest = reduce(jnp.maximum, (part.largest for part in parts))
    scales = [jnp.exp(part.largest - largest) for part in parts]
    add = partial(reduce, jnp.add)
    mixed = add(part.mixed * scale[..., None] for part, scale in zip(parts, scales, strict=True))
    return Partial(mixed, add(part.total * scale for part, scale in zip(parts, scales, strict=True)), largest)


def attend_shared(
    q: jax.Array, prefixes: Prefixes, layer: jax.Array, view: View, by_page: Partial
) -> tuple[Partial, Partial]:
    """Attention of each slot's queries [E, U, KH, X, F] over the pages of its prompt, which all its samples share.

    Every page is read once for all samples of its prompt: their queries are gathered first.
    """
    shards, _, kv_heads, queries, head_dim = q.shape
    _, places, samples = prefixes.slot_of_sample.shape
    together = jax.vmap(lambda q, slot: q.at[slot].get(mode='fill', fill_value=0))(q, prefixes.slot_of_sample)
    together = together.swapaxes(2, 3).reshape(shards, places, kv_heads, samples * queries, head_dim)
    found, by_page = attend(together, prefixes.pages, layer, view, by_page)

    def apart(x):
        x = x.reshape(shards, places, kv_heads, samples, queries, *x.shape[4:]).swapaxes(2, 3)
        x = x.reshape(shards, places * samples, *x.shape[3:])
        return jax.vmap(lambda x, sample: x.at[sample].get(mode='clip'))(x, prefixes.sample_of_slot)

    return jax.tree.map(apart, found), by_page
