"""One layer's attention of packed rows by each kernel, for `experiments.benchmarks.device`."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measure import median_seconds, relative_distance
from troll_jax.models.attention import packed_attention
from troll_jax.models.decoder import DecoderConfig
from troll_jax.models.layers import exact_products

SHORTEST, LONGEST = 64, 448  # tokens of a sequence


def compare_attention(
    config: DecoderConfig, rows: int, length: int, repeats: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields each kernel's name and figures: `ms` and `temporary_gb` of outputs and gradients, and their `error`.

    The kernels are XLA's, that of `config`, and if this is cuDNN's the same with offsets. Rows are full of sequences of
    different lengths. Errors are those of the first row, relative to XLA's in float32.
    """
    implement = lambda name: functools.partial(packed_attention, implementation=name)
    kernels = {name: implement(name) for name in dict.fromkeys(('xla', config.attention))}
    most = length // SHORTEST
    if config.attention == 'cudnn':
        kernels['cudnn with offsets'] = functools.partial(cudnn_with_offsets, most=most)
    ends = np.cumsum(np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, (rows, most)), axis=1)
    segments = jnp.asarray(np.sum(np.arange(length)[:, None] >= ends[:, None], axis=2), jnp.int32)
    keys, heads = jax.random.split(jax.random.key(0), 4), (config.heads, config.kv_heads, config.kv_heads, config.heads)
    shapes = [(rows, length, count, config.head_dim) for count in heads]
    random = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    def gradient(kernel: Callable[..., jax.Array]):
        def run(q, k, v, weights, segments):
            with exact_products(str(q.dtype)):
                out, pullback = jax.vjp(lambda q, k, v: kernel(q, k, v, segments), q, k, v)
                return out, *pullback(weights)

        return jax.jit(run)

    exact = gradient(kernels['xla'])(*(x[:1] for x in random), segments[:1])
    inputs = *(x.astype(config.compute_dtype) for x in random), segments
    for name, kernel in kernels.items():
        compiled = gradient(kernel).lower(*inputs).compile()
        error = max(map(relative_distance, (x[:1] for x in compiled(*inputs)), exact))
        seconds = median_seconds(compiled, *inputs, repeats=repeats, calls=4)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        yield name, {'ms': 1e3 * seconds, 'temporary_gb': temporary / 1e9, 'error': error}


def cudnn_with_offsets(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, most: int) -> jax.Array:
    """`packed_attention` by cuDNN, told where sequences are instead of by a mask; skips keys of others. From Hopper on.

    JAX keeps the function private, and reads the wrong keys where queries share heads of keys before 0.11.2
    (github.com/jax-ml/jax/pull/39521).

    Args:
      segment_ids: [B, S] int32, of which none comes back in a row; padding is a sequence too.
      most: sequences that a row may hold: cuDNN's work space grows with it. A row with more of them is NaN.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths, offsets, is_held = places(segment_ids, most)
    places_of_all = {'q_seqlen': lengths, 'kv_seqlen': lengths, 'q_offsets': offsets, 'kv_offsets': offsets}
    scale, mask = q.shape[-1] ** -0.5, MaskType.PADDING_CAUSAL
    out = dot_product_attention(q, k, v, **places_of_all, scale=scale, mask_type=mask)
    return jnp.where(is_held[:, None, None, None], out, jnp.nan)


def places(segment_ids: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengths [B, M] and offsets [B, M + 1] of the sequences of rows as cuDNN wants them, and whether M are enough [B].

    Both are −1 from the last sequence on; the end of a row is none, or the next row's first would be taken to begin
    there.
    """
    is_first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    edges = lambda row: jnp.nonzero(row, size=most + 1, fill_value=len(row))[0]
    edges = jax.vmap(edges)(is_first).astype(jnp.int32)
    lengths = jnp.diff(edges)
    lengths, offsets = (jnp.where(lengths > 0, x, -1) for x in (lengths, edges[:, :-1]))
    return lengths, jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1), jnp.sum(is_first, axis=1) <= most
