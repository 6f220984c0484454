"""Evaluation on all validation sets of an experiment, in training and afterwards."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import jax
import numpy as np

from troll_jax.data.prompts import PromptSet
from troll_jax.evaluate import Evaluation, evaluate, success
from troll_jax.experiment import Experiment
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import Sampler
from troll_jax.settings import Compute

logger = logging.getLogger(__name__)


def make_validation(
    experiment: Experiment,
    tokenizer,
    sampler_of: Callable[[int], Sampler],
    *,
    compute: Compute,
    split: str = 'test',
    samples_per_prompt: int | None = None,
    trained_on: PromptSet | None = None,
) -> Callable[..., dict]:
    """Loads the prompts of `experiment.validation`, and builds the function that evaluates parameters on them.

    Args:
      experiment: experiment to validate.
      tokenizer: tokenizer of the model.
      sampler_of: builds a sampler of so many responses per prompt, greedy ones if it is one. Called once per number.
      compute: device mesh and graders.
      split: split of the sets.
      samples_per_prompt: number for every set, instead of its own.
      trained_on: training prompts, which no set may be.

    Raises:
      ValueError: less than one sample per prompt, a task whose data cannot be read, or a set that is trained on.

    Returns:
      A function of parameters and a random key, and if one runs already the grader of the experiment's own task, to an
      `Evaluation` for each name of a set. `done` is called with both after every set.
    """
    if samples_per_prompt is not None and samples_per_prompt < 1:
        raise ValueError(f'samples_per_prompt must be at least 1; got {samples_per_prompt}')
    sampler_of = cache(sampler_of)
    sets = [
        (name, task, experiment.load_prompts(split, tokenizer, task), samples_per_prompt or samples)
        for name, task, samples in experiment.validation_sets
    ]
    trained = set() if trained_on is None else trained_on.hashes()
    for name, _, prompts, _ in sets:
        if trained and ((tested := prompts.hashes()) <= trained or trained <= tested):
            raise ValueError(
                f'the evaluation set {name!r} is what the run trains on; set Experiment.held_out to a number of rows '
                'or a share that is held out, or choose other data'
            )

    def validate(params, key: jax.Array, own_grader: Grader | None = None, done: Callable | None = None) -> dict:
        results = {}
        for name, task, prompts, samples in sets:
            # Workers start while the responses are sampled, and are not kept for sets that differ in their grading.
            is_own = own_grader is not None and task == experiment.task
            with nullcontext(own_grader) if is_own else compute.grader(task) as grader:
                if not is_own:  # else it has started, and may be at work in the background
                    grader.start()
                sampler = sampler_of(samples)
                results[name] = evaluate(sampler, params, prompts, grader, tokenizer, key, mesh=compute.mesh)
            logger.info('%s: %.4f', name, success(results[name]).mean())
            if done is not None:
                done(name, results[name])
        return results

    return validate


def metrics_of(results: dict[str, Evaluation]) -> dict[str, float]:
    """Metrics: the mean over the sets, in which every set counts alike, and of several sets each of them."""
    of_sets = {
        name: {'success': float(success(result).mean()), 'response_length': float(result.lengths.mean())}
        for name, result in results.items()
    }
    means = {
        f'eval/{key}': float(np.mean([row[key] for row in of_sets.values()])) for key in next(iter(of_sets.values()))
    }
    if len(of_sets) == 1:
        return means
    return means | {f'eval/{name}/{key}': value for name, row in of_sets.items() for key, value in row.items()}
