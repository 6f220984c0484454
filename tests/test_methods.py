"""Every binding of every file in configs/objectives changes what is learnt."""

import inspect
from functools import partial
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
from experiments.config import parse

import experiments.train
from troll_jax.critic import token_rewards
from troll_jax.ops.advantages import needs_greedy_reward, needs_values, whiten
from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import LossInputs, ReferenceView
from troll_jax.ops.regularisers import regularised
from troll_jax.ops.support import at_tokens, bucket_tail, sparsify
from troll_jax.rewards.terms import Responses, weigh
from troll_jax.types import SparseLogProbs

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
    'troll.region': ('@token_region',),
    'ppo_clip.ratio': ('@token_ratio',),
    'ppo_clip.dual': ('1.5',),
    'dppo.divergence': ('@kl_divergence',),
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


@pytest.fixture(autouse=True)
def no_bindings():
    gin.clear_config()
    yield
    gin.clear_config()


def token_losses() -> np.ndarray:
    """The weighted losses of the tokens above, by the configuration, in the way of `troll_jax.learn`."""
    defaults = {name: p.default for name, p in inspect.signature(experiments.train.train).parameters.items()}
    chosen = defaults | gin.get_bindings('train')
    responses = Responses([''] * len(LENGTHS), LENGTHS, LIMIT, REWARDS.reshape(-1))
    rewards, _ = weigh(chosen['rewards'], responses)
    estimator = chosen['estimator']
    if needs_values(estimator):
        of_tokens = token_rewards(rewards, np.zeros(MASK.shape, np.float32), LENGTHS)
        advantages = jax.vmap(estimator)(of_tokens, VALUES * MASK)
        advantages = (whiten(advantages, MASK) if chosen['whiten_advantages'] else advantages)[MASK]
    else:
        more = (GREEDY,) if needs_greedy_reward(estimator) else ()
        advantages = jax.vmap(estimator)(rewards.reshape(REWARDS.shape), *more)
        advantages = (whiten(advantages) if chosen['whiten_advantages'] else advantages).reshape(-1)[SEGMENTS - 1]
    weights = np.asarray(chosen['aggregation'](LENGTHS, max_length=LIMIT))
    objective = regularised(chosen['objective'], chosen['regularisers'])
    return objective(row_of(chosen['tail_rule']), advantages).loss * weights[SEGMENTS - 1]


@partial(jax.jit, static_argnums=0)
def row_of(tail_rule) -> LossInputs:
    def one(new, old, reference, token, segment):
        new, old, reference = (jax.nn.log_softmax(x) for x in (new, old, reference))
        own, listed = (sparsify(x, token, support_size=KEPT, support_mass=1.0) for x in (new, old))
        on_support = tail_rule(at_tokens(new, listed.tokens), own, listed)
        on_old_support = SparseLogProbs(listed.tokens, at_tokens(reference, listed.tokens))
        view = ReferenceView(reference[token], *bucket_tail(at_tokens(new, listed.tokens), None, on_old_support))
        return LossInputs(token, segment, new[token], old[token], *on_support, entropy(new), view)

    return jax.vmap(one)(NEW, OLD, REFERENCE, TOKENS, SEGMENTS)


def other_value(name: str, value: str) -> str:
    if name in OTHERS:
        return next(other for other in OTHERS[name] if other != value)
    return repr(float(value) / 2)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_binding_changes_the_loss(file):
    """Guards knobs that are set and never read, or read where they make no difference."""
    task = CONFIGS / 'quickstart.gin'
    parse([file])
    bindings = [line.split(' = ') for line in gin.config_str().splitlines() if ' = ' in line]
    assert {'Method.objective', 'Method.aggregation', 'Method.advantages'} <= {name for name, _ in bindings}
    gin.clear_config()
    parse([task, file])
    expected = token_losses()
    assert np.isfinite(expected).all()
    for name, value in bindings:
        if name.startswith(ELSEWHERE):
            continue
        gin.clear_config()
        parse([task, file], [f'{name} = {other_value(name, value)}'])
        assert np.abs(token_losses() - expected).max() > 1e-6, f'{name} = {value}'
