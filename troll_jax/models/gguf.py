"""Models in GGUF, the format of llama.cpp: one file with config, tokenizer and weights, most of them quantised."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from transformers import AutoConfig, PretrainedConfig

from troll_jax.models.families import family
from troll_jax.models.rotary import RopeScaling, rotary_frequencies

# By general.architecture: the architecture in Hugging Face's configs, and whether RoPE's planes are spanned by
# neighbouring components, for which the rows of Q and K stand in another order.
ARCHITECTURES = {
    'llama': ('LlamaForCausalLM', True),
    'qwen2': ('Qwen2ForCausalLM', False),
    'qwen3': ('Qwen3ForCausalLM', False),
}
FIELDS = {  # the names of Hugging Face's configs for them
    'context_length': 'max_position_embeddings',
    'embedding_length': 'hidden_size',
    'block_count': 'num_hidden_layers',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
    'rope.freq_base': 'rope_theta',
}
WIDTHS = ('attention.key_length', 'attention.value_length', 'rope.dimension_count')  # of a head, and all the same
# Tokens that end a turn or a text of these families. The metadata need not name them all.
ENDS = ('<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<|eom_id|>', '<|end_of_text|>')
EMBEDDING, ROPE_FREQUENCIES = 'token_embd.weight', 'rope_freqs.weight'


class GgufTensor(NamedTuple):
    """A tensor in a file, of which nothing is read before it is indexed; then the rows that are asked for."""

    file: Path
    offset: int  # bytes
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    heads: int | None = None  # if the file has the F rows of a head in the order 0, F/2, 1, F/2 + 1, …
    dtype: str = 'F32'  # of what is read, as safetensors names it

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        stored = (*self.shape[:-1], self.shape[-1] // block * size)
        stored = np.memmap(self.file, np.uint8, 'r', self.offset, stored)
        if len(self.shape) == 1:
            return gguf.dequantize(stored, self.kind)[index]
        rows = np.arange(self.shape[0])
        if self.heads is not None:
            rows = rows.reshape(self.heads, -1, 2).swapaxes(1, 2).ravel()
        return gguf.dequantize(stored[rows[index[0]]], self.kind)[:, *index[1:]]


class Gguf(NamedTuple):
    """A file: all that stands before its weights."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]  # by llama.cpp's names


@cache
def read_gguf(file: Path) -> Gguf:
    """Reads a file up to its weights, which takes seconds.

    Raises:
      ValueError: the file is damaged, one part of several, or its architecture or a quantisation is not supported.
    """
    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        found = {
            x.name: GgufTensor(file, x.data_offset, x.tensor_type, tuple(x.shape.tolist()[::-1]))
            for x in reader.tensors
        }
    except Exception as error:  # of many kinds: bytes are taken as they come
        raise ValueError(
            f'{file} is damaged, or newer than the package gguf ({type(error).__name__}: {error}); copy or download it '
            'again, or update gguf'
        ) from error
    if reader.endianess == gguf.GGUFEndian.BIG:
        raise ValueError(f'{file} is big-endian; expected little-endian. Run gguf-convert-endian FILE little')
    if (parts := metadata.get('split.count', 1)) not in (0, 1):
        raise ValueError(f'{file} is one of {parts} parts; expected one file. Run llama-gguf-split --merge')
    if (name := metadata.get('general.architecture')) not in ARCHITECTURES:
        raise ValueError(f'{file}: general.architecture is {name!r}; expected one of {sorted(ARCHITECTURES)}')
    keys = [*(f'{name}.{field}' for field in FIELDS), 'tokenizer.ggml.tokens', 'tokenizer.ggml.token_type']
    if missing := [key for key in keys if key not in metadata] + [key for key in [EMBEDDING] if key not in found]:
        raise ValueError(f'{file} does not have {missing}; convert the model again')
    for kind in {tensor.kind for tensor in found.values()}:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise ValueError(
                f'{file} has tensors of type {kind.name}: {error}. Use another one, such as Q8_0'
            ) from error
    return Gguf(file, metadata, found)


def end_tokens(model: Gguf) -> list[int]:
    """Every token that ends a response, by its id."""
    ids = {model.metadata.get(f'tokenizer.ggml.{name}_token_id') for name in ('eos', 'eot', 'eom')} - {None}
    tokens = zip(model.metadata['tokenizer.ggml.tokens'], model.metadata['tokenizer.ggml.token_type'], strict=False)
    control = gguf.TokenType.CONTROL
    return sorted(ids | {i for i, (token, kind) in enumerate(tokens) if kind == control and token in ENDS})


def gguf_config(model: Gguf) -> PretrainedConfig:
    """The Hugging Face config that the metadata describe. Raises a ValueError for variants that are not supported."""
    name = model.metadata['general.architecture']
    found = {key.removeprefix(f'{name}.'): x for key, x in model.metadata.items() if key.startswith(f'{name}.')}
    known = (*FIELDS, *WIDTHS, 'vocab_size')
    if other := {key: x for key, x in found.items() if isinstance(x, list) or (x and key not in known)}:
        raise ValueError(f'{model.file} is a variant of {name!r} that is not supported: {other}')
    widths = {key: found[key] for key in WIDTHS if key in found}
    if ROPE_FREQUENCIES in model.tensors:
        widths[ROPE_FREQUENCIES] = 2 * model.tensors[ROPE_FREQUENCIES].shape[0]
    if len(set(widths.values())) > 1:
        raise ValueError(f'{model.file}: {widths}; expected one width of a head')
    fields = {theirs: found[key] for key, theirs in FIELDS.items()}
    rope = {'rope_type': 'default', 'rope_theta': fields.pop('rope_theta')}
    if ROPE_FREQUENCIES in model.tensors:
        rope |= _llama_3_1(model, rope['rope_theta'])
    architecture = ARCHITECTURES[name][0]
    fields |= dict(
        architectures=[architecture],
        vocab_size=model.tensors[EMBEDDING].shape[0],
        head_dim=next(iter(widths.values()), None),
        rope_parameters=rope,
        tie_word_embeddings='output.weight' not in model.tensors,
        bos_token_id=model.metadata.get('tokenizer.ggml.bos_token_id'),
        eos_token_id=end_tokens(model),
        pad_token_id=model.metadata.get('tokenizer.ggml.padding_token_id'),
    )
    try:
        return AutoConfig.for_model(architecture.removesuffix('ForCausalLM').lower(), **fields)
    except Exception as error:  # of many kinds: each field has checks of its own
        raise ValueError(f'{model.file} does not describe a {name} model: {error}') from error


def _llama_3_1(model: Gguf, theta: float) -> dict[str, Any]:
    """Llama 3.1's RoPE, of which a file has nothing but how much slower each plane rotates."""
    slower = model.tensors[ROPE_FREQUENCIES][:]
    rule = RopeScaling(factor=float(slower.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    plain, scaled = (rotary_frequencies(2 * slower.size, theta, scaling) for scaling in (None, rule))
    if not np.allclose(plain / slower, scaled, rtol=1e-5, atol=0):
        raise ValueError(f'{model.file}: {ROPE_FREQUENCIES} slows RoPE by another rule than {rule}')
    fields = rule._asdict()
    return {'rope_type': 'llama3', 'original_max_position_embeddings': fields.pop('original_length'), **fields}


def gguf_tensors(model: Gguf, hf_config: PretrainedConfig) -> dict[str, GgufTensor]:
    """All tensors by the names of a Hugging Face checkpoint; those that it does not have keep their own."""
    name = model.metadata['general.architecture']
    (arch,) = (key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, hf_config.num_hidden_layers)
    found = {key: tensor for key, tensor in model.tensors.items() if key != ROPE_FREQUENCIES}
    for tensor in family(hf_config.architectures).tensors:
        for layer in range(hf_config.num_hidden_layers if '{layer}' in tensor.name else 1):
            theirs = tensor.name.format(layer=layer)
            ours = names.get_name(theirs, try_suffixes=('.weight', '.bias'))
            if ours in found:
                stored = found.pop(ours)
                if ARCHITECTURES[name][1] and (key := theirs.split('.')[-2]) in ('q_proj', 'k_proj'):
                    heads = hf_config.num_attention_heads if key == 'q_proj' else hf_config.num_key_value_heads
                    stored = stored._replace(heads=heads)
                found[theirs] = stored
    return found
