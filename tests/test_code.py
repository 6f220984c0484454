"""Rewards of programs: what is taken for the program, what for right, and the task."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import pytest
from isolation import require_bubblewrap
from patience import patience

from experiments.plumbing.gin_files import Config
from troll_jax.data.tasks.eurus_code import EurusCode
from troll_jax.rewards.code import (
    AssertTest,
    CallTest,
    StdinTest,
    ValueTest,
    grade_code,
    last_program,
    parse_tests,
    same_output,
    same_value,
)
from troll_jax.rewards.pool import Grader
from troll_jax.rewards.sandbox import Bubblewrap, SandboxFusion, Unisolated
from troll_jax.rewards.worker import CannotGrade

BOX = Bubblewrap(case_seconds=20.0, memory_gb=0.5, output_mb=1.0, processes=4, disk_mb=8.0)

STDIN = json.dumps({'inputs': ['2\n3\n', '5\n7\n', '1\n1\n'], 'outputs': ['5\n', '12', ['2']]})
CALL = json.dumps({'fn_name': 'add', 'inputs': ['2\n3', [5, 7], '[1]\n[2]'], 'outputs': ['5', [12], [[1, 2]]]})
ASSERT = json.dumps({'assert_case': ['assert add(2, 3) == 5', 'assert add([1], [2]) == [1, 2], "lists"']})
INSIDE = json.dumps({'assert_case': ['x = add(2, 3)\nassert x == 5', 'assert not add([1], [2]) != [1, 2]']})


def block(program: str) -> str:
    return f'I think.\n```python\n{program}\n```\nDone.'


@pytest.fixture(scope='module')
def grade():
    require_bubblewrap()
    return partial(grade_code, sandbox=BOX, program_seconds=60.0)


# --- without a sandbox


@pytest.mark.parametrize(
    'response, program',
    [
        ('```python\na\n```', 'a\n'),
        ('```python\na\n```\n```python\nb\n\nc\n```', 'b\n\nc\n'),
        ('```Py\na```', 'a'),
        ('```python3  \r\na\n```', 'a\n'),
        ('```python\na\n```\n```text\nb\n```', 'a\n'),
        ('```python\na\n```\n```python\nb, but cut', 'a\n'),
        ('```python\na, but cut\n```python\nb\n```', 'b\n'),
        *((f'So:\n{fence}\na\n{fence[:3]}\n', 'a\n') for fence in ('```', '~~~', '~~~python', '``` python', '```py3')),
        *((f'```{info}\na\n```', 'a\n') for info in ('Python', 'python title="a.py"', 'python3.11', '{.python}')),
        *((f'```{info}\na\n```', None) for info in ('cpp', 'pycon', 'pythonic', 'text', 'py-x')),
        ('````python\nx = """\n```\n"""\n````', 'x = """\n```\n"""\n'),
        ('~~~python\na\n```\nb\n~~~', 'a\n```\nb\n'),
        ('```python\na\n```\nOutput:\n```\nb\n```', 'a\n'),
        ('```cpp\na\n```\n```\nb\n```', 'b\n'),
        ('1. So:\n   ```python\n   if a:\n     b\n\n   ```', 'if a:\n  b\n\n'),
        ('<think>\n```python\na\n```\n</think>\n```\nb\n```', 'b\n'),
        ('<think>\n```python\na\n```\n</think>\nprint(1)', '\nprint(1)'),
        ('So: ```python\na\n```', 'a\n'),
        ('Use ```python blocks.\n```py\na\n```', 'a\n'),
        ('```python\na', None),
        ('a', 'a'),
        (' \n', None),
        ('', None),
        ('```python\n' * 100_000, None),
    ],
)
def test_the_last_closed_block_is_the_program(response, program):
    """Guards against half of a program, an earlier attempt, and a search that is quadratic in fences."""
    assert last_program(response) == program


@pytest.mark.parametrize(
    'output, expected, same',
    [
        ('1 2\n', '1 2', True),
        ('1  2 \n3\n\n', '1 2\n3', True),
        ('  x\r\ny', 'x\ny', True),
        ('1\n2', '1 2', False),
        ('1\n\n2', '1\n2', True),
        ('1\n2', '1\n\n3', False),
        ('0.33333', '0.333333333', True),
        ('2.0', '2', True),
        ('1.5', '2', False),
        ('2.0 3', '2 3', False),
        ('1000000000001', '1000000000000', False),
        ('0.3333333', '0.33333333', True),
        ('0.3334', '0.3333', False),
        ('1e-7', '0.0', True),
        ('2', '2.000000', True),
        ('1.23456789e9', '1234567890.0', True),
        ('1000000000000000001', '1000000000000000000', False),
        ('nan', '0.0', False),
        ('inf', '1e400', False),
        ('1_0', '10.0', False),
        ('YES', 'Yes', False),
        ('', '', True),
        ('', '1', False),
    ],
)
def test_outputs_compare_by_tokens(output, expected, same):
    """Guards against white space and last digits that make right wrong, and tolerance where whole numbers count."""
    assert same_output(output, expected) == same


@pytest.mark.parametrize(
    'value, expected, same',
    [
        ([1, [2, 'a']], [1, [2, 'a']], True),
        (0.1 + 0.2, 0.3, True),
        (2, 2.0, True),
        (10**18 + 1, 10**18, False),
        (True, 1, True),
        (True, 0, False),
        (True, True, True),
        ({'a': 1.0}, {'a': 1}, True),
        ([1], [1, 2], False),
        ('1', 1, False),
        (None, None, True),
        (float('nan'), 1, False),
    ],
)
def test_values_compare_as_json(value, expected, same):
    assert same_value(value, expected) == same


@pytest.mark.parametrize(
    'text',
    ['', 'x', '[]', '{}', '{"inputs": [], "outputs": []}', '{"inputs": ["1"], "outputs": []}', '{"assert_case": [1]}']
    + ['[' * 100_000],
)
def test_tests_that_cannot_be_read_are_an_error(text):
    """Guards against problems without tests, which every program would pass."""
    with pytest.raises(ValueError, match='The tests'):
        parse_tests(text)


def test_both_forms_of_arguments():
    tests = parse_tests(CALL)
    assert tests[0] == CallTest('add', [2, 3], 5) and tests[1] == CallTest('add', [5, 7], [12])
    for inputs, arguments in [('"a\\nb"', ['a\nb']), ('1\n2\n', [1, 2]), ('', []), ('1\n""\n', [1, ''])]:
        tests = parse_tests(json.dumps({'fn_name': 'f', 'inputs': [inputs], 'outputs': ['plain']}))
        assert tests == [CallTest('f', arguments, 'plain')]
    assert parse_tests(json.dumps({'fn_name': '', 'inputs': ['1'], 'outputs': ['2']})) == [StdinTest('1', '2')]


@pytest.mark.parametrize(
    'code, test',
    [
        ('assert f(1, (2,)) == {"a": (1, -2.5), "b": set()}', ValueTest('(f(1, (2,)))', {'a': (1, -2.5), 'b': set()})),
        ('assert 2 == f(1)', ValueTest('(f(1))', 2)),
        ('assert f(\n  1) == 2, "no"', ValueTest('(f(\n  1))', 2)),
        ('assert f(1) == g(2)', None),
        ('assert f(1) == 2 == 2', None),
        ('assert f(1) != 2', None),
        ('assert f(1)', None),
        ('x = 1\nassert f(x) == 2', None),
        ('assert f(1) ==', None),
        ('(' * 10_000, None),
    ],
)
def test_what_an_assert_expects_is_kept_outside_where_it_is_a_literal(code, test):
    (found,) = parse_tests(json.dumps({'assert_case': [code]}))
    assert found == test if test else isinstance(found, AssertTest) and found.code == code


# --- in a sandbox

ADD_INPUT = 'print(int(input()) + int(input()))'
ADD = 'def add(a: int, b: int) -> List[int]:\n    print("noise >>> 1")\n    return a + b'
METHOD = 'class Solution:\n    def add(self, a, b):\n        return a + b\n'
EQUAL_NUMBER = 'from fractions import Fraction\ndef add(a, b): return Fraction(a + b) if a == 2 else a + b'
KEYS = json.dumps({'assert_case': ['assert shared("abc", "bcd") == {"c", "b"}', 'assert shared("a", "b") == set()']})
SHARED = 'def shared(a, b): return dict.fromkeys(x for x in a if x in b).keys()'
MAIN = ADD + '\nif __name__ == "__main__":\n    add(input(), input())'


@pytest.mark.parametrize(
    'answer, program',
    [(STDIN, ADD_INPUT), (CALL, ADD), (CALL, METHOD), (CALL, MAIN), (ASSERT, ADD), (ASSERT, MAIN), (INSIDE, ADD)]
    + [(CALL, 'from __future__ import annotations\nadd = lambda a, b: a + b'), (ASSERT, EQUAL_NUMBER), (KEYS, SHARED)],
)
def test_right_programs_pass(grade, answer, program):
    """Guards against right programs that fail for how they are called, or for what they print besides."""
    result = grade(block(program), answer)
    assert result.reward == 1.0 and result.passed == result.tests and result.reason == '', result


def listed_programs():
    """(title, program, tests, is right) of each program in programs.txt, under `#### input -> output`, in JSON, or
    `#### function arguments -> value`; with `wrong` in front if it has to fail."""
    for entry in Path(__file__).with_name('programs.txt').read_text().split('#### ')[1:]:
        title, _, program = entry.partition('\n')
        wrong, name, given, expected = re.fullmatch(r'(wrong )?(?:(\w+) )?(.*) -> (.*)', title).groups()
        tests = {'inputs': [json.loads(given)], 'outputs': [json.loads(expected)], 'fn_name': name}
        yield f'#### {title}\n{program}', program, json.dumps(tests), not wrong


@pytest.mark.slow
def test_ordinary_features_of_the_language_work(grade):
    """Guards against right programs that fail for what a module, its names, the input, the stack or an exit is here."""
    programs = list(listed_programs())
    assert len(programs) >= 150
    results = [(title, grade(block(program), tests), right) for title, program, tests, right in programs]
    assert not [(title, result) for title, result, right in results if result.reward != right]


# Looks through the texts in all code and namespaces of its process for what an assert expects of `add`.
PEEK = """
import gc, re, sys, types
def texts():
    frame, things = sys._getframe(), gc.get_objects()
    while frame:
        things += [frame.f_code, frame.f_globals]
        frame = frame.f_back
    for thing in things:
        code = isinstance(thing, types.CodeType) and thing.co_consts
        yield from (x for x in code or isinstance(thing, dict) and [*thing.values()] or () if isinstance(x, str))
def add(a, b):
    for text in texts():
        for found in re.findall(r'add.*==[ ](\\w+)', text):
            return eval(found)
    raise NameError('nothing found')
"""
EQUAL = 'class Equal:\n    def __eq__(self, other): return True\n'


@pytest.mark.parametrize(
    'answer, program, reason',
    [
        (STDIN, 'print(5)', "wrong output: '5"),
        (STDIN, 'print(int(input()) - 1)', 'wrong output'),
        (STDIN, '1 / 0', 'failed: ZeroDivisionError'),
        (STDIN, 'x = bytearray(10**10)', 'memory'),
        (STDIN, 'while True: print("5" * 10**6)', 'output'),
        (STDIN, 'print(\ud800)', 'not a text that UTF-8 can hold'),
        (CALL, 'def subtract(a, b): return a - b', "failed: KeyError: 'add'"),
        (CALL, 'print("\\n>>> 5", flush=True)\nimport os\nos._exit(0)', 'wrong output'),
        (CALL, 'def add(a, b): return {1, 2}', 'failed: TypeError'),
        (CALL, 'def add(a, b): return float("nan")', 'wrong output'),
        (CALL, EQUAL + 'add = lambda a, b: Equal()', 'failed: TypeError'),
        (CALL, 'import json\njson.dumps = lambda x: "[" * 99999\nadd = max', 'output that cannot be read'),
        (ASSERT, 'def add(a, b): return a - b', "wrong output: '\\n>>> -1"),
        (ASSERT, EQUAL + 'add = lambda a, b: Equal()', 'output that cannot be read'),
        (ASSERT, 'add = lambda a, b: "5"', 'wrong output'),
        (ASSERT, 'add = lambda a, b: (1, 2) if a == [1] else 5', 'wrong output'),
        (ASSERT, 'print(">>> " + "[" * 10**5)\nquit()', 'wrong output'),
        (ASSERT, PEEK, 'NameError: nothing found'),
        (ASSERT, 'def plus(a, b): return a + b', "NameError: name 'add'"),
        (INSIDE, 'def plus(a, b): return a + b', "NameError: name 'add'"),
        (INSIDE, 'def add(a, b): return a - b', 'failed: AssertionError'),
        (INSIDE, 'import sys\nsys.exit(0)', 'wrong output'),
        (INSIDE, 'import os\nos._exit(0)', 'wrong output'),
        (INSIDE, 'print(">>> 0123456789abcdef")\nquit()', 'wrong output'),
    ],
)
def test_wrong_programs_do_not(grade, answer, program, reason):
    """Guards against exits, prints and odd values by which a policy could pass tests without solving anything."""
    result = grade(block(program), answer)
    assert result.reward == 0.0 and reason in result.reason, result


def test_what_an_assert_expects_can_be_read_where_it_runs_inside(grade):
    """That the program above would find what is there; and the limit that `AssertTest` documents."""
    assert grade(block(PEEK), json.dumps({'assert_case': ['x = 3; assert add(2, x) == 5']})).reward == 1.0


def test_a_program_that_hangs_is_wrong(grade):
    result = grade(block('while True: pass'), STDIN, sandbox=replace(BOX, case_seconds=0.5))
    assert result.reward == 0.0 and 'timeout' in result.reason, result


def test_no_program_is_not_run(grade):
    assert grade('```python\nno idea', STDIN).reason == 'no program'


def test_the_share_of_tests(grade):
    """Guards against a share of the tests that were run, instead of all."""
    program = block('a = int(input())\nif a == 5: 1 / 0\nprint(a + int(input()))')
    assert grade(program, STDIN)[:3] == (0.0, 1, 3)  # ends at the first failure
    result = grade(program, STDIN, partial=True)
    assert result[:3] == (2 / 3, 2, 3) and 'ZeroDivisionError' in result.reason
    assert grade(program, STDIN, max_tests=1)[:3] == (1.0, 1, 1)


def test_all_tests_share_a_time_limit(grade):
    """Guards against a thousand tests that take their time limit each."""
    tests = json.dumps({'inputs': [''] * 50, 'outputs': ['1'] * 50})
    result = grade(block('import time\ntime.sleep(0.4)\nprint(1)'), tests, program_seconds=1.0)
    assert result.reward == 0 and 0 < result.passed < 10
    assert 'for all tests' in result.reason


def test_a_mark_is_new_each_time():
    assert AssertTest('').mark != AssertTest('').mark


# --- the task

ROWS = [
    {
        'data_source': 'apps',
        'prompt': [{'role': 'system', 'content': 'Think.'}, {'role': 'user', 'content': f'Problem {i}'}],
        'ability': ability,
        'reward_model': {'ground_truth': truth, 'style': 'rule'},
        'extra_info': {'index': i, 'split': 'dummy'},
    }
    for i, (ability, truth) in enumerate([('code', STDIN), ('math', '7'), ('code', CALL), ('code', '{"inputs": []}')])
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    folder = tmp_path / 'data'
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(folder / 'train.parquet')
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(folder / 'validation.parquet')
    return folder


def test_rows_of_code(source, caplog):
    """Guards against mathematics graded as code, problems without tests, and a test split under another name."""
    task = EurusCode(source=str(source), sandbox=Unisolated())
    rows = task.load('train')
    assert rows['answer'][:] == [STDIN, CALL] and rows.column_names == ['messages', 'answer']
    assert rows[1]['messages'] == ROWS[2]['prompt']
    assert '1 of 3 rows of code' in caplog.text and 'No prompt in' in caplog.text
    assert len(task.load('test')) == 1
    for ability, match in (('math', "No row has ability 'code'"), ('code', r'1 of 1 rows[\s\S]*keys \[\]')):
        row = ROWS[1] | {'ability': ability, 'reward_model': {'ground_truth': '{}', 'style': ''}}
        datasets.Dataset.from_list([row]).to_parquet(source / 'train.parquet')
        with pytest.raises(ValueError, match=match):
            task.load('train')


def test_a_task_without_a_sandbox_does_not_begin(monkeypatch, tmp_path):
    """Guards against hours of loading before an error, and against programs that run unisolated by default."""
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(CannotGrade, match='apt install bubblewrap'):
        EurusCode().load('train')  # and not when it is made, which planning does too
    with pytest.raises(CannotGrade, match='Is the service up'):
        EurusCode(sandbox=SandboxFusion('http://127.0.0.1:9', attempts=1)).load('test')


def test_gin_chooses_the_sandbox():
    """Guards against a binding that leaves the default in place."""
    bindings = ['EurusCode.sandbox = @Unisolated()', 'Unisolated.case_seconds = 3.0', 'Experiment.task = @EurusCode()']
    config = Config([], [*bindings, 'EurusCode.max_tests = 5'])
    task = config.get('Experiment.task')
    assert task == EurusCode(sandbox=Unisolated(case_seconds=3.0), max_tests=5)


@pytest.mark.parametrize('arguments', [{'program_seconds': 0}, {'max_tests': 0}])
def test_unusable_limits_are_errors(arguments):
    with pytest.raises(ValueError, match='expected'):
        EurusCode(sandbox=Unisolated(), **arguments)


def test_many_programs_in_the_pool():
    """Guards against a task that workers cannot load, and programs that disturb each other."""
    require_bubblewrap()
    task = EurusCode(sandbox=replace(BOX, case_seconds=1.0 + patience()), program_seconds=60.0)
    bomb = block('import os\nwhile True:\n  try: os.fork()\n  except OSError: pass')
    responses = [block(ADD_INPUT), block('print(0)'), bomb, block('import os\nos.kill(-1, 9)'), ''] * 3
    with Grader(task.grade, deadline=task.deadline, workers=2) as grader:
        grades = grader(responses, [STDIN] * 15)
    assert grades.rewards.tolist() == [1, 0, 0, 0, 0] * 3
    assert grades[1:4] == (0, 0, 0)
