"""Evaluation on a set of prompts: success, pass@k and confidence intervals."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from troll_jax.collect import decode_responses, grade, sample_responses
from troll_jax.data.prompts import PromptSet
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import Sampler


class Evaluation(NamedTuple):
    """Graded responses, n prompts with G samples each."""

    rewards: np.ndarray  # [n, G] float32
    lengths: np.ndarray  # [n, G] int32, tokens
    stopped: np.ndarray  # [n, G] bool: ended by itself
    responses: list[list[str]]  # n lists of G


class Estimate(NamedTuple):
    """A mean over problems and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def evaluate(
    sampler: Sampler,
    params,
    prompts: PromptSet,
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    key: jax.Array,
    *,
    mesh: Mesh,
) -> Evaluation:
    """Samples and grades responses to all prompts."""
    count = len(prompts)
    rollout = sample_responses(sampler, params, prompts, np.arange(count), key, mesh=mesh)
    responses = decode_responses(rollout, tokenizer)
    samples = len(responses) // count
    grades = grade(grader, responses, [answer for answer in prompts.answers for _ in range(samples)])
    by_prompt = lambda x: x.reshape(count, samples)
    return Evaluation(
        rewards=by_prompt(grades.rewards),
        lengths=by_prompt(rollout.response_lengths),
        stopped=by_prompt(rollout.stopped),
        responses=[responses[i : i + samples] for i in range(0, len(responses), samples)],
    )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k samples is correct (arXiv 2107.03374, section 2.1).

        1 − C(n − c, k) / C(n, k)

    Args:
      samples: n, drawn for the problem.
      correct: c of them.
      k: number of samples to choose, at most n.

    Raises:
      ValueError: k or c is not within its limits.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f'expected 1 <= k <= samples and 0 <= correct <= samples; got {k=}, {samples=}, {correct=}')
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def is_correct(rewards: np.ndarray) -> np.ndarray:
    """True where a reward counts as success, for rewards of any shape: a share of passed tests below 1 does not."""
    return rewards >= 1


def success(result: Evaluation) -> np.ndarray:
    """The share of correct samples of each problem [n]."""
    return is_correct(result.rewards).mean(axis=1)


def estimate(*per_problem: np.ndarray, draws: int = 10_000, seed: int = 0) -> Estimate:
    """The mean of values over problems, with a 95 % interval by the percentile bootstrap over problems.

    Args:
      per_problem: values [n]. Of several sets of problems it is the mean of the sets' means, in which every set counts
        alike; problems are drawn within their set. With the differences of two models on the same problems it is the
        paired bootstrap.
      draws: number of bootstrap draws.
      seed: seed of the draws.
    """
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for start in range(0, draws, 100):
        count = min(100, draws - start)
        of_sets = [values[generator.integers(len(values), size=(count, len(values)))].mean(1) for values in per_problem]
        means[start : start + count] = np.mean(of_sets, axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(np.mean([values.mean() for values in per_problem])), float(low), float(high))
