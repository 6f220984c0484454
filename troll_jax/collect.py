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

_FAILURES = ('timeouts', 'crashes', 'errors')
_SECONDS = ('seconds/prefill', 'seconds/decode', 'seconds/rollout', 'seconds/reward')


class Experience(NamedTuple):
    """B groups of G graded responses, in numpy, and what it took to get them."""

    rollout: Rollout  # R = B · G responses
    rewards: np.ndarray  # [B, G] float32, weighted sums of their terms
    greedy_rewards: np.ndarray | None  # [B] of the greedy responses to the same prompts, if they were asked for
    draws: int  # batches of prompts that were sampled
    logs: dict[str, float]  # of all that was sampled, kept or not; speed, seconds and failures with greedy responses


class _Groups(NamedTuple):
    """Responses to some prompts, G to each."""

    rollout: Rollout  # arrays [groups, G, …]
    rewards: np.ndarray  # [groups, G] float32
    greedy_rewards: np.ndarray | None = None  # [groups]


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

    def sample(sampler, params, indices, draw) -> tuple[_Groups, dict[str, float]]:
        start = perf_counter()
        rollout = sample_responses(sampler, params, prompts, indices, jax.random.fold_in(key, draw), mesh=mesh)
        sampled = perf_counter()
        samples = len(rollout.response_lengths) // len(indices)
        texts = decode_responses(rollout, tokenizer)
        grades = grade(grader, texts, [prompts.answers[i] for i in indices for _ in range(samples)])
        responses = Responses(texts, rollout.response_lengths, max_response_length, grades.rewards)
        total, terms = weigh(rewards, responses)
        by_group = lambda x: x.reshape(len(indices), samples, *x.shape[1:])
        groups = _Groups(*jax.tree.map(by_group, (rollout._replace(work=None), total)))
        log = _describe(rollout) | {f'reward/{name}': np.mean(value) for name, value in terms.items()}
        log |= {f'reward/{name}': getattr(grades, name) for name in _FAILURES} | {'reward/mean': np.mean(total)}
        return groups, log | {'seconds/rollout': sampled - start, 'seconds/reward': perf_counter() - sampled}

    def collect(params, draws: int) -> Experience:
        kept, logs, greedy_logs, varied = None, [], [], 0
        for draw in count(draws):
            indices = batch_indices(len(prompts), prompts_per_step, seed=seed, step=draw)
            groups, log = sample(sampler, params, indices, draw)
            logs.append(log)
            if greedy_sampler is not None:
                greedy, log = sample(greedy_sampler, params, indices, draw)
                groups = groups._replace(greedy_rewards=greedy.rewards[:, 0])
                greedy_logs.append(log)
            varied += np.sum(~_uniform(groups))
            kept = groups if kept is None else _best(kept, groups)
            if len(logs) == max_draws or varied >= prompts_per_step:
                break
        used = len(logs)
        mean = lambda name: np.mean([log[name] for log in logs])
        total = lambda name, logs=logs: sum(log[name] for log in logs)
        everything = logs + greedy_logs
        return Experience(
            rollout=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept.rollout),
            rewards=kept.rewards,
            greedy_rewards=kept.greedy_rewards,
            draws=used,
            logs={
                'reward/mean': mean('reward/mean'),
                **{f'reward/{name}': mean(f'reward/{name}') for name, *_ in rewards},
                **{f'reward/{name}': total(f'reward/{name}', everything) for name in _FAILURES},
                'reward/uniform_share': 1 - varied / (used * prompts_per_step),
                'rollout/response_length': mean('response_length'),
                'rollout/longest_response': max(log['longest_response'] for log in logs),
                'rollout/decode_steps': total('decode_steps'),
                'rollout/slots_in_use': total('tokens') / total('places'),
                'rollout/truncated_share': mean('truncated_share'),
                'rollout/entropy': total('entropy') / total('tokens'),
                'rollout/kept_tokens': total('kept_tokens') / total('tokens'),
                'rollout/tokens_per_second': total('tokens', everything) / total('seconds/rollout', everything),
                'rollout/draws': used,
                **{name: total(name, everything) for name in _SECONDS},
            },
        )

    return collect


def _uniform(groups: _Groups) -> np.ndarray:
    """[groups] bool: all rewards are the same."""
    return np.ptp(groups.rewards, axis=1) == 0


def _best(*parts: _Groups) -> _Groups:
    """As many groups as one part has: the first whose rewards differ, filled up by the first of the others.

    They stay in their order, so that those that fill up are not all in the last minibatches.
    """
    uniform = np.concatenate([_uniform(part) for part in parts])
    first = np.sort(np.argsort(uniform, kind='stable')[: len(parts[0].rewards)])
    return jax.tree.map(lambda *x: np.concatenate(x)[first], *parts)


def _describe(rollout: Rollout) -> dict[str, float]:
    """What is logged of a rollout: means over responses, and sums over tokens."""
    lengths, work = rollout.response_lengths, rollout.work
    mask = np.arange(rollout.log_probs.shape[1]) < lengths[:, None]
    return {
        'tokens': int(lengths.sum()),
        'response_length': lengths.mean(),
        'longest_response': lengths.max(),
        'truncated_share': 1 - rollout.stopped.mean(),
        'entropy': np.sum(rollout.entropy, where=mask),
        'kept_tokens': np.sum(np.sum(rollout.support.tokens >= 0, axis=2), where=mask),
        'decode_steps': work.steps,
        'places': work.steps * work.slots,
        'seconds/prefill': work.prefill_seconds,
        'seconds/decode': work.decode_seconds,
    }
