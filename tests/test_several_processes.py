"""Two processes on this machine run what one process runs: the whole loop, and evaluation, with CPU collectives.

The two lose one of them on the way, and are started again.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.warm_start import warm_start
from troll_jax.checkpoint import Checkpoints
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.metrics import read_metrics

REPOSITORY = Path(__file__).parent.parent
BINDINGS = [
    'Experiment.max_prompt_length = 4',
    'Experiment.max_response_length = 3',
    'Arithmetic.operands = 2',
    'Arithmetic.train_size = 60',
    'Arithmetic.test_size = 10',
    'train.steps = 6',
    'train.checkpoint_every = 1',
    'train.prompts_per_step = 8',
    'train.samples_per_prompt = 4',
    'train.minibatch_prompts = 4',
    'train.micro_batch_tokens = 14',
    'train.row_tokens = 14',
    'train.evaluate_every = 2',
    'adamw.learning_rate = 1e-3',
]


def start(devices: int, *command: str) -> subprocess.Popen:
    flags = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')
    return subprocess.Popen(
        [sys.executable, '-m', *command],
        cwd=REPOSITORY,
        env=os.environ | {'XLA_FLAGS': flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def together(processes: int, *command: str) -> Iterator[list[subprocess.Popen]]:
    """A command as so many processes with two devices in all."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    where = lambda i: ['--coordinator', address, '--num-processes', str(processes), '--process-id', str(i)]
    started = [start(2 // processes, *command, *(where(i) if processes > 1 else ())) for i in range(processes)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def run(processes: int, *command: str) -> None:
    """Runs a command as so many processes; each must succeed."""
    with together(processes, *command) as started:
        for process in started:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output


def lose_one(folder: Path, *command: str) -> str:
    """Runs a command as two processes, kills one of them when step 1 is saved, and returns what the other one said."""
    with together(2, *command) as (first, second):
        deadline = time.monotonic() + 300
        while not (folder / 'checkpoints/1').exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        second.kill()
        output, _ = first.communicate(timeout=60)
        assert first.returncode != 0, output
    return output


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> list[Path]:
    """The folder of a run by one process, and by two. The model says an answer, and now and then the right one."""
    folder = tmp_path_factory.mktemp('runs')
    task = Arithmetic(operands=2, train_size=60, test_size=16)
    sizes = {'width': 16, 'layers': 1, 'heads': 2, 'kv_heads': 1, 'head_dim': 8, 'mlp_width': 24, 'batch': 32}
    warm_start(str(folder / 'model'), task, **sizes, accuracy=0.0, mixed_steps=100, worked_share=0.0)
    for processes in (1, 2):
        where = [f"train.run_dir = '{folder / str(processes)}'", f"Experiment.model = '{folder / 'model'}'"]
        command = ['experiments.train', 'configs/quickstart_clip.gin', *BINDINGS, *where]
        if processes == 2:
            lose_one(folder / '2', *command)
            assert 0 < len(read_metrics(folder / '2/metrics.jsonl')) < 7, 'a process was meant to be missed'
        run(processes, *command)
    return [folder / '1', folder / '2']


def test_two_processes_learn_what_one_learns(runs):
    """Guards sums, grades and data that a process keeps to itself, and files that two processes write at once.

    And against a process that waits for a dead one until somebody looks, or cannot go on without what it held.
    """
    one, two = (read_metrics(folder / 'metrics.jsonl') for folder in runs)
    assert [row['step'] for row in two] == [0, 1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith('seconds') and not name.endswith('per_second'):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    assert one[1]['update/ratio_max'] > 1 + 1e-5, 'something was meant to be learnt'


def test_a_checkpoint_of_two_processes_is_one(runs):
    """Guards checkpoints of which each process keeps a half: what two have saved, one evaluates as they did."""
    with Checkpoints(runs[1], read_only=True) as checkpoints:
        assert checkpoints.steps == [5, 6]
    run(1, 'experiments.evaluate', str(runs[1]))
    result = json.loads((runs[1] / 'evaluation_6_test_1.json').read_text())
    last = read_metrics(runs[1] / 'metrics.jsonl')[-1]
    assert result['success']['mean'] == pytest.approx(last['eval/success'], abs=1e-6)
    assert result['response_length'] == pytest.approx(last['eval/response_length'], abs=1e-6)


def test_processes_that_cannot_meet_are_an_error():
    """Guards a command that goes on alone where several were meant."""
    process = start(1, 'experiments.train', 'configs/quickstart_clip.gin', '--distributed')
    output, _ = process.communicate(timeout=120)
    assert process.returncode and 'Give --coordinator' in output
