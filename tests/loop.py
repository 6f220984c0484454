"""Runs of the whole loop in this process, as a user starts them, on small sizes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from tiny import save_qwen3

from experiments.plumbing.gin_files import Config
from experiments.plumbing.names import SETTINGS
from experiments.train import train
from troll_jax.checkpoint import Checkpoints
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.metrics import read_metrics
from troll_jax.models import decoder as decoders
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_config
from troll_jax.sharding import make_mesh

REPOSITORY = Path(__file__).parent.parent

SMALL = [
    'Experiment.max_prompt_length = 4',
    'Experiment.max_response_length = 3',
    'Run.steps = 4',
    'Sampling.prompts_per_step = 16',
    'Sampling.samples_per_prompt = 4',
    'Method.minibatch_prompts = 8',
    'Run.evaluate_every = 2',
    'Run.checkpoint_every = 2',
    'Compute.head_chunk = 40',
]


ARITHMETIC = ['Arithmetic.operands = 2', 'Arithmetic.train_size = 60', 'Arithmetic.test_size = 10']


class StartsWithHash(Arithmetic):
    """Rewards a response that begins with '#': something that a policy without any knowledge can find out."""

    def grade(self, response: str, answer: str) -> float:
        return float(response.startswith('#'))


HASH = [
    'import loop',
    'Experiment.task = @StartsWithHash()',
    *(binding.replace('Arithmetic', 'StartsWithHash') for binding in ARITHMETIC),
    'Run.evaluate_every = 0',
    'adamw.learning_rate = 1e-2',
]


def settings(files, bindings=()) -> list:
    """The five settings of gin files."""
    config = Config(files, bindings)
    built = [config.build(kind) for kind in SETTINGS]
    config.check_used()
    return built


def run(
    folder, model: str, *bindings: str, method: str = 'troll', task=tuple(ARITHMETIC), devices: int = 1
) -> list[dict]:
    """Trains on the quickstart's task by one of the methods and returns the metrics.

    On one device, which compiles in a fraction of the time; tests of what is sharded take all eight.
    """
    names = [f"Run.folder = '{folder}'", f"Experiment.model = '{model}'"]
    files = [REPOSITORY / 'configs/quickstart.gin', REPOSITORY / f'configs/objectives/{method}.gin']
    experiment, sampling, method, compute, run = settings(files, [*SMALL, *task, *names, *bindings])
    compute = dataclasses.replace(compute, devices=jax.devices()[:devices])
    train(experiment, sampling, method, compute, run)
    return read_metrics(Path(folder) / 'metrics.jsonl')


def saved(folder, step: int):
    """The parameters of a checkpoint."""
    config = decoder_config(load_config(str(Path(folder) / 'model')))
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_params(decoders.abstract(config, make_mesh())[1], step)


def without_times(rows: list[dict]) -> list[dict]:
    timed = ('seconds/', 'rollout/tokens_per_second', 'update/tokens_per_second')
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def two_kv_heads(folder) -> str:
    """A model that a mesh with tensor = 2 divides: a vocabulary of even size and two key-value heads."""
    tokenizer = character_tokenizer('0123456789+-*=#?')
    return save_qwen3(folder, tokenizer, num_attention_heads=4, num_key_value_heads=2)
