"""Rewards: which mathematical answers count as equal, and a pool of workers that no grading can stop."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from graders import Deadly, Unloadable, obey
from patience import patience

from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.rewards.answers import find_answer
from troll_jax.rewards.math import grade_math
from troll_jax.rewards.pool import Grader

DEADLINE = patience()  # seconds
with_and_without_deadline = pytest.mark.parametrize('deadline', [None, DEADLINE], ids=['no deadline', 'deadline'])


@pytest.fixture(scope='module')
def grader():
    with Grader(obey, deadline=DEADLINE, workers=2) as pool:
        yield pool


def is_alive(pid: int) -> bool:
    """A zombie, which nobody has waited for yet, is dead."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def wait_until_dead(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


needs_proc = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks up processes in /proc')


# --- mathematics

RIGHT = [
    (r'\boxed{18}', '18'),
    (r'so it is $\boxed{18}$.', '18'),
    (r'\boxed{-3}', '-3'),
    (r'\boxed{1,234}', '1234'),
    (r'\boxed{1{,}234}', '1234'),
    (r'\boxed{1\,234\,567}', '1234567'),
    (r'\boxed{\$18}', '18'),
    (r'\boxed{18 \text{ dollars}}', '18'),
    (r'\boxed{x = 18}', '18'),
    (r'\boxed{90^\circ}', '90'),
    (r'\boxed{50\%}', '50'),
    (r'\boxed{50\%}', '0.5'),
    (r'\boxed{0.5}', r'\frac{1}{2}'),
    (r'\boxed{\frac{1}{2}}', '0.5'),
    (r'\boxed{\frac12}', '1/2'),
    (r'\boxed{\dfrac{2}{4}}', r'\frac{1}{2}'),
    (r'\boxed{2\sqrt{3}}', r'\sqrt{12}'),
    (r'\boxed{10^6}', '1000000'),
    (r'\boxed{(x+1)^2}', 'x^2+2x+1'),
    (r'\boxed{(1, 2)}', '(1,2)'),
    (r'\boxed{[1, 2)}', '[1,2)'),
    (r'\boxed{(-\infty, 3]}', r'(-\infty,3]'),
    (r'\boxed{2, 1}', r'\{1, 2\}'),
    (r'\boxed{\infty}', r'\infty'),
    (r'\boxed{\text{C}}', 'C'),
    (r'\boxed{\text{Evelyn}}', r'\text{Evelyn}'),
    (r'\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}', r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}'),
    (r'first \boxed{3}, no: \boxed{4}', '4'),
    (r'\boxed{4}', r'\boxed{4}'),
    ('The final answer is $\\frac{3}{4}$.', '0.75'),
]

WRONG = [
    (r'\boxed{18}', '19'),
    (r'\boxed{3}', '-3'),
    (r'\boxed{[1, 2)}', '(1,2)'),
    (r'\boxed{D}', 'C'),
    (r'\boxed{3}, no: \boxed{4}', '3'),
    (r'\boxed{0.33}', r'\frac{1}{3}'),
    (r'\boxed{2\sqrt{3}}', r'2\sqrt{2}'),
    (r'the answer is \boxed{12', '12'),
    (r'\boxed{}', '0'),
    (r'\boxed{4} and then the text was cut: \boxed{5', '4'),
    (r'\boxed{\frac{1}{}', '1'),
    (r'\boxed{\undefined\garbage{', '1'),
    ('', '4'),
    ('I do not know.', '4'),
]


@pytest.mark.parametrize('response, answer', RIGHT)
def test_right_answers_parse(response, answer):
    """Guards against answers that are right, do not parse and train the policy to avoid them."""
    assert grade_math(response, answer) == 1.0


@pytest.mark.parametrize('response, answer', WRONG)
def test_wrong_answers_score_nothing(response, answer):
    """Guards against a lenient comparison, an earlier box, and half a number from a cut-off box."""
    assert grade_math(response, answer) == 0.0


def test_the_last_box_follows_braces_and_is_linear():
    assert find_answer(r'\boxed{\frac{1}{2}} \boxed{\{1\}}', ['boxed']) == r'\{1\}'
    assert find_answer(r'\boxed{a \boxed{b} c}', ['boxed']) == 'b'
    assert find_answer(r'\boxed {4}', ['boxed']) == '4'
    assert find_answer(r'no box } here {', ['boxed']) is None
    # Looking for the end of every open box anew takes minutes for this degenerate response.
    assert find_answer(r'\boxed{' * 50_000, ['boxed']) is None


def test_an_empty_reference_is_an_error():
    """Guards against a column of empty answers that silently scores 0 for ever."""
    with pytest.raises(ValueError, match='reference answer is empty'):
        grade_math(r'\boxed{4}', ' ')


# --- the pool


@with_and_without_deadline
def test_rewards_keep_their_order(deadline):
    """Guards against rewards that return in the order in which workers finish."""
    responses = [str(i % 7) for i in range(211)]
    with Grader(obey, deadline=deadline, workers=3) as pool:
        grades = pool(responses, ['3'] * 211)
    np.testing.assert_array_equal(grades.rewards, np.array([r == '3' for r in responses], np.float32))
    assert grades.rewards.dtype == np.float32
    assert (grades.timeouts, grades.crashes, grades.errors) == (0, 0, 0)


def test_no_responses(grader):
    assert grader([], []).rewards.shape == (0,)


@pytest.mark.parametrize('hang', ['spin', 'regex', 'sleep 1000'])
def test_a_hung_grading_costs_one_reward(grader, hang):
    """Guards against a verifier that stops training, also in C code that no handler and no thread can interrupt."""
    responses = ['1'] * 20
    responses[5] = responses[6] = hang
    grades = grader(responses, ['1'] * 20)
    expected = np.ones(20)
    expected[[5, 6]] = 0
    np.testing.assert_array_equal(grades.rewards, expected)
    assert (grades.timeouts, grades.crashes, grades.errors) == (2, 0, 0)


def test_the_deadline_belongs_to_one_grading():
    """Guards against a deadline for a chunk: slow gradings, each in time, must not add up to a timeout."""
    with Grader(obey, deadline=2.0, workers=1) as pool:
        grades = pool(['sleep 0.4'] * 7, ['sleep 0.4'] * 7)
    np.testing.assert_array_equal(grades.rewards, np.ones(7))
    assert grades.timeouts == 0


@pytest.mark.parametrize('crash', ['exit', 'killed'])
def test_a_crashed_worker_costs_one_reward(grader, crash):
    grades = grader([crash, *['1'] * 11], ['1'] * 12)
    np.testing.assert_array_equal(grades.rewards, [0, *[1] * 11])
    assert (grades.timeouts, grades.crashes, grades.errors) == (0, 1, 0)


@with_and_without_deadline
def test_an_exception_counts_as_nothing_and_is_logged_once(deadline, caplog):
    """Guards against a grader that fails on every sample in silence, and against one that floods the log."""
    with Grader(obey, deadline=deadline, workers=1) as pool:
        for _ in range(2):
            grades = pool(['1', 'raise', 'raise'], ['1'] * 3)
            np.testing.assert_array_equal(grades.rewards, [1, 0, 0])
            assert grades.errors == 2
    (record,) = caplog.records
    assert 'sample 1' in record.message and 'no such thing' in record.message


@pytest.mark.skipif(sys.platform != 'linux', reason='the platform does not limit address space')
def test_memory_is_limited(grader):
    """Guards against one expression that takes all of the host's memory, and the training process with it."""
    grades = grader(['memory', '1'], ['1', '1'])
    np.testing.assert_array_equal(grades.rewards, [0, 1])
    assert grades.errors == 1


@with_and_without_deadline
@pytest.mark.parametrize('bad', ['nan', 'infinity', 'huge', 'text', 'nothing'])
def test_a_reward_that_is_no_number_names_its_sample(deadline, bad):
    """Guards against one NaN that reaches the advantages of its whole group and then the parameters."""
    with Grader(obey, deadline=deadline, workers=1) as pool:
        with pytest.raises(ValueError, match=f'reward of sample 2 is .*finite number.*{bad}'):
            pool(['1', '1', bad, '1'], ['1'] * 4)
        # The pool is as good as before: no late answer slips into the next batch.
        np.testing.assert_array_equal(pool(['0', '1'], ['1', '1']).rewards, [0, 1])


def test_workers_survive_batches(grader):
    """Guards against processes started anew for every batch, at the price of importing sympy each time."""
    first, second = (set(grader(['pid'] * 40, [''] * 40).rewards) for _ in range(2))
    assert second == first and os.getpid() not in first


def test_an_interrupted_batch_leaves_nothing_behind(grader, monkeypatch):
    """Guards against answers of an interrupted batch that are taken for those of the next one."""
    receive = Grader._receive
    calls = []

    def interrupt(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return receive(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Grader, '_receive', interrupt)
        with pytest.raises(KeyboardInterrupt):
            grader(['1'] * 30, ['1'] * 30)
    grades = grader(['0'] * 30, ['1'] * 30)
    np.testing.assert_array_equal(grades.rewards, np.zeros(30))
    assert grades.crashes == 0


@needs_proc
def test_leaving_the_context_ends_the_workers():
    with Grader(obey, deadline=DEADLINE, workers=1) as pool:
        pid = int(pool(['pid'], ['']).rewards[0])
        assert is_alive(pid)
    assert not is_alive(pid)


@pytest.mark.parametrize(('deadline', 'response'), [(None, 'sleep 0.1'), (600.0, 'sleep 500')])
def test_closing_ends_a_batch_of_another_thread(deadline, response):
    """Guards a run that is stopped and waits for grades that nobody wants."""
    with ThreadPoolExecutor(1) as background, Grader(obey, deadline=deadline, workers=1) as pool:
        batch = background.submit(pool, [response] * 300, [''] * 300)
        time.sleep(0.2)
    with pytest.raises(RuntimeError, match='is closed'):
        batch.result()


@needs_proc
@pytest.mark.parametrize('at_work', [False, True])
def test_workers_die_with_their_caller(at_work, monkeypatch):
    """Guards against orphans that burn a core each after a run was killed, idle ones and hung ones."""
    program = (
        'import time\n'
        'from graders import obey\n'
        'from troll_jax.rewards import pool, worker\n'
        'grader = pool.Grader(obey, deadline=0.5, workers=1)\n'
        "print(int(grader(['pid'], ['']).rewards[0]), flush=True)\n"
        + ("grader._deadline = grader._workers[0].deadline = 1000\ngrader(['regex'], [''])\n" if at_work else '')
        + 'time.sleep(1000)\n'
    )
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(caller.stdout.readline())
    time.sleep(0.3)  # for the hung grading to begin; if it has not, the test is only easier
    assert is_alive(pid)
    caller.kill()
    caller.wait()
    assert wait_until_dead(pid, 60)


def test_workers_do_not_import_the_main_script(tmp_path):
    """Guards against workers that load the training script, and with it JAX and the model, once per core."""
    script = tmp_path / 'main_script.py'
    script.write_text(
        'from graders import obey\n'
        'from troll_jax.rewards.pool import Grader\n'
        "print('imported')\n"
        'with Grader(obey, deadline=60.0, workers=2) as grader:\n'
        "    print(grader(['main', '1'], ['', '1']).rewards.tolist())\n"
    )
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split('\n')[:2] == ['imported', '[0.0, 1.0]']


def test_a_worker_that_cannot_start_is_an_error():
    """Guards against a missing package that looks like a policy that is always wrong."""
    with (
        Grader(Unloadable().grade, deadline=60.0, workers=1) as pool,
        pytest.raises(RuntimeError, match='could not load'),
    ):
        pool(['1'], ['1'])


def test_workers_that_die_at_once_are_an_error():
    """Guards against a pool that replaces its workers for ever and never says why."""
    with Grader(Deadly().grade, deadline=60.0, workers=1) as pool, pytest.raises(RuntimeError, match='exit code 5'):
        pool(['1'], ['1'])


@pytest.mark.parametrize(
    'arguments, message',
    [
        ({'grade': lambda response, answer: 1.0, 'deadline': 1.0}, 'cannot be sent to a worker'),
        ({'grade': obey, 'deadline': 0.0}, 'deadline is 0.0'),
        ({'grade': obey, 'deadline': 1.0, 'workers': 0}, 'workers is 0'),
    ],
)
def test_unusable_arguments_are_errors_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grader(**arguments)


def test_responses_and_answers_pair_up(grader):
    with pytest.raises(ValueError, match='2 responses and 1 answers'):
        grader(['1', '2'], ['1'])


def test_sympy_hangs_are_cut():
    """The case that all of this is for: a short response that keeps a computer algebra system busy for ever."""
    task = GSM8K(deadline=DEADLINE)
    with Grader(task.grade, deadline=task.deadline, workers=1) as pool:
        grades = pool([r'\boxed{4}', r'\boxed{9^{9^{9^{9}}}}', r'\boxed{4}'], ['4'] * 3)
    np.testing.assert_array_equal(grades.rewards, [1, 0, 1])
    assert grades.timeouts == 1


@with_and_without_deadline
def test_a_grader_that_fails_on_everything_ends_the_run(deadline):
    """Guards a run that trains on zeros because of a grader that raises: said with the response and the reason."""
    with Grader(obey, deadline=deadline, workers=1) as pool:
        with pytest.raises(RuntimeError, match=r"failed on all of 3 responses.*error \(.*It begins 'raise'"):
            pool(['raise'] * 3, ['1'] * 3)
        assert pool(['raise', '1'], ['1', '1']).graded.tolist() == [False, True]
        assert not pool(['raise'] * 3, ['1'] * 3).graded.any(), 'it has graded before: the responses may be to blame'
