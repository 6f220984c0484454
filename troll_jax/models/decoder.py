"""The decoder of all model families: pre-norm, rotary positions, grouped-query attention, SwiGLU; in Flax NNX.

Parameters are float32 masters in a plain nested dict, outside of the module. `abstract` gives their shapes and
shardings, `init` draws them, `bind` puts them into a module that computes:

    graphdef, shapes = abstract(config, mesh)
    params = init(config, key, mesh)
    hidden = bind(graphdef, params)(tokens, positions, segment_ids)

All layers are one: their parameters are stacked on a leading axis and `jax.lax.scan` runs over it, so that neither
the compiled program nor the compile time grows with depth.

Letters besides those of `troll_jax/types.py`: H query heads, M key-value heads, G = H/M query heads per key-value
head, F head dimension, L cache length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from troll_jax.models.attention import IMPLEMENTATIONS, attention, packed_attention
from troll_jax.models.pages import (
    Pages,
    Prefixes,
    attend,
    attend_shared,
    merge,
    pages_of,
    scratch,
    view,
    write_token,
)
from troll_jax.sharding import RULES, constrain, named_sharding

# What the backward pass keeps of a layer instead of computing it again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights, but no attention logits
}
COMPUTE_DTYPES = ('bfloat16', 'float32')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, and how it computes.

    Raises:
      ValueError: sizes that do not go together, an unknown `compute_dtype`, `remat` or `attention`.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    compute_dtype: str = 'bfloat16'
    remat: str | None = None
    attention: str = 'xla'  # of whole sequences; a cache is always read by XLA's

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f'heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}')
        if self.head_dim % 2:
            raise ValueError(f'rotary positions need an even head_dim; got {self.head_dim}')
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f'compute_dtype must be one of {COMPUTE_DTYPES}; got {self.compute_dtype!r}')
        if self.remat is not None and self.remat not in REMAT_POLICIES:
            raise ValueError(f'remat must be None or one of {tuple(REMAT_POLICIES)}; got {self.remat!r}')
        if self.attention not in IMPLEMENTATIONS:
            raise ValueError(f'attention must be one of {tuple(IMPLEMENTATIONS)}; got {self.attention!r}')


class KVCache(NamedTuple):
    """Keys and values of the tokens so far. The slot of a token is its position; rows have no gaps."""

    k: jax.Array  # [layers, B, L, M, F] compute dtype
    v: jax.Array  # [layers, B, L, M, F]


CACHE_AXES = ('layers', 'batch', 'length', 'kv_heads', 'head_dim')


def init_cache(config: DecoderConfig, batch: int, length: int) -> KVCache:
    """An empty cache for `batch` rows of at most `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return KVCache(*(constrain(jnp.zeros(shape, config.compute_dtype), *CACHE_AXES) for _ in KVCache._fields))


def _write_slots(slots: jax.Array, layer: jax.Array, positions: jax.Array, new: jax.Array) -> jax.Array:
    """slots[layer, b, positions[b, s]] = new[b, s], for positions inside the cache.

    Written as a scatter whose batch axis is named as such: `slots.at[layer, rows, positions]` is the same, but the
    compiler cannot see that a row only writes to itself, and gathers `new` over the mesh's batch axes.
    """
    indices = jnp.stack([jnp.full_like(positions, layer), positions], axis=-1)  # [B, S, 2]
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(slots, indices, new, dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles by which positions turn the F/2 planes of a head: each [B, S, 1, F/2], float32."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns plane i of a head, which components i and i + F/2 span (the layout of Hugging Face checkpoints)."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _weight(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A new weight [I, O], or an embedding [V, D]: normal, with a deviation of 0.02 · sqrt(1024 / inputs).

    That is the published configs' `initializer_range` at the width of Qwen3-0.6B, carried over to other widths.
    """
    inputs = shape[axes.index('embed')] if 'vocab' in axes else shape[0]
    return nnx.Param(0.02 * (1024 / inputs) ** 0.5 * jax.random.normal(key, shape), axes=axes)


def _product(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """[..., I] times [I, O]. Flattened to two axes first: on a CPU a product with a batch axis is slower.

    The parts of a weight that 'embed' spreads over devices are put together first, in the dtype of the product. Left to
    the partitioner, masters travel in float32, and a TPU's compiler splits the product into one for each device's part,
    of which each reads and writes all activations.
    """
    gathered = constrain(weight[...].astype(x.dtype), *(None if axis == 'embed' else axis for axis in weight.axes))
    flat = x.reshape(-1, x.shape[-1]) @ gathered
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale over the last axis, in float32."""

    def __init__(self, size: int, axis: str, eps: float):
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class Attention(nnx.Module):
    """The projections around `attention`. Heads are flattened into one axis, head by head, as in checkpoints."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        width, q_size, kv_size = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = _weight(keys[0], (width, q_size), ('embed', 'heads'))
        self.key = _weight(keys[1], (width, kv_size), ('embed', 'kv_heads'))
        self.value = _weight(keys[2], (width, kv_size), ('embed', 'kv_heads'))
        self.output = _weight(keys[3], (q_size, width), ('heads', 'embed'))
        self.query_norm = RMSNorm(config.head_dim, 'head_dim', config.norm_eps)
        self.key_norm = RMSNorm(config.head_dim, 'head_dim', config.norm_eps)
        self.head_dim = config.head_dim

    def qkv(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, S, D] → queries [B, S, H, F], keys and values [B, S, M, F]."""
        q, k, v = (
            _product(x, weight).reshape(*x.shape[:-1], -1, self.head_dim)
            for weight in (self.query, self.key, self.value)
        )
        return rotate(self.query_norm(q), angles), rotate(self.key_norm(k), angles), v

    def merge_heads(self, mixed: jax.Array) -> jax.Array:
        """[B, S, H, F] → [B, S, D]."""
        return _product(mixed.reshape(*mixed.shape[:2], -1), self.output)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.gate = _weight(keys[0], (config.width, config.mlp_width), ('embed', 'mlp'))
        self.up = _weight(keys[1], (config.width, config.mlp_width), ('embed', 'mlp'))
        self.down = _weight(keys[2], (config.mlp_width, config.width), ('mlp', 'embed'))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _product(jax.nn.silu(_product(x, self.gate)) * _product(x, self.up), self.down)


class Layer(nnx.Module):
    """One layer, in two halves: between them the caller decides what the queries see, a sequence or a cache."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.width, 'embed', config.norm_eps)
        self.attention = Attention(config, attention_key)
        self.mlp_norm = RMSNorm(config.width, 'embed', config.norm_eps)
        self.mlp = MLP(config, mlp_key)

    def qkv(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        with jax.named_scope('qkv'):
            return self.attention.qkv(self.attention_norm(x), angles)

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        with jax.named_scope('attention_output'):
            x = x + self.attention.merge_heads(mixed)
        with jax.named_scope('mlp'):
            x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, 'batch', 'length', None)


class Decoder(nnx.Module):
    """Tokens to hidden states. The head, which turns these into probabilities, is not part of it."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        vocab_shape = (config.vocab_size, config.width)
        self.embedding = _weight(embedding_key, vocab_shape, ('vocab', 'embed'))
        self.layers = nnx.vmap(lambda layer_key: Layer(config, layer_key))(jax.random.split(layers_key, config.layers))
        self.norm = RMSNorm(config.width, 'embed', config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = _weight(head_key, vocab_shape, ('vocab', 'embed'))
        self.config = config

    @property
    def unembedding(self) -> jax.Array:
        """[V, D]: logits are hidden @ unembedding.T. In the dtype of the parameters, which is float32 for masters."""
        return self.embedding[...] if self.config.tied_embeddings else self.lm_head[...]

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Hidden states of whole sequences, several of which may share a row.

        Args:
          tokens: [B, S] int32.
          positions: [B, S] int32, of each token in its own sequence.
          segment_ids: [B, S] int32: a token sees itself and what stands before it in its row under the same id.
            Padding is segment 0: no other segment sees it.

        Returns:
          [B, S, D] in the compute dtype, after the final norm. Finite at padding too.
        """
        x, angles = self._embed(tokens, positions)
        graphdef, stacked = nnx.split(self.layers)

        def body(x: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            layer = nnx.merge(graphdef, params)
            q, k, v = layer.qkv(x, angles)
            with jax.named_scope('attention'):
                mixed = packed_attention(q, k, v, segment_ids, implementation=self.config.attention)
            return layer.finish(x, mixed), None

        if self.config.remat is not None:
            # Inside a scan nothing can merge the recomputation with the original, so the guard against it is waste.
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        with jax.named_scope('layers'):
            x, _ = jax.lax.scan(body, x, stacked)
        return self._final_norm(x)

    def extend(self, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Hidden states of the next tokens of each row, with what came before in the cache.

        Keys and values are written at slot = position, and a query sees every slot up to its own position. An empty
        cache and prompts padded on the right are therefore a prefill: what padding leaves in the cache lies past the
        prompt's end, where no length reaches.

        Args:
          tokens: [B, S] int32.
          positions: [B, S] int32; a position at or past the cache length is not written.
          cache: of length L.

        Returns:
          hidden [B, S, D] as `__call__` gives it, and the cache with the new slots.
        """
        x, angles = self._embed(tokens, positions)
        mask = jnp.arange(cache.k.shape[2])[None, None] <= positions[:, :, None]
        graphdef, stacked = nnx.split(self.layers)

        # The cache is carried, not scanned over: that way a layer writes its few new slots in place, where a scanned
        # cache is copied out whole.
        def body(
            carry: tuple[jax.Array, KVCache], layer_inputs: tuple[jax.Array, nnx.State]
        ) -> tuple[tuple[jax.Array, KVCache], None]:
            x, cache = carry
            index, params = layer_inputs
            layer = nnx.merge(graphdef, params)
            q, k, v = layer.qkv(x, angles)
            with jax.named_scope('cache'):
                cache = KVCache(
                    k=_write_slots(cache.k, index, positions, k), v=_write_slots(cache.v, index, positions, v)
                )
            with jax.named_scope('attention'):
                mixed = attention(q, cache.k[index], cache.v[index], mask)
            return (layer.finish(x, mixed), cache), None

        with jax.named_scope('layers'):
            (x, cache), _ = jax.lax.scan(body, (x, cache), (jnp.arange(self.config.layers), stacked))
        return self._final_norm(x), KVCache(*(constrain(slots, *CACHE_AXES) for slots in cache))

    def decode(
        self, tokens: jax.Array, response_lengths: jax.Array, prompts: Prefixes, responses: Pages
    ) -> tuple[jax.Array, Pages]:
        """Hidden states of the next token of each slot, which sees its prompt and its response so far.

        Args:
          tokens: [E, U] int32, the last tokens of the responses.
          response_lengths: [E, U] int32, with these tokens; their pages exist. A slot of length 0 is idle: its token is
            not written, and what comes out for it is meaningless.
          prompts: whose pages may be shared by many slots.
          responses: pages of the slots.

        Returns:
          hidden [E, U, D] as `__call__` gives it, and the pages with the new tokens.
        """
        shards, slots = tokens.shape
        config = self.config
        _, places, samples = prompts.slots.shape
        place = jnp.minimum(prompts.member // samples, places - 1)
        prompt_lengths = jnp.take_along_axis(prompts.lengths, place, axis=1)
        index = jnp.maximum(response_lengths - 1, 0)
        rows = lambda x: x.reshape(shards * slots, 1, *x.shape[2:])
        x, angles = self._embed(rows(tokens), rows(prompt_lengths + index))
        with jax.named_scope('pages'):
            page = jnp.where(response_lengths > 0, pages_of(responses, index), responses.owner.shape[1])
            offset = index % responses.size
            prompt_view = view(prompts.pages, prompts.lengths)
            response_view = view(responses, response_lengths)
        groups = config.heads // config.kv_heads
        graphdef, stacked = nnx.split(self.layers)

        def body(carry, layer_inputs):
            x, pool, of_prompts, of_responses = carry
            layer_index, params = layer_inputs
            layer = nnx.merge(graphdef, params)
            q, k, v = (y.reshape(shards, slots, *y.shape[2:]) for y in layer.qkv(x, angles))
            with jax.named_scope('cache'):
                pool = tuple(
                    write_token(p, layer_index, page, offset, new, order=responses.order)
                    for p, new in zip(pool, (k, v), strict=True)
                )
            q = q.reshape(shards, slots, config.kv_heads, groups, config.head_dim)
            with jax.named_scope('attention'):
                with jax.named_scope('prompts'):
                    before, of_prompts = attend_shared(q, prompts, layer_index, prompt_view, of_prompts)
                with jax.named_scope('responses'):
                    pages = responses._replace(k=pool[0], v=pool[1])
                    own, of_responses = attend(q, pages, layer_index, response_view, of_responses)
                both = merge([before, own])
                mixed = both.mixed / jnp.maximum(both.total, jnp.finfo(jnp.float32).tiny)[..., None]
                mixed = mixed.astype(x.dtype).reshape(shards * slots, 1, config.heads, config.head_dim)
            return (layer.finish(x, mixed), pool, of_prompts, of_responses), None

        with jax.named_scope('layers'):
            of_prompts, of_responses = scratch(prompts.pages, samples * groups), scratch(responses, groups)
            carry = (x, (responses.k, responses.v), of_prompts, of_responses)
            (x, pool, _, _), _ = jax.lax.scan(body, carry, (jnp.arange(config.layers), stacked))
        hidden = self._final_norm(x).reshape(shards, slots, config.width)
        return hidden, responses._replace(k=pool[0], v=pool[1]).lay_out()

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        with jax.named_scope('embed'):
            # The table is gathered over 'embed' first: its rows cannot be split over the mesh axes of the batch and
            # of 'embed' at once, and the compiler's way out would be to replicate all hidden states.
            table = constrain(self.embedding[...], 'vocab', None)
            x = constrain(table[tokens].astype(self.config.compute_dtype), 'batch', 'length', None)
            return x, rotary_angles(positions, self.config.head_dim, self.config.rope_theta)

    def _final_norm(self, x: jax.Array) -> jax.Array:
        with jax.named_scope('final_norm'):
            return self.norm(x)


def abstract(config: DecoderConfig, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The structure of a decoder and its parameters' shapes, without any of their values.

    Returns:
      graphdef: hashable, the same with and without a mesh; for `bind`.
      params: nested dict of float32 `jax.ShapeDtypeStruct`, with a `NamedSharding` if a mesh is given.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    if mesh is not None:
        _check_divisible(config, mesh)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))

    def shape(path: tuple[str, ...], param: nnx.Param) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(mesh, _stacking(path) + param.axes)
        return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding)

    flat = {path: shape(path, param) for path, param in nnx.to_flat_state(state)}
    return graphdef, nnx.traversals.unflatten_mapping(flat)


def init(config: DecoderConfig, key: jax.Array, mesh: Mesh | None = None) -> dict[str, Any]:
    """New parameters, each shard drawn where it lives. The values do not depend on the mesh."""
    _, shapes = abstract(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)

    def draw(key: jax.Array) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.split(Decoder(config, key))[1])

    return jax.jit(draw, out_shardings=None if mesh is None else shardings)(key)


def bind(graphdef: nnx.GraphDef, params: dict[str, Any]) -> Decoder:
    """The decoder that `graphdef` describes, around these parameters. Free, and differentiable under `jax.grad`.

    Masters are cast to the compute dtype where they are used; `cast_weights` does it beforehand.
    """
    return nnx.merge(graphdef, params)


def cast_weights(params: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The parameters as a decoder uses them: matrices in the compute dtype, the scales of norms as they are.

    For loops that read the parameters often and do not change them, such as decoding: one cast instead of one per step.
    """

    def cast(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
        return param if path[-1].key == 'scale' else param.astype(dtype)

    return jax.tree.map_with_path(cast, params)


def decode_layout(params: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The parameters laid out for decoding: whole along 'embed', which training splits, on every device."""
    _, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    axes = {path: _stacking(path) + param.axes for path, param in nnx.to_flat_state(state)}

    def lay_out(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
        names = axes[tuple(part.key for part in path)]
        return constrain(param, *(None if name == 'embed' else name for name in names))

    return jax.tree.map_with_path(lay_out, params)


def _stacking(path: tuple[str, ...]) -> tuple[str, ...]:
    return ('layers',) if path[0] == 'layers' else ()


def _check_divisible(config: DecoderConfig, mesh: Mesh) -> None:
    sizes = {
        'embed': ('width', config.width),
        'heads': ('heads', config.heads),
        'kv_heads': ('kv_heads', config.kv_heads),
        'mlp': ('mlp_width', config.mlp_width),
        'vocab': ('vocab_size', config.vocab_size),
    }
    problems = [
        f'{name} = {size} is not a multiple of mesh axis {RULES[axis]!r} = {mesh.shape[RULES[axis]]}'
        for axis, (name, size) in sizes.items()
        if size % mesh.shape[RULES[axis]]
    ]
    if problems:
        raise ValueError('the mesh does not divide the model: ' + '; '.join(problems) + '; change make_mesh')
