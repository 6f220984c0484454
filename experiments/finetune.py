"""Trains a language model on conversations: supervised fine-tuning, such as a warm start on data of one's own.

    troll finetune qwen3_0_6b "Finetuning.source = 'data/chats'" \\
        'Finetuning.max_length = 2048' 'Finetuning.batch_size = 32' 'Finetuning.optimizer = @adamw' \\
        'adamw.learning_rate = 1e-5' 'Run.steps = 500'

Settings are `Finetuning` (troll_jax/finetune.py), Compute and Run; `Experiment.model`, its chat template and that one's
arguments serve where Finetuning names none. The run directory is like that of `experiments.train`, a run resumes in
the same way, and at its end `export` in it holds the model in Hugging Face format.
"""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain

import numpy as np
from datasets import Dataset

from experiments.export import write_model
from experiments.plumbing.command import read_command_line, run_command
from experiments.plumbing.run import TrainingRun
from troll_jax.data.chats import Chat, encode_chats
from troll_jax.data.prompts import batch_indices
from troll_jax.data.tasks.interface import load_rows, locate
from troll_jax.finetune import Finetuning, SupervisedLearner
from troll_jax.models.lora import merge
from troll_jax.settings import Compute, Run

logger = logging.getLogger(__name__)


def finetune(finetuning: Finetuning, compute: Compute, run: Run, rows: Dataset | None = None) -> bool:
    """Trains a model to write what the assistant says in conversations; False if a signal has interrupted it.

    Args:
      finetuning: model, data, optimizer and chats per update.
      compute: mesh, kernels and memory budgets.
      run: folder, number of updates, evaluation, checkpoints and logging.
      rows: conversations instead of those of `Finetuning.source`, see `encode_chats`.

    Raises:
      ValueError: settings that contradict each other or bad rows, before any weight is loaded.
      RuntimeError: `Finetuning.stop_at_accuracy` was not reached.
    """
    source, goal = finetuning.source, finetuning.stop_at_accuracy
    if run.keep_best or run.save_rollout_every:
        raise ValueError('Run.keep_best and Run.save_rollout_every need rollouts, and fine-tuning has none; unset them')
    if compute.rollout_devices is not None:
        raise ValueError(
            f'got Compute.rollout_devices = {compute.rollout_devices}, but nothing is sampled; leave it out'
        )
    if (rows is None) is (source is None):
        raise ValueError(f'got the source {source!r}, and rows: {rows is not None}; expected one of the two')
    run = run if finetuning.held_out else dataclasses.replace(run, evaluate_every=0)
    training = TrainingRun((finetuning,), compute, run)
    model = finetuning.load_model(compute, finetuning.lora)  # tokenizer and sizes; no weights yet
    of_rows = encode_chats(
        load_rows(source, 'train', ('messages',)) if rows is None else rows,
        model.tokenizer,
        max_length=finetuning.max_length,
        stop_tokens=model.stop_tokens,
        where='row {} of those given'.format if source is None else partial(locate, source, 'train'),
        template_arguments=finetuning.template_arguments,
    )
    order = np.random.default_rng(0).permutation(len(of_rows))  # the same conversations are held out in every run
    parts = np.split(order, [finetuning.held_out])
    held_out, chats = ([chat for row in part for chat in of_rows[row]] for part in parts)
    if finetuning.held_out and not held_out:
        raise ValueError(f'all held_out = {finetuning.held_out} conversations are too long; raise it, or max_length')
    batch_of = partial(batch_indices, len(chats), finetuning.batch_size, seed=finetuning.seed)
    batch_of(step=0)  # an error if there are too few
    epochs = run.steps * finetuning.batch_size / len(chats)
    logger.info('%d chats, and %d held out; %d updates are %.2f epochs', len(chats), len(held_out), run.steps, epochs)
    learner = SupervisedLearner(model.config, finetuning, compute)
    validate = lambda params: {f'eval/{name}': x for name, x in learner.evaluate(params, held_out).items()}
    accuracy = None
    with training:
        state = training.start(learner, model, _content(chats), validate)
        for step in training.steps():
            begin = time.perf_counter()
            state, metrics = learner.update(state, [chats[i] for i in batch_of(step=step - 1)])
            seconds, accuracy = time.perf_counter() - begin, metrics['accuracy']
            row = {f'update/{name}': value for name, value in metrics.items()}
            row |= {'update/tokens_per_second': metrics['tokens'] / seconds, 'seconds/update': seconds}
            training.record(step, state, row, is_last=goal is not None and accuracy >= goal)
    if training.interrupted:
        return False
    if goal is not None and accuracy is not None and accuracy < goal:
        raise RuntimeError(
            f'after {run.steps} steps {accuracy:.0%} of the chats were right; expected {goal:.0%}. Raise Run.steps to '
            'train on, or change the learning rate or the model.'
        )
    write_model(run.folder, f'{run.folder}/export', merge(state.policy, finetuning.lora))
    logger.info('%s/export is the model in Hugging Face format', run.folder)
    return True


def _content(chats: Sequence[Chat]) -> list:
    """Lengths of all chats, and a hash of what is in them."""
    digest = hashlib.sha256()
    for part in chain(*chats):
        digest.update(part)
    return [[len(chat.tokens) for chat in chats], digest.hexdigest()]


def main() -> None:
    config = read_command_line(__doc__, (Finetuning, Compute, Run))
    for name in ('model', 'chat_template_from', 'template_arguments'):
        if (value := config.get(f'Experiment.{name}')) is not None:
            config.setdefault(f'Finetuning.{name}', value)
    settings = [config.build(kind) for kind in (Finetuning, Compute, Run)]
    config.check_used()
    finetune(*settings)


if __name__ == '__main__':
    run_command(main)
