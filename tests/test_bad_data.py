"""Bad data: whatever is wrong with a row or a file is a ValueError that names it. Cases are drawn by hypothesis."""

import json
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_input import cases, damaged, fresh, save_model
from hypothesis import assume, given
from hypothesis import strategies as st

from experiments.plumbing.command import run_command
from troll_jax.data.prompts import encode_prompts
from troll_jax.data.tasks.eurus_code import EurusCode
from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.data.tasks.math_problems import MathProblems
from troll_jax.data.tokenizer import load_tokenizer
from troll_jax.rewards.sandbox import Unisolated


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp('model'))


VERL = {'ability': 'code', 'prompt': [{'role': 'user', 'content': '1'}]}
TESTS = json.dumps({'inputs': ['1'], 'outputs': ['1']})
TASKS = {
    GSM8K: {'question': '1', 'answer': 'so #### 3'},
    MathProblems: {'problem': '1', 'answer': '3'},
    EurusCode: {**VERL, 'reward_model': {'style': 'rule', 'ground_truth': TESTS}},
}


def read(task, folder: Path, tokenizer) -> int:
    """The number of prompts in the files of a folder."""
    options = {'sandbox': Unisolated()} if task is EurusCode else {'instruction': None}
    return len(encode_prompts(task(source=str(folder), **options).load('train'), tokenizer, max_length=11))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.sampled_from(['', '  ', '\x00', '٣', '####']),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(['role', 'content', 'x']), inner),
    max_leaves=3,
)


@cases(60)
@given(st.sampled_from(list(TASKS)), st.data())
def test_a_row_that_is_wrong_is_an_error(tmp_path, model, task, data):
    """Guards 'None' or '[]' as a question or an answer, and errors of pyarrow or of a template that say nothing."""
    row = dict(TASKS[task])
    column = data.draw(st.sampled_from(sorted(row)))
    if data.draw(st.booleans()):
        del row[column]
    else:
        row[column] = data.draw(json_values)
        assume(row[column] != '####' or column == 'answer')  # a question like any other
    folder = fresh(tmp_path)
    folder.mkdir()
    (folder / 'train.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in [TASKS[task], row]))
    latex = task is MathProblems and column == 'answer'  # any text may be, and numbers are
    if latex and type(row.get(column)) in (int, str) and str(row[column]).strip():
        assert read(task, folder, load_tokenizer(str(model))) == 2
        return
    try:
        assert read(task, folder, load_tokenizer(str(model))) == 1
    except ValueError as error:
        assert 'xpected' in str(error) and (str(folder) in str(error) or 'the prompt' in str(error))
    else:
        assert column == 'ability'  # a row of something else than code is left out


@pytest.mark.parametrize('task', TASKS, ids=lambda task: task.__name__)
@pytest.mark.parametrize(
    'suffix, content',
    [
        ('.jsonl', b''),
        ('.jsonl', b'\n\n'),
        ('.jsonl', b'[1, 2]\n'),
        ('.jsonl', b'{}\n'),
        ('.jsonl', b'{"question": "1"'),
        ('.jsonl', b'{"question": "\xff", "problem": "\xff", "prompt": "\xff", "answer": "#### 3"}\n'),
        ('.jsonl', b'{"question": "\\ud800", "answer": "#### 3"}\n'),
        ('.parquet', b''),
        ('.parquet', b'PAR1 and no more PAR1'),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, model, task, suffix, content):
    (tmp_path / f'train{suffix}').write_bytes(content)
    with pytest.raises(ValueError, match=rf'train\{suffix}'):
        read(task, tmp_path, load_tokenizer(str(model)))


@cases(40)
@given(st.sampled_from(list(TASKS)), st.sampled_from(['jsonl', 'parquet']), st.data())
def test_a_file_with_a_part_replaced_is_read_or_an_error(tmp_path, model, task, kind, data):
    """Guards what pyarrow, a tokenizer or JSON say of broken bytes: no error of theirs reaches the user as it is."""
    folder = fresh(tmp_path)
    folder.mkdir()
    file = folder / f'train.{kind}'
    if kind == 'parquet':
        pq.write_table(pa.Table.from_pylist([TASKS[task]] * 3), file)
    else:
        file.write_text(''.join(json.dumps(row) + '\n' for row in [TASKS[task]] * 3))
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    with suppress(SystemExit):
        run_command(lambda: read(task, folder, load_tokenizer(str(model))))


@pytest.mark.parametrize('task', TASKS, ids=lambda task: task.__name__)
def test_parquet_without_rows_or_with_a_column_twice_is_an_error(tmp_path, model, task):
    tokenizer = load_tokenizer(str(model))
    table = pa.Table.from_pylist([TASKS[task]])
    for name, bad in [('none', table.slice(0, 0)), ('twice', table.append_column(table.schema[0], table.column(0)))]:
        (tmp_path / name).mkdir()
        pq.write_table(bad, tmp_path / name / 'train.parquet')
        with pytest.raises(ValueError, match='train.parquet'):
            read(task, tmp_path / name, tokenizer)


@pytest.mark.parametrize('task', TASKS, ids=lambda task: task.__name__)
def test_rows_twice_are_kept_and_huge_ones_are_dropped(tmp_path, model, task):
    """Guards a data set that is weighted by repetition, and one row that ends a run."""
    huge = '1' * 100_003
    row = TASKS[task]
    long = {**row, 'prompt': [{'role': 'user', 'content': huge}]} if task is EurusCode else {**row, [*row][0]: huge}
    (tmp_path / 'train.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in [row, long, row]))
    assert read(task, tmp_path, load_tokenizer(str(model))) == 2
