"""From prompts to graded responses: what a step learns from, before any advantage is known."""

from collections.abc import Callable, Sequence
from itertools import count
from time import perf_counter
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from troll_jax.data.prompts import PromptSet, batch_indices
from troll_jax.evaluate import decode_responses, grade, sample_responses
from troll_jax.rewards.pool import Grader
from troll_jax.rewards.terms import Responses, RewardTerm, weigh
from troll_jax.types import Rollout


class Experience(NamedTuple):
    """B groups of G graded responses, in numpy, and what it took to get them."""

    rollout: Rollout  # R = B · G responses
    rewards: np.ndarray  # [B, G] float32, weighted sums of their terms
    greedy_rewards: np.ndarray | None  # [B] of the greedy responses to the same prompts, if they were asked for
    draws: int  # batches of prompts that were sampled
    logs: dict[str, float]  # of all that was sampled, kept or not


def make_collector(
    sampler: Callable[..., Rollout],
    prompts: PromptSet,
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts_per_step: int,
    max_response_length: int,
    rewards: Sequence[tuple[str, float, RewardTerm]],
    greedy_sampler: Callable[..., Rollout] | None = None,
    max_draws: int = 1,
    seed: int,
    mesh: Mesh,
) -> Callable[..., Experience]:
    """Builds collect(params, draws) → Experience: responses to the next prompts, by the policy with these parameters.

    Args:
      sampler: as `make_sampler` builds it.
      prompts: to take from.
      grader: of the task.
      tokenizer: to decode responses with.
      prompts_per_step: B, of a draw and of what comes out.
      max_response_length: T.
      rewards: name, weight and function of each term.
      greedy_sampler: one greedy response per prompt, for estimators that compare with it.
      max_draws: more than one is dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose rewards are all
        equal, with all their terms, are replaced by groups of further draws, at most so many in all. If these do not
        suffice, groups of equal rewards fill up the batch.
      seed: of the data's order and of the sampling.
      mesh: of the devices.

    Returns:
      A function of the parameters and of `Progress.draws`, on which data and random numbers depend. The caller adds
      `Experience.draws` to it.
    """
    key = jax.random.key(seed)

    def sample(sampler, params, indices, draw, seconds) -> tuple[Rollout, np.ndarray, dict]:
        start = perf_counter()
        rollout = sample_responses(sampler, params, prompts, indices, jax.random.fold_in(key, draw), mesh=mesh)
        seconds['rollout'] += perf_counter() - start

        start = perf_counter()
        samples = len(rollout.response_lengths) // len(indices)
        texts = decode_responses(rollout, tokenizer)
        grades = grade(grader, texts, [prompts.answers[i] for i in indices for _ in range(samples)])
        responses = Responses(texts, rollout.response_lengths, max_response_length, grades.rewards)
        total, terms = weigh(rewards, responses)
        seconds['reward'] += perf_counter() - start
        failures = {name: getattr(grades, name) for name in ('timeouts', 'crashes', 'errors')}
        return rollout, total.reshape(len(indices), samples), terms | failures

    def collect(params, draws: int) -> Experience:
        seconds = {'rollout': 0.0, 'reward': 0.0}
        rollouts, groups, greedy, logs = [], [], [], []
        for draw in count(draws):
            indices = batch_indices(len(prompts), prompts_per_step, seed=seed, step=draw)
            rollout, total, log = sample(sampler, params, indices, draw, seconds)
            rollouts.append(rollout)
            groups.append(total)
            logs.append(log)
            if greedy_sampler is not None:
                greedy.append(sample(greedy_sampler, params, indices, draw, seconds)[1][:, 0])
            varied = [np.ptp(rewards, axis=1) > 0 for rewards in groups]
            if len(groups) == max_draws or np.sum(varied) >= prompts_per_step:
                break
        used = len(groups)
        uniform = 1 - np.mean(varied)
        # In the order of the draws, so that groups that fill up are not all in the last minibatches.
        first = np.sort(np.argsort(~np.concatenate(varied), kind='stable')[:prompts_per_step])
        choose = lambda arrays: np.concatenate(arrays)[first] if max_draws > 1 else arrays[0]
        samples = groups[0].shape[1]
        by_group = lambda *x: choose([leaf.reshape(-1, samples, *leaf.shape[1:]) for leaf in x])
        chosen = jax.tree.map(
            lambda *x: by_group(*x).reshape(-1, *x[0].shape[1:]), *[rollout._replace(work=None) for rollout in rollouts]
        )
        mean = lambda name: np.mean([log[name] for log in logs])
        return Experience(
            rollout=chosen,
            rewards=choose(groups),
            greedy_rewards=choose(greedy) if greedy else None,
            draws=used,
            logs={
                'reward/mean': np.mean(groups),
                **{f'reward/{name}': mean(name) for name, *_ in rewards},
                **{f'reward/{name}': sum(log[name] for log in logs) for name in ('timeouts', 'crashes', 'errors')},
                'reward/uniform_share': uniform,
                **_describe(rollouts, seconds['rollout']),
                'rollout/draws': used,
                **{f'seconds/{name}': value for name, value in seconds.items()},
            },
        )

    return collect


def _describe(rollouts: list[Rollout], seconds: float) -> dict[str, float]:
    """Metrics of everything that was sampled."""
    lengths = np.concatenate([rollout.response_lengths for rollout in rollouts])
    tokens = int(lengths.sum())
    masks = [np.arange(x.log_probs.shape[1]) < x.response_lengths[:, None] for x in rollouts]
    over_tokens = lambda values: sum(np.sum(x, where=mask) for x, mask in zip(values, masks, strict=True)) / tokens
    steps = sum(rollout.work.steps for rollout in rollouts)
    return {
        'rollout/response_length': lengths.mean(),
        'rollout/longest_response': lengths.max(),
        'rollout/decode_steps': steps,
        'rollout/slots_in_use': tokens / (steps * rollouts[0].work.slots),
        'rollout/truncated_share': 1 - np.mean([rollout.stopped.mean() for rollout in rollouts]),
        'rollout/entropy': over_tokens([rollout.entropy for rollout in rollouts]),
        'rollout/kept_tokens': over_tokens([np.sum(rollout.support.tokens >= 0, axis=2) for rollout in rollouts]),
        'rollout/tokens_per_second': tokens / seconds,
        'seconds/prefill': sum(rollout.work.prefill_seconds for rollout in rollouts),
        'seconds/decode': sum(rollout.work.decode_seconds for rollout in rollouts),
    }
