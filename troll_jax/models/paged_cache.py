"""The paged KV cache: a sequence owns pages in a common pool of keys and values.

A sequence is a prompt, whose pages serve all of its samples, or the response of a decode slot. It takes pages as it
grows and gives them back when it ends. The lowest free ones come first, so that the pages in use lie close together and
attention is a loop over few chunks of the pool. No page is ever copied. Axis letters: `troll_jax/types.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.sharding import axis_size, constrain, platform

_AXES = {'p': None, 'k': 'kv_heads', 'f': 'head_dim'}


class Pages(NamedTuple):
    """A pool of pages, and the sequences that own them."""

    k: jax.Array  # [layers, E, NP, KH, PS, F] compute dtype
    v: jax.Array  # [layers, E, NP, KH, PS, F]
    owner: jax.Array  # [E, NP] int32, the sequence of each page; W: free
    first: jax.Array  # [E, NP] int32, the index of its first token in its sequence
    table: jax.Array  # [E, W, J] int32, the pages of each sequence in order; NP: none

    order = 'kpf'  # of the last axes of k and v: KH, PS, F

    @property
    def size(self) -> int:
        """PS, tokens in a page."""
        return self.k.shape[3 + self.order.index('p')]

    def lay_out(self) -> 'Pages':
        """Each shard's part on its own devices."""
        k, v = (constrain(x, 'layers', 'batch', None, *(_AXES[name] for name in self.order)) for x in self[:2])
        return type(self)(k, v, *(constrain(x, 'batch', *[None] * (x.ndim - 1)) for x in self[2:]))


class TokenPages(Pages):
    """Pages with tokens before heads, so that a token is written in one piece: [layers, E, NP, PS, KH, F]."""

    order = 'pkf'


def response_pages(config) -> type[Pages]:
    """The kind of pages for responses, into which single tokens are written.

    A TPU's compiler lays such a pool out with tokens before heads, and copies one of another order where a program
    begins and ends. With a single head on each device both orders are the same but for the padding: the last but one
    axis comes in eights, and must not be the heads. On a CPU attention reads heads before tokens faster.
    """
    heads = config.kv_heads // axis_size('kv_heads')
    return TokenPages if platform() == 'tpu' and heads > 1 else Pages


def init_pages(kind: type[Pages], config, shards: int, sequences: int, length: int, size: int) -> Pages:
    """A pool of pages of `size` tokens, in which every sequence may grow to `length` tokens."""
    each = -(-length // size)
    sizes = {'p': size, 'k': config.kv_heads, 'f': config.head_dim}
    shape = (config.layers, shards, sequences * each, *(sizes[name] for name in kind.order))
    integers = lambda value, *shape: jnp.full((shards, *shape), value, jnp.int32)
    pages = kind(
        *(jnp.zeros(shape, config.compute_dtype) for _ in range(2)),
        owner=integers(sequences, sequences * each),
        first=integers(0, sequences * each),
        table=integers(sequences * each, sequences, each),
    )
    return pages.lay_out()


def grow(pages: Pages, lengths: jax.Array) -> Pages:
    """Gives every sequence the pages that it lacks for `lengths` [E, W] tokens."""

    def one_shard(owner, first, table, lengths):
        count, (sequences, each) = owner.size, table.shape
        begins = jnp.arange(each) * pages.size
        wanted = ((table == count) & (begins[None] < lengths[:, None])).reshape(-1)
        # The i-th page that is wanted is the i-th free one.
        free = jnp.nonzero(owner == sequences, size=count, fill_value=count)[0]
        page = jnp.where(wanted, free[jnp.cumsum(wanted) - 1], count).astype(jnp.int32)
        owner = owner.at[page].set(jnp.repeat(jnp.arange(sequences, dtype=jnp.int32), each), mode='drop')
        first = first.at[page].set(jnp.tile(begins.astype(jnp.int32), sequences), mode='drop')
        return owner, first, jnp.where(wanted, page, table.reshape(-1)).reshape(table.shape)

    owner, first, table = jax.vmap(one_shard)(pages.owner, pages.first, pages.table, lengths)
    return pages._replace(owner=owner, first=first, table=table)


def release(pages: Pages, ended: jax.Array) -> Pages:
    """Takes all pages back from the sequences [E, W] bool that have ended."""
    count, sequences = pages.owner.shape[1], ended.shape[1]
    gone = jax.vmap(lambda ended, owner: jnp.append(ended, False)[owner])(ended, pages.owner)
    return pages._replace(
        owner=jnp.where(gone, sequences, pages.owner), table=jnp.where(ended[:, :, None], count, pages.table)
    )


def pages_of(pages: Pages, index: jax.Array) -> jax.Array:
    """The page [E, W] that holds token `index` [E, W] of each sequence; NP if there is none."""
    each = pages.table.shape[2]
    place = jnp.clip(index // pages.size, 0, each - 1)
    return jnp.take_along_axis(pages.table, place[:, :, None], axis=2)[:, :, 0]


def write_token(
    pool: jax.Array, layer: jax.Array, page: jax.Array, offset: jax.Array, new: jax.Array, *, order: str
) -> jax.Array:
    """pool[layer, e, page[e, w], :, offset[e, w]] = new[e, w], for pages that exist, with axes in the order 'kpf'.

    Args:
      pool: [layers, E, NP, *one page], page and offset: [E, W], new: [E, W, KH, F].
      order: a page's axes, `Pages.order`.

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
    """pool[:, e, page[e, i]] = new[:, e, i], for pages [E, NP'] that exist; new: [layers, E, NP', *one page]."""
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
