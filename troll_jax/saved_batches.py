"""The minibatches of one rollout in a file, to compare objectives on the same data."""

import os
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from troll_jax.sharding import fetch
from troll_jax.types import Batch

_EXPECTED = 'expected what save_batches of this version of troll_jax wrote'


class SavedBatches(NamedTuple):
    """The result of `load_batches`."""

    step: int  # of the checkpoint before the step that learnt from them; 0: the model that the run started from
    batches: list[Batch]  # in numpy, in the order in which they were learnt from


def save_batches(path: str | os.PathLike, batches: Iterable[Batch], *, step: int) -> None:
    """Writes minibatches of one rollout as compressed .npz: all of them or, on any failure, nothing.

    Of several processes all call it, and the first one writes.

    Args:
      path: file to write; its folder is made.
      batches: as they are learnt from, in numpy or on devices.
      step: step of the checkpoint before they are learnt from.
    """
    entries, count, first = {'step': np.int64(step)}, 0, jax.process_index() == 0
    for batch in batches:
        for where, leaf in jax.tree.leaves_with_path(batch):
            whole = fetch(leaf)
            if first:
                entries[f'{count}/{jax.tree_util.keystr(where, simple=True, separator="/")}'] = whole
        count += 1
    if not first:
        return
    entries['count'] = np.int64(count)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            np.savez_compressed(file, **entries)  # most of a batch is room that its responses did not need
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_batches(path: str | os.PathLike) -> SavedBatches:
    """Reads what `save_batches` wrote. Runs no code from the file.

    Raises:
      ValueError: there is no such file, it is damaged, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'no file of saved batches {str(path)!r}; train with Run.save_rollout_every to get some')
    try:
        with np.load(path, allow_pickle=False) as file:
            entries = dict(file)  # reads all of it, and compares checksums
    except Exception as error:  # whatever numpy and zipfile raise on a damaged or foreign file
        raise ValueError(
            f'{path} cannot be read, it is damaged or no .npz file ({type(error).__name__}: {error}); {_EXPECTED}'
        ) from error
    try:
        step, count = int(entries.pop('step')), int(entries.pop('count'))
        batches = [_take(Batch, entries, str(i)) for i in range(count)]
    except (KeyError, TypeError) as error:  # names what is not there
        raise ValueError(f'{path} holds no saved batches: {error}; {_EXPECTED}') from error
    if entries:
        raise ValueError(f'{path} holds {sorted(entries)}, which a Batch does not have; {_EXPECTED}')
    return SavedBatches(step, batches)


def _take(kind: type, entries: dict[str, np.ndarray], prefix: str) -> Any:
    """A NamedTuple of what lies below a prefix, which is taken out. A field of which nothing is there has its default.

    By field names and types alone: a field that `Batch` gets later, even one that may be None, needs nothing here.
    """
    values = {}
    for name, hint in typing.get_type_hints(kind).items():
        nested = [option for option in (hint, *typing.get_args(hint)) if hasattr(option, '_fields')]
        if f'{prefix}/{name}' in entries:
            values[name] = entries.pop(f'{prefix}/{name}')
        elif any(entry.startswith(f'{prefix}/{name}/') for entry in entries):
            values[name] = _take(nested[0], entries, f'{prefix}/{name}')
    return kind(**values)
