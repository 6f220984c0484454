"""Evaluation on a set of prompts: success, pass@k and confidence intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import scipy.special
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from troll_jax.collect import decode_responses, grade, sample_responses
from troll_jax.data.prompts import PromptSet
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import Sampler


class Evaluation(NamedTuple):
    """Graded responses, n prompts with G samples each."""

    prompts: list[str]  # n, as the model reads them
    answers: list[str]  # n
    rewards: np.ndarray  # [n, G] float32
    lengths: np.ndarray  # [n, G] int32, tokens
    stopped: np.ndarray  # [n, G] bool: ended by itself
    responses: list[list[str]]  # n lists of G

    @property
    def problems(self) -> np.ndarray:
        """[n] int, the distinct problem of each prompt, see `distinct`."""
        return distinct(self.prompts, self.answers)


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
    grades = grade(grader, responses, [answer for answer in prompts.answers for _ in range(samples)], mesh)
    by_prompt = lambda x: x.reshape(count, samples)
    return Evaluation(
        prompts=prompts.decode(tokenizer),
        answers=prompts.answers,
        rewards=by_prompt(grades.rewards),
        lengths=by_prompt(rollout.response_lengths),
        stopped=by_prompt(rollout.stopped),
        responses=[responses[i : i + samples] for i in range(0, len(responses), samples)],
    )


def distinct(texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Numbers [n] of the distinct problems, from 0: benchmarks are published with every problem up to 32 times."""
    numbers = {}
    return np.array([numbers.setdefault(problem, len(numbers)) for problem in zip(texts, answers, strict=True)])


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
    """The share of correct samples of each distinct problem."""
    return mean_by_problem(is_correct(result.rewards).mean(axis=1), result.problems)


def mean_by_problem(values: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """The means of values [n] over the prompts of each distinct problem."""
    return np.bincount(problems, values) / np.bincount(problems)


def estimate(*per_problem: np.ndarray, samples: int = 1) -> Estimate:
    """The mean of shares over problems, with a 95 % interval that holds its coverage at 0 and at 1.

    Wilson's score interval for n_eff independent answers with Student's t, n_eff = mean (1 − mean) / variance of the
    mean over problems: n if the samples of a problem are all alike, n · samples if problems are equally hard. Several
    sets are combined by the method of variance estimates recovery (Zou and Donner, 2008).

    Args:
      per_problem: shares [n] in [0, 1]. Of several sets of problems it is the mean of the sets' means, in which every
        set counts alike.
      samples: responses of a problem that a share is of.
    """
    found = [_of_shares(np.asarray(values, np.float64), samples) for values in per_problem]
    mean, count = np.mean([one.mean for one in found]), len(found)
    low = np.sqrt(sum((one.mean - one.low) ** 2 for one in found)) / count
    high = np.sqrt(sum((one.high - one.mean) ** 2 for one in found)) / count
    return Estimate(float(mean), float(max(mean - low, 0)), float(min(mean + high, 1)))


def _of_shares(values: np.ndarray, samples: int) -> Estimate:
    count, mean = len(values), values.mean()
    variance = values.var(ddof=1) / count if count > 1 else 0.0
    # Where nothing varies the samples of a problem may be all alike.
    independent = count if variance == 0 and mean in (0, 1) else mean * (1 - mean) / max(variance, 1e-12)
    independent, t = np.clip(independent, count, count * samples), _t(count)
    middle = (mean + t * t / (2 * independent)) / (1 + t * t / independent)
    half = t / (1 + t * t / independent) * np.sqrt(mean * (1 - mean) / independent + (t / (2 * independent)) ** 2)
    return Estimate(mean, min(max(middle - half, 0.0), mean), max(min(middle + half, 1.0), mean))


def estimate_mean(*per_problem: np.ndarray, samples: int = 1) -> Estimate:
    """The mean of any values over problems, as of rewards or differences of shares, with Student's 95 % interval.

    The variance of each set has one more answer of size 1 in it, so that an interval of equal values is not a point.
    Of the differences of two models on the same problems it is the paired interval. Arguments as of `estimate`.
    """
    sets = [np.asarray(values, np.float64) for values in per_problem]
    variances = [(x.var(ddof=min(1, len(x) - 1)) + 1 / (len(x) * samples)) / len(x) for x in sets]
    mean = np.mean([x.mean() for x in sets])
    half = _t(min(map(len, sets))) * np.sqrt(sum(variances)) / len(sets)
    return Estimate(float(mean), float(mean - half), float(mean + half))


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean over training seeds of estimates on the same problems; the interval is for other seeds and problems too.

    Its half is √(a² + b²): a is that of the mean over seeds by Student's t, b the mean of those over problems, which
    further seeds do not narrow.
    """
    means, count = np.array([one.mean for one in estimates]), len(estimates)
    seeds = _t(count) * means.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    sides = [np.mean([one.mean - one.low for one in estimates]), np.mean([one.high - one.mean for one in estimates])]
    below, above = np.hypot(seeds, sides)
    return Estimate(float(means.mean()), float(means.mean() - below), float(means.mean() + above))


def _t(count: int) -> float:
    """The 97.5 % quantile of Student's distribution for the mean of so many values."""
    return float(scipy.special.stdtrit(max(count - 1, 1), 0.975))
