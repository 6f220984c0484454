"""Runs of a tiny model in processes of their own, to be killed, and what is left of them."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import train
from experiments.benchmarks.soak import SETTINGS

REPOSITORY = Path(__file__).parents[2]
TINY = [*SETTINGS, 'train.evaluate_every = 0', 'train.checkpoint_every = 1']


class Process:
    """A training run in a fork of this process, which must not have touched a device: nothing is imported again."""

    def __init__(self, run_dir: Path, model: Path, *bindings: str):
        self.run_dir, self.log = run_dir, run_dir.with_suffix('.log')
        where = [f'train.run_dir = {str(run_dir)!r}', f'Experiment.model = {str(model)!r}']
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            with self.log.open('w') as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.argv = ['train', 'configs/quickstart_troll.gin', *TINY, *where, *bindings]
            train.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> bool:
        """Returns whether the condition has come true before the process ended by itself."""
        deadline = time.monotonic() + seconds
        while not condition():
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            assert time.monotonic() < deadline, f'nothing happened in {seconds} s: {self.log.read_text()[-3000:]}'
            time.sleep(0.002)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def finish(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, self.log.read_text()[-3000:]


def whole_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that a kill left whole, by their names alone."""
    folder = run_dir / 'checkpoints'
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def is_saving(run_dir: Path) -> bool:
    folder = run_dir / 'checkpoints'
    return folder.exists() and any('tmp' in path.name for path in folder.iterdir())


def rows(run_dir: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, each of which must be whole and of a later step than the one before."""
    path = run_dir / 'metrics.jsonl'
    text = path.read_text() if path.exists() else ''
    assert not text or text.endswith('\n'), f'the last line is torn: {text[-80:]!r}'
    found = [json.loads(line) for line in text.splitlines()]
    steps = [row['step'] for row in found]
    assert steps == sorted(set(steps)), steps
    return found


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Every bit of the checkpoint of a step, and all numbers but times, are the same."""
    timed = ('seconds/', 'rollout/tokens_per_second', 'update/tokens_per_second')
    plain = lambda run: [{n: x for n, x in row.items() if not n.startswith(timed)} for row in rows(run)]
    assert plain(one) == plain(other)
    a, b = (everything(run, step) for run in (one, other))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


def everything(run_dir: Path, step: int) -> dict:
    """All arrays of a checkpoint, by the names of its items."""
    with ocp.StandardCheckpointer() as checkpointer:
        items = [path for path in (run_dir / 'checkpoints' / str(step)).iterdir() if (path / '_METADATA').exists()]
        return {item.name: checkpointer.restore(item.absolute()) for item in items}
