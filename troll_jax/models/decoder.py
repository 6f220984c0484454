"""The decoder of all model families: pre-norm, RoPE, grouped-query attention (GQA); in Flax NNX.

Parameters are float32 masters in a plain nested dict, outside of the module. `abstract` gives their shapes and
shardings, `init` draws them, `bind` puts them into a module that computes:

    graphdef, shapes = abstract(config, mesh)
    params = init(config, key, mesh)
    hidden = bind(graphdef, params)(tokens, positions, segment_ids)

All layers are one: their parameters are stacked on a leading axis and `jax.lax.scan` runs over it, so that neither
the compiled program nor the compile time grows with depth. Axis letters: `troll_jax/types.py`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from troll_jax.models.attention import best_implementation, packed_attention
from troll_jax.models.layers import REMAT_POLICIES, DecoderConfig, Layer, RMSNorm, exact_products, weight
from troll_jax.models.lora import merge, split
from troll_jax.models.paged_attention import Pool, best_paged_implementation, paged_attention
from troll_jax.models.quantization import quantise
from troll_jax.models.rotary import Angles, angles_where, rotary_angles, rotary_frequencies
from troll_jax.sharding import RULES, axis_size, constrain, named_sharding


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

        graphdef, stacked = nnx.split(self.layers)
        rotates = None if self.config.rope_layers is None else jnp.array(self.config.rope_layers)

        def body(x: jax.Array, of_layer: tuple[Any, ...]) -> tuple[jax.Array, None]:
            rotates, params = of_layer
            layer = nnx.merge(graphdef, params)
            q, k, v = layer.qkv(x, angles_where(rotates, angles), 'rows', 'length')
            with jax.named_scope('attention'):
                mixed = packed_attention(q, k, v, segment_ids, implementation=self.config.attention)
            return constrain(layer.finish(x, mixed), 'rows', 'length', None), None

        if self.config.remat is not None:
            # Inside a scan nothing can merge the recomputation with the original, so the guard against it is waste.
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        x, angles = self._embed(tokens, positions, 'rows', 'length')
        with jax.named_scope('layers'), exact_products(self.config.compute_dtype):
            if self.config.layers:  # a scan over none cannot add up gradients in place
                x, _ = jax.lax.scan(body, x, (rotates, stacked))
        with jax.named_scope('final_norm'):
            return self.norm(x)

    def decode(
        self,
        layers: Sequence[dict[str, Any]],
        tokens: jax.Array,
        positions: jax.Array,
        block_table: jax.Array,
        cache: Sequence[Pool],
    ) -> tuple[jax.Array, list[Pool]]:
        """Hidden states of the next tokens of each sequence, by paged attention to all that it has in the cache.

        One token of each is a decode step, several are a chunk of a prefill. Not scanned over layers: a scan would copy
        the weights and the cache of each layer out of stacked arrays.

        Args:
          layers: the weights of each layer, see `decode_weights`.
          tokens: [W, C] int32.
          positions: [W, C] int32, of each token in its sequence, consecutive; −1: none, its hidden state is
            meaningless.
          block_table: [W, J] int32, the pages of each sequence, on its own shard.
          cache: keys and values of each layer.

        Returns:
          hidden [W, C, D] as `__call__` gives it, and the cache with these tokens.
        """
        graphdef, _ = nnx.split(self.layers)
        x, angles = self._embed(tokens, positions, 'batch', None)
        rope_layers = self.config.rope_layers or (None,) * len(layers)
        written = []
        with exact_products(self.config.compute_dtype):
            for params, rotates, pool in zip(layers, rope_layers, cache, strict=True):
                layer = nnx.merge(graphdef, params)
                q, *kv = layer.qkv(x, angles_where(rotates, angles), 'batch', None)
                k, v = (quantise(part, self.config.decode_precision, axis=-1) for part in kv)
                with jax.named_scope('attention'):
                    mixed, pool = paged_attention(
                        q, k, v, pool, block_table, positions, implementation=self.config.decode_attention
                    )
                x = constrain(layer.finish(x, mixed), 'batch', None, None)
                written.append(pool)
        with jax.named_scope('final_norm'):
            return self.norm(x), written

    def _embed(self, tokens: jax.Array, positions: jax.Array, *axes: str | None) -> tuple[jax.Array, Angles]:
        with jax.named_scope('embed'):
            x = constrain(_look_up(self.config.compute_dtype, self.embedding[...], tokens), *axes, None)
            frequencies = rotary_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
            return x, rotary_angles(positions, frequencies)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype: str, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of a table [V, D] in `dtype`, in which it travels between devices; their gradients are summed in its own."""
    # Gathered over 'embed' first: its rows cannot be split over the mesh axes of the batch and of 'embed' at once, and
    # the compiler's way out would be to replicate all hidden states.
    return constrain(table.astype(dtype), 'vocab', None)[tokens]


def _add_up(dtype, residuals, gradient):
    table, tokens = residuals
    return constrain(jnp.zeros_like(table).at[tokens].add(gradient.astype(table.dtype)), 'vocab', None), None


_look_up.defvjp(lambda dtype, table, tokens: (_look_up(dtype, table, tokens), (table, tokens)), _add_up)


def with_best_kernels(
    config: DecoderConfig, device: jax.Device, attention: str | None = None, decode_attention: str | None = None
) -> DecoderConfig:
    """The configuration with the attention kernels that are named, or else are the fastest on such a device.

    Raises:
      ValueError: a kernel for decoding that such a device does not have.
    """
    sizes = config.compute_dtype, config.head_dim
    best = best_paged_implementation(device, *sizes)
    if decode_attention not in (None, 'xla', best):
        raise ValueError(
            f'decode_attention = {decode_attention!r} does not run on {device.platform} with {sizes[0]} and heads of '
            f"{sizes[1]}; expected 'xla' or {best!r}, or None for the fastest"
        )
    return dataclasses.replace(
        config,
        attention=attention or best_implementation(device, *sizes),
        decode_attention=decode_attention or best,
    )


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


def init(config: DecoderConfig, key: jax.Array, mesh: Mesh | None = None, *, trained_only=False) -> dict[str, Any]:
    """New parameters, or the adapters among them, each shard drawn where it lives. The mesh changes no value."""
    part = (lambda params: split(params)[1]) if trained_only else (lambda params: params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, part(abstract(config, mesh)[1]))

    def draw(key: jax.Array) -> dict[str, Any]:
        return part(nnx.to_pure_dict(nnx.split(Decoder(config, key))[1]))

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


def cast_shapes(shapes: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The shapes, with their shardings, of what `cast_weights` returns."""
    like = lambda x, sharded: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded.sharding)
    return jax.tree.map(like, jax.eval_shape(partial(cast_weights, dtype=dtype), shapes), shapes)


def decode_weights(
    params: dict[str, Any], config: DecoderConfig, *, gather: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parameters laid out for decoding: cast, apart for each layer, and whole along 'embed', which training splits.

    Adapters are merged into their weights, from the same rounded numbers that training multiplies with.

    Args:
      params: those of training.
      config: the decoder's.
      gather: false: they stay split along 'embed', which takes less memory, and are gathered in every step.

    Returns:
      parameters for `bind`, with the layers' structure alone, and for each layer its own, for `Decoder.decode`.
    """
    _, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))
    axes = {path: param.axes for path, param in nnx.to_flat_state(state)}

    def lay_out(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
        names = axes[tuple(part.key for part in path)]
        if path[0].key == 'layers' and param.ndim == 2:
            param = quantise(param, config.decode_precision, axis=0)
        return constrain(param, *(None if gather and name == 'embed' else name for name in names))

    params = cast_weights(params, config.compute_dtype)
    layer = lambda i: merge(jax.tree.map(lambda x: x[i], {'layers': params['layers']}), config.lora)
    layers = [jax.tree.map_with_path(lay_out, layer(i))['layers'] for i in range(config.layers)]
    others = {name: value for name, value in params.items() if name != 'layers'}
    return jax.tree.map_with_path(lay_out, others), layers


def _stacking(path: tuple[str, ...]) -> tuple[str, ...]:
    return ('layers',) if path[0] == 'layers' else ()


def _check_divisible(config: DecoderConfig, mesh: Mesh) -> None:
    kv_heads = ('kv_heads', config.kv_heads)
    if mesh.shape[RULES['kv_heads']] % config.kv_heads == 0:  # each device has one, or a copy: the weights are split
        kv_heads = ('kv_heads · head_dim', config.kv_heads * config.head_dim)
    sizes = {
        'embed': ('width', config.width),
        'heads': ('heads', config.heads),
        'kv_heads': kv_heads,
        'mlp': ('mlp_width', config.mlp_width),
        'vocab': ('vocab_size', config.vocab_size),
    }
    problems = [
        f'{name} = {size} is not a multiple of the {axis_size(axis, mesh)} devices of mesh axes {RULES[axis]!r}'
        for axis, (name, size) in sizes.items()
        if size % axis_size(axis, mesh)
    ]
    if problems:
        raise ValueError('the mesh does not divide the model: ' + '; '.join(problems) + '; change make_mesh')
