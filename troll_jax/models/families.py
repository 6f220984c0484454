"""Differences between the supported model families, as data: configs and names of tensors in checkpoints."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from troll_jax.models.decoder import DecoderConfig
from troll_jax.models.layers import XIELU
from troll_jax.models.rotary import RopeScaling


class Tensor(NamedTuple):
    """The place of a parameter of ours in a Hugging Face checkpoint."""

    name: str  # with '{layer}' if there is one tensor per layer, which we stack
    path: tuple[str, ...]  # in our nested dict
    transposed: bool = False  # checkpoints keep [out, in], we keep [in, out]


class Constant(NamedTuple):
    """A number that checkpoints store and no training changes."""

    name: str  # with '{layer}'
    value: float


class Requirement(NamedTuple):
    """A field of the Hugging Face config that changes the model, and the values that we implement."""

    field: str
    read: Callable[[PretrainedConfig], Any]
    expected: tuple[Any, ...]


class Family(NamedTuple):
    options: Callable[[PretrainedConfig], dict[str, Any]]  # fields of DecoderConfig besides those of `_sizes`
    requirements: tuple[Requirement, ...]
    tensors: tuple[Tensor, ...]  # 'lm_head.weight' exists only if the embeddings are not tied
    constants: tuple[Constant, ...] = ()


_SIZES = (
    *('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads'),
    *('intermediate_size', 'max_position_embeddings'),
)


def _sizes(hf: PretrainedConfig) -> dict[str, Any]:
    """The fields of DecoderConfig that all families name alike."""
    rope, scaling = hf.rope_parameters, None
    numbers = {name: getattr(hf, name) for name in (*_SIZES, 'rms_norm_eps')} | {'rope_theta': rope['rope_theta']}
    for name, value in numbers.items():
        whole = name in _SIZES
        if type(value) not in ((int,) if whole else (int, float)) or not 0 < value < math.inf:
            expected = f'a {"whole " if whole else "finite "}number above 0'
            raise ValueError(f'{name} of the model is {value!r}; expected {expected}. Correct its config.json.')
    if rope['rope_type'] == 'llama3':
        scaling = RopeScaling(
            factor=float(rope['factor']),
            low_freq_factor=float(rope['low_freq_factor']),
            high_freq_factor=float(rope['high_freq_factor']),
            original_length=rope.get('original_max_position_embeddings', hf.max_position_embeddings),
        )
    return dict(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, 'head_dim', None) or hf.hidden_size // hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        rope_theta=float(rope['rope_theta']),
        rope_scaling=scaling,
        norm_eps=hf.rms_norm_eps,
        tied_embeddings=hf.tie_word_embeddings,
    )


def _rope_layers(hf: PretrainedConfig) -> tuple[bool, ...] | None:
    """True for layers that apply RoPE; None if all do."""
    layers = tuple(bool(rotates) for rotates in hf.no_rope_layers[: hf.num_hidden_layers])  # 1: with, 0: without
    return None if all(layers) else layers


_ROPE = (
    Requirement('rope_type', lambda hf: hf.rope_parameters['rope_type'], ('default', 'llama3')),
    Requirement('partial_rotary_factor', lambda hf: hf.rope_parameters.get('partial_rotary_factor', 1.0), (1.0,)),
)
_SILU = Requirement('hidden_act', lambda hf: hf.hidden_act, ('silu',))
_NO_ATTENTION_BIAS = Requirement('attention_bias', lambda hf: hf.attention_bias, (False,))
_NO_MLP_BIAS = Requirement('mlp_bias', lambda hf: hf.mlp_bias, (False,))
_FULL_ATTENTION = Requirement('layer_types', lambda hf: sorted(set(hf.layer_types)), (['full_attention'],))


def _of_layer(name: str, *path: str, transposed: bool = False) -> Tensor:
    return Tensor('model.layers.{layer}.' + name, ('layers', *path), transposed)


_OUTSIDE = (
    Tensor('model.embed_tokens.weight', ('embedding',)),
    Tensor('model.norm.weight', ('norm', 'scale')),
    Tensor('lm_head.weight', ('lm_head',)),
)
_NORMS = (
    _of_layer('input_layernorm.weight', 'attention_norm', 'scale'),
    _of_layer('post_attention_layernorm.weight', 'mlp_norm', 'scale'),
)
_ATTENTION = (
    _of_layer('self_attn.q_proj.weight', 'attention', 'query', transposed=True),
    _of_layer('self_attn.k_proj.weight', 'attention', 'key', transposed=True),
    _of_layer('self_attn.v_proj.weight', 'attention', 'value', transposed=True),
    _of_layer('self_attn.o_proj.weight', 'attention', 'output', transposed=True),
)
_QKV_BIAS = (
    _of_layer('self_attn.q_proj.bias', 'attention', 'query_bias'),
    _of_layer('self_attn.k_proj.bias', 'attention', 'key_bias'),
    _of_layer('self_attn.v_proj.bias', 'attention', 'value_bias'),
)
_QK_NORM = (
    _of_layer('self_attn.q_norm.weight', 'attention', 'query_norm', 'scale'),
    _of_layer('self_attn.k_norm.weight', 'attention', 'key_norm', 'scale'),
)
_UP_DOWN = (
    _of_layer('mlp.up_proj.weight', 'mlp', 'up', transposed=True),
    _of_layer('mlp.down_proj.weight', 'mlp', 'down', transposed=True),
)
_SWIGLU = (_of_layer('mlp.gate_proj.weight', 'mlp', 'gate', transposed=True), *_UP_DOWN)

QWEN3 = Family(
    options=lambda hf: dict(qk_norm=True),
    requirements=(*_ROPE, _SILU, _NO_ATTENTION_BIAS, _FULL_ATTENTION),
    tensors=_OUTSIDE + _NORMS + _ATTENTION + _QK_NORM + _SWIGLU,
)
QWEN2 = Family(
    options=lambda hf: dict(qk_norm=False, qkv_bias=True),
    requirements=(*_ROPE, _SILU, _FULL_ATTENTION),
    tensors=_OUTSIDE + _NORMS + _ATTENTION + _QKV_BIAS + _SWIGLU,
)
LLAMA = Family(
    options=lambda hf: dict(qk_norm=False),
    requirements=(*_ROPE, _SILU, _NO_ATTENTION_BIAS, _NO_MLP_BIAS),
    tensors=_OUTSIDE + _NORMS + _ATTENTION + _SWIGLU,
)
SMOLLM3 = Family(
    options=lambda hf: dict(qk_norm=False, rope_layers=_rope_layers(hf)),
    requirements=(*_ROPE, _SILU, _NO_ATTENTION_BIAS, _NO_MLP_BIAS, _FULL_ATTENTION),
    tensors=_OUTSIDE + _NORMS + _ATTENTION + _SWIGLU,
)
APERTUS = Family(
    options=lambda hf: dict(qk_norm=True, mlp='xielu'),
    requirements=(*_ROPE, Requirement('hidden_act', lambda hf: hf.hidden_act, ('xielu',)), _NO_ATTENTION_BIAS),
    tensors=(
        *_OUTSIDE,
        _of_layer('attention_layernorm.weight', 'attention_norm', 'scale'),
        _of_layer('feedforward_layernorm.weight', 'mlp_norm', 'scale'),
        *_ATTENTION,
        *_QK_NORM,
        *_UP_DOWN,
        _of_layer('mlp.act_fn.alpha_p', 'mlp', 'activation', 'alpha_p'),
        _of_layer('mlp.act_fn.alpha_n', 'mlp', 'activation', 'alpha_n'),
    ),
    constants=(
        Constant('model.layers.{layer}.mlp.act_fn.beta', XIELU.BETA),
        Constant('model.layers.{layer}.mlp.act_fn.eps', XIELU.EPS),
    ),
)

# By the first entry of `architectures` in config.json.
FAMILIES: dict[str, Family] = {
    'Qwen3ForCausalLM': QWEN3,
    'Qwen2ForCausalLM': QWEN2,  # Qwen2.5 too
    'LlamaForCausalLM': LLAMA,  # Llama 3, 3.1 and 3.2, and models trained on from them
    'SmolLM3ForCausalLM': SMOLLM3,
    'ApertusForCausalLM': APERTUS,
}


def family(architectures: list[str] | None) -> Family:
    """The family of a config's `architectures`.

    Raises:
      ValueError: it is not supported.
    """
    if not isinstance(architectures, list) or architectures[:1] not in [[name] for name in FAMILIES]:
        raise ValueError(f'unsupported architecture: got {architectures}, expected one of {sorted(FAMILIES)}')
    return FAMILIES[architectures[0]]


def decoder_config(
    hf_config: PretrainedConfig, *, compute_dtype: str = 'bfloat16', remat: str | None = None
) -> DecoderConfig:
    """Our config of a model that `hf_config` describes.

    Raises:
      ValueError: an unsupported architecture, or a variant of a supported one that we do not implement.
    """
    of = family(hf_config.architectures)
    found = [(r.field, r.read(hf_config), r.expected) for r in of.requirements]
    problems = [
        f'{field}: got {got!r}, expected {" or ".join(map(repr, expected))}'
        for field, got, expected in found
        if got not in expected
    ]
    if problems:
        raise ValueError(f'unsupported variant of {hf_config.architectures[0]}: ' + '; '.join(problems))
    return DecoderConfig(**_sizes(hf_config), **of.options(hf_config), compute_dtype=compute_dtype, remat=remat)


def tensors(hf_config: PretrainedConfig) -> tuple[Tensor, ...]:
    """All parameters of the model that `hf_config` describes."""
    table = family(hf_config.architectures).tensors
    return tuple(tensor for tensor in table if tensor.name != 'lm_head.weight' or not hf_config.tie_word_embeddings)
