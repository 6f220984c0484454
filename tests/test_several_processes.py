"""Four and two processes on this machine run what one process runs: the whole loop, and evaluation, with CPU collectives.

Four begin, and one of them is killed; two go on, and are told to stop; one ends the run. `python -m
tests.faults.processes` has more moments of a kill, and whole runs.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.faults.runs import REPOSITORY


@pytest.fixture(scope='module')
def result(tmp_path_factory) -> dict:
    command = [
        sys.executable,
        '-m',
        'tests.faults.processes',
        '--short',
        '--folder',
        str(tmp_path_factory.mktemp('short') / 'runs'),
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def run(command: list[str]) -> subprocess.CompletedProcess:
    """With as many devices as the command asks for by itself."""
    flags = re.sub('--xla_force_host_platform_device_count=[0-9]+', '', os.environ['XLA_FLAGS'])
    environment = os.environ | {'XLA_FLAGS': flags}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)


def test_several_processes_learn_what_one_learns(result):
    """Guards sums, grades, random numbers and data that a process keeps to itself, parts of the model and checkpoints of
    which each process keeps its own, files that two processes write at once, and a start that cannot go on without what
    a dead process held. With critic, reference model and dynamic sampling, on fsdp and tensor axes across processes.
    """
    assert result['numbers'][0] < 1e-5, result['numbers']
    assert result['arrays'][0] < 1e-5, result['arrays']
    logged = result['logged']
    assert [row['step'] for row in logged] == [0, 1, 2, 3, 4, 5, 6]
    assert all(row['update/gradient_norm'] > 1e-3 and row['critic/gradient_norm'] > 1e-3 for row in logged[1:])
    assert any(row['rollout/draws'] > 1 for row in logged[1:]), 'groups were meant to be replaced'


def test_a_dead_process_ends_the_others(result):
    """Guards processes that wait for a dead one until somebody looks, and an end without a word about it."""
    assert result['codes'][2] == -9 and all(result['codes'])
    assert result['seconds'] < 60
    assert all(told for i, told in enumerate(result['told']) if i != 2)
    assert 1 <= result['after_kill'] < 6


def test_sigterm_to_one_stops_all(result):
    """Guards a process that saves and ends by itself while the others wait for it. Both ended with exit code 0."""
    assert result['after_kill'] < result['after_stop'] < 6


def test_each_process_grades_and_reads_its_share(result):
    """Guards work that is done as many times as there are processes."""
    assert {sum(of_one) for of_one in result['grading']} == {sum(result['grading'][0])}
    assert {count for of_one in result['grading'] for count in of_one} == {4, 8}  # of 16 that evaluate, and of 32
    held = result['parameters']
    assert all(held / 4 < sum(read) < 0.3 * held for read in result['read']), (held, result['read'])


def test_several_processes_evaluate_what_one_evaluates(result):
    """Guards an evaluation that takes a process's share for the whole, or adds shares twice."""
    evaluated, logged = result['evaluated'], result['logged'][-1]  # the last process ran alone
    assert evaluated['problems'] == 16
    assert evaluated['success']['mean'] == pytest.approx(logged['eval/success'], abs=1e-6)
    assert evaluated['response_length'] == pytest.approx(logged['eval/response_length'], abs=1e-6)


def test_processes_that_cannot_meet_are_an_error():
    """Guards a command that goes on alone where several were meant."""
    done = run([sys.executable, '-m', 'experiments.train', 'configs/quickstart_clip.gin', '--distributed'])
    assert done.returncode and 'Give --coordinator' in done.stderr
