"""Kills a training run with SIGKILL at random moments; it must end as if nothing had happened.

    python -m tests.faults.kill [--times 20] [--seed 0] [--folder DIR]

By turns a run is killed while a checkpoint is being written, at a random moment of its loop, and at one of its start,
restoring included. Every start must go on from the newest whole checkpoint, every line of metrics.jsonl be whole and
come once, and in the end all arrays and numbers must be those of a run that was left alone. The last line is JSON.
"""

import argparse
import json
import os
import random
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .runs import Process, assert_same_run, is_saving, rows, whole_steps
from .soak import write_model

MARK = 'KILLED_RUN_OF'  # in the environment of what a run starts
MOMENTS = ('save', 'loop', 'start')


def kill_many(folder: Path, times: int, seed: int) -> dict:
    generator = random.Random(seed)
    os.environ[MARK] = str(os.getpid())
    steps = 10 * times
    model = folder / 'model'
    write_model(model)
    begin = time.monotonic()
    alone, killed = folder / 'alone', folder / 'killed'
    process = Process(alone, model, f'Run.steps = {steps}')
    process.wait_for(lambda: bool(rows(alone)))
    until_first_step = time.monotonic() - begin
    process.finish()
    assert all(row['update/gradient_norm'] > 1e-6 for row in rows(alone)[:10]), (
        'every step was meant to teach something'
    )

    counts, half_saved, repeated = dict.fromkeys(MOMENTS, 0), 0, 0
    for i in range(times):
        moment = MOMENTS[i % len(MOMENTS)]
        before, expected = whole_steps(killed), (whole_steps(killed) or [0])[-1]
        seen = rows(killed)
        process = Process(killed, model, f'Run.steps = {steps}')
        has_saved = lambda done=before: bool(set(whole_steps(killed)) - set(done))
        if moment == 'start':
            until = time.monotonic() + generator.uniform(0, until_first_step)
            process.wait_for(lambda until=until, has_saved=has_saved: has_saved() or time.monotonic() > until)
        else:
            assert process.wait_for(has_saved), 'ended by itself'
            if moment == 'loop':
                time.sleep(generator.uniform(0, 0.5))
            else:
                assert process.wait_for(lambda: is_saving(killed)), 'ended by itself'
                time.sleep(generator.uniform(0, 0.02))
        process.kill()
        said = re.search(r'resuming from step (\d+)', process.log.read_text())
        assert not said or int(said[1]) == expected, f'went on from {said[1]}, and step {expected} was whole'
        assert said or not expected or moment == 'start'
        half_saved += is_saving(killed)
        repeated += bool(seen) and seen[-1]['step'] > expected
        counts[moment] += 1
        print(f'killed in {moment}; whole: {whole_steps(killed)}, numbers of {len(rows(killed))} steps', flush=True)
    process = Process(killed, model, f'Run.steps = {steps}')
    process.finish()
    assert_same_run(alone, killed, steps)
    assert not is_saving(killed), 'half a checkpoint was left behind'
    deadline = time.monotonic() + 10  # until they notice
    while (orphans := workers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not orphans, f'processes that outlived their run: {orphans}'
    return {'kills': times, 'moments': counts, 'in_a_save': half_saved, 'had_to_repeat': repeated, 'steps': steps}


def workers() -> list[str]:
    """The processes that have been started by runs of this one."""
    mark, found = f'{MARK}={os.getpid()}'.encode(), []
    for process in Path('/proc').glob('[0-9]*'):
        with suppress(OSError):  # it has just ended
            if mark in (process / 'environ').read_bytes().split(b'\0'):
                found.append(process.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--times', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--folder', type=Path, help='to write to, which must not exist; a temporary one by default')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / 'kill'
        folder.mkdir(parents=True)
        print(json.dumps(kill_many(folder, arguments.times, arguments.seed)))


if __name__ == '__main__':
    main()
