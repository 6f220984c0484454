"""Supervised fine-tuning on conversations: its settings, and the learner whose loss is the mean over learnt tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.data.chats import Chat
from troll_jax.experiment import StartModel
from troll_jax.learn import abstract_state, start_state
from troll_jax.models import decoder as decoders
from troll_jax.models.layers import exact_products
from troll_jax.models.lora import Lora
from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.ops.support import default_tail
from troll_jax.optimizer import Optimizer, apply_gradients
from troll_jax.packing import abstract_batch, first_fit
from troll_jax.score import Scoring, for_each_micro_batch, run_head
from troll_jax.settings import Compute
from troll_jax.sharding import fetch, place
from troll_jax.typechecks import check_fields
from troll_jax.types import Batch, TrainState, join
from troll_jax.update import abstract_policy, gradients_of


@dataclass(frozen=True, kw_only=True)
class Finetuning(StartModel):
    """What is learnt by supervised fine-tuning.

    Args:
      model, chat_template_from, template_arguments: as in `Experiment`.
      max_length: tokens of the longest chat; longer ones are dropped.
      batch_size: chats per update.
      optimizer: function that builds an optimizer of optax, such as `partial(adamw, learning_rate=1e-5)`.
      source: conversations that `load_rows` finds and `encode_chats` reads; None: `finetune` is given them.
      held_out: conversations that are not trained on, for `eval/loss`; 0: no evaluation.
      stop_at_accuracy: share of an update's chats whose learnt tokens are all the most probable ones, at which the run
        is done. It is then an error if `Run.steps` do not get there. None: the run has `Run.steps`.
      seed: seed of the data's order.
      lora: adapters that are trained instead of all parameters, as in `Method`.

    Raises:
      ValueError: a value of another type or out of its range.
    """

    model: str
    max_length: int
    batch_size: int
    optimizer: Optimizer
    source: str | None = None
    held_out: int = 0
    stop_at_accuracy: float | None = None
    chat_template_from: str | None = None
    template_arguments: dict[str, Any] | None = None
    seed: int = 0
    lora: Lora | None = None

    def __post_init__(self):
        check_fields(self)
        for name in ('max_length', 'batch_size'):
            check_range(f'Finetuning.{name}', getattr(self, name), is_positive, 'above 0')
        for name in ('held_out', 'seed'):
            check_range(f'Finetuning.{name}', getattr(self, name), is_not_negative, 'at least 0')
        check_range('Finetuning.stop_at_accuracy', self.stop_at_accuracy, lambda x: 0 <= x <= 1, 'a share, or None')

    @property
    def max_response_length(self) -> int:
        return self.max_length


class SupervisedLearner:
    """The update of supervised fine-tuning, and its metrics without one. Programs compile once.

    The loss is −Σ log π(token) / n over the n learnt tokens of an update's chats.

    Args:
      config: sizes of the model.
      finetuning: length, number of chats and optimizer of an update.
      compute: mesh and memory. Raises a ValueError if its rows or micro-batches do not hold the longest chat.
    """

    shapes: TrainState
    """Shapes and shardings of all that is trained."""

    def __init__(self, config: decoders.DecoderConfig, finetuning: Finetuning, compute: Compute):
        self.config = config = replace(config, lora=finetuning.lora)
        self.mesh, self._size = compute.mesh, finetuning.batch_size
        self._shape = compute.batch_shape(self._size, finetuning.max_length)
        self._optimizer = compute.place_optimizer(finetuning.optimizer())
        self.shapes = abstract_state(config, self._optimizer, self.mesh)
        # Two tokens of the model's own support, the first of which is the most probable one.
        self._scoring = Scoring(1.0, default_tail, 2, 1.0, compute.head_chunk)
        self._graphdef, _ = decoders.abstract(config)
        self._update, self._measure = jax.jit(self._update_of, donate_argnums=0), jax.jit(self._measure_of)

    def init(self, params: Any) -> TrainState:
        """The state before the first update. The start model's parameters become part of it."""
        return start_state(params, self._optimizer, self.shapes)

    def update(self, state: TrainState, chats: Sequence[Chat]) -> tuple[TrainState, dict[str, float]]:
        """One update on at most `batch_size` chats, and its metrics. The state that is passed in is consumed.

        A gradient that is not finite changes nothing: `skipped` is 1.
        """
        batch = self.pack(chats)
        with jax.set_mesh(self.mesh):
            state, *found = self._update(state, place(batch, self.mesh))
        sums, metrics = fetch(found)
        computed = batch.segment_ids[np.any(batch.segment_ids > 0, axis=(1, 2))]  # others hold nothing and are skipped
        return state, metrics | _means(sums) | {'tokens': sums['tokens'], 'padding_share': np.mean(computed == 0)}

    def evaluate(self, params: Any, chats: Sequence[Chat]) -> dict[str, float]:
        """Metrics over all of any number of chats."""
        batches = [self.pack(chats[i : i + self._size]) for i in range(0, len(chats), self._size)]
        with jax.set_mesh(self.mesh):
            parts = [fetch(self._measure(params, place(batch, self.mesh))) for batch in batches]
        return _means(jax.tree.map(lambda *x: np.sum(x, dtype=np.float64), *parts))

    def pack(self, chats: Sequence[Chat]) -> Batch:
        """Chats in packed rows, in numpy; the loss weights of their learnt tokens are equal and sum to one."""
        batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_batch(self._shape, 0))
        learnt = sum(chat.learnt.sum() for chat in chats)
        places = first_fit(np.array([len(chat.tokens) for chat in chats]), self._shape.row_tokens)
        for chat, row, start in zip(chats, *places, strict=True):
            row, length = divmod(row, self._shape.rows), len(chat.tokens)
            at = (*row, slice(start, start + length))
            batch.segment_ids[at] = 1 + batch.segment_ids[row].max()
            batch.tokens[at], batch.positions[at] = chat.tokens, np.arange(length)
            batch.loss_weights[at] = chat.learnt / learnt
        return batch

    def _update_of(self, state: TrainState, batch: Batch):
        def loss(params, part: Batch):
            logs = self._score(join(state.base, params), part)
            return -jnp.sum(logs['log_probs'] * part.loss_weights), jax.lax.stop_gradient(logs)

        with exact_products(self.config.compute_dtype):
            gradients, _, logs = gradients_of(loss, state.params, batch)
        layout = partial(abstract_policy, self.config, self._optimizer)
        state, metrics = apply_gradients(self._optimizer, gradients, state, layout)
        done = state.progress
        progress = done._replace(step=done.step + 1, updates=done.updates + (metrics['skipped'] == 0))
        return state._replace(progress=progress), _sums(logs, batch), metrics

    def _measure_of(self, params, batch: Batch) -> dict[str, jax.Array]:
        nothing = jnp.zeros_like(batch.loss_weights)
        empty = {'log_probs': nothing, 'wrong': nothing > 0}
        return _sums(for_each_micro_batch(partial(self._score, params), batch, empty), batch)

    def _score(self, params, part: Batch) -> dict[str, jax.Array]:
        """The log-probability of each learnt token [Z, S], and whether another token is more probable."""
        head = run_head(decoders.bind(self._graphdef, params), part, self._scoring, own_support=True)
        wrong = (head.own.tokens[..., 0] != part.tokens) & (part.loss_weights > 0)
        return {'log_probs': head.log_probs, 'wrong': wrong}


def _sums(logs: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Sums over the learnt tokens of a batch, and over its chats."""
    learnt, wrong = batch.loss_weights > 0, logs['wrong']
    one_row = lambda ids, some: jnp.zeros(len(ids) + 1, jnp.int32).at[ids].max(some.astype(jnp.int32))
    chats_with = lambda some: jnp.sum(jax.vmap(jax.vmap(one_row))(batch.segment_ids, some))
    sums = {'loss': -jnp.sum(logs['log_probs']), 'tokens': jnp.sum(learnt), 'wrong_tokens': jnp.sum(wrong)}
    return sums | {'chats': chats_with(learnt), 'wrong_chats': chats_with(wrong)}


def _means(sums: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        'loss': sums['loss'] / sums['tokens'],
        'token_accuracy': 1 - sums['wrong_tokens'] / sums['tokens'],
        'accuracy': 1 - sums['wrong_chats'] / sums['chats'],
    }
