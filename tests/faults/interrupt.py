"""Runs that are stopped or killed in the middle of a rollout, or while grades are waited for, and what is left of them.

    python -m tests.faults.interrupt [--folder DIR]

From the second step on a rollout or its grades take half a minute; nothing waits for their end. The last line is JSON:
of each case after how many seconds the run had ended, and at which step. Every run then goes on, and ends as one that
was left alone, to the bit; those of two processes with overlap end as one process does.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import jax

import experiments.plumbing.command
import troll_jax.collect
import troll_jax.rewards.pool

from .processes import SIMPLE, Together, differences, started_at
from .runs import assert_same_run, rows
from .soak import write_model

LAG = ('Sampling.lag = 1', 'Run.steps = 4', 'Compute.slots = 2')
SPLIT = ('Compute.overlap = True', 'Compute.rollout_devices = 1')
BOTH_SPLIT = (SPLIT[0], 'Compute.rollout_devices = 2')
CASES = {
    # What is slow, the signal, processes, devices, settings.
    'rollout': ('rollout', signal.SIGTERM, 1, 1, ()),
    'grades': ('grades', signal.SIGINT, 1, 1, ()),
    'overlap': ('grades', signal.SIGTERM, 1, 1, SPLIT[:1]),
    'split': ('rollout', signal.SIGTERM, 1, 2, SPLIT),
    'split, killed': ('rollout', signal.SIGKILL, 1, 2, SPLIT),
    'two processes': ('rollout', signal.SIGTERM, 2, 2, SPLIT[:1]),
    'two processes, grades': ('grades', signal.SIGTERM, 2, 2, SPLIT[:1]),
    'two processes, split': ('rollout', signal.SIGTERM, 2, 4, BOTH_SPLIT),
}


def slow_down(run_dir: Path, what: str, devices: int) -> None:
    """Lets each block of decoding, or each grading, take a second once a step is done."""
    jax.config.update('jax_num_cpu_devices', devices)
    experiments.plumbing.command._PEER_TIMEOUT = 300  # on a busy machine signs of life are late, and none dies here
    owner, name = {
        'rollout': (troll_jax.collect, 'decode_responses'),
        'grades': (troll_jax.rewards.pool, 'grade_one'),
        'nothing': (troll_jax.collect, 'decode_responses'),
    }[what]
    function = getattr(owner, name)

    def call(*arguments):
        if what != 'nothing' and rows(run_dir):
            os.write(1, b'\nMARK slow 0\n')
            time.sleep(1.0)
        return function(*arguments)

    setattr(owner, name, call)


def start(run_dir: Path, what: str, processes: int, devices: int, settings: tuple[str, ...]) -> Together:
    before = partial(slow_down, run_dir, what)
    return Together(run_dir, processes, *SIMPLE, *LAG, *settings, before=before, devices=devices)


def interrupt(folder: Path, case: str) -> tuple[dict, Path, Path]:
    """Interrupts a run and has it go on. Returns what was seen, and the folders of one left alone and of this one."""
    what, number, processes, devices, settings = CASES[case]
    run_dir, sizes = folder / case.replace(', ', '_').replace(' ', '_'), (processes, devices, settings)
    of_alone = (1, 1, ()) if settings is BOTH_SPLIT else sizes
    alone = folder / f'alone_{of_alone[0]}_{of_alone[1]}_{SPLIT[1] in settings}'
    if not alone.exists():
        start(alone, 'nothing', *of_alone).finish()
    together = start(run_dir, what, *sizes)
    together.wait_for(0, 'slow', 2)
    together.signal(processes - 1, number)
    ended = together.end(300)
    expected = -9 if number == signal.SIGKILL else 0
    assert all(code == expected for code, _ in ended), together.said(0)[-3000:]
    step, logged = started_at(run_dir), rows(run_dir)[-1]['step']
    assert 1 <= step == logged < 4, (step, logged)
    # Split with `context`, a process learns from all responses: not from those alone that its own devices sample.
    later = ('Compute.context = 2',) if settings is BOTH_SPLIT else ()
    start(run_dir, 'nothing', processes, devices, (*settings, *later)).finish()
    return {'seconds': round(max(seconds for _, seconds in ended), 1), 'step': step}, alone, run_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', type=Path, help='to write to, which must not exist; a temporary one by default')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / 'interrupt'
        folder.mkdir(parents=True)
        write_model(folder / 'model')
        found = {}
        for case in arguments.cases:
            found[case] = interrupt(folder, case)
            print(case, found[case], flush=True)
        if (folder / 'alone_2_2_False').exists():
            start(folder / 'one_process', 'nothing', 1, 2, SPLIT[:1]).finish()
        rounded = []
        for case, (_, alone, run_dir) in found.items():  # which touches devices: no forks any more
            if CASES[case][-1] is BOTH_SPLIT:
                assert all('rollout/weights_checksum' in row for row in rows(run_dir))
                rounded.append((alone, run_dir))
            else:
                assert_same_run(alone, run_dir, 4)
        if (several := folder / 'alone_2_2_False').exists():
            rounded.append((folder / 'one_process', several))
        for one, other in rounded:
            apart = differences(one, other)
            assert max(apart['numbers'], apart['arrays'])[0] < 1e-5, apart
        print(json.dumps({case: seen for case, (seen, *_) in found.items()}))


if __name__ == '__main__':
    main()
