"""The files of a run in JSON lines, and its trackers. One writer, steps only ever grow."""

import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from troll_jax.trackers import TRACKERS, Board, Tracker

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes `metrics.jsonl`, `constrained_tokens.jsonl` and `samples.jsonl` into a run's folder, and to its trackers.

    A context manager. The files are the record of the run: an error of theirs ends it, one of a tracker is a warning.

    Args:
      folder: run directory; is created if it is not there.
      resume_after: the last step that counts. Lines of later steps, and a line that was torn by a crash, are removed,
        so that a resumed run has every step once. 0 is a fresh start, of which nothing counts, not even step 0.
      write: False in all processes of a run but one, which then write nothing.
      trackers: names of `troll_jax.trackers.TRACKERS`.
      settings: name → value of the run's settings, for the trackers.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        resume_after: int = 0,
        write: bool = True,
        trackers: Sequence[str] = ('tensorboard',),
        settings: Mapping[str, str] | None = None,
    ):
        self._write, self._trackers = write, {}
        if not write:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        first = resume_after + 1 if resume_after else 0
        self._last_step, path, id_path = first - 1, folder / 'metrics.jsonl', folder / 'board_id'
        earlier = read_metrics(path) if first and path.exists() else []
        self._last_shown = earlier[-1]['step'] if earlier else -1
        self._file = _open_before(path, first)
        self._tables = _open_before(folder / 'constrained_tokens.jsonl', first)
        self._samples = _open_before(folder / 'samples.jsonl', first)
        if not first or not id_path.exists():  # a run that starts over may be another one
            id_path.write_text(uuid.uuid4().hex[:8])
        board = Board(folder, id_path.read_text(), first, settings or {})
        for name in trackers:
            with self._tolerated(name, first):
                self._trackers[name] = TRACKERS[name](board)

    def __enter__(self) -> 'MetricsWriter':
        return self

    def __exit__(self, kind, *_) -> None:
        if not self._write:
            return
        for file in (self._file, self._tables, self._samples):
            file.close()
        for name, tracker in list(self._trackers.items()):
            with self._tolerated(name, self._last_step):
                tracker.close(kind is not None)

    def write_table(self, step: int, rows: list[dict]) -> None:
        """Appends the tokens that an objective held back most at a step to `constrained_tokens.jsonl`."""
        if not self._write:
            return
        _append(self._tables, {'step': step, 'tokens': rows})
        lines = [f'    {row["text"]!r} {row["constrained"]} of {row["seen"]}' for row in rows]
        self._tell(step, lambda tracker: tracker.text(step, 'constrained_tokens', '\n'.join(lines)))

    def write_samples(self, step: int, prompts: list[dict], text: str) -> None:
        """Appends some prompts of a step, with their responses, to `samples.jsonl`; `text` is for the trackers."""
        if not self._write:
            return
        _append(self._samples, {'step': step, 'prompts': prompts})
        self._tell(step, lambda tracker: tracker.text(step, 'samples', text))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step. A number that is not finite becomes null in the file, so that it stays JSON.

        Raises:
          ValueError: the step does not come after the last one.
        """
        if not self._write:
            return
        if step <= self._last_step:
            raise ValueError(f'metrics of step {step} come after those of step {self._last_step}; steps must grow')
        self._last_step = step
        values = {name: float(value) for name, value in values.items()}
        row = {'step': step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        _append(self._file, row)
        self._tell(step, lambda tracker: tracker.scalars(step, values))

    def _tell(self, step: int, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            if step > self._last_shown or tracker.repeats:
                with self._tolerated(name, step):
                    what(tracker)

    @contextmanager
    def _tolerated(self, name: str, step: int) -> Iterator[None]:
        """Goes on without a tracker that has failed, whatever it raised: the files have all that it would show."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            logger.warning('%s failed at step %d, and the run goes on without it: %s', name, step, error)


def _open_before(path: Path, first: int) -> BinaryIO:
    """Opens a file of JSON lines to write to, after taking out the lines of step `first` and later."""
    kept = [row for row in read_metrics(path) if row['step'] < first] if path.exists() else []
    temporary = path.with_suffix('.tmp')
    temporary.write_bytes(b''.join(map(_line, kept)))
    temporary.replace(path)
    return path.open('ab', buffering=0)


def _line(row: dict) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + '\n').encode()


def _append(file: BinaryIO, row: dict) -> None:
    """Adds a line to a file without a buffer or, if the disk is full, leaves the file as it was.

    Raises:
      OSError: the line could not be written.
    """
    end, left = os.fstat(file.fileno()).st_size, _line(row)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        os.ftruncate(file.fileno(), end)
        raise OSError(
            error.errno,
            f'{error.strerror}: the numbers of step {row["step"]} could not be written. See that there is room, then '
            'start again: the run resumes from its latest checkpoint',
            os.fspath(file.name),
        ) from error


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The rows of a `metrics.jsonl`, up to the first line that a crash left incomplete."""
    rows = []
    with Path(path).open('rb') as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except ValueError:  # no JSON, or half of a character
                break
    return rows
