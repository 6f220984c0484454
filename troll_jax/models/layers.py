"""One layer of the decoder, and its configuration. Axis letters: `troll_jax/types.py`."""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from troll_jax.models.attention import IMPLEMENTATIONS, keep_output
from troll_jax.models.lora import Adapter, Lora, adapt
from troll_jax.models.paged_attention import IMPLEMENTATIONS as PAGED_IMPLEMENTATIONS
from troll_jax.models.quantization import PRECISIONS
from troll_jax.models.rotary import Angles, RopeScaling, rotate
from troll_jax.sharding import axis_size, constrain

# Activation checkpointing: values of a layer that the backward pass keeps instead of computing them again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'attention': keep_output,
    # Products with weights, and attention: no product of a forward pass is taken twice (MaxText: minimal_with_context).
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keep_output
    ),
}
COMPUTE_DTYPES = ('bfloat16', 'float32')
MLPS = ('swiglu', 'xielu')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, options of its model family (the defaults are Qwen3's), and options of its computation.

    Raises:
      ValueError: sizes that do not go together, an unknown `mlp`, `compute_dtype`, `remat` or `attention`.
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
    qk_norm: bool = True  # of each query and key, before RoPE
    qkv_bias: bool = False
    mlp: str = 'swiglu'
    rope_scaling: RopeScaling | None = None
    rope_layers: tuple[bool, ...] | None = None  # layers that apply RoPE; None: all
    tokenizer_size: int | None = None  # ids from here on belong to no token and have no probability; None: vocab_size
    compute_dtype: str = 'bfloat16'
    remat: str | None = None
    attention: str = 'xla'  # of whole sequences
    decode_attention: str = 'xla'  # over the paged KV cache
    decode_precision: str | None = None  # of weights and KV cache in decoding, see `models.quantization`
    lora: Lora | None = None  # adapters among the parameters; a sampler merges them into its weights

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f'heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}')
        if self.head_dim % 2:
            raise ValueError(f'rotary positions need an even head_dim; got {self.head_dim}')
        if self.rope_layers is not None and len(self.rope_layers) != self.layers:
            raise ValueError(f'rope_layers must say it for {self.layers} layers; got {len(self.rope_layers)} values')
        options = {'mlp': MLPS, 'compute_dtype': COMPUTE_DTYPES, 'remat': (None, *REMAT_POLICIES)}
        options |= {'attention': IMPLEMENTATIONS, 'decode_attention': PAGED_IMPLEMENTATIONS}
        for name, known in (options | {'decode_precision': (None, *PRECISIONS)}).items():
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {tuple(known)}; got {getattr(self, name)!r}')


def exact_products(dtype: str) -> contextlib.AbstractContextManager:
    """A context in which float32 products are taken in float32. By default TPUs use bfloat16, NVIDIA's GPUs TF32.

    With a compute dtype of bfloat16 nothing changes. A kernel's derivative is traced where the gradient is taken, so
    this must be in force there too.
    """
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision('highest') if is_float32 else contextlib.nullcontext()


def weight(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A new weight [I, O], or an embedding [V, D]: normal, with a deviation of 0.02 · sqrt(1024 / inputs).

    That is the published configs' `initializer_range` at the width of Qwen3-0.6B, carried over to other widths.
    """
    inputs = shape[axes.index('embed')] if 'vocab' in axes else shape[0]
    return nnx.Param(0.02 * (1024 / inputs) ** 0.5 * jax.random.normal(key, shape), axes=axes)


def product(x: jax.Array, weight: nnx.Param, bias: nnx.Param | None = None, lora: Adapter | None = None) -> jax.Array:
    """[..., I] times [I, O], plus the adapter's product, plus [O].

    Flattened to two axes first: on a CPU a product with a batch axis is slower. Not if rows are split over devices:
    the tokens of one device would no longer lie next to each other.

    The parts of a weight that 'embed' spreads over devices are gathered first, in the dtype of the product. Left to
    the partitioner, masters travel in float32, and a TPU's compiler splits the product into one for each device's part,
    of which each reads and writes all activations.
    """
    gathered = constrain(weight[...].astype(x.dtype), *(None if axis == 'embed' else axis for axis in weight.axes))
    flat = (x if axis_size('length') > 1 else x.reshape(-1, x.shape[-1])) @ gathered
    if lora is not None:
        flat = flat + product(lora.scale * product(x, lora.a), lora.b).reshape(flat.shape)
    if bias is not None:
        # In float32, in which its gradient, a sum over all tokens, is summed too.
        bias = bias[...].astype(jnp.float32)
        flat = (flat.astype(jnp.float32) + jnp.expand_dims(bias, range(flat.ndim - 1))).astype(x.dtype)
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
        self.query = weight(keys[0], (width, q_size), ('embed', 'heads'))
        self.key = weight(keys[1], (width, kv_size), ('embed', 'kv_heads'))
        self.value = weight(keys[2], (width, kv_size), ('embed', 'kv_heads'))
        self.output = weight(keys[3], (q_size, width), ('heads', 'embed'))
        bias = lambda size, axis: nnx.Param(jnp.zeros(size), axes=(axis,)) if config.qkv_bias else None
        self.query_bias = bias(q_size, 'heads')
        self.key_bias, self.value_bias = bias(kv_size, 'kv_heads'), bias(kv_size, 'kv_heads')
        norm = lambda: RMSNorm(config.head_dim, 'head_dim', config.norm_eps) if config.qk_norm else None
        self.query_norm, self.key_norm = norm(), norm()
        self.head_dim = config.head_dim

    def qkv(self, x: jax.Array, angles: Angles, *axes: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, S, D] → queries [B, S, H, F], keys and values [B, S, KH, F]; with RoPE. `axes` are those of B and S.

        On more devices than KV heads each of these has a copy: KH is then the number of devices.
        """
        of = {'query': self.query_bias, 'key': self.key_bias, 'value': self.value_bias}
        of = [(getattr(self, name), bias, self.lora.get(name)) for name, bias in of.items()]
        q, k, v = (product(x, *parts).reshape(*x.shape[:-1], -1, self.head_dim) for parts in of)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        k = rotate(k, angles)
        if (copies := axis_size('kv_heads') // k.shape[2]) > 1:
            whole = (constrain(x, *axes, None, None) for x in (k, v))
            k, v = (constrain(jnp.repeat(x, copies, axis=2), *axes, 'kv_heads', None) for x in whole)
        return rotate(q, angles), k, v

    def merge_heads(self, mixed: jax.Array) -> jax.Array:
        """[B, S, H, F] → [B, S, D]."""
        return product(mixed.reshape(*mixed.shape[:2], -1), self.output, lora=self.lora.get('output'))


class MLP(nnx.Module):
    """SwiGLU, down(silu(gate(x)) · up(x)), or down(xIELU(up(x)))."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        if config.mlp == 'swiglu':
            self.gate = weight(keys[0], (config.width, config.mlp_width), ('embed', 'mlp'))
        else:
            self.activation = XIELU()
        self.up = weight(keys[1], (config.width, config.mlp_width), ('embed', 'mlp'))
        self.down = weight(keys[2], (config.mlp_width, config.width), ('mlp', 'embed'))
        self.gated = config.mlp == 'swiglu'

    def __call__(self, x: jax.Array) -> jax.Array:
        up = product(x, self.up, lora=self.lora.get('up'))
        gate = product(x, self.gate, lora=self.lora.get('gate')) if self.gated else None
        inner = jax.nn.silu(gate) * up if self.gated else self.activation(up)
        return product(inner, self.down, lora=self.lora.get('down'))


class XIELU(nnx.Module):
    """The integral of an ELU with two learnt scalars (Huang and Schlag, arXiv 2411.13010), in float32.

        a x² + β x  for x > 0,  (b + β) (exp(min(x, ε)) − 1 − x) + β x  else,  with a = softplus(α_p), b = softplus(α_n)

    float32 whatever the dtype of `x`, because the gradients of the scalars are sums over all tokens.
    """

    BETA, EPS = 0.5, -1e-6

    def __init__(self):
        inverse_softplus = lambda y: jnp.log(jnp.expm1(jnp.full(1, y)))
        self.alpha_p = nnx.Param(inverse_softplus(0.8), axes=(None,))
        self.alpha_n = nnx.Param(inverse_softplus(0.8 - self.BETA), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        a, b = (jax.nn.softplus(alpha[0].astype(jnp.float32)) for alpha in (self.alpha_p[...], self.alpha_n[...]))
        negative = (b + self.BETA) * (jnp.expm1(jnp.minimum(x32, self.EPS)) - x32)
        return (jnp.where(x32 > 0, a * x32 * x32, negative) + self.BETA * x32).astype(x.dtype)


class Layer(nnx.Module):
    """One layer, in two halves: between them the caller computes attention, over a sequence or a KV cache."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.width, 'embed', config.norm_eps)
        self.attention = Attention(config, attention_key)
        self.mlp_norm = RMSNorm(config.width, 'embed', config.norm_eps)
        self.mlp = MLP(config, mlp_key)
        adapt(config.lora, jax.random.fold_in(key, 2), self.attention, self.mlp)

    def qkv(self, x: jax.Array, angles: Angles, *axes: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        with jax.named_scope('qkv'):
            return self.attention.qkv(self.attention_norm(x), angles, *axes)

    def finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        with jax.named_scope('attention_output'):
            x = x + self.attention.merge_heads(mixed)
        with jax.named_scope('mlp'):
            x = x + self.mlp(self.mlp_norm(x))
        return x
