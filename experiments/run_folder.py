"""What a run's folder holds besides numbers: where a run starts or goes on, and what it needs to be evaluated."""

import difflib
import hashlib
import importlib.metadata
import json
import logging
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gin
from etils import epath
from transformers import GenerationConfig, PreTrainedTokenizerBase

from troll_jax.checkpoint import Checkpoints
from troll_jax.data.prompts import PromptSet
from troll_jax.models.hf_weights import load_config, load_pretrained
from troll_jax.types import TrainState

logger = logging.getLogger(__name__)

SETUP = 'setup.json'  # lies where the checkpoints are
ON_CHANGE = ('stop', 'go on')
PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'transformers')
# Bindings that say where, how long and on what a run goes on, and not what it learns.
FREE = re.compile(
    r"""(make_mesh|evaluation)\..*
    | Experiment\.(mesh|remat|attention)
    | train\.(run_dir|steps|slots|gather_weights|row_tokens|micro_batch_tokens|head_chunk|evaluate_every|table_every
        |checkpoint_every|checkpoint_dir|keep_checkpoints|keep_best|save_rollout_every|profile_step|max_skipped
        |debug_nans|on_change)""",
    re.VERBOSE,
)


def describe_setup(tokenizer: PreTrainedTokenizerBase, splits: dict[str, PromptSet]) -> dict[str, dict]:
    """All that decides what a run learns, besides its weights: to be saved with these, as `setup.json`.

    Args:
      tokenizer: of the run.
      splits: of the data, by their names.
    """
    bindings = re.findall(r'^([\w./]+) = (.*)$', gin.config_str(max_line_length=10**6), re.MULTILINE)
    special = [tokenizer.special_tokens_map, tokenizer.chat_template]
    return {
        'bindings': dict(bindings),
        'tokenizer': {'tokenizer': fingerprint(sorted(tokenizer.get_vocab().items()), special)},
        'data': {
            f'{name} data': fingerprint(
                [row[:length].tolist() for row, length in zip(data.tokens, data.lengths, strict=True)], data.answers
            )
            for name, data in splits.items()
        },
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES} | {'troll_jax': _commit()},
    }


def fingerprint(*values: Any) -> str:
    """A hash of values that can be written as JSON: the same on any machine and in any version of Python."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _commit() -> str | None:
    """The commit of this repository, `-dirty` if files differ from it; None outside of a repository."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude', '*']
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def check_setup(checkpoints: Checkpoints, new: dict[str, dict], on_change: str) -> None:
    """Compares with what the checkpoints were saved with, before anything goes on from them.

    Raises:
      ValueError: another configuration, tokenizer or data, and `on_change` is not 'go on'.
    """
    if on_change not in ON_CHANGE:
        raise ValueError(f'train.on_change must be one of {ON_CHANGE}; got {on_change!r}')
    if not checkpoints.steps:
        return
    path = checkpoints.path.parent / SETUP
    if not path.exists():
        logger.warning('%s is missing: configuration and data cannot be compared with those before', path)
        return
    old = json.loads(path.read_text())

    def changes(*parts: str) -> list[str]:
        before, after = ({name: x for part in parts for name, x in of[part].items()} for of in (old, new))
        names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
        return [
            f'{name}: {before.get(name, "not set")} → {after.get(name, "not set")}'
            for name in names
            if not FREE.fullmatch(name)
        ]

    if versions := changes('versions'):
        logger.warning('other versions than before, results may differ in rounding:\n%s', '\n'.join(versions))
    if not (found := changes('bindings', 'tokenizer', 'data')):
        return
    message = f'{path.parent} was trained to step {checkpoints.steps[-1]} with something else:\n' + '\n'.join(found)
    if on_change == 'stop':
        raise ValueError(
            f'{message}\nUse what it was started with or another train.run_dir, or bind train.on_change = "go on" to '
            'train on with the change'
        )
    logger.warning(message)


def check_writable(folder: str | Path) -> None:
    """Leaves nothing behind: a folder that does not exist is made later, and the nearest above it is tried.

    Raises:
      ValueError: no name.
      OSError: nothing can be written there.
    """
    if not str(folder):
        raise ValueError("got '' for a folder to write to; expected a name. Bind one, '.' is the working folder")
    folder = Path(folder)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b'.')
            file.flush()
    except OSError as error:
        raise OSError(
            error.errno,
            f'{error.strerror}: files are to be written there. Make it writable, or bind another folder',
            str(folder),
        ) from error


@contextmanager
def nothing_left_behind(folder: str | Path) -> Iterator[None]:
    """Removes the folders that an error leaves empty: `folder`, its `checkpoints`, and those above that it made."""
    folder = Path(folder)
    made = [path for path in (folder / 'checkpoints', folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # what is not empty, was never made, or another process has removed
                path.rmdir()
        raise


def _replace(path: epath.Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_text(text)
    temporary.replace(path)


def restore_or_start(
    checkpoints: Checkpoints,
    experiment,
    shapes: TrainState,
    start: Callable[[Any], TrainState],
    step: int | None = None,
) -> TrainState:
    """A checkpoint, by default the latest, or what `start` makes of the model that the run starts from (step 0)."""
    if step is None:
        step = checkpoints.steps[-1] if checkpoints.steps else 0
    if step:
        logger.info('going on from step %d', step)
        return checkpoints.restore(shapes, step)
    _, params = load_pretrained(experiment.model, mesh=experiment.mesh)
    return start(params)


def save_setup(
    run_dir: Path, experiment, tokenizer, first: int, checkpoint_dir: str | None, setup: dict[str, dict]
) -> None:
    """Writes what evaluation, export and resuming need besides the parameters. A configuration that changed is kept.

    Raises:
      ValueError: a run that starts from nothing would overwrite one whose checkpoints lie elsewhere.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path, new = run_dir / 'config.gin', gin.config_str()
    old = path.read_text() if path.exists() else new
    elsewhere = re.search(r"^train\.checkpoint_dir = '(.*)'", old, re.MULTILINE)
    if not first and elsewhere and elsewhere[1] != checkpoint_dir:
        raise ValueError(
            f'{run_dir} has its checkpoints in {elsewhere[1]}, and train.checkpoint_dir is {checkpoint_dir!r}; bind it '
            'to go on, or choose another run_dir'
        )
    if first and old != new:
        (run_dir / f'config_until_{first}.gin').write_text(old)
        changed = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in '+-']
        logger.warning('going on from step %d with another configuration:\n%s', first, '\n'.join(changed))
    _replace(epath.Path(path), new)
    where = epath.Path(checkpoint_dir or run_dir)
    where.mkdir(parents=True, exist_ok=True)
    _replace(where / SETUP, json.dumps(setup, indent=2) + '\n')
    load_config(experiment.model).save_pretrained(run_dir / 'model')
    tokenizer.save_pretrained(run_dir / 'model')
    stop_tokens = list(experiment.stop_tokens(tokenizer))
    GenerationConfig(eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id).save_pretrained(run_dir / 'model')
