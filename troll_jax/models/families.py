"""What differs between the supported model families, as data: configs and names of tensors in checkpoints."""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from troll_jax.models.decoder import DecoderConfig


class Tensor(NamedTuple):
    """Where a parameter of ours stands in a Hugging Face checkpoint."""

    name: str  # with '{layer}' if there is one tensor per layer, which we stack
    path: tuple[str, ...]  # in our nested dict
    transposed: bool = False  # checkpoints keep [out, in], we keep [in, out]


class Requirement(NamedTuple):
    """A field of the Hugging Face config that changes the model, and the only value that we implement."""

    field: str
    read: Callable[[PretrainedConfig], Any]
    expected: Any


class Family(NamedTuple):
    sizes: Callable[[PretrainedConfig], dict[str, Any]]  # fields of DecoderConfig
    requirements: tuple[Requirement, ...]
    tensors: tuple[Tensor, ...]  # 'lm_head.weight' exists only if the embeddings are not tied


QWEN3 = Family(
    sizes=lambda hf: dict(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        mlp_width=hf.intermediate_size,
        rope_theta=float(hf.rope_parameters['rope_theta']),
        norm_eps=hf.rms_norm_eps,
        tied_embeddings=hf.tie_word_embeddings,
    ),
    requirements=(
        Requirement('attention_bias', lambda hf: hf.attention_bias, False),
        Requirement('hidden_act', lambda hf: hf.hidden_act, 'silu'),
        Requirement('layer_types', lambda hf: sorted(set(hf.layer_types)), ['full_attention']),
        Requirement('rope_type', lambda hf: hf.rope_parameters['rope_type'], 'default'),
    ),
    tensors=(
        Tensor('model.embed_tokens.weight', ('embedding',)),
        Tensor('model.layers.{layer}.input_layernorm.weight', ('layers', 'attention_norm', 'scale')),
        Tensor('model.layers.{layer}.self_attn.q_proj.weight', ('layers', 'attention', 'query'), True),
        Tensor('model.layers.{layer}.self_attn.k_proj.weight', ('layers', 'attention', 'key'), True),
        Tensor('model.layers.{layer}.self_attn.v_proj.weight', ('layers', 'attention', 'value'), True),
        Tensor('model.layers.{layer}.self_attn.o_proj.weight', ('layers', 'attention', 'output'), True),
        Tensor('model.layers.{layer}.self_attn.q_norm.weight', ('layers', 'attention', 'query_norm', 'scale')),
        Tensor('model.layers.{layer}.self_attn.k_norm.weight', ('layers', 'attention', 'key_norm', 'scale')),
        Tensor('model.layers.{layer}.post_attention_layernorm.weight', ('layers', 'mlp_norm', 'scale')),
        Tensor('model.layers.{layer}.mlp.gate_proj.weight', ('layers', 'mlp', 'gate'), True),
        Tensor('model.layers.{layer}.mlp.up_proj.weight', ('layers', 'mlp', 'up'), True),
        Tensor('model.layers.{layer}.mlp.down_proj.weight', ('layers', 'mlp', 'down'), True),
        Tensor('model.norm.weight', ('norm', 'scale')),
        Tensor('lm_head.weight', ('lm_head',)),
    ),
)

# By the first entry of `architectures` in config.json.
FAMILIES: dict[str, Family] = {'Qwen3ForCausalLM': QWEN3}


def family(architectures: list[str] | None) -> Family:
    """The family of a config's `architectures`.

    Raises:
      ValueError: it is not supported.
    """
    if not architectures or architectures[0] not in FAMILIES:
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
    problems = [f'{field}: got {got!r}, expected {expected!r}' for field, got, expected in found if got != expected]
    if problems:
        raise ValueError(f'unsupported variant of {hf_config.architectures[0]}: ' + '; '.join(problems))
    return DecoderConfig(**of.sizes(hf_config), compute_dtype=compute_dtype, remat=remat)


def tensors(hf_config: PretrainedConfig) -> tuple[Tensor, ...]:
    """All parameters of the model that `hf_config` describes."""
    table = family(hf_config.architectures).tensors
    return tuple(tensor for tensor in table if tensor.name != 'lm_head.weight' or not hf_config.tie_word_embeddings)
