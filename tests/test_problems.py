"""Problems from rows of one's own, in every format and schema."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from troll_jax.data.tasks.math_problems import MathProblems
from troll_jax.data.tasks.problems import ScoredProblems

ROWS = [{'question': 'One and one?', 'answer': 'It is 2.\n#### 2', 'level': 1}, {'question': 'Six?', 'answer': '6'}]
CHAT = [{'role': 'system', 'content': 'Be.'}, {'role': 'user', 'content': 'a?'}]
VERL = {
    'data_source': 'own/countdown',
    'prompt': CHAT,
    'reward_model': {'style': 'rule', 'ground_truth': {'target': 7, 'numbers': [3, 4]}},
    'extra_info': {'index': 3},
}


def write(path: Path, rows: list[dict]) -> str:
    table = Dataset.from_list(rows)
    if path.suffix == '.json':
        path.write_text(json.dumps(rows))
    else:
        {'.jsonl': table.to_json, '.csv': table.to_csv, '.parquet': table.to_parquet}[path.suffix](path)
    return str(path)


@pytest.mark.parametrize('ending', ['jsonl', 'json', 'csv', 'parquet'])
def test_a_file_of_questions_and_answers(tmp_path, ending):
    """Guards a format that is read otherwise, and the worked solution as the answer, to which no response is equal."""
    rows = MathProblems(source=write(tmp_path / f'own.{ending}', ROWS), instruction=None).load('train')
    assert rows['answer'][:] == ['2', '6'] and rows[0]['messages'] == [{'role': 'user', 'content': 'One and one?'}]
    write(tmp_path / f'own.{ending}', [*ROWS, {'question': '', 'answer': '3'}])
    with pytest.raises(ValueError, match=rf"'question' in row 2 of '.*own.{ending}' is ''; expected text"):
        MathProblems(source=str(tmp_path / f'own.{ending}')).load('train')


def test_conversations_and_further_columns(tmp_path):
    """Guards an instruction under a prompt that is complete, and columns of other rows."""
    rows = [{'prompt': CHAT, 'solution': rf'So $\boxed{{{n}}}$.', 'topic': f't{n}'} for n in range(3)]
    task = MathProblems(source=write(tmp_path / 'trl.parquet', rows), columns=('solution', 'topic'), system_prompt='')
    loaded = task.load('test')
    assert loaded[2] == {'messages': CHAT[1:], 'answer': '2', 'solution': r'So $\boxed{2}$.', 'topic': 't2'}
    with pytest.raises(ValueError, match=r"no column \['topics'\]; got \['prompt', 'solution', 'topic'\]"):
        MathProblems(source=task.source, columns=('topics',)).load('train')


def judge(data_source, solution_str, ground_truth, extra_info):
    return [float((data_source, ground_truth['target'], extra_info['index']) == (solution_str, 7, 3)), 'why']


def short(solution_str, ground_truth, method='strict'):
    return {'score': len(solution_str), 'method': method}


def test_verls_data_and_score(tmp_path):
    """Guards what verl gives a score: the ground truth as it is in the data, be it a dictionary, and the row's."""
    task = ScoredProblems(source=write(tmp_path / 'verl.parquet', [VERL]), score=judge)
    (row,) = task.load('train')
    assert row['messages'] == CHAT
    assert [task.grade(text, row['answer']) for text in ('own/countdown', 'other')] == [1, 0]
    assert ScoredProblems(source=task.source, score=short).grade('four', row['answer']) == 4
    with pytest.raises(
        ValueError, match=r"judge_reward: missing a required argument: 'prompts', which nothing gives it"
    ):
        ScoredProblems(source='', score=judge_reward)
    with pytest.raises(ValueError, match='row 0 of .* has no answer, but reward_model'):
        broken = write(tmp_path / 'broken.jsonl', [{**VERL, 'reward_model': {'style': 'rule'}}])
        ScoredProblems(source=broken, score=short).load('train')


def judge_reward(prompts, **kwargs): ...
