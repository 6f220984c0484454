"""Attention of packed rows, by the best kernel of a platform.

Attention over the KV cache is in `paged_attention.py`. Axis letters: `troll_jax/types.py`.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from troll_jax.sharding import RULES, axis_size, constrain, shard_map

_SPLASH_LANES, _SPLASH_BLOCK = 128, 512  # a block is a multiple of the first and at most the second
_OUTPUT = 'attention'  # the name of what a backward pass needs of a forward pass


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, implementation: str
) -> jax.Array:
    """Causal attention of rows in which several sequences are packed end to end.

    Args:
      q: [B, S, H, F], k and v: [B, S, KH, F].
      segment_ids: [B, S] int32: a token sees itself and the tokens before it in its row under the same id.
      implementation: one of `IMPLEMENTATIONS`, see `best_implementation`. All sum logits and take probabilities in
        float32; only 'xla' ever holds those of a whole row, [B, H, S, S], of one layer at a time.

    Returns:
      [B, S, H, F] in the dtype of `q`.
    """
    return IMPLEMENTATIONS[implementation](q, k, v, segment_ids)


def best_implementation(device: jax.Device, compute_dtype: str, head_dim: int) -> str:
    """The fastest implementation on such a device."""
    if device.platform == 'tpu':
        return 'splash'
    # NVIDIA's GPUs have a number here ('8.0' is Ampere's), AMD's a name.
    capability = re.fullmatch(r'(\d+)\.\d+', str(getattr(device, 'compute_capability', '')))
    if capability and int(capability[1]) >= 8 and compute_dtype == 'bfloat16' and head_dim <= 128 and head_dim % 8 == 0:
        return 'cudnn'
    return 'xla'


def keep_output(primitive, *_, **params) -> bool:
    """A policy of `jax.checkpoint`: keeps the outputs of `packed_attention`, and with them its kernels' statistics."""
    is_named = primitive.name == 'name' and params['name'] == _OUTPUT
    return is_named or primitive.name == 'dot_product_attention_fwd_wrapper'  # cuDNN's, to which JAX gives no name


def xla_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """XLA's own attention, on any platform."""
    # Of a row that is split every device has a part of the queries, and all keys.
    k, v = (constrain(x, 'rows', None, 'kv_heads', 'head_dim') for x in (k, v))
    mask = _same(segment_ids, segment_ids)
    # Without this a backward pass keeps the probabilities of every layer; kernels compute them again, too.
    attend = jax.checkpoint(
        partial(jax.nn.dot_product_attention, is_causal=True, implementation='xla'), prevent_cse=False
    )
    return checkpoint_name(attend(q, k, v, mask=mask), _OUTPUT)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """cuDNN's flash attention, on NVIDIA's GPUs from Ampere on. bfloat16, head_dim ≤ 128 and a multiple of 8."""

    def shard(q, k, v, *segments):
        mask, split = _same(*segments), q.shape[1] < k.shape[1]
        if split:  # the kernel's own causal mask takes the first query to be at the first key
            first = jax.lax.axis_index(RULES['length']) * q.shape[1]
            mask &= first + jnp.arange(q.shape[1])[None, None, :, None] >= jnp.arange(k.shape[1])[None, None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=not split, implementation='cudnn')

    return _over_shards(shard, q, k, v, segment_ids, multiple=2)  # its backward pass takes no odd length with a mask


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Pallas' splash attention, on TPUs. Blocks of keys after a block of queries are skipped.

    Args:
      interpret: true runs the kernel step by step on any platform, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # half a second that others need not wait

    parts, lanes = axis_size('length'), _SPLASH_LANES
    length = q.shape[1] // parts
    block = min(_SPLASH_BLOCK, -(-length // lanes) * lanes)
    names = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
    sizes = splash.BlockSizes(**{f'block_{name}': block for name in names})
    causal = splash.CausalMask((parts * -(-length // block) * block,) * 2)
    causal = splash.MultiHeadMask([causal] * (q.shape[2] // axis_size('heads')))
    # Its arrays say for every block of queries which blocks of keys it sees.
    kernel = splash.make_splash_mha(
        causal,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=_OUTPUT,
        interpret=interpret,
    )
    axes = jax.tree.map(lambda x: ('length',) if x.ndim == 1 else (None, 'length', None), kernel)

    def shard(q, k, v, of_queries, of_keys, kernel):
        heads_first = (x.swapaxes(1, 2) for x in (q * q.shape[3] ** -0.5, k, v))
        return jax.vmap(kernel)(*heads_first, splash.SegmentIds(of_queries, of_keys)).swapaxes(1, 2)

    return _over_shards(shard, q, k, v, segment_ids, (kernel, axes), multiple=block)


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    'xla': xla_attention,
    'cudnn': cudnn_attention,
    'splash': splash_attention,
}


def _same(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """[B, 1, S, L] bool, true where two tokens are of the same segment."""
    return of_queries[:, None, :, None] == of_keys[:, None, None, :]


def _over_shards(kernel: Callable[..., jax.Array], q, k, v, segment_ids, *more: tuple[Any, Any], multiple: int):
    """Calls a kernel, which no compiler can split, on each device's rows, heads and queries, with all keys of the rows.

    Args:
      kernel: function of q, k, v, the segment ids of queries and of keys, and `more`.
      more: arrays and their logical axes.
      multiple: what a device has of the length is filled up to a multiple of it.
    """

    def shard(q, k, v, segment_ids, *more):
        length = q.shape[1]
        pad = lambda x, value=0: jnp.pad(
            x, [(0, 0), (0, -length % multiple)] + [(0, 0)] * (x.ndim - 2), constant_values=value
        )
        gather = partial(jax.lax.all_gather, axis_name=RULES['length'], axis=1, tiled=True)
        q, k, v, segment_ids = pad(q), pad(k), pad(v), pad(segment_ids, -1)
        return kernel(q, gather(k), gather(v), segment_ids, gather(segment_ids), *more)[:, :length]

    of_heads, of_kv_heads = (('rows', 'length', name, 'head_dim') for name in ('heads', 'kv_heads'))
    axes = (of_heads, of_kv_heads, of_kv_heads, ('rows', 'length'), *(axes for _, axes in more))
    return shard_map(shard, axes, of_heads)(q, k, v, segment_ids, *(arrays for arrays, _ in more))
