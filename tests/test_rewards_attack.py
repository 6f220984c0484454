"""Answers that attack the grading: each costs its own reward, and the pool is as good as before."""

import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from graders import obey
from patience import patience

from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.rewards.math import grade_math
from troll_jax.rewards.pool import Grader

pytestmark = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks up processes in /proc')

DEADLINE = patience()  # seconds
WORKERS = 2


def processes_of(session: int) -> list[int]:
    """Live processes of a session. A zombie that its own parent has yet to wait for is dead."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            state, _, _, owner = (entry / 'stat').read_text().rpartition(')')[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != 'Z':
            found.append(int(entry.name))
    return found


def zombies_of(parent: int) -> list[int]:
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            state, owner = (entry / 'stat').read_text().rpartition(')')[2].split()[:2]
        except OSError:
            continue
        if int(owner) == parent and state == 'Z':
            found.append(int(entry.name))
    return found


def wait_until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope='module')
def grader():
    with Grader(obey, deadline=DEADLINE, workers=WORKERS) as pool:
        yield pool


def check_recovered(grader: Grader) -> None:
    """The next batch is graded right, by as many workers as ever, each the only process of its session."""
    grades = grader(['1', '0'] * 50, ['1'] * 100)
    np.testing.assert_array_equal(grades.rewards, [1, 0] * 50)
    assert grades[1:4] == (0, 0, 0)
    assert len(grader._workers) == WORKERS
    assert not zombies_of(os.getpid())


ATTACKS = {
    'spin': (1, 0, 0),
    'regex': (1, 0, 0),
    'memory 10': (0, 0, 1),
    'memory in steps': (0, 0, 1),
    'exit': (0, 1, 0),
    'sys.exit': (0, 1, 0),
    'fork and return': (0, 0, 0),
    'fork and hang': (1, 0, 0),
    'fork and exit': (0, 1, 0),  # at once, though its child has inherited the connection
    'fork twice': (0, 0, 0),
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_an_attack_costs_one_reward_and_leaves_no_process(grader, attack):
    """Guards against a pool that shrinks with every attack, and against children of a killed worker that live on.

    Also against two answers to one question: a grading that forks returns twice, and the second answer would be taken
    for that of the next response.
    """
    before = [worker.process.pid for worker in grader._workers]
    grades = grader([attack, *['1', '0'] * 10], [attack, *['1'] * 20])
    np.testing.assert_array_equal(grades.rewards[1:], [1, 0] * 10)
    assert grades[1:4] == ATTACKS[attack]
    assert grades.rewards[0] == (sum(ATTACKS[attack]) == 0)
    check_recovered(grader)
    now = {worker.process.pid for worker in grader._workers}
    assert all(wait_until(lambda pid=pid: not processes_of(pid)) for pid in before if pid not in now)


def test_what_a_grading_left_behind_ends_with_its_worker():
    """Guards against orphans of a worker that was never killed, only closed."""
    with Grader(obey, deadline=60.0, workers=1) as pool:
        pool(['fork and return'], [''])
        pid = pool._workers[0].process.pid
        assert len(processes_of(pid)) == 2
    assert wait_until(lambda: not processes_of(pid))


def test_many_attacks_at_once():
    """Guards against a pool that survives one attack and not thirty, or starts workers faster than it kills them."""
    attacks = ['exit', 'memory 10', 'fork and return', 'sys.exit', 'killed'] * 6
    with Grader(obey, deadline=60.0, workers=WORKERS) as pool:
        grades = pool([*attacks, '1'], ['no'] * 30 + ['1'])
        assert grades.rewards.tolist() == [0] * 30 + [1] and grades[1:4] == (0, 18, 6)
        check_recovered(pool)


@pytest.mark.skipif(sys.platform != 'linux', reason='the platform does not limit address space')
def test_the_memory_limit_is_the_arguments():
    """Guards against a limit that nothing reads."""
    with Grader(obey, deadline=60.0, workers=1, memory_limit_gb=1.0) as pool:
        assert pool(['map 2'], ['']).errors == 1
    with Grader(obey, deadline=60.0, workers=1, memory_limit_gb=8.0) as pool:
        assert pool(['map 2'], ['']).errors == 0


# --- through math-verify

COSTLY = {
    'tower': r'\boxed{9^{9^{9^{9}}}}',
    'factorial': r'\boxed{' + '9' * 100_000 + '!}',
    'fractions': r'\boxed{' + r'\frac{1}{' * 5_000 + '2' + '}' * 5_000 + '}',
    'brackets': r'\boxed{' + '(' * 500_000 + ')' * 500_000 + '}',
    'braces': '{' * 500_000 + '}' * 500_000,
    'brackets without a box': '$' + '[' * 1_000_000,
    'boxes': r'\boxed{' * 150_000,
    'sum': r'\boxed{\sum_{n=1}^{10^{12}} \sin(n^n)}',
}


def test_costly_mathematics_is_cut(caplog):
    """Guards against expressions that keep a parser or a computer algebra system busy, or take all memory."""
    caplog.set_level(logging.WARNING)
    task = GSM8K(deadline=DEADLINE)
    with Grader(task.grade, deadline=task.deadline, workers=WORKERS) as pool:
        pool([r'\boxed{4}'] * WORKERS, ['4'] * WORKERS)
        grades = pool([*COSTLY.values(), r'\boxed{4}'], ['4'] * (len(COSTLY) + 1))
        np.testing.assert_array_equal(grades.rewards, [0] * len(COSTLY) + [1])
        assert grades.timeouts >= 1 and grades.crashes + grades.errors + grades.timeouts <= len(COSTLY)
        after = pool([r'\boxed{4}', r'\boxed{5}'] * 10, ['4'] * 20)
        np.testing.assert_array_equal(after.rewards, [1, 0] * 10)
        assert after[1:4] == (0, 0, 0) and len(pool._workers) == WORKERS


BROKEN = {
    'lone surrogates': '\ud800\udfff\udc80',
    'surrogates in the wrong order': '\udc00\ud800',
    'NUL': '\0',
    'controls': ''.join(map(chr, range(32))) + '\x7f\x80\x9f',
    'overlong, as decoders leave it': b'\xc0\xaf\xe0\x80\xaf\xf0\x80\x80\xaf'.decode(errors='replace'),
    'overlong, escaped': b'\xc0\xaf\xff\xfe'.decode(errors='surrogateescape'),
    'right to left and back': '\u202e4\u202c\u2066\u05d0\u0661\u2069\u200f',
    'combining': 'e' + '\u0301' * 20_000,
    'zero width': '\u200b\u200d\ufeff\u2060' * 1_000,
    'not characters': '\ufffe\uffff\U0010ffff\ufdd0',
    'other digits': '\u0664\u096a\uff14',
    'separators': '\u2028\u2029\x0b\x0c\x85',
    'a family': '\U0001f468\u200d\U0001f469\u200d\U0001f467' * 500,
}


def test_broken_unicode_costs_nothing_else(caplog):
    """Guards against a text that cannot be sent, logged or parsed, and takes the batch with it."""
    texts = [form.format(text) for text in BROKEN.values() for form in (r'\boxed{{{}}}', '{}', r'\boxed{{5{}}}')]
    with Grader(grade_math, deadline=60.0, workers=WORKERS) as pool:
        grades = pool([*texts, r'\boxed{7}'], ['7'] * (len(texts) + 1))
        np.testing.assert_array_equal(grades.rewards, [0] * len(texts) + [1])
        assert grades.timeouts == grades.crashes == 0
    for record in caplog.records:
        record.getMessage().encode()


def test_an_error_that_cannot_be_encoded_is_logged(caplog):
    """Guards against an exception whose text a log file refuses."""
    with Grader(obey, deadline=60.0, workers=1) as pool:
        assert pool(['raise \ud800'], ['']).errors == 1
    caplog.records[0].getMessage().encode()


def test_a_grader_that_is_out_of_order_ends_the_run():
    """Guards against training on zeros while the service that grades is down. The pool itself stays usable."""
    for deadline in (None, 60.0):
        with Grader(obey, deadline=deadline, workers=1) as pool:
            with pytest.raises(RuntimeError, match='out of order, at sample 1: .*service is down'):
                pool(['1', 'cannot grade', '1'], ['1'] * 3)
            assert pool(['1'], ['1']).rewards == [1]
