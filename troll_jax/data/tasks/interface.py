"""What a task is, and how a data set is read from the Hugging Face hub or from local files."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # `datasets` takes seconds to import, and grading workers import this module without ever loading data.
    from datasets import Dataset

SPLITS = ('train', 'test')
_BUILDERS = {'.parquet': 'parquet', '.jsonl': 'json'}


class Task(Protocol):
    """A data set, the prompts made of it, and the reward of a response."""

    deadline: float | None
    """Seconds that one grading may take in a worker that can be killed. None: plain string work that cannot hang,
    graded in the calling process."""

    def load(self, split: str) -> Dataset:
        """Rows of split 'train' or 'test' with the columns `messages` (list of {role, content}) and `answer` (str)."""

    def grade(self, response: str, answer: str) -> float:
        """Reward of one decoded response, without special tokens; 1.0 is correct."""


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; expected one of {SPLITS}.')


def load_rows(
    source: str,
    split: str,
    *,
    columns: tuple[str, ...],
    config: str | None = None,
    test_split: str = 'test',
) -> Dataset:
    """Reads one split of a data set.

    Args:
        source: one of
            - a folder that holds `train*` and `test*` files, each `.parquet` or `.jsonl`;
            - a path with `{split}` in it, and `*` if there are several files: `data/gsm8k_{split}.jsonl`; also the URL
              of a bucket, gs://…, which fsspec reads;
            - an id on the Hugging Face hub: `openai/gsm8k`.
        split: 'train' or 'test'.
        columns: columns that the data must have.
        config: name of the configuration on the hub.
        test_split: what the source calls the split for testing.

    Raises:
        ValueError: the source does not exist or cannot be read, a column is missing, or the split is empty.
    """
    check_split(split)
    split = test_split if split == 'test' else split
    source = os.path.expanduser(source)
    files = _local_files(source, split)
    import datasets

    try:
        if files:
            builder = _BUILDERS[os.path.splitext(files[0])[1]]
            rows = datasets.load_dataset(builder, data_files={split: files}, split=split)
        else:
            rows = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # of many kinds: no network, no such id, damaged, no rows
        where = f'the files {files}' if files else f'{source!r}, which is no folder here (looked in {os.getcwd()}),'
        raise ValueError(
            f'Split {split!r} of {where} cannot be read or is empty ({type(error).__name__}: {error}). Expected a '
            f'folder with {split}*.parquet or {split}*.jsonl files, a path with {{split}} in it, or an id on the '
            'Hugging Face hub.'
        ) from error
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f'Split {split!r} of {source!r} has no column {missing}; got {rows.column_names}, expected {list(columns)}.'
            ' Rename the columns, or point to the data set in its original form.'
        )
    return rows


def _local_files(source: str, split: str) -> list[str]:
    """The split's files or URLs; an empty list if `source` does not look like a path, and so is an id on the hub."""
    suffixes = ' or '.join(_BUILDERS)
    if '://' in source:
        if '{split}' not in source or not source.endswith(tuple(_BUILDERS)):
            raise ValueError(f'The URL {source!r} must have {{split}} in it and end in {suffixes}.')
        return [source.replace('{split}', split)]
    if os.path.isdir(source):
        pattern = os.path.join(glob.escape(source), f'{split}*')
    elif '{split}' in source:
        pattern = source.replace('{split}', split)
    elif source.endswith(tuple(_BUILDERS)) or '*' in source:
        raise ValueError(
            f'{source!r} names the same files for training and testing; write {{split}} where their names differ, '
            'e.g. data/gsm8k_{split}.jsonl, or give the folder.'
        )
    elif source.startswith(('/', './', '../')):
        raise ValueError(f'The folder {source!r} does not exist; expected one with {split}* files ({suffixes}).')
    else:
        return []
    files = sorted(name for name in glob.glob(pattern) if name.endswith(tuple(_BUILDERS)))
    if not files:
        raise ValueError(
            f'No file matches {pattern!r} with suffix {suffixes}; add one, or change the source {source!r}.'
        )
    kinds = {os.path.splitext(name)[1] for name in files}
    if len(kinds) > 1:
        raise ValueError(f'Split {split!r} mixes the formats {sorted(kinds)}: {files}; expected one. Remove the other.')
    return files
