"""Several processes on this machine run what one process runs: the whole loop, and evaluation, with CPU collectives.

Four begin, and one of them is killed; two go on, and are told to stop. `python -m tests.faults.processes` has more
moments of a kill, and `experiments.evaluate`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp('short') / 'runs'
    command = [sys.executable, '-m', 'tests.faults.processes', '--short', '--folder', str(folder)]
    flags = re.sub('--xla_force_host_platform_device_count=[0-9]+', '', os.environ['XLA_FLAGS'])  # it sets the number
    environment = os.environ | {'XLA_FLAGS': flags}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_several_processes_learn_what_one_learns(result):
    """Guards sums, grades, random numbers and data that a process keeps to itself, checkpoints of which each process
    keeps its own part, files that two processes write at once, and a start that cannot go on without what a dead one
    held. With critic, reference model and dynamic sampling, on fsdp and tensor axes across processes. Rows hold other
    responses, so sums have another order: a loss of nearly 0 is 1e-7 off, 1e-5 of the least that counts as its size.
    """
    assert result['numbers'][0] < 1e-4, result['numbers']
    assert result['arrays'][0] < 1e-5, result['arrays']
    logged = result['logged']
    assert [row['step'] for row in logged] == list(range(result['steps'][1] + 1))
    assert logged[0]['eval/response_length'] > 1
    assert all(row['update/gradient_norm'] > 1e-3 and row['critic/gradient_norm'] > 1e-3 for row in logged[1:])
    assert any(row['rollout/draws'] > 1 for row in logged[1:]), 'groups were meant to be replaced'


def test_a_dead_process_ends_the_others(result):
    """Guards processes that wait for a dead one until somebody looks, and an end without a word about it."""
    assert result['codes'][2] == -9 and all(result['codes'])
    assert result['seconds'] < 120, 'a minute, and a busy machine'
    assert all(told for i, told in enumerate(result['told']) if i != 2)


def test_sigterm_to_one_stops_all(result):
    """Guards a process that saves and ends by itself while the others wait for it. Both ended with exit code 0."""
    assert 1 <= result['steps'][0] < result['steps'][1] < 8


def test_each_process_grades_and_reads_its_share(result):
    """Guards work that is done as many times as there are processes."""
    assert {count for of_one in result['graded'] for count in of_one} == {4, 8}  # of 16 that evaluate, and of 32
    held = result['parameters']
    assert all(held / 4 < read < 0.3 * held for read in result['read']), (held, result['read'])


def test_each_process_holds_its_share_of_a_rollout(result):
    """Guards hosts that hold all of it: bytes of the recorded distributions and of a minibatch, by one process and by
    four, whose devices have two shards of the batch among them."""
    whole, *of_each = result['held']
    assert of_each == [[size / 2 for size in whole]] * 4


def test_weights_go_over_to_the_devices_that_sample(result):
    """Guards shards in the place of others. Of the mesh that samples each process has one row, two, one and a half."""
    assert result['sent'] == [[1, 1, 1]] * 2
    assert 'rollout_devices = 5 of 12 devices in 2 processes; expected a multiple' in result['refused']


def test_processes_that_cannot_meet_are_an_error(result):
    """Guards a command that goes on alone where several were meant."""
    assert result['lonely']['code'] and 'Give --coordinator' in result['lonely']['said']
