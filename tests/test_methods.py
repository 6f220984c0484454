"""Every binding of every file in configs/objectives changes what is learnt."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import decoder_config

from experiments.plumbing.gin_files import Config
from troll_jax.collect import Experience
from troll_jax.learn import Learner
from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import LossInputs, Minibatch, ReferenceView
from troll_jax.ops.needs import give
from troll_jax.ops.regularisers import regularised
from troll_jax.ops.support import at_tokens, bucket_tail, sparsify
from troll_jax.rewards.terms import Responses, weigh
from troll_jax.settings import Compute, Method, Sampling
from troll_jax.types import Rollout, SparseLogProbs

CONFIGS = Path(__file__).parent.parent / 'configs'
FILES = sorted(CONFIGS.glob('objectives/*.gin'))

# What belongs to a critic or to sampling, and not to a loss: tests/test_learn.py and test_collect.py see these change.
ELSEWHERE = ('Method.critic', 'Critic.', 'critic/adamw.', 'Sampling.max_draws')

# What takes the place of each choice; the second if the first is what the file has.
OTHERS = {
    'Method.objective': ('@importance_weighted', '@cispo'),
    'Method.aggregation': ('@sequence_mean', '@token_mean'),
    'Method.advantages': ('@mean_centred', '@group_normalised'),
    'Method.tail_rule': ('@default_tail',),
    'Method.rewards': ("[('task', 1.0, @task_reward)]",),
    'kl_to_reference.estimator': ('@k1',),
    'Method.regularisers': ('[]',),
    'Method.whiten_advantages': ('False',),
    'troll.ratio': ('@token_ratio',),
    'troll.region': ('@total_variation_region', '@token_region'),
    'capped_ratio.limit': ('1.5',),
    'kl_cov.share': ('0.5',),
    'erc.upper': ('1.5',),
    'icepop.upper': ('1.1',),
    'ppo_clip.ratio': ('@token_ratio',),
    'ppo_clip.dual': ('1.5',),
    'dppo.divergence': ('@kl_divergence',),
    'dppo_binary.divergence': ('@kl_divergence', '@total_variation'),
    'masked.drop': ('@ipo', '@kpop'),
    'masked.objective': ('@cispo',),
    'shuffled.of': ('@troll', '@ppo_clip'),
    'importance_weighted.ratio': ('@sequence_ratio',),
    'kl_to_old.estimator': ('@k1',),
    'vespo.positive': ('(1.0, 2.0)',),
    'vespo.negative': ('(1.0, 2.0)',),
}

GROUPS, SAMPLES, VOCAB, KEPT, LIMIT = 3, 4, 7, 3, 10
RANDOM = np.random.default_rng(40)  # a seed at which ratios go far enough for every bound
REWARDS = RANDOM.normal(size=(GROUPS, SAMPLES)).astype(np.float32)
LENGTHS = np.array([1, 9, 3, 5, 10, 2, 4, 9, 7, 1, 3, 10])
SEGMENTS = np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)
OLD = RANDOM.normal(size=(len(SEGMENTS), VOCAB)).astype(np.float32)
NEW = OLD + (2 * RANDOM.normal(size=OLD.shape) * RANDOM.random((len(SEGMENTS), 1)) ** 2).astype(np.float32)
TOKENS = RANDOM.integers(VOCAB, size=len(SEGMENTS))
REFERENCE = RANDOM.normal(size=OLD.shape).astype(np.float32)
GREEDY = RANDOM.normal(size=GROUPS).astype(np.float32)
MASK = np.arange(LIMIT) < LENGTHS[:, None]
VALUES = RANDOM.normal(size=MASK.shape).astype(np.float32)


def token_losses(method: Method) -> np.ndarray:
    """The weighted losses of the tokens above, by a method."""
    learner = Learner(
        decoder_config(VOCAB),
        Sampling(prompts_per_step=GROUPS, samples_per_prompt=SAMPLES),
        method,
        Compute(devices=jax.devices()[:1]),
        max_prompt_length=1,
        max_response_length=LIMIT,
    )
    zeros = lambda *more, dtype=np.float32: np.zeros((*MASK.shape, *more), dtype)
    support = SparseLogProbs(zeros(KEPT, dtype=np.int32), zeros(KEPT))
    prompt, stopped = np.ones_like(LENGTHS), np.zeros_like(LENGTHS)
    tokens = np.zeros((len(LENGTHS), 1 + LIMIT), np.int32)
    packed = learner.pack(Rollout(tokens, prompt, LENGTHS, stopped, zeros(), zeros(), support))
    rewards, _ = weigh(method.rewards, Responses([''] * len(LENGTHS), LENGTHS, LIMIT, REWARDS.reshape(-1)))
    scored = packed._replace(values=None if method.critic is None else VALUES)
    experience = Experience(packed.rollout, rewards.reshape(REWARDS.shape), GREEDY, draws=1, metrics={})
    (batch,), _ = learner.assign_advantages(scored, experience)
    advantages, weights = (scored.to_responses([x])[MASK] for x in (batch.advantages, batch.loss_weights))
    objective, row = regularised(method.objective, method.regularisers), row_of(method.tail_rule)
    minibatch = Minibatch(row.new_log_probs, row.old_log_probs, advantages, row.segments > 0)
    return objective(row, advantages, **give(objective, minibatch=minibatch)).loss * weights


@partial(jax.jit, static_argnums=0)
def row_of(tail_rule) -> LossInputs:
    def one(new, old, reference, token, segment):
        new, old, reference = (jax.nn.log_softmax(x) for x in (new, old, reference))
        own, listed = (sparsify(x, token, support_size=KEPT, support_mass=1.0) for x in (new, old))
        on_support = tail_rule(at_tokens(new, listed.tokens), listed, **give(tail_rule, new=own))
        on_old_support = SparseLogProbs(listed.tokens, at_tokens(reference, listed.tokens))
        view = ReferenceView(reference[token], *bucket_tail(at_tokens(new, listed.tokens), on_old_support))
        return LossInputs(token, segment, new[token], old[token], *on_support, entropy(new), view)

    return jax.vmap(one)(NEW, OLD, REFERENCE, TOKENS, SEGMENTS)


def other_value(name: str, value: str) -> str:
    if name in OTHERS:
        return next(other for other in OTHERS[name] if other != value)
    return repr(float(value) / 2)


def test_dapo_rewards_are_those_of_the_paper():
    """Guards an overlong penalty that weighs twice as much against a grade of 0 or 1 as against the paper's -1 or 1.

    Right, right at the length limit, wrong, wrong at the length limit: 1, 0, -1 and -2 in the paper.
    """
    method = Config([CONFIGS / 'quickstart.gin', CONFIGS / 'objectives/dapo.gin']).build(Method)
    lengths, grades = np.array([1, LIMIT, 1, LIMIT]), np.array([1, 1, 0, 0], np.float32)
    rewards, _ = weigh(method.rewards, Responses([''] * 4, lengths, LIMIT, grades))
    paper = method.advantages(np.array([1.0, 0.0, -1.0, -2.0], np.float32))
    np.testing.assert_allclose(method.advantages(rewards), paper, rtol=1e-5)
    np.testing.assert_allclose(paper, [1.162, 0.387, -0.387, -1.162], atol=1e-3)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_binding_changes_the_loss(file):
    """Guards knobs that are set and never read, or read where they make no difference."""
    bound = Config([file]).bindings
    bindings = [(f'{key}.{name}', repr(value)) for key, values in bound.items() for name, value in values.items()]
    assert {'Method.objective', 'Method.aggregation', 'Method.advantages'} <= {name for name, _ in bindings}

    def losses(*changes: str) -> np.ndarray:
        config = Config([CONFIGS / 'quickstart.gin', file], changes)
        return token_losses(dataclasses.replace(config.build(Method), minibatch_prompts=GROUPS))

    expected = losses()
    assert np.isfinite(expected).all()
    for name, value in bindings:
        if not name.startswith(ELSEWHERE):
            without_critic = ['Method.critic = None'] if name == 'Method.advantages' else []  # no other wants one
            changed = losses(f'{name} = {other_value(name, value)}', *without_critic)
            assert np.abs(changed - expected).max() > 1e-6, f'{name} = {value}'
