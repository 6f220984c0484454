"""ReasoningGym: every data set loads the same problems everywhere and grades them, and mistakes are named."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from isolation import UNTESTED

from troll_jax.data.tasks import reasoning_gym
from troll_jax.data.tasks.arithmetic import is_held_out
from troll_jax.data.tasks.reasoning_gym import ReasoningGym
from troll_jax.rewards.pool import Grader

pytest.importorskip('reasoning_gym', reason=f'reasoning-gym {UNTESTED}: it is not installed (needs a C compiler)')

SUMS = ('chain_sum', 1.0, {'max_terms': 2, 'max_digits': 1})  # 200 problems
SIZES = {'train_size': 8, 'test_size': 8}

WALK = """
import json, sys
from troll_jax.data.tasks.reasoning_gym import ReasoningGym, _entry, _package

walked = {}
for name in sorted(set(_package().DATASETS) - {'composite'}):
    task = ReasoningGym([(name, 1.0, {})], train_size=2, places=('<answer>', 'response'))
    rows, grades = task.load('train'), []
    for answer in rows['answer']:
        problem = json.loads(answer)
        right, index = problem.pop('answer'), problem.pop('index')
        data = _entry(json.dumps(problem), index)['metadata']
        right = right or data.get('example_answer') or data.get('example_correct_answer')
        right = right or json.dumps(data.get('possible_answer'))
        responses = right, f'I think <answer>0</answer>. No: <answer>\\n{right}\\n</answer>', 'absurd zebra', ''
        grades.append([task.grade(response, answer) for response in responses])
    walked[name] = [rows['messages'][:], rows['answer'][:]], grades
json.dump(walked, sys.stdout)
"""


def ask(*dataset, **settings) -> tuple[ReasoningGym, str]:
    """A task of one data set and the answer of its first problem."""
    task = ReasoningGym([dataset], **SIZES | settings)
    return task, task.load('train')['answer'][0]


def questions(task: ReasoningGym, split: str) -> list[str]:
    return [messages[-1]['content'] for messages in task.load(split)['messages']]


@pytest.mark.slow
def test_every_data_set_loads_and_grades():
    """Guards against problems that differ between processes, metadata that is lost on the way to the grader, and
    verifiers that refuse their own answer or take any other."""
    programs = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', WALK],
            env={**os.environ, 'PYTHONHASHSEED': seed},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in '01'
    ]
    one, other = (json.loads(program.communicate()[0]) for program in programs)
    assert len(one) >= 105
    unequal = {name for name, (rows, _) in one.items() if rows != other[name][0]}
    assert unequal <= reasoning_gym._BY_HASHES
    wrong = {name: grades for name, (_, grades) in one.items() if grades != [[1.0, 1.0, 0.0, 0.0]] * 2}
    assert wrong == {'boxnet': [[0.0] * 4] * 2, 'rush_hour': [[0.0] * 4] * 2}  # which do not come with an answer


def test_shares_and_splits():
    """Guards against weights that nothing reads, problems twice in a mix, test problems in training, also by another
    seed, and settings that change nothing."""
    mix = [SUMS, ('gcd', 3.0, {'max_value': 50}), SUMS]
    task = ReasoningGym(mix, train_size=150, test_size=20)
    train, test = (questions(task, split) for split in ('train', 'test'))
    names = Counter(json.loads(answer)['dataset'] for answer in task.load('train')['answer'])
    assert names == {'chain_sum': 60, 'gcd': 90}
    assert len(set(train)) == 150 and len(set(test)) == 20
    others = questions(ReasoningGym(mix, train_size=150, test_size=20, seed=1), 'train')
    assert others != train and not set(test) & {*train, *others}
    assert questions(task, 'train') == train
    bare = ReasoningGym([SUMS], **SIZES, instruction=None, system_prompt='Be brief.').load('test')
    assert all(is_held_out(messages[1]['content']) for messages in bare['messages'])
    assert bare['messages'][0][0] == {'role': 'system', 'content': 'Be brief.'}


def test_levels():
    """Guards against levels that are mixed up, and parameters that a curriculum overrides."""
    task = ReasoningGym([('chain_sum', 1.0, {'max_digits': 1})], levels=(0, 2), train_size=400, test_size=20)
    rows = task.load('train')
    terms = {0: set(), 2: set()}
    for messages, level in zip(rows['messages'], rows['level'], strict=True):
        terms[level].add(len(re.findall(r' [-+] ', messages[0]['content'])) + 1)
    assert terms == {0: {2}, 2: {3, 4}}  # those of two terms are all taken
    assert Counter(rows['level'])[0] < 200 == Counter(rows['level'])[2]
    with pytest.raises(ValueError, match='acre.* at level 0 .*curriculum'):
        ReasoningGym([('acre', 1.0, {})], levels=(0,))


def test_grades_in_workers():
    """Guards against a task that cannot be sent to a worker, or whose first gradings there run out of time."""
    task = ReasoningGym([SUMS, ('countdown', 1.0, {})], **SIZES)
    answers = list(task.load('train')['answer'])
    right = [json.loads(answer)['answer'] for answer in answers]
    with Grader(task.grade, deadline=task.deadline, workers=2) as grader:
        assert grader(right + right[::-1], answers * 2).rewards.tolist() == [1.0] * 8 + [0.0] * 8


@pytest.mark.parametrize(
    'places, response, reward',
    [
        (('<answer>', 'response'), ' {} \n', 1.0),
        (('<answer>', 'response'), 'It is {}', 0.0),
        (('<answer>', 'response'), '{} <answer> 9999 </answer>', 0.0),
        (('<answer>',), '{}', 0.0),
        (('<answer>', 'last number'), '7 + 9999 is {}.', 1.0),
        (('boxed', '<answer>'), 'I try \\boxed{{9999}}, <answer>{}</answer>', 1.0),
        (('boxed', 'response'), 'So \\boxed{{{}}}', 1.0),
    ],
)
def test_where_the_answer_is(places, response, reward):
    task, answer = ask(*SUMS, places=places)
    assert task.grade(response.format(json.loads(answer)['answer']), answer) == reward


def test_partial_credit():
    """Guards against the little that many data sets give for anything, and no answer at all that is paid."""
    task, answer = ask('countdown', 1.0, {})
    partial, _ = ask('countdown', 1.0, {}, partial=True)
    assert (task.grade('1 + 1', answer), partial.grade('1 + 1', answer)) == (0.0, 0.05)
    assert partial.grade('', answer) == 0.0


@pytest.mark.parametrize(
    'name, response',
    [
        ('game_of_life_halting', 'perhaps'),
        ('puzzle24', '1*2*3*4'),
        ('puzzle24', '-~-~(6+6+7+3)'),
        ('countdown', '2**5'),
        ('coin_flip', '0'),
        ('complex_arithmetic', 'nan'),
        ('prime_factorization', '2 × x'),
    ],
)
def test_wrong_answers_that_a_verifier_would_pay_or_fail_on(name, response):
    task, answer = ask(name, 1.0, {})
    assert task.grade(response, answer) == 0.0


@pytest.mark.parametrize('name', sorted(reasoning_gym._EVALUATED))
def test_no_answer_is_run_as_a_program(name, tmp_path, monkeypatch):
    """Guards against what verifiers do with an answer: eval, and sympy's parser, which evaluates as well."""
    monkeypatch.setenv('PYTHONHASHSEED', '0')
    task, answer = ask(name, 1.0, {})
    path = tmp_path / 'written'
    call = f'open({str(path)!r}, "w")'
    codes = 'S("' + ''.join(f'\\{ord(c):03o}' for c in call) + '")'
    pieces = 'S(' + '+'.join(f'{c!r}' for c in call) + ')'
    for program in (call, f'[{call}]', codes, pieces, f'[{pieces}]'):
        assert task.grade(program, answer) == 0.0 and not path.exists()


@pytest.mark.parametrize(
    'settings, match',
    [
        ({'datasets': [('chain_sun', 1.0, {})]}, "no data set 'chain_sun'; expected one like .*'chain_sum'"),
        ({'datasets': [('gcd', 1.0, {'max': 3})]}, r"'gcd' .*has no \['max'\].*max_value = 1000"),
        ({'datasets': [('gcd', 1.0, {'seed': 3})]}, r"has no \['seed'\]"),
        ({'datasets': [('gcd', 1.0, {'max_value': 0})]}, r"'gcd' .*max_value must be > min_value"),
        ({'datasets': [('gcd', 0.0, {})]}, 'weights above zero'),
        ({'datasets': []}, 'one or more data sets'),
        ({'datasets': [('gcd', 1.0)]}, 'ReasoningGym.datasets is .*expected a list of'),
        ({'datasets': [SUMS], 'places': ['answer']}, r"places is \['answer'\].*'<answer>'"),
        ({'datasets': [SUMS], 'test_size': 0}, 'test_size 0; expected at least 1'),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        ReasoningGym(**settings)


def test_what_depends_on_the_machine(monkeypatch):
    """Guards against problems that differ between hosts, a problem graded as another, and a small data set that is
    searched for ever."""
    monkeypatch.delenv('PYTHONHASHSEED', raising=False)
    with pytest.raises(ValueError, match="'word_ladder' depend on how Python hashes .*PYTHONHASHSEED=0"):
        ReasoningGym([('word_ladder', 1.0, {})])
    task, answer = ask(*SUMS)
    with pytest.raises(reasoning_gym.CannotGrade, match='expected the same package'):
        task.grade('1', answer.replace('"answer": "', '"answer": "1'))
    with pytest.raises(ValueError, match='chain_sum.* gives 1[67].* distinct problems .*500 are its share'):
        ReasoningGym([SUMS], train_size=500).load('train')
    monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
    with pytest.raises(ValueError, match='pip install reasoning-gym'):
        ReasoningGym([SUMS])
