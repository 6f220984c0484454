"""Runs of a tiny model in processes of their own, to be killed, and what is left of them."""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import train

from .soak import SETTINGS

REPOSITORY = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent has ended
TINY = [*SETTINGS, 'Run.evaluate_every = 0', 'Run.checkpoint_every = 1']


class Process:
    """A training run in a fork of this process, which must not have touched a device: nothing is imported again.

    On Linux it ends with this process, so that a test that runs out of time leaves nothing behind.

    Args:
      run_dir: of the run.
      model: that it starts from.
      bindings: of gin.
      files: configurations.
      options: of the command line.
      name: of the log beside `run_dir`, where several processes have one.
      before: is called in the fork before the run.
      command: what is called: `main` of a command that takes the folder of a run, or by default of the training.
    """

    def __init__(
        self,
        run_dir: Path,
        model: Path,
        *bindings: str,
        files: Sequence[str] = ('quickstart', 'troll'),
        options: Sequence[str] = (),
        name: str = '',
        before: Callable[[], None] = lambda: None,
        command: Callable[[], None] = train.main,
    ):
        self.run_dir, self.log = run_dir, run_dir.with_name(f'{run_dir.name}{name}.log')
        where = [f'Run.folder = {str(run_dir)!r}', f'Experiment.model = {str(model)!r}']
        self.log.write_text('')  # what an earlier run said would be taken for this one's
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            if sys.platform == 'linux':
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            with self.log.open('w') as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            is_training = command is train.main
            sys.argv = ['command', *([*files, *TINY, *where] if is_training else [str(run_dir)]), *bindings, *options]
            before()
            command()
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
    items = [path for path in (run_dir / 'checkpoints' / str(step)).iterdir() if (path / '_METADATA').exists()]
    return {item.name: _arrays(item.absolute()) for item in items}


def _arrays(item: Path) -> dict:
    """In numpy: there may be other devices here than those it was saved from."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(item).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(item, ocp.args.PyTreeRestore(restore_args=as_numpy))
