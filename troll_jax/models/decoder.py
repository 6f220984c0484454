"""The decoder of all model families: pre-norm, RoPE, grouped-query attention (GQA); in Flax NNX.

Parameters are float32 masters in a plain nested dict, outside of the module. `abstract` gives their shapes and
shardings, `init` draws them, `bind` puts them into a module that computes:

    graphdef, shapes = abstract(config, mesh)
    params = init(config, key, mesh)
    hidden = bind(graphdef, params)(tokens, positions, segment_ids)

All layers are one: their parameters are stacked on a leading axis and `jax.lax.scan` runs over it, so that neither
the compiled program nor the compile time grows with depth. Axis letters: `troll_jax/types.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from troll_jax.models.attention import attention, packed_attention
from troll_jax.models.layers import REMAT_POLICIES, DecoderConfig, Layer, RMSNorm, exact_products, weight
from troll_jax.models.paged_attention import Prefixes, attend, attend_shared, merge, scratch, view
from troll_jax.models.paged_cache import Pages, pages_of, write_token
from troll_jax.models.rotary import Angles, angles_where, rotary_angles, rotary_frequencies
from troll_jax.sharding import RULES, constrain, named_sharding


class KVCache(NamedTuple):
    """A contiguous KV cache, for prefill. The index of a token is its position; rows have no gaps."""

    k: jax.Array  # [layers, B, L, KH, F] compute dtype
    v: jax.Array  # [layers, B, L, KH, F]


CACHE_AXES = ('layers', 'batch', 'length', 'kv_heads', 'head_dim')


def init_cache(config: DecoderConfig, batch: int, length: int) -> KVCache:
    """An empty cache for `batch` rows of at most `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return KVCache(*(constrain(jnp.zeros(shape, config.compute_dtype), *CACHE_AXES) for _ in KVCache._fields))


def _write(cache: jax.Array, layer: jax.Array, positions: jax.Array, new: jax.Array) -> jax.Array:
    """cache[layer, b, positions[b, s]] = new[b, s], for positions inside the cache.

    Written as a scatter whose batch axis is named as such: `cache.at[layer, rows, positions]` is the same, but the
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
    return jax.lax.scatter(cache, indices, new, dimensions, mode=jax.lax.GatherScatterMode.FILL_OR_DROP)


class Decoder(nnx.Module):
    """Tokens to hidden states. The head, from these to probabilities, is not part of it."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        embedding_key, layers_key, head_key = jax.random.split(key, 3)
        vocab_shape = (config.vocab_size, config.width)
        self.embedding = weight(embedding_key, vocab_shape, ('vocab', 'embed'))
        self.layers = nnx.vmap(lambda layer_key: Layer(config, layer_key))(jax.random.split(layers_key, config.layers))
        self.norm = RMSNorm(config.width, 'embed', config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = weight(head_key, vocab_shape, ('vocab', 'embed'))
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
          segment_ids: [B, S] int32: a token sees itself and the tokens before it in its row under the same id.
            Padding is segment 0: no other segment sees it.

        Returns:
          [B, S, D] in the compute dtype, after the final norm. Finite at padding too.
        """

        def mix(layer, q, k, v, _):
            with jax.named_scope('attention'):
                return packed_attention(q, k, v, segment_ids, implementation=self.config.attention), None

        return self._run(tokens, positions, None, mix, remat=self.config.remat)[0]

    def extend(self, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Prefill: hidden states of the next tokens of each row, with the tokens before them in the cache.

        Keys and values are written at their positions, and a query sees the cache up to its own position. So prompts
        are padded on the right, and start with an empty cache: keys of padding are past the prompt's end, where no
        length reaches.

        Args:
          tokens: [B, S] int32.
          positions: [B, S] int32; a position at or past the cache length is not written.
          cache: KV cache of length L.

        Returns:
          hidden [B, S, D] as `__call__` gives it, and the cache with the new tokens.
        """
        mask = jnp.arange(cache.k.shape[2])[None, None] <= positions[:, :, None]

        def mix(layer, q, k, v, cache):
            with jax.named_scope('cache'):
                cache = KVCache(*(_write(x, layer, positions, new) for x, new in zip(cache, (k, v), strict=True)))
            with jax.named_scope('attention'):
                return attention(q, cache.k[layer], cache.v[layer], mask), cache

        x, cache = self._run(tokens, positions, cache, mix)
        return x, KVCache(*(constrain(each, *CACHE_AXES) for each in cache))

    def decode(
        self, tokens: jax.Array, response_lengths: jax.Array, prompts: Prefixes, responses: Pages
    ) -> tuple[jax.Array, Pages]:
        """Decode step: hidden states of the next token of each slot, by paged attention to its prompt and response.

        Args:
          tokens: [E, U] int32, the last tokens of the responses.
          response_lengths: [E, U] int32, with these tokens; their pages exist. A slot of length 0 is idle: its token is
            not written, and its hidden state is meaningless.
          prompts: their pages may be shared by many slots.
          responses: pages of the slots (W = U).

        Returns:
          hidden [E, U, D] as `__call__` gives it, and the pages with the new tokens.
        """
        shards, slots = tokens.shape
        config = self.config
        _, places, samples = prompts.slot_of_sample.shape
        place = jnp.minimum(prompts.sample_of_slot // samples, places - 1)
        prompt_lengths = jnp.take_along_axis(prompts.lengths, place, axis=1)
        index = jnp.maximum(response_lengths - 1, 0)
        rows = lambda x: x.reshape(shards * slots, 1, *x.shape[2:])
        with jax.named_scope('pages'):
            page = jnp.where(response_lengths > 0, pages_of(responses, index), responses.owner.shape[1])
            offset = index % responses.size
            prompt_view = view(prompts.pages, prompts.lengths)
            response_view = view(responses, response_lengths)
        queries = config.heads // config.kv_heads

        def mix(layer, q, k, v, state):
            pool, of_prompts, of_responses = state
            q, k, v = (x.reshape(shards, slots, *x.shape[2:]) for x in (q, k, v))
            with jax.named_scope('cache'):
                pool = tuple(
                    write_token(p, layer, page, offset, new, order=responses.order)
                    for p, new in zip(pool, (k, v), strict=True)
                )
            q = q.reshape(shards, slots, config.kv_heads, queries, config.head_dim)
            with jax.named_scope('attention'):
                with jax.named_scope('prompts'):
                    before, of_prompts = attend_shared(q, prompts, layer, prompt_view, of_prompts)
                with jax.named_scope('responses'):
                    pages = responses._replace(k=pool[0], v=pool[1])
                    own, of_responses = attend(q, pages, layer, response_view, of_responses)
                both = merge([before, own])
                mixed = both.mixed / jnp.maximum(both.total, jnp.finfo(jnp.float32).tiny)[..., None]
                mixed = mixed.astype(q.dtype).reshape(shards * slots, 1, config.heads, config.head_dim)
            return mixed, (pool, of_prompts, of_responses)

        with jax.named_scope('pages'):
            state = (
                (responses.k, responses.v),
                scratch(prompts.pages, samples * queries),
                scratch(responses, queries),
            )
        hidden, (pool, _, _) = self._run(rows(tokens), rows(prompt_lengths + index), state, mix)
        hidden = hidden.reshape(shards, slots, config.width)
        return hidden, responses._replace(k=pool[0], v=pool[1]).lay_out()

    def _run(
        self, tokens: jax.Array, positions: jax.Array, state: Any, mix: Callable[..., Any], remat: str | None = None
    ) -> tuple[jax.Array, Any]:
        """Tokens [B, S] to hidden states [B, S, D] through all layers.

        Args:
          state: memory of `mix` from layer to layer, such as a KV cache. It is carried and not scanned over: that way
            a layer writes its few new tokens in place, where a scanned cache is copied out whole.
          mix: (layer, q, k, v, state) → attention of these queries [B, S, H, F], and the new state.
          remat: one of `REMAT_POLICIES`, for calls that are differentiated.
        """
        x, angles = self._embed(tokens, positions)
        graphdef, stacked = nnx.split(self.layers)
        rotates = None if self.config.rope_layers is None else jnp.array(self.config.rope_layers)

        def body(carry: tuple[jax.Array, Any], of_layer: tuple[Any, ...]) -> tuple[tuple[jax.Array, Any], None]:
            x, state = carry
            index, rotates, params = of_layer
            layer = nnx.merge(graphdef, params)
            mixed, state = mix(index, *layer.qkv(x, angles_where(rotates, angles)), state)
            return (layer.finish(x, mixed), state), None

        if remat is not None:
            # Inside a scan nothing can merge the recomputation with the original, so the guard against it is waste.
            body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
        with jax.named_scope('layers'), exact_products(self.config.compute_dtype):
            (x, state), _ = jax.lax.scan(body, (x, state), (jnp.arange(self.config.layers), rotates, stacked))
        with jax.named_scope('final_norm'):
            return self.norm(x), state

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, Angles]:
        with jax.named_scope('embed'):
            # The table is gathered over 'embed' first: its rows cannot be split over the mesh axes of the batch and
            # of 'embed' at once, and the compiler's way out would be to replicate all hidden states.
            table = constrain(self.embedding[...], 'vocab', None)
            x = constrain(table[tokens].astype(self.config.compute_dtype), 'batch', 'length', None)
            frequencies = rotary_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
            return x, rotary_angles(positions, frequencies)


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
    """The parameters as a decoder uses them: matrices in the compute dtype, vectors (norms, biases) as they are.

    For loops that read the parameters often and do not change them, such as decoding: one cast instead of one per step.
    """

    def cast(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
        return param if param.ndim - len(_stacking((path[0].key,))) < 2 else param.astype(dtype)

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
