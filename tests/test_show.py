"""Samples of a step, and the command that shows them: what is said of single tokens is what the updates did."""

import io
import json
import re

import loop
import numpy as np
import pytest
from loop import HASH
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.plumbing.samples import in_brackets, in_markdown, split, token_spans
from experiments.show import Side, page, print_samples, read_sides, rows_of
from troll_jax.metrics import read_metrics

NASTY = '</pre><script>alert(1)</script>&amp;\x1b[31m [bold] ü数'


@pytest.fixture(scope='module')
def trained(tmp_path_factory, model):
    """A run whose samples are all of its prompts, in packed rows over four devices."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    settings = ['Run.save_samples_every = 3', 'Run.save_samples_prompts = 64', 'troll.bound = 1e-3']
    settings += ['Compute.row_tokens = 20', 'Compute.micro_batch_tokens = 40', 'Method.mask_truncated = True']
    settings += ["Method.rewards = [('task', 1.0, @task_reward), ('long', 0.5, @soft_overlong)]"]
    rows = loop.run(folder, model, *settings, task=HASH, devices=4)
    return folder, rows


def test_samples_are_what_the_updates_saw(trained):
    """Guards tokens, rewards or advantages of other responses than those they stand beside, flags of another update,
    and steps that are not saved."""
    folder, rows = trained
    saved = read_metrics(folder / 'samples.jsonl')
    assert [row['step'] for row in saved] == [1, 3, 4]
    for step in saved:
        row, prompts = rows[step['step'] - 1], step['prompts']
        responses = [response for prompt in prompts for response in prompt['responses']]
        assert [prompt['update'] for prompt in prompts] == [1] * 8 + [2] * 8
        assert len(responses) == 64 and len({prompt['prompt'] for prompt in prompts}) > 8
        assert all(eval(prompt['prompt'].rstrip('=')) % 10 == int(prompt['answer']) for prompt in prompts)
        mean = lambda function, responses=responses: pytest.approx(np.mean(list(map(function, responses))))
        assert row['reward/mean'] == mean(lambda x: x['reward'])
        assert row['reward/long'] == mean(lambda x: x['rewards']['long'])
        assert row['rollout/response_length'] == mean(lambda x: x['tokens'])
        assert row['rollout/truncated_share'] == mean(lambda x: x['truncated'])
        for prompt in prompts:
            advantages, rewards = ([x[name] for x in prompt['responses']] for name in ('advantage', 'reward'))
            assert np.ptp(rewards) == 0 or np.corrcoef(advantages, rewards)[0, 1] > 0.999
        for response in responses:
            assert response['rewards']['task'] == response['text'].startswith('#')
            assert response['reward'] == pytest.approx(response['rewards']['task'] + response['rewards']['long'] / 2)
            assert response['truncated'] is not response['text'].endswith('<eos>')
            spans = response['constrained']
            assert not (response['truncated'] and spans), 'it was meant to be without a loss'
            assert [end - start in (1, 5) for start, end in spans] == [True] * len(spans) <= [True] * response['tokens']
        shares = []
        for update in (1, 2):
            some = [x for prompt in prompts if prompt['update'] == update for x in prompt['responses']]
            seen = sum(x['tokens'] for x in some if not x['truncated'])
            shares.append(sum(len(x['constrained']) for x in some) / seen)
        assert np.mean(shares) == pytest.approx(row['update/constrained_share'])
        assert shares[0] < 0.01 < shares[1], 'the first update is at the policy that sampled'


def test_spans_of_tokens_that_are_no_characters():
    """Guards marks that are shifted by characters of several tokens, or that vanish, and bytes that are none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = np.array(tokenizer.encode('a数 é.'))
    text, spans = token_spans(tokens, tokenizer)
    assert text == 'a数 é.' and spans == [[0, 1], *[[1, 2]] * 3, [2, 3], *[[3, 4]] * 2, [4, 5]]
    assert in_brackets(text, [spans[2], spans[3], spans[4]]) == 'a⟦数⟧⟦ ⟧é.'
    torn = [*tokens[:3], *tokens[4:6]]  # half a character in the middle, and one at the end
    text, spans = token_spans(torn, tokenizer)
    assert text == tokenizer.decode(torn) and len(spans) == 5
    assert all(0 <= start < end <= len(text) for start, end in spans) and spans[-1][1] == len(text)
    assert ''.join(part for part, _ in split(text, spans)) == text


def sample(prompt: str, text: str = '12', **changes) -> dict:
    response = {'text': text, 'reward': 1.0, 'rewards': {'task': 1.0}, 'advantage': 0.5, 'tokens': 2}
    response |= {'truncated': False, 'constrained': [[1, 2]]} | changes
    return {'prompt': prompt, 'answer': NASTY, 'update': 2, 'responses': [response]}


def write(folder, **steps) -> str:
    folder.mkdir()
    lines = [json.dumps({'step': int(step[1:]), 'prompts': prompts}) for step, prompts in steps.items()]
    (folder / 'samples.jsonl').write_text('\n'.join([*lines, '{"step": 9, "prom']))
    (folder / 'metrics.jsonl').write_text('{"step": 1, "reward/mean": 0.25, "update/kl_mean": 0.5}\n{"step"')
    return str(folder)


def test_columns_and_rows(tmp_path):
    """Guards prompts beside others, steps that one run has not, and the half line of a run that goes on or crashed."""
    one = write(tmp_path / 'a', s1=[sample('x')], s4=[sample('y'), sample('z')], s6=[sample('x')])
    other = write(tmp_path / 'b', s2=[sample('z')], s4=[sample('z'), sample('w'), sample('v')])
    titles = lambda *arguments: [(side.run[-1], side.step) for side in read_sides(*arguments)]
    assert titles([one]) == [('a', 1), ('a', 6)] and titles([one, other]) == [('a', 4), ('b', 4)]
    assert titles([one], [4]) == [('a', 4)] and titles([one], [4, 1]) == [('a', 4), ('a', 1)]
    assert titles([one, other], [4]) == [('a', 4), ('b', 4)] and titles([one, other], [6, 2]) == [('a', 6), ('b', 2)]
    with pytest.raises(ValueError, match='b has no samples of step 6; expected one of 2, 4'):
        read_sides([one, other], [6])
    rows = rows_of(read_sides([one, other]))
    assert [[prompt and prompt['prompt'] for prompt in row] for row in rows] == [['z', 'z'], ['y', 'w'], [None, 'v']]
    assert len(rows_of(read_sides([one, other]), 2)) == 2


def test_a_page_is_one_file_and_a_response_is_text(tmp_path):
    """Guards a response that runs in the browser, and a page that needs the network."""
    metrics = {NASTY: [{'step': 1, 'reward/mean': 0.25, 'update/kl_mean': 0.5}, {'step': 2, 'update/kl_mean': None}]}
    prompts = [sample(NASTY, NASTY, constrained=[[0, 6], [6, 8]])]
    sides = [Side(NASTY, 3, prompts), Side('b', 3, [])]
    html = page(sides, rows_of(sides), metrics)
    assert '<script' not in html and '&amp;amp;' in html and '&lt;/pre&gt;' in html
    assert '<mark>&lt;/pre&gt;</mark><mark>&lt;s</mark>cript' in html
    assert html.count('<svg') == 1 and not re.findall(r'(?:src|@import|(?<!:)href)=?[ "(]*https?:', html)
    assert '<td>0.250' in html and '<td>0.5' in html
    for of_run, rows in [({'a': [{'step': NASTY}]}, []), (metrics, [(prompts[0] | {'update': NASTY}, None)])]:
        with pytest.raises(ValueError, match='format'):  # numbers that are none, in files of somebody else's
            page(sides, rows, of_run)


def test_markdown_has_responses_as_code():
    """Guards text that leaves its block of code, by whatever Markdown takes for the end of a line."""
    text = in_markdown([sample(f'a\r{NASTY}', f'b\r{NASTY}\n\n{NASTY}', constrained=[])])
    assert all(line.startswith('    ') for line in re.split('[\r\n]', text) if 'script' in line)


def test_a_terminal_gets_text_and_no_commands():
    """Guards marks that are lost where there are no colours, and responses that move the cursor or are markup."""
    terms = {'rewards': {NASTY: 1.0, 'long': 0.0}}
    sides = [Side('a', 3, [sample('1+1=', NASTY, constrained=[[0, 6]], **terms)]), Side('b', 3, [])]
    printed = {}
    for colour in (None, 'standard'):
        console = Console(file=io.StringIO(), width=200, color_system=colour, force_terminal=colour is not None)
        print_samples(sides, rows_of(sides), console)
        printed[colour] = console.file.getvalue()
    assert '⟦</pre>⟧<script>' in printed[None] and '\x1b' not in printed[None] and '[bold]' in printed[None]
    assert '\x1b[30;43m</pre>' in printed['standard'] and '⟦' not in printed['standard']
    assert '\x1b[31m [' not in printed['standard'] and '␛[31m [bold] ü数' in printed['standard']
