"""One layer's attention of packed rows by each kernel, for `experiments.benchmarks.device`."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measure import median_seconds, relative_distance
from troll_jax.models.attention import IMPLEMENTATIONS
from troll_jax.models.decoder import DecoderConfig
from troll_jax.models.layers import exact_products

SHORTEST, LONGEST = 64, 448  # tokens of a sequence


def compare_attention(
    config: DecoderConfig, rows: int, length: int, repeats: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields each kernel's name and figures: `ms` and `temporary_gb` of outputs and gradients, and their `error`.

    The kernels are XLA's, that of `config`, and if this is cuDNN's the same with offsets, from Hopper on. Rows are full
    of sequences of different lengths. Errors are those of the last row, relative to XLA's in float32.
    """
    kernels = {name: IMPLEMENTATIONS[name] for name in dict.fromkeys(('xla', config.attention))}
    most = -(-length // SHORTEST)
    if config.attention == 'cudnn' and float(jax.devices()[0].compute_capability) >= 9:
        kernels['cudnn with offsets'] = functools.partial(cudnn_with_offsets, max_segments=most)
    ends = np.cumsum(np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, (rows, most)), axis=1)
    segments = jnp.asarray(np.sum(np.arange(length)[:, None] >= ends[:, None], axis=2), jnp.int32)
    keys, heads = jax.random.split(jax.random.key(0), 4), (config.heads, config.kv_heads, config.kv_heads, config.heads)
    shapes = [(rows, length, count, config.head_dim) for count in heads]
    random = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    def with_gradients(kernel: Callable[..., jax.Array]):
        def run(q, k, v, weights, segments):
            with exact_products(str(q.dtype)):
                out, pullback = jax.vjp(lambda q, k, v: kernel(q, k, v, segments), q, k, v)
                return out, *pullback(weights)

        return jax.jit(run)

    exact = with_gradients(kernels['xla'])(*(x[-1:] for x in random), segments[-1:])
    inputs = *(x.astype(config.compute_dtype) for x in random), segments
    for name, kernel in kernels.items():
        compiled = with_gradients(kernel).lower(*inputs).compile()
        error = float(np.max([relative_distance(x[-1:], y) for x, y in zip(compiled(*inputs), exact, strict=True)]))
        seconds = median_seconds(compiled, *inputs, repeats=repeats, calls=4)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        yield name, {'ms': 1e3 * seconds, 'temporary_gb': temporary / 1e9, 'error': error}


def cudnn_with_offsets(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, max_segments: int
) -> jax.Array:
    """`packed_attention` by cuDNN, told where segments are instead of by a mask; skips keys of others. From Hopper on.

    JAX keeps the function private, and reads the wrong keys where queries share heads of keys before 0.11.2
    (github.com/jax-ml/jax/pull/39521).

    Args:
      segment_ids: [B, S] int32, in a row equal ids are adjacent; padding is a segment too.
      max_segments: of a row, at least as many as any has: cuDNN's work space grows with it.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths, offsets = segment_offsets(segment_ids, max_segments)
    segments = {'q_seqlen': lengths, 'kv_seqlen': lengths, 'q_offsets': offsets, 'kv_offsets': offsets}
    scale, mask = q.shape[-1] ** -0.5, MaskType.PADDING_CAUSAL
    return dot_product_attention(q, k, v, **segments, scale=scale, mask_type=mask)


def segment_offsets(segment_ids: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array]:
    """Lengths [B, M] and offsets [B, M + 1] of a row's segments as JAX wants them.

    Both are −1 after the last segment. The end of a row gets no offset: JAX would take it for the start of the next
    row's first segment.
    """
    is_first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    edges = lambda row: jnp.nonzero(row, size=max_segments + 1, fill_value=len(row))[0]
    edges = jax.vmap(edges)(is_first).astype(jnp.int32)
    lengths = jnp.diff(edges)
    lengths, offsets = (jnp.where(lengths > 0, x, -1) for x in (lengths, edges[:, :-1]))
    return lengths, jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)
