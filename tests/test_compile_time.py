"""Compile time must not grow with depth."""

from functools import partial

import jax

from experiments.benchmarks.measure import KEPT, PROMPT, RESPONSE, qwen3_0_6b, random_batch
from troll_jax.models import decoder as decoders
from troll_jax.ops.losses import troll
from troll_jax.ops.support import default_tail
from troll_jax.optimizer import adamw
from troll_jax.packing import BatchShape
from troll_jax.score import Scoring
from troll_jax.types import START, TrainState
from troll_jax.update import make_update


def lower_update(layers: int) -> jax.stages.Lowered:
    """The update for a model of this depth, traced and not yet compiled."""
    config, optimizer = qwen3_0_6b(layers=layers, compute_dtype='float32'), adamw()
    update = make_update(config, optimizer, troll, Scoring(1.0, default_tail, KEPT, 1 - 1e-5))
    _, params = decoders.abstract(config)
    progress = jax.eval_shape(lambda: START)
    state = TrainState(progress, params, jax.eval_shape(optimizer.init, params))
    return update.lower(
        state, jax.eval_shape(partial(random_batch, BatchShape(1, 1, PROMPT + RESPONSE), config.vocab_size))
    )


def test_the_update_does_not_grow_with_depth():
    """Guards the scan over layers in the whole update, gradient and optimizer included. Time itself depends on the size
    of the program that XLA is given."""
    few, many = (len(lower_update(layers).as_text().splitlines()) for layers in (3, 7))
    assert few == many > 1000
