"""Trackers: every step once, also after a resume, and none of them can end a run. Those not installed are skipped."""

import logging
import struct
import time
from importlib import metadata

import pytest

from troll_jax.metrics import MetricsWriter, read_metrics
from troll_jax.settings import Run
from troll_jax.trackers import TRACKERS, check_installed

SAMPLES = [{'prompt': '1+1='}]


def read_mlflow(folder) -> tuple[dict, list]:
    from mlflow import MlflowClient

    client = MlflowClient(f'sqlite:///{folder}/mlflow.db')
    (run,) = client.search_runs([client.get_experiment_by_name('troll_jax').experiment_id])
    assert run.info.status == 'FINISHED' and run.data.params == {'troll.bound': '0.05'}
    history = client.get_metric_history(run.info.run_id, 'reward/mean')
    return {(m.step, m.value) for m in history}, [
        file.path for file in client.list_artifacts(run.info.run_id, 'samples')
    ]


def read_trackio(folder) -> tuple[dict, list]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs('troll_jax')
    rows = SQLiteStorage.get_logs('troll_jax', name)
    values = [(row['step'], row['reward/mean']) for row in rows if 'reward/mean' in row]
    return values, [row['samples'] for row in rows if 'samples' in row]


def read_wandb(folder) -> tuple[dict, list]:
    """The history in the files of an offline run: records in blocks of 32 KiB, as LevelDB has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    values, texts, ids = [], [], set()
    for path in sorted(folder.glob('wandb/offline-run-*/*.wandb')):
        data, at, parts = path.read_bytes(), 7, b''
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack_from('<IHB', data, at)
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record, parts = Record.FromString(parts), b''
                ids |= {record.run.run_id} - {''}
                row = {item.key or '/'.join(item.nested_key): item.value_json for item in record.history.item}
                values += [(record.history.step.num, float(row['reward/mean']))] if 'reward/mean' in row else []
                texts += [row['samples/path']] if 'samples/path' in row else []
    assert len(ids) == 1
    return values, texts


READERS = {'wandb': read_wandb, 'trackio': read_trackio, 'mlflow': read_mlflow}


@pytest.mark.parametrize('name', READERS)
def test_a_resumed_run_goes_on_with_its_board(tmp_path, monkeypatch, name):
    """Guards a second board after every resume, steps that are there twice, and samples that reach no tracker."""
    pytest.importorskip(name)
    if name == 'trackio':
        import trackio.sqlite_storage
        import trackio.utils

        for module in (trackio.utils, trackio.sqlite_storage):
            monkeypatch.setattr(module, 'TRACKIO_DIR', tmp_path / 'trackio')
    for variable in ('WANDB_API_KEY', 'WANDB_MODE', 'MLFLOW_TRACKING_URI', 'TRACKIO_SPACE_ID'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    for first, last in ((0, 5), (3, 6)):
        time.sleep(name == 'wandb')  # its folders have names of seconds
        settings = {'resume_after': first, 'trackers': (name,), 'settings': {'troll.bound': '0.05'}}
        with MetricsWriter(tmp_path, **settings) as metrics:
            for step in range(first + 1 if first else 0, last + 1):
                if step == 4:
                    metrics.write_samples(step, SAMPLES, '<b>')
                metrics.write(step, {'reward/mean': step / 2, 'eval/pass@1': float('nan')})
    deadline = time.monotonic() + 20
    values, texts = READERS[name](tmp_path)
    while len(values) < 7 and time.monotonic() < deadline:  # that of wandb is written by another process
        time.sleep(0.2)
        values, texts = READERS[name](tmp_path)
    assert sorted(values) == [(step, step / 2) for step in range(7)] and len(texts) == 1
    assert not (tmp_path / 'tensorboard').exists()


class Flaky:
    """A tracker whose network fails at step 2."""

    repeats, told = False, []

    def __init__(self, board):
        self.board = board

    def scalars(self, step, values):
        if step == 2:
            raise ConnectionError('no route to host')
        self.told.append((self.board.id, step))

    def close(self, failed):
        raise AssertionError('it had failed before')


def test_a_tracker_that_fails_is_one_warning(tmp_path, monkeypatch, caplog):
    """Guards a run of days against the network of its tracker, and a log against a line for every step."""
    monkeypatch.setitem(TRACKERS, 'flaky', Flaky)
    (tmp_path / 'tensorboard').touch()  # no folder can be made there
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path, trackers=('tensorboard', 'flaky')) as metrics:
        for step in range(1, 5):
            metrics.write(step, {'loss': 1.0})
    assert [row['step'] for row in read_metrics(tmp_path / 'metrics.jsonl')] == [1, 2, 3, 4]
    assert [step for _, step in Flaky.told] == [1]
    assert ['tensorboard failed at step 0' in text or 'flaky failed at step 2' in text for text in caplog.messages] == [
        True,
        True,
    ]
    # A run that starts over may be another one: what it repeats is no part of the old board.
    with MetricsWriter(tmp_path, trackers=('flaky',)) as metrics:
        metrics.write(1, {'loss': 2.0})
        metrics._trackers.clear()
    assert [step for _, step in Flaky.told] == [1, 1] and Flaky.told[0][0] != Flaky.told[1][0]


def test_a_tracker_that_is_not_there_is_an_error_at_once(tmp_path, monkeypatch):
    """Guards a missing package that only a warning after the first compilation tells of, and a folder of its name."""
    with pytest.raises(ValueError, match=r"trackers is \('wand',\); expected a list"):
        Run(folder='run', steps=1, trackers=('wand',))
    check_installed(['tensorboard'])
    installed = {name.lower() for distribution in metadata.distributions() if (name := distribution.name)}
    if missing := [name for name in READERS if name not in installed]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / missing[0]).mkdir()
        with pytest.raises(ValueError, match=f'pip install {missing[0]}, or unset it'):
            check_installed(['tensorboard', missing[0]])
