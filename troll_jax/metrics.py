"""Metrics of a run: one JSON line per step, and TensorBoard. One writer, steps only ever grow."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import text


class MetricsWriter:
    """Writes `metrics.jsonl` and a `tensorboard` folder into a run's folder. A context manager.

    Args:
      folder: run directory; is created if it is not there.
      resume_after: the last step that counts. Lines of later steps, and a line that was torn by a crash, are removed,
        so that a resumed run has every step once. 0 is a fresh start, of which nothing counts, not even step 0.
      write: False in all processes of a run but one, which then write nothing.
    """

    def __init__(self, folder: str | os.PathLike, *, resume_after: int = 0, write: bool = True):
        self._write = write
        if not write:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        first = resume_after + 1 if resume_after else 0
        self._last_step = first - 1
        self._file = _open_before(folder / 'metrics.jsonl', first)
        self._tables = _open_before(folder / 'constrained_tokens.jsonl', first)
        # Written here and now: the thread of a SummaryWriter dies when the disk is full, and the run then waits for it
        # forever. The first event tells TensorBoard to drop what earlier files say of the steps from here on.
        self._board_folder = folder / 'tensorboard'
        self._board_folder.mkdir(exist_ok=True)
        self._board = EventsWriter(str(self._board_folder / 'events'), f'.{os.getpid()}')
        self._show(first, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> 'MetricsWriter':
        return self

    def __exit__(self, kind, *_) -> None:
        if not self._write:
            return
        self._file.close()
        self._tables.close()
        with nullcontext() if kind is None else suppress(OSError):  # what ended the run comes first
            self._board.close()

    def _show(self, step: int, **what) -> None:
        with _explained(self._board_folder, step):
            self._board.write_event(Event(wall_time=time.time(), step=step, **what))
            self._board.flush()

    def write_table(self, step: int, rows: list[dict]) -> None:
        """Appends the tokens that an objective held back most at a step to `constrained_tokens.jsonl`."""
        if not self._write:
            return
        _append(self._tables, {'step': step, 'tokens': rows})
        lines = [f'- {row["text"]!r} {row["constrained"]} of {row["seen"]}' for row in rows]
        self._show(step, summary=text('constrained_tokens', '\n'.join(lines)))

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
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._show(step, summary=Summary(value=scalars))


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
    with _explained(file.name, row['step']):
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


@contextmanager
def _explained(path: str | os.PathLike, step: int) -> Iterator[None]:
    """An OSError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f'{error.strerror}: the numbers of step {step} could not be written. See that there is room, then start '
            'again: the run resumes from its latest checkpoint',
            os.fspath(path),
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
