"""Attention over a paged KV cache: a sequence reads the pages that its block table names, in order.

Sequences may have pages in common, such as those of a prompt with all its samples. Who owns a page is the scheduler's
to know. Every implementation keeps keys and values of one layer in its own layout, a `Pool`. Under a mesh each shard
of the batch has pages of its own, and page ids count from 0 in each. Axis letters: `troll_jax/types.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.models.attention import best_implementation
from troll_jax.sharding import axis_size, constrain, platform, shard_map

Pool = tuple[jax.Array, ...]  # keys and values of one layer, in the layout of an implementation

PAGE_SIZE = 32  # tokens: on CPUs measured to be fast, on accelerators several pages make a block
_TILE = 16  # XLA: sequences that attend at a time, as measured on a CPU
_BLOCK_TOKENS = 128  # ragged: keys that are multiplied at a time
_TRITON_BLOCK_TOKENS, _TRITON = 64, {'num_warps': 4, 'num_stages': 1}  # fastest on an H200, docs/accelerators.md
_SPLIT_TOKENS, _SPLITS = 1024, 8  # Triton: a block table this long is read in parts, by as many programs,
_PROGRAMS = 1024  # unless there are so many as it is, several for each multiprocessor
_IN_FLIGHT = 32  # ragged: rows that are being written at a time
_NOTHING = float(jnp.finfo(jnp.float32).min)  # the logit of a key that is not seen
_AXES = {'n': 'batch', 'p': None, 'k': 'kv_heads', 'c': 'kv_heads', 'f': None}


class Implementation(NamedTuple):
    """One layout of a pool, and the functions of one shard that know it."""

    layout: tuple[str, ...]  # of each array of a pool: n pages, p tokens, k KV heads, f head_dim, c keys and values
    write: Callable[..., Pool]  # (pool, k, v [N, KH, F], page, offset [N]); page NP: nothing
    attend: Callable[..., jax.Array]  # (q, pool, block_table, positions, kv_heads) → mixed
    padded: Callable[[int, int], tuple[int, int]] = lambda *sizes: sizes  # KH and F of one device as they are kept

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """The logical axes of a pool."""
        return tuple(tuple(_AXES[name] for name in order) for order in self.layout)


def best_paged_implementation(device: jax.Device, compute_dtype: str, head_dim: int) -> str:
    """The fastest implementation on such a device; kernels are for bfloat16 only."""
    if device.platform == 'tpu' and compute_dtype == 'bfloat16':
        return 'ragged'
    if best_implementation(device, compute_dtype, head_dim) == 'cudnn' and head_dim in (16, 32, 64, 128):
        return 'triton'
    return 'xla'


def init_pool(config, pages: int, page_size: int, implementation: str) -> Pool:
    """Zeros for one layer.

    Args:
      config: a decoder's configuration.
      pages: number of pages of all shards together.
      page_size: tokens of a page, see `PAGE_SIZE`.
      implementation: one of `IMPLEMENTATIONS`.
    """
    kind, devices = IMPLEMENTATIONS[implementation], axis_size('kv_heads')
    kv_heads, head_dim = kind.padded(max(1, config.kv_heads // devices), config.head_dim)  # copies, if there are fewer
    sizes = {'n': pages, 'p': page_size, 'k': devices * kv_heads, 'c': devices * kv_heads * 2, 'f': head_dim}
    # To write a token to bfloat16, XLA on a CPU would convert the whole pool.
    dtype = 'float32' if implementation == 'xla' and platform() == 'cpu' else config.compute_dtype
    zeros = (jnp.zeros([sizes[name] for name in order], dtype) for order in kind.layout)
    return tuple(constrain(x, *axes) for x, axes in zip(zeros, kind.axes, strict=True))


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: Pool,
    block_table: jax.Array,
    positions: jax.Array,
    *,
    implementation: str,
) -> tuple[jax.Array, Pool]:
    """Writes the next C tokens of W sequences to their pages, and attends from them to all up to themselves.

    Args:
      q: [W, C, H, F], k and v: [W, C, KH, F]; W counts the sequences of all shards.
      pool: see `init_pool`; donate it.
      block_table: [W, J] int32, the pages of each sequence in order, ids within its shard. Entries past a sequence's
        end are 0, or any page.
      positions: [W, C] int32, of each token in its sequence, rising by one within a row; −1: no token. Those come after
        all others of a row, are not written, and their output means nothing but is finite.
      implementation: one of `IMPLEMENTATIONS`, see `best_paged_implementation`. Logits and probabilities are float32.

    Returns:
      [W, C, H, F] in the dtype of `q`, and the pool.
    """
    kind = IMPLEMENTATIONS[implementation]
    of_heads, of_kv_heads = (('batch', None, name, None) for name in ('heads', 'kv_heads'))
    axes = (of_heads, of_kv_heads, of_kv_heads, kind.axes, ('batch', None), ('batch', None))
    one_shard = shard_map(partial(write_and_attend, kind), axes, (of_heads, kind.axes))
    return one_shard(q, k, v, pool, block_table, positions)


def write_and_attend(kind: Implementation, q, k, v, pool: Pool, block_table, positions) -> tuple[jax.Array, Pool]:
    """`paged_attention` of one shard."""
    pages, page_size = (pool[0].shape[kind.layout[0].index(name)] for name in 'np')
    page = jnp.take_along_axis(block_table, positions // page_size, axis=1, mode='clip')
    page = jnp.where(positions < 0, pages, page)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    pool = kind.write(pool, flat(k), flat(v), flat(page), flat(positions % page_size))
    return kind.attend(q, pool, block_table, positions, kv_heads=k.shape[2]).astype(q.dtype), pool


def copy_pages(pool: Pool, source: jax.Array, target: jax.Array, *, implementation: str) -> Pool:
    """Copies page `source` to page `target`, [W] int32 each, ids within a shard; to a page ≥ NP: nothing."""
    kind = IMPLEMENTATIONS[implementation]

    def copy(x, order, source, target):
        before = (slice(None),) * order.index('n')
        pages = x.at[*before, source].get(mode='clip')
        return x.at[*before, target].set(pages, mode='drop', unique_indices=True)

    shard = lambda pool, *ids: tuple(copy(x, order, *ids) for x, order in zip(pool, kind.layout, strict=True))
    return shard_map(shard, (kind.axes, ('batch',), ('batch',)), kind.axes)(pool, source, target)


# XLA: k [NP, KH, F, PS], v [NP, KH, PS, F]. A CPU multiplies by these orders fastest.


def _write_xla(pool: Pool, k, v, page, offset) -> Pool:
    keys, values = pool
    k, v = k.astype(keys.dtype), v.astype(values.dtype)
    return keys.at[page, :, :, offset].set(k, mode='drop'), values.at[page, :, offset].set(v, mode='drop')


def _attend_xla(q, pool: Pool, block_table, positions, *, kv_heads: int) -> jax.Array:
    """Softmax page by page. Sequences are sorted by length, so that the j-th page is read of those that have one."""
    keys, values = pool
    sequences, chunk, _, head_dim = q.shape
    tile, page_size = math.gcd(sequences, _TILE), keys.shape[3]
    pages = jnp.max(positions, axis=1) // page_size + 1  # of each sequence
    order = jnp.argsort(pages, descending=True)
    by_head = q.reshape(sequences, chunk, kv_heads, -1, head_dim).swapaxes(1, 2)[order]
    block_table, positions = block_table[order], positions[order]

    def read(j, i, state):
        """Of sequences i·tile to (i + 1)·tile the j-th page."""
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * tile, tile)
        page = jax.lax.dynamic_slice(block_table, (i * tile, j), (tile, 1))[:, 0]
        k, v = (x.at[page].get(mode='clip') for x in (keys, values))
        logits = jnp.einsum('skcxf,skfp->skcxp', part(by_head), k, preferred_element_type=jnp.float32) * head_dim**-0.5
        seen = (j * page_size + jnp.arange(page_size))[None, None] <= part(positions)[:, :, None]
        logits = jnp.where(seen[:, None, :, None], logits, _NOTHING)
        mixed, total, largest = (part(x) for x in state)
        new = jnp.maximum(largest, jnp.max(logits, axis=-1))
        weights, scale = jnp.exp(logits - new[..., None]), jnp.exp(largest - new)
        added = jnp.einsum('skcxp,skpf->skcxf', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        changed = mixed * scale[..., None] + added, total * scale + jnp.sum(weights, axis=-1), new
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * tile, axis=0)
        return jax.tree.map(put, state, changed)

    column = lambda j, state: jax.lax.fori_loop(0, -(-jnp.sum(pages > j) // tile), partial(read, j), state)
    state = jnp.zeros(by_head.shape), jnp.zeros(by_head.shape[:4]), jnp.full(by_head.shape[:4], _NOTHING)
    mixed, total, _ = jax.lax.fori_loop(0, jnp.max(pages), column, state)
    mixed = mixed / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]  # 0 where no page was read
    return mixed[jnp.argsort(order)].swapaxes(1, 2).reshape(q.shape)


# Triton: k and v [KH, NP, PS, F].


def _write_triton(pool: Pool, k, v, page, offset) -> Pool:
    put = lambda x, new: x.at[:, page, offset].set(new.swapaxes(0, 1), mode='drop', unique_indices=True)
    return tuple(put(x, new.astype(x.dtype)) for x, new in zip(pool, (k, v), strict=True))


def _attend_triton(q, pool: Pool, block_table, positions, *, kv_heads: int) -> jax.Array:
    """Pallas' kernel for one token of each sequence; for more, attention over the gathered pages."""
    from jax.experimental.pallas.ops.gpu import paged_attention as triton  # others need not wait for it

    (sequences, chunk, _, head_dim), columns, page_size = q.shape, block_table.shape[1], pool[0].shape[2]
    if chunk > 1:
        found = (x.at[:, block_table].get(mode='clip') for x in pool)  # [KH, W, J, PS, F]
        k, v = (x.reshape(kv_heads, sequences, -1, head_dim).transpose(1, 2, 0, 3) for x in found)
        mask = jnp.arange(k.shape[1])[None, None] <= positions[:, :, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation='xla')
    together = math.gcd(columns, max(1, _TRITON_BLOCK_TOKENS // page_size))
    split = columns * page_size >= _SPLIT_TOKENS and sequences * kv_heads < _PROGRAMS
    splits = math.gcd(columns // together, _SPLITS) if split else 1
    mixed = triton.paged_attention(
        q[:, 0] * head_dim**-0.5,
        *pool,
        block_table,
        positions[:, 0] + 1,
        pages_per_compute_block=together,
        k_splits=splits,
        **_TRITON,
        interpret=platform() == 'cpu',  # for tests
    )
    return mixed[:, None]


# Ragged: one array [NP, PS, 2·KH', F'], the key and the value of each head next to each other. The kernel wants F to
# fill 128 lanes, to which a TPU would pad it in any case, and heads that fill tiles: 1, 2, 4 or a multiple of 8.


def _padded_ragged(kv_heads: int, head_dim: int) -> tuple[int, int]:
    return -(-kv_heads // 8) * 8 if kv_heads > 4 else 1 << (kv_heads - 1).bit_length(), -(-head_dim // 128) * 128


def _pad(x: jax.Array, *sizes: int) -> jax.Array:
    """x [N, heads, F] with zeros up to these sizes of the last two axes."""
    return jnp.pad(x, [(0, 0)] + [(0, size - old) for size, old in zip(sizes, x.shape[1:], strict=True)])


def _write_ragged(pool: Pool, k, v, page, offset) -> Pool:
    """By DMA, as a TPU's scatter goes token by token."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (both,) = pool
    new = _pad(jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[2]), *both.shape[2:]).astype(both.dtype)

    def kernel(page, offset, new, _, pool, semaphore):
        def each(act):
            def row(i, _):
                copy = pltpu.make_async_copy(new.at[i], pool.at[page[i], offset[i]], semaphore)
                pl.when(page[i] < pool.shape[0])(lambda: act(copy))

            begin = pl.program_id(0) * _IN_FLIGHT
            jax.lax.fori_loop(begin, jnp.minimum(begin + _IN_FLIGHT, new.shape[0]), row, None)

        each(lambda copy: copy.start())
        each(lambda copy: copy.wait())

    scalars, anywhere = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pl.ANY))
    write = pl.pallas_call(
        kernel,
        jax.typeof(both),
        grid=(pl.cdiv(new.shape[0], _IN_FLIGHT),),
        in_specs=[scalars, scalars, anywhere, anywhere],
        out_specs=anywhere,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        input_output_aliases={3: 0},
        name='write_tokens',
    )
    return (write(page, offset, new, both),)


def _attend_ragged(q, pool: Pool, block_table, positions, *, kv_heads: int) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    (sequences, chunk, heads, head_dim), (_, page_size, both, lanes) = q.shape, pool[0].shape
    # Padding counts as tokens, which see rubbish: their page ids must be there.
    block_table = jnp.pad(block_table, [(0, 0), (0, (chunk - 1) // page_size + (chunk > 1))])
    mixed = ragged_paged_attention(
        _pad(q.reshape(-1, heads, head_dim), heads // kv_heads * both // 2, lanes),
        *pool,
        jnp.maximum(positions[:, 0], 0) + chunk,
        block_table,
        jnp.arange(sequences + 1, dtype=jnp.int32) * chunk,
        jnp.array([sequences], jnp.int32),
        sm_scale=head_dim**-0.5,
        num_kv_pages_per_block=min(block_table.shape[1], max(1, _BLOCK_TOKENS // page_size)),
        num_queries_per_block=min(sequences * chunk, 32),
    )
    return mixed[:, :heads, :head_dim].reshape(q.shape)


IMPLEMENTATIONS: dict[str, Implementation] = {
    'xla': Implementation(('nkfp', 'nkpf'), _write_xla, _attend_xla),
    'triton': Implementation(('knpf', 'knpf'), _write_triton, _attend_triton),
    'ragged': Implementation(('npcf',), _write_ragged, _attend_ragged, padded=_padded_ragged),
}
