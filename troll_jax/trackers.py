"""Where the numbers of a run are shown besides its files: TensorBoard, Weights & Biases, trackio, MLflow."""

import importlib.util
import os
import re
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import text as text_summary

PROJECT = 'troll_jax'


class Board(NamedTuple):
    """What a tracker is built from."""

    folder: Path  # of the run
    id: str  # of the board: the same whenever the run resumes
    first: int  # step that comes next; above 0: the run resumes
    settings: Mapping[str, str]  # name → value of the run's settings


class Tracker(Protocol):
    """A board of one run, built from a `Board`. What it raises costs the run that board, and nothing else."""

    repeats: bool
    """True if it takes steps that a resumed run repeats in place of the earlier ones; else they are not sent again."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows numbers of a step; some may not be finite."""

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text in Markdown."""

    def close(self, failed: bool) -> None:
        """Ends the board, `failed` if an error has ended the run."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    repeats = True

    def __init__(self, board: Board):
        # Written here and now: the thread of a SummaryWriter dies when the disk is full, and the run then waits for it
        # forever. The first event tells TensorBoard to drop what earlier files say of the steps from here on.
        folder = board.folder / 'tensorboard'
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
        self._show(board.first, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._show(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=x) for name, x in values.items()]))

    def text(self, step: int, name: str, text: str) -> None:
        self._show(step, summary=text_summary(name, text))

    def close(self, failed: bool) -> None:
        self._writer.close()

    def _show(self, step: int, **what) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
        self._writer.flush()


class WeightsAndBiases:
    """A run of Weights & Biases; without a login it is offline, in the run's folder `wandb`, for `wandb sync`."""

    repeats = False

    def __init__(self, board: Board):
        import wandb

        offline = 'WANDB_MODE' not in os.environ and not wandb.login(prompt=False)
        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', PROJECT),
            id=board.id,
            name=board.folder.name,
            dir=board.folder,
            config=dict(board.settings),
            allow_val_change=True,
            resume='allow',
            mode='offline' if offline else None,
            settings={'console': 'off', 'silent': True},
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._html(f'<pre>{escape(text)}</pre>')}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, on this machine unless TRACKIO_SPACE_ID names a Space; TRACKIO_DIR moves it."""

    repeats = False

    def __init__(self, board: Board):
        import trackio

        self._markdown = trackio.Markdown
        self._run = trackio.init(
            PROJECT,
            name=f'{board.folder.name}-{board.id}',
            config=dict(board.settings),
            resume='allow',
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._markdown(text)}, step)

    def close(self, failed: bool) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, in `mlflow.db` of the run's folder unless MLFLOW_TRACKING_URI names a server."""

    repeats = False

    def __init__(self, board: Board):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, uri = Metric, os.environ.get('MLFLOW_TRACKING_URI')
        local, folder = uri is None, board.folder.absolute()
        self._client = client = MlflowClient(f'sqlite:///{folder}/mlflow.db' if local else uri)
        artifacts = (folder / 'mlflow').as_uri() if local else None
        found = client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else client.create_experiment(PROJECT, artifacts)
        earlier = client.search_runs([experiment], f"tags.board = '{board.id}'")
        run = earlier[0] if earlier else client.create_run(experiment, tags={'board': board.id}, run_name=folder.name)
        self._id = run.info.run_id
        if earlier:
            client.update_run(self._id, 'RUNNING')
        else:
            client.log_batch(self._id, params=[Param(name, x[:500]) for name, x in board.settings.items()][:100])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now, allowed = int(1000 * time.time()), lambda name: re.sub(r'[^A-Za-z0-9_\-. :/]', '_', name)
        self._client.log_batch(self._id, [self._metric(allowed(name), x, now, step) for name, x in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f'{name}/{step}.md')

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, 'FAILED' if failed else 'FINISHED')


TRACKERS = {'tensorboard': TensorBoard, 'wandb': WeightsAndBiases, 'trackio': Trackio, 'mlflow': MLflow}


def check_installed(names: Sequence[str]) -> None:
    """Raises a ValueError for a tracker that is not installed. That of TensorBoard is."""
    # A folder of that name in the working folder has no origin.
    found = {name: getattr(importlib.util.find_spec(name), 'origin', None) for name in names if name != 'tensorboard'}
    if missing := [name for name, origin in found.items() if origin is None]:
        raise ValueError(f'Run.trackers has {missing}, not installed; pip install {" ".join(missing)}, or unset it')
