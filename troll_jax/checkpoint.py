"""Checkpoints of a run, by Orbax: saved in the background, restored straight onto the mesh in use."""

import logging
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from troll_jax.models.lora import checksum, split
from troll_jax.types import CriticState, Progress, TrainState, join

_OPTIONAL = ('critic', 'reference', 'past')  # items of a state that not every run has
_SCORE = 'score'  # by which the best checkpoint is found
_BASE = 'checksum of the start model'  # in the metadata of a checkpoint of adapters

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a run's folder. A context manager; leaving it waits until the last one is on disk.

    Args:
      folder: run directory, or a bucket (gs://…); checkpoints lie in `checkpoints/<step>` below it.
      keep: how many of the latest to keep.
      keep_every: checkpoints of steps that are a multiple of it are kept besides; None keeps the latest alone.
      keep_best: the one that was saved with the highest score is kept besides, of equal ones the latest.
      read_only: touches nothing, so that a run that is under way can be looked into.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        keep_best: bool = False,
        read_only: bool = False,
    ):
        folder = os.fspath(folder)
        self.path = epath.Path(folder if '://' in folder else os.path.abspath(folder)) / 'checkpoints'
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        else:
            kept = [managers.LatestN(n=keep)]
            kept += [managers.EveryNSteps(keep_every)] if keep_every else []
            if keep_best:
                kept.append(managers.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(kept),
                best_fn=_score if keep_best else None,  # without which Orbax writes no score
                cleanup_tmp_directories=True,
            )
        self._manager = ocp.CheckpointManager(
            self.path,
            options=options,
            item_handlers={name: ocp.StandardCheckpointHandler() for name in TrainState._fields},
        )

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, Exception) and jax.process_count() > 1:
            # Now: if a process has died, waiting for it ends this one before Python tells of any error.
            _logger.error('the run ends, the first error of its processes says why: %s: %s', kind.__name__, error)
        try:
            self.wait()
        except OSError as error:
            if kind is None:
                raise
            _logger.error('%s', error)  # what ended the run comes first
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, score: float | None = None) -> None:
        """Starts saving. Returns once the arrays are copied; a step that is not after the latest is left alone.

        Args:
          state: what to save.
          score: number for `keep_best`, if it is known.

        Raises:
          OSError: this checkpoint, or the one before in the background, could not be written.
        """
        items = {name: ocp.args.StandardSave(value) for name, value in _items(state).items()}
        metrics = None if score is None else {_SCORE: float(score)}
        adapted = None if state.base is None else {_BASE: int(checksum(state.base))}
        with self._explained():
            self._manager.save(
                int(state.progress.step), args=ocp.args.Composite(**items), metrics=metrics, custom_metadata=adapted
            )

    def check(self) -> None:
        """Raises the OSError of a save in the background that has failed, if one has. Costs nothing."""
        with self._explained():
            self._manager.check_for_errors()
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()  # at once, and raises what ended a save before its last part

    def wait(self) -> None:
        """Returns when all is on disk. Raises an OSError if something could not be written."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextmanager
    def _explained(self):
        """Turns any error while saving into an OSError that says which checkpoints are whole and what to do."""
        try:
            yield
        except Exception as error:
            self._manager.reload()
            lines = str(error).splitlines()
            raise OSError(
                f'a checkpoint could not be written to {self.path} ({type(error).__name__}: '
                f'{lines[0] if lines else ""}). Whole are those of the steps {self.steps}. See that there is room and '
                'that it may be written to, then start again: the run resumes from the latest of them.'
            ) from error

    def restore(self, shapes: TrainState, step: int, load: Callable[[], Any] | None = None) -> TrainState:
        """Restores a whole state.

        Args:
          shapes: a state of `jax.ShapeDtypeStruct` with shardings; they need not be those it was saved from.
          step: one of `steps`.
          load: loads the start model's parameters, which a checkpoint of adapters does not hold.

        Raises:
          ValueError: the checkpoint cannot be read, holds other arrays than `shapes`, or adapters of other parameters
            than those that `load` returns.
        """
        restored = self._restore(step, _items(shapes))
        restored['progress'] = Progress(**restored['progress'])
        if 'critic' in restored:
            restored['critic'] = CriticState(**restored['critic'])
        return TrainState(**restored, base=None if shapes.base is None else self._load_base(step, load))

    def restore_params(self, shapes: Any, step: int, load: Callable[[], Any] | None = None) -> Any:
        """Restores the policy's parameters alone. Arguments and errors as in `restore`."""
        base, trained = split(shapes)
        params = self._restore(step, {'params': trained})['params']
        return params if base is None else join(self._load_base(step, load), params)

    def _load_base(self, step: int, load: Callable[[], Any]) -> Any:
        """The parameters that a checkpoint's adapters belong to."""
        params = load()
        base = split(params)[0] or params
        if (got := int(checksum(base))) != (expected := self._manager.metadata(step).custom_metadata.get(_BASE)):
            raise ValueError(
                f'{self.path / str(step)} holds adapters of another start model than the one that is loaded: got the '
                f'checksum {got}, expected {expected}. Restore that model, or bind Experiment.model to a copy of it.'
            )
        return base

    def _restore(self, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
        where = self.path / str(step)
        if step not in self.steps:
            raise ValueError(f'no checkpoint of step {step} in {self.path}; there are {self.steps}')
        try:
            self._check_shapes(step, shapes)
            items = {name: ocp.args.StandardRestore(value) for name, value in shapes.items()}
            return dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        except _Mismatch as error:
            raise ValueError(
                f'{where} is a checkpoint of another model or optimizer: {error}. Use the configuration that it was '
                'saved with, or another run folder.'
            ) from None
        except Exception as error:  # whatever Orbax and its storage raise on a damaged file
            older = [other for other in self.steps if other < step]
            raise ValueError(
                f'{where} cannot be read, it is damaged or incomplete ({type(error).__name__}: '
                f'{str(error).splitlines()[0] if str(error) else ""}). Move that folder away to resume from '
                + (f'step {older[-1]}.' if older else 'the start.')
            ) from error

    def _check_shapes(self, step: int, shapes: dict[str, Any]) -> None:
        saved = self._manager.item_metadata(step)
        for item, expected in shapes.items():
            if saved[item] is None:
                if item in _OPTIONAL and not (self.path / str(step) / item).exists():
                    raise _Mismatch(f'it holds no {item}')
                raise FileNotFoundError(f'no metadata of {item}')
            # A restore would cut, pad or cast to fit.
            for what in (lambda leaf: tuple(leaf.shape), lambda leaf: jnp.dtype(leaf.dtype).name):
                got, want = _by_name(saved[item], what), _by_name(expected, what)
                for name in sorted(got.keys() | want.keys()):
                    if got.get(name) != want.get(name):
                        raise _Mismatch(f'{item}/{name} is {got.get(name)}, expected {want.get(name)}')


def _items(state: TrainState) -> dict[str, Any]:
    as_dict = lambda x: x._asdict() if isinstance(x, Progress | CriticState) else x
    return {name: as_dict(value) for name, value in state._asdict().items() if value is not None and name != 'base'}


def _score(metrics: dict[str, float]) -> float:
    return metrics[_SCORE]


class _Mismatch(Exception):
    """A checkpoint holds other arrays than were asked for."""


def _by_name(tree: Any, what: Callable[[Any], Any]) -> dict[str, Any]:
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): what(leaf) for path, leaf in flat}
