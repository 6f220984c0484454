"""Tasks: what the rows hold, that held-out problems stay held out, and what counts as a right answer."""

import json
import os
import subprocess
import sys

import datasets
import pytest

from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic, demonstration, is_held_out, running_values
from troll_jax.data.tasks.gsm8k import GSM8K, INSTRUCTION
from troll_jax.data.tasks.interface import as_messages, check_asked_for
from troll_jax.data.tasks.math_problems import MathProblems

ROWS = [
    {'question': 'Ann has 3 eggs and buys 4. How many?', 'answer': '3+4=<<3+4=7>>7\n#### 7'},
    {'question': 'A car costs 1,000 and a bike 234?', 'answer': 'Add them.\n#### 1,234'},
    {'question': 'Half of five dollars?', 'answer': '5/2\n#### $2.50'},
    {'question': 'Three less than nothing?', 'answer': '0-3\n#### -3'},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'gsm8k'
    path.mkdir()
    return path


def write(path, rows):
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


# --- GSM8K


@pytest.mark.parametrize('suffix', ['.parquet', '.jsonl'])
def test_gsm8k_reads_a_folder(folder, suffix):
    """Guards against the two splits mixed up, and against answers with commas or a currency left in."""
    write(folder / f'train-00000-of-00002{suffix}', ROWS[:2])
    write(folder / f'train-00001-of-00002{suffix}', ROWS[2:3])
    write(folder / f'test-00000-of-00001{suffix}', ROWS[3:])
    (folder / 'README.md').write_text('not data')
    train, test = (GSM8K(source=str(folder)).load(split) for split in ('train', 'test'))
    assert train['answer'] == ['7', '1234', '2.50'] and test['answer'] == ['-3']
    assert train.column_names == ['messages', 'answer']
    (message,) = train[0]['messages']
    assert message == {'role': 'user', 'content': f'{ROWS[0]["question"]}\n\n{INSTRUCTION}'}


def test_gsm8k_reads_a_path_with_a_split_in_it(folder):
    write(folder / 'my_train.jsonl', ROWS[:1])
    write(folder / 'my_test.jsonl', ROWS[1:])
    task = GSM8K(source=str(folder / 'my_{split}.jsonl'))
    assert (len(task.load('train')), len(task.load('test'))) == (1, 3)


def test_gsm8k_reads_a_url(folder):
    """Guards buckets, by the one kind of URL that needs none, and URLs that would be taken for ids on the hub."""
    write(folder / 'my_train.jsonl', ROWS[:1])
    assert len(GSM8K(source=f'file://{folder}/my_{{split}}.jsonl').load('train')) == 1
    for url in (f'file://{folder}', 'gs://bucket/{split}.tsv'):
        with pytest.raises(ValueError, match='must end in .parquet'):
            GSM8K(source=url).load('train')


def test_gsm8k_prompt_arguments_change_the_prompt(folder):
    """Guards against arguments that nothing reads."""
    write(folder / 'train.jsonl', ROWS)
    task = GSM8K(source=str(folder), instruction=None, system_prompt='Be brief.')
    assert task.load('train')[0]['messages'] == [
        {'role': 'system', 'content': 'Be brief.'},
        {'role': 'user', 'content': ROWS[0]['question']},
    ]
    task = GSM8K(source=str(folder), instruction='Think.')
    assert task.load('train')[0]['messages'][0]['content'] == f'{ROWS[0]["question"]}\n\nThink.'


@pytest.mark.parametrize(
    'rows, message',
    [
        ([{'question': 'a', 'solution': '#### 1'}], r"no column \['answer'\]; got \['question', 'solution'\]"),
        (
            [{'question': 'a', 'answer': '#### 1'}, {'question': 'b', 'answer': 'it is 2'}],
            "row 1 .*'it is 2'.*#### number",
        ),
        ([{'question': 'a', 'answer': '#### many'}], "row 0 .*'#### many'"),
        ([], 'cannot be read or is empty'),
        ([{'question': 'a', 'answer': ''}], 'row 0'),
        ([{'question': 'a', 'answer': 7}], "row 0 .*'7'"),
    ],
)
def test_gsm8k_says_what_is_wrong_with_the_data(folder, rows, message):
    """Guards against data in another schema that trains on empty answers."""
    write(folder / 'train.jsonl', rows)
    with pytest.raises(ValueError, match=message):
        GSM8K(source=str(folder)).load('train')


def test_gsm8k_empty_parquet_is_an_error(folder):
    datasets.Dataset.from_dict({'question': [], 'answer': []}).to_parquet(folder / 'train.parquet')
    with pytest.raises(ValueError, match='cannot be read or is empty'):
        GSM8K(source=str(folder)).load('train')


def test_gsm8k_says_which_files_are_missing(folder):
    write(folder / 'train.jsonl', ROWS)
    with pytest.raises(ValueError, match=r'No file matches .*test\*'):
        GSM8K(source=str(folder)).load('test')
    for name in (folder / 'nowhere', folder / 'no/where', '.hidden/gsm8k', '~no-such-user/gsm8k', 'data/gsm8k.zst'):
        with pytest.raises(ValueError, match=f"The folder '{name}' does not exist; expected one with train"):
            GSM8K(source=str(name)).load('train')
    with pytest.raises(ValueError, match=rf"'{folder}' has \['train.jsonl'\]"):
        GSM8K(source=str(folder / 'no/where')).load('train')
    with pytest.raises(ValueError, match="split is 'dev'"):
        GSM8K(source=str(folder)).load('dev')
    write(folder / 'train.parquet', ROWS)
    with pytest.raises(ValueError, match='mixes the formats'):
        GSM8K(source=str(folder)).load('train')


@pytest.mark.parametrize('ending', ['parquet', 'jsonl'])
def test_columns_that_are_not_used_are_not_read(folder, ending):
    """Guards files that agree in what is used and differ in the rest, as those of published collections do."""
    write(folder / f'train-1.{ending}', [{**row, 'extra': 1} for row in ROWS])
    write(folder / f'train-2.{ending}', [{**row, 'extra': {'index': 'a'}} for row in ROWS])
    assert len(GSM8K(source=str(folder)).load('train')) == 2 * len(ROWS)


def test_files_whose_answers_are_of_several_types(folder):
    """Guards numbers in one file and text in the next, which are the same answers."""
    for i, answers in enumerate([['1', '2'], [3, 4], [5.5, 6.5]]):
        write(folder / f'train-{i}.jsonl', [{'problem': 'Which?', 'answer': answer} for answer in answers])
    assert MathProblems(source=str(folder)).load('train')['answer'] == ['1', '2', '3', '4', '5.5', '6.5']


def test_gsm8k_an_unreachable_hub_is_explained():
    """The usual mistake is a relative folder that is not there, which reads like an id on the hub."""
    with pytest.raises(ValueError, match="'no-such-owner/no-such-data', which is no folder here"):
        GSM8K(source='no-such-owner/no-such-data').load('train')


@pytest.mark.parametrize(
    'response, answer, reward',
    [
        (r'3 + 4 = 7, so \boxed{7}', '7', 1),
        (r'\boxed{8}', '7', 0),
        (r'\boxed{1,234}', '1234', 1),
        (r'\boxed{\$1,234.00}', '1234', 1),
        (r'\boxed{$7}', '7', 1),
        (r'\boxed{7 dollars}', '7', 1),
        (r'\boxed{7.}', '7', 1),
        (r'\boxed{- 7 apples}', '-7', 1),
        (r'\boxed{7 \text{ eggs}}', '7', 1),
        (r'\boxed{\frac{14}{2}}', '7', 1),
        (r'\boxed{.5}', '0.50', 1),
        (r'\boxed{\sqrt{7}}', '7', 0),
        ('Step 1: 3. Step 2: 4.\n#### 7', '7', 1),
        ('#### $1,234 per year', '1234', 1),
        ('It takes 3 days, 1,234.50 hours', '1234.5', 1),
        ('10 - 3 is 17-10, which is 7.', '7', 1),
        ('17-10', '10', 1),
        ('about 12345', '345', 0),
        (r'7, or rather \boxed{7', '7', 0),
        ('no number', '7', 0),
        ('####', '7', 0),
        ('', '7', 0),
    ],
)
def test_gsm8k_grades(response, answer, reward):
    """Guards against `$`, commas and units that turn a right answer into a wrong one."""
    assert GSM8K().grade(response, answer) == reward


# --- arithmetic


def test_running_values_by_hand():
    assert running_values('3*2+6*3-3*3=') == [6, 2, 6, 3, 9]
    assert running_values('1-2=') == [9]  # a remainder is never negative
    assert running_values('2+3*4=') == [5, 0]  # strictly from left to right
    assert demonstration('3*2+6*3-3*3=', worked=True) == '62639#9'
    assert demonstration('3*2+6*3-3*3=', worked=False) == '#9'


@pytest.mark.parametrize('text', ['', '3=', '3*2', '3*2+=', '12+3=', '3/2=', '3*2=\n', '3 * 2='])
def test_what_is_no_problem_is_an_error(text):
    with pytest.raises(ValueError, match='expected digits joined by'):
        running_values(text)


def test_arithmetic_rows_agree_with_their_demonstrations():
    task = Arithmetic(train_size=211, test_size=23)
    for split, size in (('train', 211), ('test', 23)):
        rows = task.load(split)
        assert len(rows) == size
        for row in rows:
            problem = row['messages'][0]['content']
            assert len(problem) == 12 and set(problem) <= set(CHARACTERS)
            for worked in (False, True):
                response = demonstration(problem, worked)
                assert set(response) <= set(CHARACTERS)
                assert task.grade(response, row['answer']) == 1.0


def test_held_out_problems_never_occur_in_training():
    """Guards against test problems seen in training, with any seed and size; small problems make collisions certain."""
    held_out = set(Arithmetic(operands=3, test_size=500, train_size=1).problems('test'))
    assert len(held_out) == 500 and all(map(is_held_out, held_out))
    for seed in (0, 1):
        train = Arithmetic(operands=3, train_size=3000, test_size=1, seed=seed).problems('train')
        assert len(set(train)) == 3000 and held_out.isdisjoint(train)


def test_arithmetic_depends_on_its_arguments_alone():
    """Guards against Python's salted string hash: another process must split and draw the same way."""
    here = Arithmetic(train_size=50, test_size=20)
    assert here.problems('train') != Arithmetic(train_size=50, test_size=20, seed=1).problems('train')
    program = (
        'from troll_jax.data.tasks.arithmetic import Arithmetic\n'
        'task = Arithmetic(train_size=50, test_size=20)\n'
        "print(*task.problems('train'), *task.problems('test'))"
    )
    environment = {**os.environ, 'PYTHONHASHSEED': '12345', 'PYTHONPATH': os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=environment, check=True)
    assert there.stdout.split() == here.problems('train') + here.problems('test')


def test_the_held_out_share_is_near_one_in_eight():
    problems = [
        f'{a}{o}{b}{p}{c}=' for a in range(10) for b in range(10) for c in range(10) for o in '+-*' for p in '+-*'
    ]
    assert 0.11 < sum(map(is_held_out, problems)) / len(problems) < 0.14


@pytest.mark.parametrize(
    'response, reward',
    [
        ('#9', 1),
        ('62639#9', 1),
        ('99999#9', 1),  # only the answer counts; that working pays is for the policy to find out
        ('#8', 0),
        ('9', 0),
        ('#', 0),
        ('', 0),
        ('#99', 0),
        ('#9#9', 0),
        ('#8#9', 0),
        ('#9#', 0),
        ('#9=', 0),
        ('# 9', 0),
    ],
)
def test_arithmetic_grades(response, reward):
    """Guards against rewarding every digit tried in turn, or an answer buried in what follows it."""
    assert Arithmetic().grade(response, '9') == reward


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'operands': 1}, 'operands is 1'),
        ({'operands': 2, 'train_size': 10}, 'test_size is 512; expected between 1 and 18'),
        ({'train_size': 0}, 'train_size is 0'),
    ],
)
def test_arithmetic_refuses_what_it_cannot_draw(arguments, message):
    """Guards against a search for distinct problems that never ends."""
    with pytest.raises(ValueError, match=message):
        Arithmetic(**arguments)


def test_prompts_that_ask_for_no_place_are_said(caplog):
    """Guards data whose answers are looked for where no prompt asks for them: all rewards are 0, without a word."""
    asked = as_messages('How many?', 'Write the answer in \\boxed{}.', None)
    check_asked_for([as_messages('1?', None, None), asked], ('boxed', '####'), 'row 0')
    check_asked_for([as_messages('1?', None, None)], ('boxed', 'last number'), 'row 0')
    assert not caplog.text
    check_asked_for([as_messages('1?', 'End with Answer: $Answer', None)] * 2, ('boxed', '####'), 'row 0 of data')
    assert "no prompt asks for an answer in one of the places where it is looked for, 'boxed', '####'" in caplog.text
