"""Experience: sampling and grading responses to prompts, with dynamic sampling."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from functools import partial
from itertools import count
from time import perf_counter
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from troll_jax.data.prompts import PromptSet, draw_indices
from troll_jax.rewards.pool import Arriving, Grader, Grades
from troll_jax.rewards.terms import Responses, RewardTerm, task_reward, weigh
from troll_jax.rollout import Sampler
from troll_jax.settings import Sampling
from troll_jax.sharding import checksum, gather
from troll_jax.types import Rollout

_logger = logging.getLogger(__name__)

_LOOKS = 0.5  # seconds between looks for a signal while grades are waited for
_SILENT_STEPS = 5  # without two different rewards, until a run says so
_FAILURES = ('timeouts', 'crashes', 'errors')
_SECONDS = ('seconds/prefill', 'seconds/decode', 'seconds/rollout', 'seconds/reward')


class Experience(NamedTuple):
    """B groups of G graded responses, in numpy."""

    rollout: Rollout  # R = B · G responses
    rewards: np.ndarray  # [B, G] float32, weighted sums of their terms
    greedy_rewards: np.ndarray | None  # [B] of the greedy responses to the same prompts, if they were asked for
    draws: int  # batches of prompts that were sampled
    metrics: dict[str, float]  # of all that was sampled, kept or not; speed, seconds and failures with greedy responses
    graded: np.ndarray | None = None  # [B, G] bool, responses whose grading did not fail; None: all
    terms: dict[str, np.ndarray] | None = None  # name → [B, G] float32, rewards by term, not weighted
    answers: np.ndarray | None = None  # [B] str, reference answers


class Collecting(NamedTuple):
    """Experience to come: called, it waits for it."""

    finish: Callable[[], Experience]
    rollout: Future | None  # of the sampling thread

    def __call__(self) -> Experience:
        return self.finish()

    def end_rollout(self, everywhere: type[Exception]) -> None:
        """Waits until nothing is sampled, and raises at once what ended it if not of a kind that all processes have."""
        error = self.rollout and self.rollout.exception()
        if error and not isinstance(error, everywhere):
            raise error


class _Groups(NamedTuple):
    """Responses to some prompts, G to each."""

    rollout: Rollout  # arrays [groups, G, …], and the support [groups, G', …] of the samples that this process holds
    rewards: np.ndarray  # [groups, G] float32
    compared: np.ndarray  # [groups, G] float32, of which a group without two values is a zero-variance group
    graded: np.ndarray  # [groups, G] bool
    terms: dict[str, np.ndarray]  # name → [groups, G]
    answers: np.ndarray  # [groups, G] str
    greedy_rewards: np.ndarray | None = None  # [groups]


def sample_responses(
    sampler: Sampler, params, prompts: PromptSet, indices: np.ndarray, key: jax.Array, *, mesh: Mesh, **options
) -> Rollout:
    """Samples responses to `prompts[indices]`, one rollout of n · G rows. `options` as in `Sampler.__call__`.

    The key of a prompt depends on its place in `indices`.
    """
    with jax.set_mesh(mesh):
        return sampler(params, prompts[indices], _fold_in_each(key, np.arange(len(indices))), **options)


_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def grade(grader: Grader, responses: Sequence[str], answers: Sequence[str], mesh: Mesh) -> Grades:
    """Grades a batch that every process has, each of them its share. All of them get all grades, over this mesh."""
    share = _own_share()
    return _gather_grades(partial(grader, responses[share], answers[share]), len(responses), mesh)


def _own_share() -> slice:
    return slice(jax.process_index(), None, jax.process_count())


def _gather_grades(own: Callable[[], Grades], responses: int, mesh: Mesh) -> Grades:
    count = jax.process_count()
    if count == 1:
        return own()
    failed = None
    try:
        grades = own()
    except (ValueError, RuntimeError) as error:
        failed, grades = error, None
    everywhere = gather(failed is not None, mesh)
    if failed or np.any(everywhere):
        raise failed or RuntimeError(f'grading failed in process {np.argmax(everywhere)}, which says why')
    padded = np.zeros((2, -(-responses // count)), np.float32)
    padded[:, : len(grades.rewards)] = grades.rewards, grades.graded
    both, *failures = gather((padded, *grades[1:4]), mesh)
    rewards, graded = np.moveaxis(both, 0, 2).reshape(2, -1)[:, :responses]
    return Grades(rewards, *(int(np.sum(x)) for x in failures), graded > 0)


def response_tokens(rollout: Rollout) -> list[np.ndarray]:
    """The tokens of each response [R] of a rollout in numpy, with the stop token."""
    starts, ends = rollout.prompt_lengths, rollout.prompt_lengths + rollout.response_lengths
    return [row[start:end] for row, start, end in zip(rollout.tokens, starts, ends, strict=True)]


def gather_responses(
    prompts: PromptSet, indices: np.ndarray, texts: Sequence[str], tokens: Sequence, grades: np.ndarray, max_length: int
) -> Responses:
    """G responses to each of `prompts[indices]`, with all that a reward term may read."""
    samples, lengths = len(texts) // len(indices), np.array([len(x) for x in tokens], np.int32)
    columns = {name: [x for x in of for _ in range(samples)] for name, of in prompts.columns(indices).items()}
    messages, answers = columns.pop('messages'), columns.pop('answer')
    return Responses(texts, lengths, max_length, grades, tokens, messages, answers, columns)


def decode_responses(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each response [R] of a rollout in numpy, up to the stop token, with its other special tokens."""
    rows = [row[: len(row) - ended] for row, ended in zip(response_tokens(rollout), rollout.stopped, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=False)


def make_collector(
    sampler: Sampler,
    prompts: PromptSet,
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    max_response_length: int,
    rewards: Sequence[tuple[str, float, RewardTerm]],
    mesh: Mesh,
    learner_mesh: Mesh | None = None,
    greedy_sampler: Sampler | None = None,
    sampling_thread: Executor | None = None,
    check: Callable[[], None] = lambda: None,
) -> Callable[..., Collecting]:
    """Builds collect(params, expected, draws), which samples responses to the next prompts by a policy.

    Responses are graded in the background, each as soon as it has ended.

    Args:
      sampler: sampler of G responses per prompt.
      prompts: training prompts.
      grader: grader of the task.
      tokenizer: tokenizer to decode responses with.
      sampling: prompts per step, seed and dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): zero-variance groups,
        whose grades by the task are all equal (their rewards, if no term is `task_reward`), are replaced by groups of
        further draws, at most `max_draws` in all. If these do not suffice, zero-variance groups fill up the batch.
      max_response_length: T, tokens.
      rewards: name, weight and function of each reward term.
      mesh: mesh of the devices that sample.
      learner_mesh: that of the devices that learn, whose processes keep the distributions; None: the same.
      greedy_sampler: sampler of one greedy response per prompt, for advantages that compare with it.
      sampling_thread: one thread, which samples the first draw; None: it is sampled at once. For a mesh of its own.
      check: is called between blocks of decoding, and while grades are waited for; what it raises ends the rollout.

    Returns:
      A function of the policy's parameters, of the `checksum` that they must have (None: any), and of `Progress.draws`,
      on which data and random numbers depend, to a function without arguments that returns the graded responses. The
      caller adds `Experience.draws` to the draws. An OSError says that the checksum is another.
    """
    prompts_per_step = sampling.prompts_per_step
    by_task = any(getattr(term, 'func', term) is task_reward for _, _, term in rewards)
    in_a_row = 0  # steps in which nothing told responses apart

    def sample(sampler, params, indices, draw) -> Callable[[], tuple[_Groups, dict[str, float]]]:
        start = perf_counter()
        answers = [prompts.answers[i] for i in indices for _ in range(sampler.samples_per_prompt)]
        texts, share = [''] * len(answers), _own_share()
        arriving = Arriving(grader, answers[share])

        def watch(rollout: Rollout, ended: np.ndarray) -> None:
            grader.check_open()
            part = jax.tree.map(lambda x: x[ended], rollout._replace(log_probs=None, entropy=None, support=None))
            for i, text in zip(ended, decode_responses(part, tokenizer), strict=True):
                texts[i] = text
                if i % share.step == share.start:
                    arriving.add(i // share.step, text)
            check()  # last: several processes wait for the devices in it

        try:
            with jax.set_mesh(mesh):
                key = jax.random.fold_in(jax.random.key(sampling.seed), draw)
            rollout = sample_responses(
                sampler, params, prompts, indices, key, mesh=mesh, watch=watch, keep=learner_mesh
            )
        except BaseException:
            arriving.give_up()
            raise
        log = _describe(rollout) | {'seconds/rollout': perf_counter() - start}
        return partial(reward, rollout, indices, texts, answers, arriving.grades, log)

    def reward(rollout, indices, texts, answers, own: Future[Grades], log) -> tuple[_Groups, dict[str, float]]:
        start = perf_counter()
        while not gather(bool(wait([own], timeout=_LOOKS).done), mesh).all():
            check()
        grades = _gather_grades(own.result, len(texts), mesh)
        tokens = response_tokens(rollout)
        responses = gather_responses(prompts, indices, texts, tokens, grades.rewards, max_response_length)
        total, terms = weigh(rewards, responses)
        by_group = lambda x: x.reshape(len(indices), -1, *x.shape[1:])
        compared = grades.rewards if by_task else total
        arrays = rollout._replace(stats=None), total, compared, grades.graded, terms, np.array(answers, object)
        groups = _Groups(*jax.tree.map(by_group, arrays))
        mean = lambda x: np.mean(x[grades.graded]) if grades.graded.any() else 0.0
        log = log | {f'reward/{name}': mean(value) for name, value in terms.items()}
        log |= {f'reward/{name}': getattr(grades, name) for name in _FAILURES} | {'reward/mean': mean(total)}
        log |= {'some': list(zip(total, texts, strict=True))[:2]}
        return groups, log | {'seconds/reward': perf_counter() - start}

    def draw_groups(params, draw: int, expected=None) -> list[Callable[[], tuple[_Groups, dict[str, float]]]]:
        if expected is not None:
            with jax.set_mesh(mesh):
                found, wanted = int(checksum(params)), int(expected)
            if found != wanted:
                raise OSError(
                    f'the weights that are to sample have the checksum {found}, expected {wanted}, that of the policy: '
                    'they were damaged on their way to Compute.rollout_devices. Nothing is learnt from them; look at '
                    'these devices, and start again to resume from the latest checkpoint'
                )
        indices = draw_indices(prompts, prompts_per_step, seed=sampling.seed, draw=draw, level=sampling.level)
        samplers = [sampler] if greedy_sampler is None else [sampler, greedy_sampler]
        return [sample(one, params, indices, draw) for one in samplers]

    def collect(params, expected: jax.Array | None, draws: int) -> Collecting:
        rollout = None
        if sampling_thread is None:
            first = draw_groups(params, draws, expected)
            first_draw = lambda: first
        else:
            rollout = sampling_thread.submit(draw_groups, params, draws, expected)
            first_draw = rollout.result
        # What samples no further batch lets go of the parameters.
        params = None if sampling.max_draws == 1 else params
        return Collecting(partial(finish, first_draw, params, draws, expected), rollout)

    def finish(first_draw, params, draws: int, expected) -> Experience:
        nonlocal in_a_row
        kept, logs, greedy_logs, varied = None, [], [], 0
        for draw in count(draws):
            (groups, log), *greedy = [
                rewarded() for rewarded in (first_draw() if draw == draws else draw_groups(params, draw))
            ]
            logs.append(log)
            for baseline, log in greedy:
                # Without its baseline a group is not graded either.
                graded = groups.graded & baseline.graded
                groups = groups._replace(greedy_rewards=baseline.rewards[:, 0], graded=graded)
                greedy_logs.append(log)
            varied += np.sum(~_uniform(groups))
            kept = groups if kept is None else _best(kept, groups)
            if len(logs) == sampling.max_draws or varied >= prompts_per_step:
                break
        used = len(logs)
        in_a_row = 0 if varied or kept.rewards.shape[1] == 1 else in_a_row + 1
        if in_a_row == _SILENT_STEPS:
            _logger.warning(
                'nothing to learn from: for %d steps the responses to each prompt had equal rewards. Does the task '
                'look for answers where its prompts ask for them? Two rewards with their responses: %s',
                _SILENT_STEPS,
                '; '.join(f'{reward:g} {text[-300:]!r}' for reward, text in logs[-1]['some']),
            )
        mean = lambda name: np.mean([log[name] for log in logs])
        total = lambda name, logs=logs: sum(log[name] for log in logs)
        everything = logs + greedy_logs
        return Experience(
            rollout=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept.rollout),
            rewards=kept.rewards,
            greedy_rewards=kept.greedy_rewards,
            draws=used,
            graded=kept.graded,
            terms=kept.terms,
            answers=kept.answers[:, 0],
            metrics={
                'reward/mean': mean('reward/mean'),
                **{f'reward/{name}': mean(f'reward/{name}') for name, *_ in rewards},
                **{f'reward/{name}': total(f'reward/{name}', everything) for name in _FAILURES},
                'reward/uniform_share': 1 - varied / (used * prompts_per_step),
                'rollout/response_length': mean('response_length'),
                'rollout/longest_response': max(log['longest_response'] for log in logs),
                'rollout/decode_steps': total('decode_steps'),
                'rollout/evictions': total('evictions', everything),
                'rollout/slots_in_use': total('tokens') / total('places'),
                'rollout/truncated_share': mean('truncated_share'),
                'rollout/entropy': total('entropy') / total('tokens'),
                'rollout/support_size': total('support_size') / total('tokens'),
                'rollout/tokens_per_second': total('tokens', everything) / total('seconds/rollout', everything),
                'rollout/draws': used,
                **{name: total(name, everything) for name in _SECONDS},
                **({} if expected is None else {'rollout/weights_checksum': int(expected)}),
            },
        )

    return collect


def _uniform(groups: _Groups) -> np.ndarray:
    """[groups] bool: all that was graded is the same."""
    most, least = (np.where(groups.graded, groups.compared, end) for end in (-np.inf, np.inf))
    return most.max(axis=1) <= least.min(axis=1)


def _best(*parts: _Groups) -> _Groups:
    """As many groups as one part has: the first whose rewards differ, filled up by the first of the others.

    They stay in their order, so that those that fill up are not all in the last minibatches.
    """
    uniform = np.concatenate([_uniform(part) for part in parts])
    first = np.sort(np.argsort(uniform, kind='stable')[: len(parts[0].rewards)])
    return jax.tree.map(lambda *x: np.concatenate(x)[first], *parts)


def _describe(rollout: Rollout) -> dict[str, float]:
    """Metrics of a rollout: means over responses, and sums over tokens."""
    lengths, stats = rollout.response_lengths, rollout.stats
    mask = np.arange(rollout.log_probs.shape[1]) < lengths[:, None]
    return {
        'tokens': int(lengths.sum()),
        'response_length': lengths.mean(),
        'longest_response': lengths.max(),
        'truncated_share': 1 - rollout.stopped.mean(),
        'entropy': np.sum(rollout.entropy, where=mask),
        'support_size': stats.listed,
        'decode_steps': stats.steps,
        'evictions': stats.evictions,
        'places': stats.steps * stats.slots,
        'seconds/prefill': stats.prefill_seconds,
        'seconds/decode': stats.decode_seconds,
    }
