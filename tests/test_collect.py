"""From prompts to graded responses, by a real sampler and a policy without any knowledge."""

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest
from tiny import decoder_config

from troll_jax.collect import decode_responses, gather_responses, make_collector, sample_responses
from troll_jax.data.prompts import batch_indices, encode_prompts
from troll_jax.data.tasks.arithmetic import CHARACTERS, Arithmetic
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.models import decoder as decoders
from troll_jax.rewards.pool import Grader
from troll_jax.rewards.terms import task_reward
from troll_jax.rollout import Sampler
from troll_jax.settings import Sampling
from troll_jax.sharding import make_mesh

B, G, T = 5, 3, 4
TOKENIZER = character_tokenizer(CHARACTERS)
TASK = Arithmetic(operands=2, train_size=31, test_size=7)
CONFIG = decoder_config(len(TOKENIZER), width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_width=12)


@functools.cache
def prompts():
    return encode_prompts(TASK.load('train'), TOKENIZER, max_length=4)


@functools.cache
def sampler(samples: int, temperature: float):
    return Sampler(
        CONFIG,
        samples_per_prompt=samples,
        max_response_length=T,
        temperature=temperature,
        stop_tokens=[TOKENIZER.eos_token_id],
        support_size=3,
        support_mass=1.0,
    )


@functools.cache
def params():
    return decoders.init(CONFIG, jax.random.key(0))


def starts_low(responses) -> np.ndarray:
    """1 for a response that begins with one digit, as few do: most groups are uniform."""
    return np.array([text[:1] == '4' for text in responses.texts], np.float32)


def starts_low_or_place(responses) -> np.ndarray:
    """The same, but of greedy responses the place of their prompt in its draw."""
    return np.arange(B) if len(responses.texts) == B else starts_low(responses)


def collector_of(rewards, grader, *, greedy=False, max_draws=1, slots=None, **options):
    return make_collector(
        dataclasses.replace(sampler(G, 1.0), slots=slots) if slots else sampler(G, 1.0),
        prompts(),
        grader,
        TOKENIZER,
        Sampling(prompts_per_step=B, samples_per_prompt=G, max_draws=max_draws, seed=3),
        max_response_length=T,
        rewards=rewards,
        mesh=make_mesh(1, 1, 1, jax.devices()[:1]),
        greedy_sampler=sampler(1, 0.0) if greedy else None,
        **options,
    )


def collect(draws=0, *, rewards=(('low', 1.0, starts_low),), grader=None, **settings):
    with grader or Grader(TASK.grade, deadline=None) as grader:
        return collector_of(rewards, grader, **settings)(params(), None, draws)()


def groups_of(experience) -> list[tuple]:
    """Prompt, responses and rewards of each group, to be compared."""
    rows = experience.rollout.tokens.reshape(B, G, -1)
    return [(rows[i].tobytes(), experience.rewards[i].tobytes()) for i in range(B)]


def test_dynamic_sampling_keeps_what_varies():
    """Guards which groups are replaced and by what: as if draws had been made one by one and the others thrown away."""
    single = [collect(draws) for draws in range(12)]
    varied = [
        (group, draw, place)
        for draw, experience in enumerate(single)
        for place, (group, rewards) in enumerate(zip(groups_of(experience), experience.rewards, strict=True))
        if np.ptp(rewards) > 0
    ]
    first = varied[:B]
    needed = first[-1][1] + 1  # draws until there are enough
    assert 3 <= needed <= 12, 'the test needs some groups that vary and some that do not'
    result = collect(max_draws=10, greedy=True, rewards=[('low', 1.0, starts_low_or_place)])
    assert groups_of(result) == [group for group, *_ in first]
    assert list(result.greedy_rewards) == [place for *_, place in first]
    assert result.draws == needed == result.metrics['rollout/draws']
    assert all(np.ptp(result.rewards, axis=1) > 0)
    # The log tells of everything that was sampled, and not of greedy responses.
    seen = np.concatenate([experience.rewards for experience in single[:needed]])
    for name in ('mean', 'low'):
        np.testing.assert_allclose(result.metrics[f'reward/{name}'], seen.mean(), rtol=1e-6)
    np.testing.assert_allclose(result.metrics['reward/uniform_share'], np.mean(np.ptp(seen, axis=1) == 0), rtol=1e-6)


def test_dynamic_sampling_has_a_limit():
    """Guards a run that samples for ever because the policy is always right: what is missing is filled up."""
    result = collect(max_draws=2, rewards=[('same', 1.0, lambda r: np.ones(len(r.texts)))])
    assert result.draws == 2 and result.rewards.shape == (B, G) and (result.rewards == 1).all()
    assert groups_of(result)[0][0] == groups_of(collect(0))[0][0]
    one = collect(max_draws=collect(max_draws=10).draws - 1)
    kept = np.ptp(one.rewards, axis=1) > 0
    assert 0 < kept.sum() < B


def test_responses_are_graded_while_others_decode():
    """Guards grades that are asked for once all has been sampled, and a rollout left early whose grading goes on."""
    graded, blocks = threading.Event(), []

    def grade(response: str, answer: str) -> float:
        graded.set()
        return TASK.grade(response, answer)

    def check():
        blocks.append(graded.wait(60) if blocks else False)  # the second time some of the first block have ended
        if len(blocks) == 5:
            raise InterruptedError

    settings = dict(rewards=[('task', 1.0, task_reward)], slots=4, check=check)
    with Grader(grade, deadline=None) as grader:
        collect_some = collector_of(grader=grader, **settings)
        experience = collect_some(params(), None, 0)()
        assert blocks == [False, True, True, True]
        assert groups_of(experience) == groups_of(collect(rewards=settings['rewards']))
        with pytest.raises(InterruptedError):
            collect_some(params(), None, 1)
        assert list(grader(['#'], ['1']).rewards) == [0.0]


def test_terms_are_given_the_row_of_each_response():
    """Guards the prompt, answer or column of another group, of which a reward would be noise."""
    rows = TASK.load('train')
    prompts = encode_prompts(rows.add_column('copy', rows['answer'][:]), TOKENIZER, max_length=4)
    places, texts = np.arange(4), [f'{i}' for i in range(8)]
    found = gather_responses(prompts, places[::-1], texts, [np.zeros(1)] * 8, np.zeros(8), 3)
    expected = [rows[int(i)] for i in np.repeat(places[::-1], 2)]
    assert list(found.prompts) == [row['messages'] for row in expected]
    assert found.answers == found.columns['copy'] == [row['answer'] for row in expected]


def grades_by(function) -> Grader:
    return Grader(lambda response, answer: function(response), deadline=None)


def test_dynamic_sampling_goes_by_the_grades_of_the_task():
    """Guards groups of wrong answers that differ in their lengths alone: they tell nothing of right and wrong."""
    rewards = [('task', 1.0, task_reward), ('length', 0.1, lambda r: r.lengths)]
    result = collect(max_draws=3, rewards=rewards, grader=grades_by(lambda response: 0.0))
    assert result.draws == 3 and result.metrics['reward/uniform_share'] == 1
    assert np.ptp(result.rewards, axis=1).max() > 0
    assert collect(max_draws=3, rewards=rewards[1:]).draws < 3, 'without a grade of the task by the rewards'


def test_failed_gradings_are_no_rewards():
    """Guards a mean that counts failures as wrong answers, and groups that vary by nothing but a failure."""

    def fails_for_some(response: str) -> float:
        if response[:1] in '0123456':
            raise RuntimeError('down')
        return 1.0

    result = collect(rewards=[('task', 1.0, task_reward)], grader=grades_by(fails_for_some))
    failed = ~result.graded
    assert 0 < failed.sum() == result.metrics['reward/errors'] < failed.size
    assert result.metrics['reward/task'] == result.metrics['reward/mean'] == 1
    assert result.metrics['reward/uniform_share'] == 1 and (result.rewards[failed] == 0).all()


def test_a_run_that_learns_nothing_says_so(caplog):
    """Guards hours of equal rewards, as of a task that looks for answers where its prompts do not ask for them."""
    with grades_by(lambda response: 0.0) as grader:
        collector = collector_of([('task', 1.0, task_reward)], grader)
        for draws in range(7):
            collector(params(), None, draws)()
            said = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
            assert len(said) == (draws >= 4)
    assert 'for 5 steps the responses to each prompt had equal rewards' in said[0] and "0 '" in said[0]


def test_greedy_rewards_are_of_the_same_prompts():
    """Guards a baseline of other prompts or of sampled responses."""
    first = lambda texts: np.array([ord(text[0]) if text else 0 for text in texts])
    length = ('length', 1.0, lambda r: r.lengths + first(r.texts))
    result = collect(2, greedy=True, rewards=[length])
    assert result.greedy_rewards.shape == (B,)
    indices = batch_indices(len(prompts()), B, seed=3, step=2)
    alone = sample_responses(
        sampler(1, 0.0), params(), prompts(), indices, jax.random.key(99), mesh=make_mesh(1, 1, 1, jax.devices()[:1])
    )
    texts = decode_responses(alone, TOKENIZER)
    expected = alone.response_lengths + first(texts)
    np.testing.assert_array_equal(result.greedy_rewards, expected)
    assert collect(2).greedy_rewards is None


def test_same_draw_same_experience():
    """Guards random numbers that depend on anything but seed and draw: a resumed run would sample other responses."""
    assert groups_of(collect(1)) == groups_of(collect(1)) != groups_of(collect(2))
    result = collect(1, rewards=[('task', 1.0, task_reward)])
    assert result.metrics['reward/task'] == result.metrics['reward/mean'] == result.rewards.mean()


def test_a_term_that_is_not_finite_names_the_response():
    """Guards a NaN that spreads over a group in silence."""
    with pytest.raises(ValueError, match=r"reward term 'odd' gave nan for the response"):
        collect(rewards=[('odd', 1.0, lambda r: np.where(np.arange(len(r.texts)) == 4, np.nan, 0.0))])
