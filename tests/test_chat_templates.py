"""Chat templates of the paper's model families, from the tokenizer's folder to token ids.

The tokenizers are small and have each family's own special tokens, its way to add a BOS, its ids that end a response,
and a template of its form. Everything goes the way of a user: a model's folder, `Experiment`'s loading functions.
"""

import json
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from troll_jax.data.prompts import encode_prompts
from troll_jax.data.tokenizer import load_tokenizer, stop_token_ids

WORDS = [
    '?',
    '\n\n',
    '\n',
    'system',
    'user',
    'assistant',
    'Be',
    'brief',
    'kind',
    'Hi',
    'there',
    '/no_think',
    'Today',
    '26',
]
WORDS += ['Jul', 'July', '2024', 'disabled', 'Thinking']

CHATML = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% endif %}"
    "{% set system = system | default('', true) %}"
    'SYSTEM'
    "{% for m in messages if m['role'] != 'system' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    '{% if add_generation_prompt %}<|im_start|>assistant\nTHINK{% endif %}'
)
EMPTY_THOUGHT = '{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}'


@dataclass(frozen=True)
class Family:
    """A tokenizer: its special tokens in the order of their ids, behind those of `WORDS`."""

    special: list[str]
    template: str
    eos: str
    pad: str | None
    bos: str | None = None  # the tokenizer puts it before every text, as these families' tokenizers do
    stops: tuple[str, ...] = ()  # of generation_config.json


FAMILIES = {
    'Qwen3': Family(
        ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>'],
        CHATML.replace('SYSTEM', '{% if system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}').replace(
            'THINK', EMPTY_THOUGHT
        ),
        eos='<|im_end|>',
        pad='<|endoftext|>',
        stops=('<|im_end|>', '<|endoftext|>'),
    ),
    'Qwen2.5': Family(
        ['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
        # Without a system message there is one all the same.
        CHATML.replace('SYSTEM', "<|im_start|>system\n{{ system or 'Be kind' }}<|im_end|>\n").replace('THINK', ''),
        eos='<|im_end|>',
        pad='<|endoftext|>',
        stops=('<|im_end|>', '<|endoftext|>'),
    ),
    'Llama 3': Family(
        [
            '<|begin_of_text|>',
            '<|end_of_text|>',
            '<|start_header_id|>',
            '<|end_header_id|>',
            '<|eom_id|>',
            '<|eot_id|>',
        ],
        "{{ bos_token }}{% set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% endif %}"
        '<|start_header_id|>system<|end_header_id|>\n\nToday {{ date }}\n\n{{ system }}<|eot_id|>'
        "{% for m in messages if m['role'] != 'system' %}"
        "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        '{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}',
        eos='<|eot_id|>',
        pad=None,
        bos='<|begin_of_text|>',
        stops=('<|end_of_text|>', '<|eom_id|>', '<|eot_id|>'),
    ),
    'SmolLM3': Family(
        ['<|end_of_text|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>'],
        '{% set thinking = enable_thinking | default(true) %}'
        + CHATML.replace(
            'SYSTEM',
            "{% set shape = '%d %B %Y' %}<|im_start|>system\n"
            "Today {{ strftime_now(shape) }}{{ '' if thinking else ' /no_think' }}\n\n"
            '{{ system }}<|im_end|>\n',
        ).replace('THINK', '{% if not thinking %}<think>\n\n</think>\n{% endif %}'),
        eos='<|im_end|>',
        pad='<|im_end|>',
        stops=('<|im_end|>',),
    ),
    'Apertus': Family(
        ['<s>', '</s>', '<pad>']
        + [f'<|{role}_{end}|>' for role in ('system', 'developer', 'user', 'assistant') for end in ('start', 'end')],
        '{{ bos_token }}'
        "{% if messages[0]['role'] == 'system' %}<|system_start|>{{ messages[0]['content'] }}<|system_end|>{% endif %}"
        "<|developer_start|>Thinking {{ 'enabled' if enable_thinking else 'disabled' }}<|developer_end|>"
        "{% for m in messages if m['role'] != 'system' %}"
        "<|{{ m['role'] }}_start|>{{ m['content'] }}<|{{ m['role'] }}_end|>{% endfor %}"
        '{% if add_generation_prompt %}<|assistant_start|>{% endif %}',
        eos='<|assistant_end|>',
        pad='<pad>',
        bos='<s>',
        stops=('</s>', '<|assistant_end|>'),
    ),
}


def save(path, family: Family, *, template: bool = True, eos: str | None = None, stops: bool = True) -> str:
    """The family's tokenizer and generation_config.json as a model's folder."""
    path.mkdir()
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token='?'))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r'\n\n|\n|[\w/]+'), 'removed', invert=True)
    backend.add_special_tokens(family.special)
    if family.bos:
        pair = [(family.bos, backend.token_to_id(family.bos))]
        backend.post_processor = processors.TemplateProcessing(single=f'{family.bos} $A', special_tokens=pair)
    special = {'bos_token': family.bos, 'eos_token': eos or family.eos, 'pad_token': family.pad}
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=family.template if template else None,
        **{name: token for name, token in special.items() if token},
    ).save_pretrained(path)
    if stops:
        ids = [backend.token_to_id(token) for token in family.stops]
        (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids[0] if len(ids) == 1 else ids}))
    return str(path)


def prompt(tokenizer, *contents: str, **arguments) -> list[int]:
    """Ids of the prompt of a user's words, or of a system prompt and a user's words."""
    roles = ['system', 'user'][-len(contents) :]
    messages = [{'role': role, 'content': content} for role, content in zip(roles, contents, strict=True)]
    rows = datasets.Dataset.from_dict({'messages': [messages], 'answer': ['7']})
    prompts = encode_prompts(rows, tokenizer, max_length=61, template_arguments=arguments)
    return prompts.tokens.tolist()


HEADER = '<|start_header_id|> {} <|end_header_id|> NN'
GOLDEN = [
    ('Qwen3', ['Hi there'], {}, '<|im_start|> user N Hi there <|im_end|> N <|im_start|> assistant N'),
    (
        'Qwen3',
        ['Be brief', 'Hi'],
        {'enable_thinking': False},
        '<|im_start|> system N Be brief <|im_end|> N <|im_start|> user N Hi <|im_end|> N <|im_start|> assistant N '
        '<think> NN </think> NN',
    ),
    ('Qwen3', ['Hi'], {'enable_thinking': True}, '<|im_start|> user N Hi <|im_end|> N <|im_start|> assistant N'),
    (
        'Qwen2.5',
        ['Hi'],
        {},
        '<|im_start|> system N Be kind <|im_end|> N <|im_start|> user N Hi <|im_end|> N <|im_start|> assistant N',
    ),
    (
        'Qwen2.5',
        ['Be brief', 'Hi'],
        {},
        '<|im_start|> system N Be brief <|im_end|> N <|im_start|> user N Hi <|im_end|> N <|im_start|> assistant N',
    ),
    (
        'Llama 3',
        ['Be brief', ' Hi there '],
        {},
        f'<|begin_of_text|> {HEADER.format("system")} Today 26 Jul 2024 NN Be brief <|eot_id|> '
        f'{HEADER.format("user")} Hi there <|eot_id|> {HEADER.format("assistant")}',
    ),
    (
        'Llama 3',
        ['Hi'],
        {'date_string': '2024'},
        f'<|begin_of_text|> {HEADER.format("system")} Today 2024 NN <|eot_id|> '
        f'{HEADER.format("user")} Hi <|eot_id|> {HEADER.format("assistant")}',
    ),
    (
        'SmolLM3',
        ['Be brief', 'Hi'],
        {'enable_thinking': False},
        '<|im_start|> system N Today 26 July 2024 /no_think NN Be brief <|im_end|> N <|im_start|> user N Hi '
        '<|im_end|> N <|im_start|> assistant N <think> NN </think> N',
    ),
    (
        'SmolLM3',
        ['Hi'],
        {},
        '<|im_start|> system N Today 26 July 2024 NN <|im_end|> N <|im_start|> user N Hi '
        '<|im_end|> N <|im_start|> assistant N',
    ),
    (
        'Apertus',
        ['Be brief', 'Hi'],
        {'enable_thinking': False},
        '<s> <|system_start|> Be brief <|system_end|> <|developer_start|> Thinking disabled <|developer_end|> '
        '<|user_start|> Hi <|user_end|> <|assistant_start|>',
    ),
]


@pytest.mark.parametrize('name, contents, arguments, expected', GOLDEN)
def test_golden_ids(tmp_path, name, contents, arguments, expected):
    """Guards against a second BOS or none, a missing generation prompt, a thinking switch that switches nothing, a
    system prompt that is lost, and a prompt that depends on the day."""
    family = FAMILIES[name]
    tokenizer = load_tokenizer(save(tmp_path / 'model', family))
    ids = {word: i for i, word in enumerate(WORDS + family.special)} | {'N': 2, 'NN': 1}
    got = prompt(tokenizer, *contents, **arguments)
    assert got == [ids[word] for word in expected.split()], tokenizer.convert_ids_to_tokens(got)
    assert got.count(tokenizer.bos_token_id) == (1 if family.bos else 0)


@pytest.mark.parametrize('name', FAMILIES)
def test_special_tokens_in_a_problem_are_text(tmp_path, name):
    """Guards a problem that ends the user's turn, or speaks for the system, by words that spell a special token."""
    tokenizer = load_tokenizer(save(tmp_path / 'model', FAMILIES[name]))
    special = lambda ids: [i for i in ids if i >= len(WORDS)]
    expected = prompt(tokenizer, 'Be brief', 'Hi there')
    for token in FAMILIES[name].special:
        got = prompt(tokenizer, f'Be {token} brief', f'Hi {token}{token} there')
        assert special(got) == special(expected), token
        words = [i for i in got if i < len(WORDS) and i != WORDS.index('?')]
        assert words == [i for i in expected if i < len(WORDS)], token
        assert got.count(WORDS.index('?')) >= 3, token


@pytest.mark.parametrize('name', FAMILIES)
def test_stops_and_padding(tmp_path, name):
    """Guards against a response that runs past the end of its turn, or of the text, to the length limit."""
    family = FAMILIES[name]
    path = save(tmp_path / 'model', family)
    tokenizer = load_tokenizer(path)
    ids = [len(WORDS) + family.special.index(token) for token in family.stops]
    assert stop_token_ids(tokenizer, path) == tuple(sorted(ids))
    assert tokenizer.pad_token_id == (tokenizer.convert_tokens_to_ids(family.pad) if family.pad else min(ids))


@pytest.mark.parametrize('name, end_of_text', [('Llama 3', '<|end_of_text|>'), ('Apertus', '</s>')])
def test_a_base_model_with_the_template_of_its_instruct_version(tmp_path, name, end_of_text):
    """Guards the paper's base models: the same ids as the Instruct version's, one BOS, and both ends stop."""
    family = FAMILIES[name]
    chat = save(tmp_path / 'chat', family)
    base = save(tmp_path / 'base', family, template=False, eos=end_of_text, stops=False)
    ids = {token: len(WORDS) + i for i, token in enumerate(family.special)}
    (tmp_path / 'base' / 'config.json').write_text(json.dumps({'eos_token_id': ids[end_of_text]}))
    tokenizer = load_tokenizer(base, chat_template_from=chat)
    assert prompt(tokenizer, 'Be brief', 'Hi') == prompt(load_tokenizer(chat), 'Be brief', 'Hi')
    assert stop_token_ids(tokenizer, base) == tuple(sorted((ids[end_of_text], ids[family.eos])))


@pytest.mark.parametrize('name', FAMILIES)
def test_a_cut_prompt_keeps_all_of_its_template(tmp_path, name):
    """Guards against a prompt whose end is cut off, so that the model goes on with the user's words."""
    tokenizer = load_tokenizer(save(tmp_path / 'model', FAMILIES[name]))
    whole = prompt(tokenizer, 'Be brief', 'there')
    messages = [[{'role': 'system', 'content': 'Be brief'}, {'role': 'user', 'content': 'Hi ' * 40 + 'there'}]]
    rows = datasets.Dataset.from_dict({'messages': messages, 'answer': ['7']})
    prompts = encode_prompts(rows, tokenizer, max_length=len(whole) + 5, long_prompts='cut')
    at = whole.index(WORDS.index('there'))
    expected = [*whole[:at], *[WORDS.index('Hi')] * 5, *whole[at:]]
    np.testing.assert_array_equal(prompts.tokens, expected)
    assert (prompts.cut, prompts.dropped) == (1, 0)
