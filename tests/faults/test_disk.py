"""Disks that are full or cannot be written to: an error that names the place, and what was whole stays whole."""

import errno
import json
import subprocess
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.plumbing.run import check_writable
from troll_jax.checkpoint import Checkpoints
from troll_jax.metrics import MetricsWriter, read_metrics
from troll_jax.types import START, TrainState


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount(folder, '-t', 'tmpfs', '-o', 'size=1m', 'none', str(folder))
    yield folder
    subprocess.run(['umount', '--lazy', folder], check=True)


def mount(folder: Path, *arguments: str) -> None:
    done = subprocess.run(['mount', *arguments], capture_output=True, text=True)
    if done.returncode:
        warnings.warn(f'NOT TESTED: a full disk, because nothing can be mounted here: {done.stderr}', stacklevel=1)
        pytest.skip('needs to mount a file system, which only root may')


def state(step: int) -> TrainState:
    """About 200 kB that cannot be compressed."""
    values = np.random.default_rng(step).normal(size=(5, 10_007)).astype(np.float32)
    return TrainState(START._replace(step=jnp.int32(step)), {'a': jnp.asarray(values)}, {'count': jnp.int32(step)})


def fill(folder: Path, leave: int) -> Path:
    """Writes zeros until only so many bytes are left."""
    path = folder / 'filling'
    with path.open('wb', buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(path.stat().st_size // 4096 * 4096 - leave)
    return path


def shapes(of: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), jax.device_put(of))


def test_a_checkpoint_that_does_not_fit_is_an_error_and_the_one_before_is_whole(small_disk):
    """Guards against a run that goes on for hours without being saved, and an older checkpoint that is lost to it."""
    with pytest.raises(
        OSError, match=r'could not be written to .*disk/checkpoints.*steps \[1\]. See that there is room'
    ):
        with Checkpoints(small_disk, keep=1) as checkpoints:
            checkpoints.save(state(1))
            checkpoints.wait()
            filling = fill(small_disk, leave=100_000)
            checkpoints.save(state(2))  # fails in the background
            checkpoints.wait()
    filling.unlink()
    with Checkpoints(small_disk, keep=1) as checkpoints:
        assert checkpoints.steps == [1]
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(shapes(state(1)), 1), state(1))
        checkpoints.save(state(2))
    with Checkpoints(small_disk) as checkpoints:
        assert checkpoints.steps == [2]
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(shapes(state(2)), 2), state(2))


def test_a_failed_save_is_told_of_at_the_next_step(small_disk):
    """Guards against an error in the background that waits for the next checkpoint, hours later."""
    with Checkpoints(small_disk) as checkpoints:
        fill(small_disk, leave=100_000)
        with pytest.raises(OSError, match='could not be written'):
            checkpoints.save(state(1))
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # as a run's steps do
                checkpoints.check()
                time.sleep(0.01)


@pytest.mark.parametrize('room', [62_000, 66_000, 70_000, 74_000])
def test_lines_on_a_full_disk_are_whole_or_not_there(small_disk, room):
    """Guards against half a line, after which nothing could be read, one that comes twice after the next start, and a
    run that waits forever for a thread that the full disk has ended."""
    path = small_disk / 'metrics.jsonl'
    many = {f'name_{i}': i / 7 for i in range(400)}  # longer than a block
    with pytest.raises(OSError, match=r'numbers of step \d+ could not be written.*disk/(metrics.jsonl|tensorboard)'):
        with MetricsWriter(small_disk) as metrics:
            filling = fill(small_disk, leave=room)
            for step in range(1, 100):
                metrics.write(step, many)
    text = path.read_text()
    steps = [json.loads(line)['step'] for line in text.splitlines()]
    assert text.endswith('\n') and 0 < len(steps) < 99 and steps == list(range(1, len(steps) + 1))
    filling.unlink()
    with MetricsWriter(small_disk, resume_after=steps[-1]) as metrics:
        metrics.write(steps[-1] + 1, many)
    assert [row['step'] for row in read_metrics(path)] == [*steps, steps[-1] + 1]


def test_a_folder_that_cannot_be_written_to_is_an_error_that_names_it(small_disk):
    """Guards against an error after an hour, of a file that the user does not know. Root may write to any folder but
    those of a file system that is mounted for reading alone."""
    check_writable(small_disk / 'run')
    assert not (small_disk / 'run').exists()
    (small_disk / 'run').mkdir()
    mount(small_disk, '-o', 'remount,ro', str(small_disk))
    for folder in (small_disk / 'run', small_disk / 'other'):
        with pytest.raises(OSError, match=rf'Read-only .* bind another folder.*{folder}'):
            check_writable(folder)
