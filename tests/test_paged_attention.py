"""Attention over pages against attention over contiguous keys, and what is compiled for accelerators."""

import math
import re
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as ragged

from experiments.studies.program_cost import compile_program, describe, program_cost
from troll_jax.models import paged_attention as module
from troll_jax.models.paged_attention import (
    IMPLEMENTATIONS,
    best_paged_implementation,
    copy_pages,
    init_pool,
    paged_attention,
    write_and_attend,
)
from troll_jax.sharding import axis_size, make_mesh, named_sharding

PAGE, CHUNK, PROMPT, LENGTH = 4, 8, 11, 14


def normal(key: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape)


def check(implementation: str, groups: int, shards=1, kv_heads=2, head_dim=5, attend=None):
    """Prefills, copies and decodes in groups of four slots: two samples of a prompt of 11 tokens, one that goes on from
    a prompt of 5 tokens for two, and an idle one. All outputs must be those of attention over contiguous keys."""
    attend = attend or jax.jit(partial(paged_attention, implementation=implementation))
    copy = jax.jit(partial(copy_pages, implementation=implementation))
    slots, pages = 4 * groups * shards, 9 * groups  # pages of a shard
    sizes = SimpleNamespace(kv_heads=kv_heads, head_dim=head_dim, compute_dtype='float32')
    q = 3 * normal(0, slots, LENGTH, 6, head_dim)
    k, v = (normal(key, slots, LENGTH, kv_heads, head_dim) for key in (1, 2))
    k, v = (x.at[1::4, :PROMPT].set(x[::4, :PROMPT]) for x in (k, v))
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    pool = init_pool(sizes, pages * shards, PAGE, implementation)

    def everywhere(rows) -> jax.Array:
        """What each group has, its pages after those of the groups before."""
        rows = [jnp.asarray(rows, jnp.int32) + 9 * group for group in range(groups)]
        return jnp.concatenate(rows * shards)

    def run(pool, table, begin, chunk, ends):
        """Tokens from `begin` to those before `ends` of each slot of a group, and checks their outputs."""
        positions = jnp.tile(jnp.asarray(begin)[:, None] + jnp.arange(chunk)[None], (groups * shards, 1))
        there = positions < jnp.tile(jnp.asarray(ends), groups * shards)[:, None]
        at = jnp.arange(slots)[:, None], positions
        mixed, pool = attend(q[at], k[at], v[at], pool, table, jnp.where(there, positions, -1))
        np.testing.assert_allclose(mixed[there], expected[at][there], atol=2e-5)
        assert np.all(np.isfinite(mixed))
        return pool

    prompts = everywhere([[3, 0, 6, 0], [0, 0, 0, 0], [1, 5, 0, 0], [0, 0, 0, 0]])
    for begin in (0, CHUNK):
        pool = run(pool, prompts, [begin] * 4, CHUNK, [PROMPT, 0, 5, 0])
    # Both samples get a copy of the prompt's last page, and write to it at once. Too large an id: nothing is copied.
    nothing = pages * jnp.tile(jnp.array([0, 0, 1, 1]), groups * shards)
    pool = copy(pool, everywhere([6, 6, 3, 3]), jnp.maximum(everywhere([7, 8, 0, 0]), nothing))
    table = everywhere([[3, 0, 7, 2], [3, 0, 8, 4], [1, 5, 0, 0], [0, 0, 0, 0]])
    for step in range(LENGTH - PROMPT):
        pool = run(pool, table, [PROMPT + step, PROMPT + step, 5 + step, 0], 1, [LENGTH, LENGTH, 7, 0])


@pytest.mark.parametrize('implementation', ['xla', 'triton'])
@pytest.mark.parametrize('sizes', [None, (2, 2, 2)])
def test_attention_over_pages_equals_attention_over_contiguous_keys(implementation, sizes):
    """Guards shared pages, writes of idle slots and of padding, masks within a page and a chunk, many tiles of XLA's
    loop, pages copied from another shard's, and heads that meet those of another device."""
    with jax.set_mesh(make_mesh(*sizes)) if sizes else nullcontext():
        head_dim = 16 if implementation == 'triton' else 5
        check(implementation, 1 if sizes else 6, shards=axis_size('batch'), head_dim=head_dim)


def test_a_long_block_table_is_read_in_parts(monkeypatch):
    """Guards partial softmaxes that are merged, of parts without a token too."""
    monkeypatch.setattr(module, '_SPLIT_TOKENS', 8)
    monkeypatch.setattr(module, '_TRITON_BLOCK_TOKENS', PAGE)
    check('triton', 2, head_dim=16)


def test_the_layout_and_the_writes_of_a_tpu(monkeypatch):
    """Guards the order of keys and values, padding to tiles, lengths, and the DMAs, which run interpreted. The kernel
    that reads does not; its library's own reference stands in."""
    plain = ragged.ref_ragged_paged_attention
    options = ('num_kv_pages_per_block', 'num_queries_per_block')
    read = lambda *args, **kwargs: plain(*args, **{x: kwargs[x] for x in kwargs.keys() - {*options}})
    monkeypatch.setattr(ragged, 'ragged_paged_attention', read)
    kind = IMPLEMENTATIONS['ragged']
    kind = kind._replace(write=jax.jit(kind.write))
    with pltpu.force_tpu_interpret_mode():
        check('ragged', 1, kv_heads=3, attend=partial(write_and_attend, kind))


@pytest.mark.parametrize(
    ('topology', 'dtype', 'head_dim', 'expected'),
    [
        ('h100:1', 'bfloat16', 64, 'triton'),
        ('h100:1', 'float32', 64, 'xla'),
        ('h100:1', 'bfloat16', 80, 'xla'),
        ('v5e:2x2', 'bfloat16', 80, 'ragged'),
        ('v5e:2x2', 'float32', 64, 'xla'),
    ],
)
def test_the_best_implementation(topology, dtype, head_dim, expected):
    """Guards sizes that a kernel refuses, and devices that have none."""
    assert best_paged_implementation(describe(topology)[1][0], dtype, head_dim) == expected
    assert best_paged_implementation(jax.devices()[0], dtype, head_dim) == 'xla'


@pytest.fixture
def no_cache():
    """Turns off JAX's cache: programs for absent devices cannot be read from it."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # it looks at the setting only once
    yield
    jax.config.update('jax_enable_compilation_cache', before)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ('topology', 'tensor', 'heads', 'kv_heads', 'head_dim', 'implementation', 'launches'),
    [
        ('h100:1', 1, 16, 8, 128, 'triton', 5),
        ('h100:8', 2, 14, 2, 64, 'triton', 5),
        ('v5e:2x4', 2, 16, 8, 128, 'ragged', 16),
        ('v5e:2x4', 1, 9, 3, 64, 'ragged', 16),
    ],
)
@pytest.mark.usefixtures('no_cache')
def test_what_is_compiled_for_decoding(topology, tensor, heads, kv_heads, head_dim, implementation, launches):
    """Guards a pool that is copied or transposed, a loop over slots, collectives, and many small kernels per layer."""
    steps, slots = 16, 64
    config = SimpleNamespace(kv_heads=kv_heads, head_dim=head_dim, compute_dtype='bfloat16')
    mesh = make_mesh(1, -1, tensor, devices=describe(topology)[1])

    def decode(pool, q, k, v, table, positions, source, target):
        def step(carry, _):
            pool, q, positions = carry
            k_new, v_new = (x + positions[:, :, None, None].astype(x.dtype) for x in (k, v))
            mixed, pool = paged_attention(q, k_new, v_new, pool, table, positions, implementation=implementation)
            return (pool, mixed, positions + 1), None

        pool = copy_pages(pool, source, target, implementation=implementation)
        return jax.lax.scan(step, (pool, q, positions), length=steps)[0]

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shards = axis_size('batch')
        array = lambda shape, axes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
            shape, dtype, sharding=named_sharding(mesh, axes)
        )
        of_heads = lambda name, count: array((slots * shards, 1, count, head_dim), ('batch', None, name, None))
        tables = [array((slots * shards, width), ('batch', None), jnp.int32) for width in (16, 1)]
        pages = [array((slots * shards,), ('batch',), jnp.int32)] * 2
        pool = jax.eval_shape(lambda: init_pool(config, 1000 * shards, 32, implementation))
        pool = tuple(array(x.shape, axes) for x, axes in zip(pool, IMPLEMENTATIONS[implementation].axes, strict=True))
        q, k = of_heads('heads', heads), of_heads('kv_heads', kv_heads)
        program = jax.jit(decode, donate_argnums=0).trace(pool, q, k, k, *tables, *pages)
        program = compile_program(program)
    text = program.as_text()
    # No other pool, not even one of only keys or values: neither a copy nor a transposed one.
    assert program.memory_analysis().temp_size_in_bytes < math.prod(pool[0].sharding.shard_shape(pool[0].shape))
    assert not re.search(r' (all-|reduce-scatter|collective-permute)', text) and text.count(' while(') == 1
    # Per step: those of the layer, the loop's counter and the next positions.
    assert implementation != 'ragged' or 'write_tokens' in text
    cost, unknown = program_cost(text)
    assert cost.launches / steps < launches + 3 and unknown.launches == 0
