"""Needs of a function, by the names of its parameters, however it is wrapped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.critic import Critic
from troll_jax.ops.advantages import gae, greedy_baseline, group_normalised
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.losses import LossInputs, ReferenceView, importance_weighted, ppo_clip
from troll_jax.ops.minibatch_losses import kl_cov, m2po
from troll_jax.ops.needs import give, needs
from troll_jax.ops.regularisers import entropy_bonus, evaluate, k1, kl_to_reference, regularised
from troll_jax.ops.support import bucket_tail, default_tail
from troll_jax.optimizer import adamw
from troll_jax.settings import Method
from troll_jax.types import SparseLogProbs

partial = functools.partial


def asks(row, reference, *, scale=1.0):
    return row, reference, scale


class Asks:
    """The same as an object, and as a method."""

    def __init__(self, reference=None):  # not what it is called with
        self.reference = reference

    def __call__(self, row, reference):
        return row, reference

    def asks(self, row, reference):
        return row, reference

    def asks_not(self, row):
        return row


@functools.wraps(asks)
def wrapped(*arguments, **settings):
    return asks(*arguments, **settings)


@pytest.mark.parametrize(
    'function',
    [
        asks,
        lambda row, reference=None: row,  # a default is no reason not to be given one
        lambda row, *, reference: row,
        partial(asks, scale=2.0),
        partial(partial(asks, scale=2.0), scale=3.0),
        partial(asks, 'row'),
        partial(partial(asks, 'row'), scale=2.0),
        Asks(),
        Asks().asks,
        partial(Asks()),
        partial(Asks().asks, 'row'),
        wrapped,
        jax.jit(asks),
        partial(jax.jit(asks), scale=2.0),
    ],
)
def test_what_is_needed(function):
    """Guards a reference model that is never loaded: attributes of a function were lost behind `functools.partial`."""
    assert needs(function, 'reference')
    assert give(function, reference=5, values=6) == {'reference': 5}


@pytest.mark.parametrize(
    'function',
    [
        None,
        lambda row: row,
        lambda row, **others: row,
        partial(asks, reference=7),
        partial(asks, reference=None),  # set is set
        partial(partial(asks, reference=7), scale=2.0),
        partial(partial(asks, scale=2.0), reference=7),
        partial(partial(asks, reference=7), 'row'),
        partial(asks, 'row', 7),
        partial(partial(asks, 'row'), 7),
        partial(Asks(), reference=7),
        partial(Asks(), 'row', 7),
        Asks('an attribute').asks_not,
    ],
)
def test_what_is_not_needed(function):
    """Guards values that are given over what is set, or to what does not take them; and a reward without a penalty."""
    assert not needs(function, 'reference')
    if function is not None:
        assert give(function, reference=5) == {}


def test_a_setting_is_not_given_again():
    """Guards a clash of what `functools.partial` has set with what is given by name."""
    once = partial(asks, reference=7)
    assert once('row', **give(once, reference=5)) == ('row', 7, 1.0)
    assert partial(asks, scale=3.0)('row', **give(partial(asks, scale=3.0), reference=5)) == ('row', 5, 3.0)


def test_functions_of_the_library():
    """Guards the names that the learner asks for against a parameter that is renamed."""
    found = {
        'reference': [kl_to_reference],
        'values': [gae],
        'greedy_reward': [greedy_baseline],
        'new': [default_tail],
        'minibatch': [m2po, kl_cov],
    }
    functions = [kl_to_reference, entropy_bonus, gae, group_normalised, greedy_baseline, default_tail, bucket_tail]
    functions += [importance_weighted, ppo_clip, m2po, kl_cov]
    for name, expected in found.items():
        assert [function for function in functions if needs(function, name)] == expected


def method(**settings) -> Method:
    defaults = {'objective': importance_weighted, 'advantages': group_normalised, 'aggregation': token_mean}
    return Method(**defaults | {'tail_rule': bucket_tail, 'optimizer': adamw, 'minibatch_prompts': 2} | settings)


def test_a_pull_with_settings_brings_its_reference_model():
    """Guards `functools.partial(kl_to_reference, …)`, which had no reference model: there was no attribute on it."""
    pull = partial(kl_to_reference, coefficient=0.1)
    assert not method().has_reference
    for settings in ({'regularisers': [pull]}, {'objective': regularised_by(pull)}):
        assert method(**settings).has_reference and method(**settings).loss_needs_reference
    penalised = method(reward_penalty=partial(pull, estimator=k1))
    assert penalised.has_reference and not penalised.loss_needs_reference
    policy, other = jnp.log(jnp.array([[0.7, 0.3]])), jnp.log(jnp.array([[0.4, 0.6]]))
    listed = lambda log_probs: SparseLogProbs(jnp.array([[0, 1]]), log_probs)
    row = LossInputs(*[jnp.zeros(1)] * 4, listed(policy), listed(policy), jnp.zeros(1))
    row = row._replace(reference=ReferenceView(other[:, 0], listed(policy), listed(other)))
    expected = 0.7 * np.log(0.7 / 0.4) + 0.3 * np.log(0.3 / 0.6)
    np.testing.assert_allclose(evaluate(pull, row), [0.1 * expected], rtol=1e-5)
    losses = regularised(importance_weighted, [pull])(row, jnp.zeros(1))
    np.testing.assert_allclose(losses.logs['kl_to_reference'], [0.1 * expected], rtol=1e-5)
    own = regularised(regularised_by(pull), [])(row, jnp.zeros(1))
    np.testing.assert_allclose(own.loss, losses.loss, rtol=1e-5)


def regularised_by(pull):
    """An objective of one's own that asks for the reference model itself."""

    def objective(row, advantages, progress, reference):
        losses = importance_weighted(row, advantages, progress)
        return losses._replace(loss=losses.loss + pull(row, reference))

    return objective


def test_gae_with_settings_asks_for_its_critic():
    """Guards `functools.partial(gae, …)`, which was called without values: there was no attribute on it."""
    estimator = partial(gae, gamma=0.9, lam=0.7)
    assert method(advantages=estimator, critic=Critic()).critic == Critic()
    with pytest.raises(ValueError, match='take the values of a critic'):
        method(advantages=estimator)
    rewards, values = jnp.array([0.0, 1.0]), jnp.array([0.5, 0.2])
    got = estimator(rewards, **give(estimator, values=values, greedy_reward=1.0))
    np.testing.assert_array_equal(got, gae(rewards, values, gamma=0.9, lam=0.7))
