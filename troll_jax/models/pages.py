"""Keys and values in pages, so that attention while decoding reads what there is and not what there could be.

A user of pages is whatever has one growing text: a prompt, whose pages serve all of its samples, or a slot with the
response that it is decoding. Users take pages of a common pool as they grow and give them back when they end; the
lowest free ones come first, so that the pages in use lie close together and attention is a loop over few chunks of the
pool. No page is ever copied: queries, which are small, are brought to the pages, and what each page says to them is put
together per user, as the parts of one softmax.

Letters besides those of `decoder.py`: E shards of the batch (each with users and pages of its own), U users, N pages,
J pages that a user may have, X queries of a user per key-value head.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.sharding import RULES, constrain, current_mesh, platform

_AXES = {'p': None, 'm': 'kv_heads', 'f': 'head_dim'}


class Pages(NamedTuple):
    """A pool of pages and who has them."""

    k: jax.Array  # [layers, E, N, M, page, F] compute dtype
    v: jax.Array  # [layers, E, N, M, page, F]
    owner: jax.Array  # [E, N] int32, the user of each page; U: free
    first: jax.Array  # [E, N] int32, the index of its first token in the text of its user
    table: jax.Array  # [E, U, J] int32, the pages of each user in order; N: none

    order = 'mpf'  # of the last axes of k and v: heads, tokens of the page, components

    @property
    def size(self) -> int:
        """Tokens in a page."""
        return self.k.shape[3 + self.order.index('p')]

    def lay_out(self) -> 'Pages':
        """Each shard's part on its own devices."""
        k, v = (constrain(x, 'layers', 'batch', None, *(_AXES[name] for name in self.order)) for x in self[:2])
        return type(self)(k, v, *(constrain(x, 'batch', *[None] * (x.ndim - 1)) for x in self[2:]))


class TokenPages(Pages):
    """Pages with tokens before heads, so that a token is written in one piece: [layers, E, N, page, M, F]."""

    order = 'pmf'


def response_pages(config) -> type[Pages]:
    """The kind of pages for responses, into which single tokens are written.

    A TPU's compiler lays such a pool out with tokens before heads, and copies one of another order where a program
    begins and ends. With a single head on each device both orders are the same but for the padding: the last but one
    axis comes in eights, and must not be the heads. On a CPU attention reads heads before tokens faster.
    """
    mesh = current_mesh()
    heads = config.kv_heads // (1 if mesh is None else mesh.shape[RULES['kv_heads']])
    return TokenPages if platform() == 'tpu' and heads > 1 else Pages


class Prefixes(NamedTuple):
    """Prompts in Q places, each with the samples that slots are decoding of it."""

    pages: Pages  # of users Q
    lengths: jax.Array  # [E, Q] int32; 0: a free place
    member: jax.Array  # [E, U] int32, place · G + sample of what each slot decodes; Q · G: idle
    slots: jax.Array  # [E, Q, G] int32, the slot that decodes each sample; U: none


class View(NamedTuple):
    """What attention reads, the same in all layers."""

    limits: jax.Array  # [E, N] int32, tokens of each page that its user sees
    chunks: jax.Array  # [] int32, how many chunks of the pool, of U pages each, hold all pages with any such token


class Partial(NamedTuple):
    """A softmax over some of the keys: Σ exp(logit − max) · value and Σ exp(logit − max)."""

    mixed: jax.Array  # [..., F] float32
    total: jax.Array  # [...] float32
    largest: jax.Array  # [...] float32; a large negative number where no key is seen


_NOTHING = jnp.finfo(jnp.float32).min


def init_pages(kind: type[Pages], config, shards: int, users: int, length: int, page: int) -> Pages:
    """A pool in which every user may grow to `length` tokens."""
    each = -(-length // page)
    sizes = {'p': page, 'm': config.kv_heads, 'f': config.head_dim}
    shape = (config.layers, shards, users * each, *(sizes[name] for name in kind.order))
    integers = lambda value, *sizes: jnp.full((shards, *sizes), value, jnp.int32)
    pages = kind(
        *(jnp.zeros(shape, config.compute_dtype) for _ in range(2)),
        owner=integers(users, users * each),
        first=integers(0, users * each),
        table=integers(users * each, users, each),
    )
    return pages.lay_out()


def grow(pages: Pages, lengths: jax.Array) -> Pages:
    """Gives every user [E, U] the pages that it lacks for a text of `lengths` tokens."""

    def one_shard(owner, first, table, lengths):
        count, (users, each) = owner.size, table.shape
        begins = jnp.arange(each) * pages.size
        wanted = ((table == count) & (begins[None] < lengths[:, None])).reshape(-1)
        # The i-th page that is wanted is the i-th free one.
        free = jnp.nonzero(owner == users, size=count, fill_value=count)[0]
        page = jnp.where(wanted, free[jnp.cumsum(wanted) - 1], count).astype(jnp.int32)
        owner = owner.at[page].set(jnp.repeat(jnp.arange(users, dtype=jnp.int32), each), mode='drop')
        first = first.at[page].set(jnp.tile(begins.astype(jnp.int32), users), mode='drop')
        return owner, first, jnp.where(wanted, page, table.reshape(-1)).reshape(table.shape)

    owner, first, table = jax.vmap(one_shard)(pages.owner, pages.first, pages.table, lengths)
    return pages._replace(owner=owner, first=first, table=table)


def release(pages: Pages, ended: jax.Array) -> Pages:
    """Takes all pages back from the users [E, U] bool that have ended."""
    count, users = pages.owner.shape[1], ended.shape[1]
    gone = jax.vmap(lambda ended, owner: jnp.append(ended, False)[owner])(ended, pages.owner)
    return pages._replace(
        owner=jnp.where(gone, users, pages.owner), table=jnp.where(ended[:, :, None], count, pages.table)
    )


def pages_of(pages: Pages, index: jax.Array) -> jax.Array:
    """The page [E, U] of each user in which token `index` [E, U] of its text lies; N if it has none there."""
    each = pages.table.shape[2]
    place = jnp.clip(index // pages.size, 0, each - 1)
    return jnp.take_along_axis(pages.table, place[:, :, None], axis=2)[:, :, 0]


def write_token(
    pool: jax.Array, layer: jax.Array, page: jax.Array, offset: jax.Array, new: jax.Array, *, order: str
) -> jax.Array:
    """pool[layer, e, page[e, u], :, offset[e, u]] = new[e, u], for pages that exist, with axes in the order 'mpf'.

    Args:
      pool: [layers, E, N, *one page], page and offset: [E, U], new: [E, U, M, F].
      order: of a page's axes, `Pages.order`.

    Written as a scatter whose batch axis is named as such: plain indexing is the same, but the compiler cannot see that
    a shard only writes to itself, and gathers `new` over the mesh's batch axes.
    """
    indices = jnp.stack([jnp.full_like(page, layer), page, offset], axis=-1)
    at = (0, 2, 3 + order.index('p'))
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=at,
        scatter_dims_to_operand_dims=at,
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        pool, indices, new.astype(pool.dtype), dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP
    )


def write_pages(pool: jax.Array, page: jax.Array, new: jax.Array) -> jax.Array:
    """pool[:, e, page[e, i]] = new[:, e, i], for pages [E, I] that exist; new: [layers, E, I, *one page]."""
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(0, 3, 4, 5),
        inserted_window_dims=(2,),
        scatter_dims_to_operand_dims=(2,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        pool, page[:, :, None], new.astype(pool.dtype), dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP
    )


def view(pages: Pages, lengths: jax.Array) -> View:
    """What users see whose texts have `lengths` [E, U] tokens."""
    seen = jax.vmap(lambda lengths, owner: jnp.append(lengths, 0)[owner])(lengths, pages.owner)
    limits = jnp.clip(seen - pages.first, 0, pages.size)
    last = jnp.max(jnp.where(limits > 0, jnp.arange(1, limits.shape[1] + 1)[None], 0))
    return View(limits, -(-last // pages.table.shape[1]))


def scratch(pages: Pages, queries: int) -> Partial:
    """Where `attend` keeps what each page says to its user's queries, [E, N, M, X]: handed from layer to layer."""
    shards, count = pages.owner.shape
    kv_heads, head_dim = (pages.k.shape[3 + pages.order.index(name)] for name in 'mf')
    shape = (shards, count, kv_heads, queries)
    zeros = lambda *shape: constrain(jnp.zeros(shape), 'batch', None, 'kv_heads', *[None] * (len(shape) - 3))
    return Partial(zeros(*shape, head_dim), zeros(*shape), zeros(*shape))


def attend(q: jax.Array, pages: Pages, layer: jax.Array, view: View, by_page: Partial) -> tuple[Partial, Partial]:
    """The attention of each user's queries over its own pages.

    Args:
      q: [E, U, M, X, F].
      pages, layer: keys and values.
      view: which of them are seen; all of a user's pages have a token that is.
      by_page: by `scratch`. What it holds is overwritten.

    Returns:
      Partial over [E, U, M, X], and the scratch.
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
            jnp.einsum(f'enmxf,en{pages.order}->enmxp', mine, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        )
        seen = jnp.arange(pages.size)[None, None, None, None] < part(view.limits)[:, :, None, None, None]
        logits = jnp.where(seen, logits, _NOTHING)
        largest = jnp.max(logits, axis=-1)
        weights = jnp.where(seen, jnp.exp(logits - largest[..., None]), 0.0)
        mixed = jnp.einsum(
            f'enmxp,en{pages.order}->enmxf', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        new = Partial(mixed, jnp.sum(weights, axis=-1), largest)
        return jax.tree.map(partial(jax.lax.dynamic_update_slice_in_dim, start_index=begin, axis=1), partials, new)

    by_page = jax.lax.fori_loop(0, view.chunks, read, by_page)

    def pick(j: int) -> Partial:
        """What the j-th pages of all users say."""
        page = pages.table[:, :, j]
        get = lambda x, fill: jax.vmap(lambda x, page: x.at[page].get(mode='fill', fill_value=fill))(x, page)
        return Partial(get(by_page.mixed, 0.0), get(by_page.total, 0.0), get(by_page.largest, _NOTHING))

    return merge([pick(j) for j in range(pages.table.shape[2])]), by_page


def merge(parts: Sequence[Partial]) -> Partial:
    """Puts softmaxes over different keys together."""
    # Sums of few terms instead of reductions of stacked ones: a compiler makes one pass of all this.
    largest = reduce(jnp.maximum, (part.largest for part in parts))
    scales = [jnp.exp(part.largest - largest) for part in parts]
    add = partial(reduce, jnp.add)
    mixed = add(part.mixed * scale[..., None] for part, scale in zip(parts, scales, strict=True))
    return Partial(mixed, add(part.total * scale for part, scale in zip(parts, scales, strict=True)), largest)


def attend_shared(
    q: jax.Array, prefixes: Prefixes, layer: jax.Array, view: View, by_page: Partial
) -> tuple[Partial, Partial]:
    """The attention of each slot's queries [E, U, M, X, F] over the pages of its prompt, which all its samples share.

    Every page is read once for all samples of its prompt: their queries are brought together first.
    """
    shards, _, kv_heads, queries, head_dim = q.shape
    _, places, samples = prefixes.slots.shape
    together = jax.vmap(lambda q, slots: q.at[slots].get(mode='fill', fill_value=0))(q, prefixes.slots)
    together = together.swapaxes(2, 3).reshape(shards, places, kv_heads, samples * queries, head_dim)
    found, by_page = attend(together, prefixes.pages, layer, view, by_page)

    def apart(x):
        x = x.reshape(shards, places, kv_heads, samples, queries, *x.shape[4:]).swapaxes(2, 3)
        x = x.reshape(shards, places * samples, *x.shape[3:])
        return jax.vmap(lambda x, member: x.at[member].get(mode='clip'))(x, prefixes.member)

    return jax.tree.map(apart, found), by_page
