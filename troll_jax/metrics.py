"""Where numbers of a run go: one JSON line per step, and TensorBoard. One writer, steps only ever grow."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes `metrics.jsonl` and a `tensorboard` folder into a run's folder. A context manager.

    Args:
      folder: of the run; is created if it is not there.
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
        self._tables = _open_before(folder / 'held_tokens.jsonl', first)
        self._board = SummaryWriter(str(folder / 'tensorboard'), purge_step=first)

    def __enter__(self) -> 'MetricsWriter':
        return self

    def __exit__(self, *_) -> None:
        if not self._write:
            return
        self._file.close()
        self._tables.close()
        self._board.close()

    def write_table(self, step: int, rows: list[dict]) -> None:
        """Appends the tokens that an objective held back most at a step to `held_tokens.jsonl`."""
        if not self._write:
            return
        _append(self._tables, {'step': step, 'tokens': rows})
        lines = [f'- {row["text"]!r} {row["held"]} of {row["seen"]}' for row in rows]
        self._board.add_text('held_tokens', '\n'.join(lines), step)

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
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


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
            'start again: the run goes on from its latest checkpoint',
            file.name,
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
