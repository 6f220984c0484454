"""What a run's folder holds besides numbers: where a run starts or goes on, and what it needs to be evaluated."""

import difflib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gin
from transformers import GenerationConfig

from troll_jax.checkpoint import Checkpoints
from troll_jax.models.hf_weights import load_config, load_pretrained
from troll_jax.types import TrainState

logger = logging.getLogger(__name__)


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


def save_setup(run_dir: Path, experiment, tokenizer, first: int, checkpoint_dir: str | None) -> None:
    """Writes what evaluation and export need besides the parameters. A configuration that changed is kept.

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
    path.write_text(new)
    load_config(experiment.model).save_pretrained(run_dir / 'model')
    tokenizer.save_pretrained(run_dir / 'model')
    stop_tokens = list(experiment.stop_tokens(tokenizer))
    GenerationConfig(eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id).save_pretrained(run_dir / 'model')
