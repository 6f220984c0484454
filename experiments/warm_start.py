"""Builds the small model of the quickstart and teaches it, by supervised learning, to answer some problems.

    troll warm_start arithmetic_model ['warm_start.seed = 1' …]

The result is a folder in Hugging Face format like any other model: config, safetensors, tokenizer with chat template.
"""

import logging
import shutil
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
from datasets import Dataset
from transformers import Qwen3Config

from experiments.finetune import finetune
from experiments.plumbing.command import read_command_line, run_command
from experiments.plumbing.run import check_writable
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic, demonstration
from troll_jax.data.tokenizer import character_tokenizer, save_tokenizer
from troll_jax.finetune import Finetuning
from troll_jax.models import decoder as decoders
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import save_pretrained
from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.optimizer import adamw
from troll_jax.settings import Compute, Run

logger = logging.getLogger(__name__)


def warm_start(
    folder: str,
    task: Arithmetic,
    *,
    width: int = 64,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    mlp_width: int = 192,
    worked_share: float = 0.25,
    learning_rate: float = 3e-3,
    batch: int = 128,
    accuracy: float = 0.95,
    mixed_steps: int = 150,
    max_steps: int = 2000,
    seed: int = 0,
) -> None:
    """Trains a new model on demonstrations and saves it.

    First all demonstrations are worked, until the model gets nearly all of a batch right; then some of them only give
    the answer. The model that comes out knows how to work a problem and seldom does: reinforcement learning has
    something to find out, and something to build on.

    Args:
      folder: folder to write the model to.
      task: task whose training problems are demonstrated.
      width, layers, heads, kv_heads, head_dim, mlp_width: sizes of the model.
      worked_share: share of demonstrations in the second part that show the running values before the answer.
      learning_rate: rate after a linear warm-up of 50 steps; falls to zero in the second part.
      batch: demonstrations per step.
      accuracy: share of a batch's worked answers that must be right, from beginning to end, for the first part to end.
      mixed_steps: optimizer steps of the second part.
      max_steps: limit of optimizer steps of the first part.
      seed: seed of weights, data order and demonstrations.

    Raises:
      ValueError: a number that makes no sense.
      RuntimeError: the first part has not ended after `max_steps`.
    """
    above_zero = {'width': width, 'layers': layers, 'heads': heads, 'kv_heads': kv_heads, 'head_dim': head_dim}
    above_zero |= {'mlp_width': mlp_width, 'batch': batch, 'learning_rate': learning_rate}
    for name, value in (above_zero | {'mixed_steps': mixed_steps, 'max_steps': max_steps}).items():
        check_range(name, value, is_positive, 'above 0')
    for name, share in {'worked_share': worked_share, 'accuracy': accuracy}.items():
        check_range(name, share, lambda x: 0 <= x <= 1, 'a share, from 0 to 1')
    check_range('seed', seed, is_not_negative, 'at least 0')
    check_writable(folder)
    tokenizer = character_tokenizer(CHARACTERS)
    prompt_room, response_room = 2 * task.operands, task.operands + 2
    hf_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp_width,
        max_position_embeddings=prompt_room + response_room,
        rope_parameters={'rope_type': 'default', 'rope_theta': 1000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=['Qwen3ForCausalLM'],
        dtype='float32',
    )
    compute = Compute(dtype='float32', remat=None, head_chunk=4096, devices=jax.devices()[:1])
    problems = task.problems('train')

    with tempfile.TemporaryDirectory() as runs:

        def teach(name: str, model: Path, share: float, steps: int, accuracy: float | None, **rates: int) -> Path:
            """The folder of the model after learning from demonstrations of which this share is worked."""
            worked = np.random.default_rng(seed).random(len(problems)) < share
            words = [demonstration(problem, show) for problem, show in zip(problems, worked, strict=True)]
            settings = Finetuning(
                model=str(model),
                max_length=prompt_room + response_room,
                batch_size=batch,
                optimizer=partial(adamw, learning_rate, b2=0.98, **rates),
                stop_at_accuracy=accuracy,
                seed=seed,
            )
            run = Run(folder=Path(runs, name), steps=steps, checkpoint_every=steps)
            if not finetune(settings, compute, run, Dataset.from_dict({'prompt': problems, 'completion': words})):
                raise KeyboardInterrupt
            return Path(run.folder, 'export')

        new = Path(runs, 'new')
        params = decoders.init(decoder_config(hf_config, compute_dtype='float32'), jax.random.key(seed))
        save_pretrained(new, params, hf_config)
        save_tokenizer(new, tokenizer)
        working = teach('working', new, 1.0, max_steps, accuracy, warmup_updates=50)
        mixed = teach('mixed', working, worked_share, mixed_steps, None, decay_updates=mixed_steps)
        shutil.copytree(mixed, folder, dirs_exist_ok=True)


def main() -> None:
    config = read_command_line(__doc__, (), [warm_start])
    command = config.function(warm_start)
    config.check_used()
    command()
    logger.info('saved %s', command.keywords['folder'])


if __name__ == '__main__':
    run_command(main)
