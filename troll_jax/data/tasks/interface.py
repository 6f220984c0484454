"""The interface of a task, and the reader of data sets from the Hugging Face hub or from local files."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from troll_jax.data.tasks.verl import VERL, is_verl
from troll_jax.hub import is_path, what_is_there

if TYPE_CHECKING:
    # `datasets` takes seconds to import, and grading workers import this module without ever loading data.
    from datasets import Dataset

_logger = logging.getLogger(__name__)

SPLITS = ('train', 'test')
ROWS_AT_A_TIME = 4096  # as Python's lists and dictionaries, which take ten times the memory
_BUILDERS = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json', '.csv': 'csv'}
_OTHER_FILES = ('.tsv', '.txt', '.arrow', '.gz', '.zst')  # no hub ids end so


class Task(Protocol):
    """A data set, the prompts made of it, and the reward of a response."""

    deadline: float | None
    """Seconds that one grading may take in a worker that can be killed. None: plain string work that cannot hang,
    graded in the calling process."""

    def load(self, split: str) -> Dataset:
        """Rows of split 'train' or 'test' with the columns `messages` (list of {role, content}) and `answer` (str).
        For a curriculum also `level` (int), see `Sampling.level`. Reward terms are given the others."""

    def grade(self, response: str, answer: str) -> float:
        """Reward of one decoded response, without the token that ended it; 1.0 is correct."""


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f'split is {split!r}; expected one of {SPLITS}.')


def load_rows(
    source: str,
    split: str,
    columns: Sequence[str | Sequence[str]],
    *,
    others: Sequence[str] = (),
    config: str | None = None,
    test_split: str = 'test',
) -> Dataset:
    """Reads one split of a data set.

    Args:
        source: one of
            - a folder that holds `train*` and `test*` files, each `.parquet`, `.jsonl`, `.json` or `.csv`;
            - a path with `{split}` in it, and `*` if there are several files: `data/gsm8k_{split}.jsonl`; without
              `{split}` it is every split. Also a URL that fsspec reads, gs://… or hf://…;
            - an id on the Hugging Face hub, `openai/gsm8k`, or a folder of it, `owner/name/folder`.
        split: 'train' or 'test'.
        columns: the only ones that are read, or those of verl's schema if it has that; all if one is missing. Of
            several names for one, it is the first that there is.
        others: columns that are read, too, if they are there.
        config: name of the configuration on the hub.
        test_split: the source's name of 'test', such as 'validation'.

    Raises:
        ValueError: the source does not exist or cannot be read, or the split is empty.
    """
    check_split(split)
    name = test_split if split == 'test' else split
    source = os.path.expanduser(source)
    files = _local_files(source, name)
    owner_and_name = '/'.join(source.split('/')[:2])
    import datasets

    try:
        if files:
            # One by one: what is not used may be of another type in each.
            parts = [_read_file(file, name, columns, others) for file in files]
            rows = datasets.concatenate_datasets([part.cast(parts[0].features) for part in parts])
        else:
            folder = '/'.join(source.split('/')[2:])
            rows = datasets.load_dataset(owner_and_name, config, data_dir=folder or None, split=name)
            rows = rows.select_columns(_used(rows.column_names, columns, others))
        rows.data.validate(full=True)  # or text that is not UTF-8 is an error wherever it is read first
        return rows
    except Exception as error:  # of many kinds: no network, no such id, damaged, no rows
        while files and error.__cause__ is not None:  # of a file the first cause tells what is wrong with it
            error = error.__cause__
        where = f'the files {files}' if files else f'{source!r}, which is no folder here (looked in {os.getcwd()}),'
        hub = re.fullmatch(r'hf://datasets/([^/]+/[^/]+)/.*', source)
        where += _files_on_hub(hub[1] if hub else owner_and_name) if hub or not files else ''
        raise ValueError(
            f'Split {name!r} of {where} cannot be read or is empty ({type(error).__name__}: {error}). Expected a '
            f'folder with {name}*.parquet, .jsonl, .json or .csv files that have rows, in UTF-8, such a file, a path '
            'with {split} in it, or an id on the Hugging Face hub.'
        ) from error


def locate(source: str, split: str, row: int, *, test_split: str = 'test') -> str:
    """The place of a row of `load_rows`, for an error: 'row 3 of data/train-1.parquet', counted from 0 in its file."""
    name = test_split if split == 'test' else split
    files = _local_files(os.path.expanduser(source), name)
    if len(files) > 1:
        import datasets

        builder = _BUILDERS[os.path.splitext(files[0])[1]]
        for file in files:
            length = len(datasets.load_dataset(builder, data_files=file, split='train'))
            if row < length:
                return f'row {row} of {file!r}'
            row -= length
    return f'row {row} of {files[0]!r}' if files else f'row {row} of {name!r} in {source!r}'


def as_dataset(problems: Iterable[tuple[list[dict[str, str]], str]]) -> Dataset:
    """Rows with the columns `messages` and `answer`, of an iterator of both."""
    from datasets import Dataset, concatenate_datasets

    problems, parts = iter(problems), []
    while some := list(islice(problems, ROWS_AT_A_TIME)):
        messages, answers = map(list, zip(*some, strict=True))
        parts.append(Dataset.from_dict({'messages': messages, 'answer': answers}))
    return concatenate_datasets(parts) if parts else Dataset.from_dict({'messages': [], 'answer': []})


def check_columns(rows: Dataset, columns: tuple[str, ...], where: str) -> None:
    """Raises a ValueError that names what is missing of `columns`; `where` is that of the first row."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(
            f'{where} has no column {missing}; got {rows.column_names}, expected {list(columns)}, or the schema of '
            'verl: prompt, reward_model. Rename the columns, or point to the data set in its original form.'
        )


def check_asked_for(prompts: Sequence[list[dict[str, str]]], places: Sequence[str], where: str) -> None:
    """Warns if no prompt mentions a place in which the answer is looked for: every reward could be 0."""
    markers = [place.strip(':').lower() for place in places]
    if 'last number' not in places and not any(
        marker in message['content'].lower() for messages in prompts for message in messages for marker in markers
    ):
        _logger.warning(
            'no prompt asks for an answer in one of the places where it is looked for, %s (first: %s); change '
            '`places`, or add an instruction',
            *(', '.join(map(repr, places)), where),
        )


def as_messages(question: str, instruction: str | None, system_prompt: str | None) -> list[dict[str, str]]:
    """The question, with the instruction under it, as a user's words behind the system prompt, if there is one."""
    content = f'{question}\n\n{instruction}' if instruction else question
    system = [{'role': 'system', 'content': system_prompt}] if system_prompt else []
    return [*system, {'role': 'user', 'content': content}]


def find_column(names: Sequence[str], column: str | Sequence[str]) -> str | None:
    """The column of this name, or the first of these names, among those that there are."""
    return next((name for name in ([column] if isinstance(column, str) else column) if name in names), None)


def _used(names: Sequence[str], columns: Sequence[str | Sequence[str]], others: Sequence[str]) -> list[str]:
    """The columns to read of those that there are."""
    found = [find_column(names, column) for column in columns]
    found = VERL if is_verl(names) else names if None in found else found
    return [name for name in names if name in (*found, *others)]


def _read_file(file: str, split: str, columns: Sequence[str | Sequence[str]], others: Sequence[str]) -> Dataset:
    import datasets
    import fsspec
    import pyarrow.parquet

    builder, options = _BUILDERS[os.path.splitext(file)[1]], {}
    if builder == 'parquet':
        with fsspec.open(file) as opened:
            options['columns'] = _used(pyarrow.parquet.read_schema(opened).names, columns, others)
    if builder == 'csv':
        options['keep_default_na'] = False  # 'None' and 'NA' are text
    rows = datasets.load_dataset(builder, data_files={split: file}, split=split, **options)
    return rows.select_columns(_used(rows.column_names, columns, others))


def _files_on_hub(dataset: str) -> str:
    """For an error: the files of a data set on the hub, whose layout may be another one than was taken for granted."""
    import huggingface_hub

    try:
        files = huggingface_hub.HfApi().list_repo_files(dataset, repo_type='dataset')
    except Exception:  # of many kinds: no network, no such id; then there is nothing to add
        return ''
    return f' and has the files {sorted(files)[:50]} on the hub,'


def _local_files(source: str, split: str) -> list[str]:
    """The files or URLs of a split, by the source's name of it; none if `source` looks like an id on the hub."""
    suffixes = ' or '.join(_BUILDERS)
    if '://' in source:
        if not source.endswith(tuple(_BUILDERS)):
            raise ValueError(f'The URL {source!r} must end in {suffixes}.')
        return [source.replace('{split}', split)]
    if os.path.isdir(source):
        pattern = os.path.join(glob.escape(source), f'{split}*')
    elif '{split}' in source or '*' in source or source.endswith(tuple(_BUILDERS)):
        pattern = source.replace('{split}', split)
    elif is_path(source) or source.endswith(_OTHER_FILES):
        raise ValueError(
            f'The folder {source!r} does not exist; expected one with {split}* files ({suffixes}). '
            f'{what_is_there(source)}.'
        )
    else:
        return []
    files = sorted(name for name in glob.glob(pattern) if name.endswith(tuple(_BUILDERS)))
    if not files:
        raise ValueError(
            f'No file matches {pattern!r} with suffix {suffixes}; {what_is_there(os.path.dirname(pattern))}. Add one, '
            f'or change the source {source!r} or what it calls this split (test_split).'
        )
    kinds = {os.path.splitext(name)[1] for name in files}
    if len(kinds) > 1:
        raise ValueError(f'Split {split!r} mixes the formats {sorted(kinds)}: {files}; expected one. Remove the other.')
    return files
