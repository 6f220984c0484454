import jax
import jax.numpy as jnp

from troll_jax.models.attention import attention
from troll_jax.sharding import constrain, shard_map

PAGE_SIZES = {'xla': 16}
Pool = tuple[jax.Array, ...]


def best_paged_implementation(device, compute_dtype, head_dim, kv_heads=None) -> str:
    return 'xla'


def init_pool(config, pages: int, page_size: int, implementation: str) -> Pool:
    shape = (pages, page_size, config.kv_heads, config.head_dim)
    return tuple(constrain(jnp.zeros(shape, config.compute_dtype), 'batch', None, 'kv_heads', None) for _ in range(2))


def paged_attention(q, k, v, pool, block_table, positions, *, implementation):
    def one(q, k, v, kp, vp, table, positions):
        n, size = kp.shape[:2]
        page = jnp.take_along_axis(table, jnp.maximum(positions, 0) // size, axis=1)
        page = jnp.where(positions < 0, n, page)
        kp = kp.at[page, positions % size].set(k, mode='drop')
        vp = vp.at[page, positions % size].set(v, mode='drop')
        flat = lambda x: x[table].reshape(table.shape[0], -1, *x.shape[2:])
        mask = jnp.arange(table.shape[1] * size)[None, None] <= positions[:, :, None]
        return attention(q, flat(kp), flat(vp), mask), kp, vp

    heads, kv = ('batch', None, 'heads', None), ('batch', None, 'kv_heads', None)
    mixed, *pool = shard_map(one, (heads, kv, kv, kv, kv, ('batch', None), ('batch', None)), (heads, kv, kv))(
        q, k, v, *pool, block_table, positions
    )
    return mixed, tuple(pool)


def copy_pages(pool, source, target, *, implementation):
    one = lambda x, source, target: x.at[target].set(x[jnp.minimum(source, len(x) - 1)], mode='drop')
    axes = ('batch', None, 'kv_heads', None)
    return tuple(shard_map(one, (axes, ('batch',), ('batch',)), axes)(x, source, target) for x in pool)
