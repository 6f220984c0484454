"""Every binding of every file in configs/objectives changes what is learnt."""

import inspect
from functools import partial
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.train
from experiments.config import parse
from troll_jax.ops.advantages import whiten
from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import TokenLogProbs
from troll_jax.ops.regularisers import regularised
from troll_jax.ops.support import at_tokens, sparsify

CONFIGS = Path(__file__).parent.parent / 'configs'
FILES = sorted(CONFIGS.glob('objectives/*.gin'))

# What takes the place of each choice; the second if the first is what the file has.
OTHERS = {
    'train.objective': ('@importance_weighted', '@cispo'),
    'train.aggregation': ('@sequence_mean', '@token_mean'),
    'train.estimator': ('@mean_centred', '@group_normalised'),
    'train.tail_rule': ('@default_tail',),
    'train.length_penalty': ('None',),
    'train.regularisers': ('[]',),
    'train.whiten_advantages': ('False',),
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


@pytest.fixture(autouse=True)
def no_bindings():
    gin.clear_config()
    yield
    gin.clear_config()


def token_losses() -> np.ndarray:
    """The weighted losses of the tokens above, by the configuration, in the way of `experiments.train`."""
    defaults = {name: p.default for name, p in inspect.signature(experiments.train.train).parameters.items()}
    chosen = defaults | gin.get_bindings('train')
    rewards = REWARDS
    if chosen['length_penalty'] is not None:
        rewards = rewards + chosen['length_penalty'](LENGTHS, max_length=LIMIT).reshape(REWARDS.shape)
    advantages = jax.vmap(chosen['estimator'])(rewards)
    advantages = np.asarray(whiten(advantages) if chosen['whiten_advantages'] else advantages).reshape(-1)
    weights = np.asarray(chosen['aggregation'](LENGTHS, max_length=LIMIT))
    objective = regularised(chosen['objective'], chosen['regularisers'])
    row = row_of(chosen['tail_rule'])
    return objective(row, jnp.asarray(advantages[SEGMENTS - 1])).loss * weights[SEGMENTS - 1]


@partial(jax.jit, static_argnums=0)
def row_of(tail_rule) -> TokenLogProbs:
    def one(new, old, token, segment):
        new, old = jax.nn.log_softmax(new), jax.nn.log_softmax(old)
        own, listed = (sparsify(x, token, max_tokens=KEPT, mass=1.0) for x in (new, old))
        on_support = tail_rule(at_tokens(new, listed.tokens), own, listed)
        return TokenLogProbs(token, segment, new[token], old[token], *on_support, entropy(new))

    return jax.vmap(one)(NEW, OLD, TOKENS, SEGMENTS)


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
    assert {'train.objective', 'train.aggregation', 'train.estimator'} <= {name for name, _ in bindings}
    gin.clear_config()
    parse([task, file])
    expected = token_losses()
    assert np.isfinite(expected).all()
    for name, value in bindings:
        gin.clear_config()
        parse([task, file], [f'{name} = {other_value(name, value)}'])
        assert np.abs(token_losses() - expected).max() > 1e-6, f'{name} = {value}'
