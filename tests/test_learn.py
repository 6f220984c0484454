"""From graded responses to new parameters: what the stage puts together, against its pieces put together by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import (
    CONFIG,
    KEPT,
    MASS,
    PROMPT,
    RESPONSE,
    ROWS,
    SGD,
    all_log_probs,
    assert_same_step,
    nearby_params,
    policy_params,
    rollout,
    run,
    updater,
)

from experiments.train import training_step
from troll_jax.collect import Experience
from troll_jax.critic import Critic, make_values
from troll_jax.learn import Learner, summarise
from troll_jax.models import decoder as decoders
from troll_jax.ops.advantages import gae, greedy_baseline, group_normalised, mean_centred, no_baseline
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.importance import truncated_importance
from troll_jax.ops.losses import LossOutputs, importance_weighted, troll
from troll_jax.ops.regularisers import k1, kl_to_reference
from troll_jax.ops.support import bucket_tail, default_tail
from troll_jax.optimizer import adamw
from troll_jax.packing import batch_shape, make_batch, make_layout
from troll_jax.settings import Compute, Method, Sampling
from troll_jax.types import START

GROUPS = 4
REWARDS = np.array([[1, 0], [1, 1], [0, 0.5], [-1, 2]], np.float32)
MASK = np.arange(RESPONSE) < rollout().response_lengths[:, None]
discounted = functools.partial(gae, gamma=0.9, lam=0.7)


def experience(greedy_rewards=None, draws=1) -> Experience:
    return Experience(rollout(), REWARDS, greedy_rewards, draws, {})


def method(**settings) -> Method:
    defaults = {'objective': troll, 'advantages': group_normalised, 'aggregation': token_mean}
    defaults |= {'tail_rule': default_tail, 'optimizer': lambda: SGD, 'minibatch_prompts': GROUPS}
    return Method(**defaults | settings)


def learner(compute=None, **settings) -> Learner:
    return Learner(
        CONFIG,
        Sampling(prompts_per_step=GROUPS, samples_per_prompt=ROWS // GROUPS, support_size=KEPT, support_mass=MASS),
        method(**settings),
        compute or Compute(row_tokens=13, devices=jax.devices()[:1]),
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
    )


def copy(params):
    return jax.tree.map(jnp.copy, params)


def with_head(critic, scale: float):
    """A critic that has an opinion: its head is not zero."""
    head = scale * jnp.sin(jnp.arange(CONFIG.width) + 1.0)
    return critic._replace(params=critic.params | {'head': head})


def by_hand(params, advantages, **extra):
    """Parameters and metrics after one update with given advantages [R] or [R, T]."""
    layout = make_layout(rollout(), batch_shape(ROWS, PROMPT + RESPONSE, row_tokens=13))
    weights = np.asarray(token_mean(rollout().response_lengths, RESPONSE))
    advantages = np.asarray(advantages, np.float32).reshape(ROWS, -1)
    extra['advantages'] = layout.scatter(np.broadcast_to(advantages, MASK.shape))
    batch = make_batch(rollout(), weights, weights, layout)._replace(**extra)
    return run(updater(troll), params, batch)


def result(state, metrics):
    found = {name.removeprefix('update/'): np.float32(x) for name, x in metrics.items() if name.startswith('update/')}
    return jax.tree.map(np.asarray, state.params), {
        name: x for name, x in found.items() if name not in ('padding_share', 'kl_noise', 'tokens_per_second')
    }


def test_gae_of_a_critic():
    """Guards the way of values and rewards through packing: which token they belong to, and that whitening sees tokens.

    The expected advantages come from sums over the future of each token, not from a recursion.
    """
    bench = learner(advantages=discounted, critic=Critic(optimizer=lambda: SGD), whiten_advantages=True)
    state = bench.init(copy(nearby_params()))
    state = state._replace(critic=with_head(state.critic, 0.5))
    tokens = jnp.asarray(rollout().tokens)
    hidden = hidden_states(nearby_params(), tokens)
    lengths = rollout().response_lengths
    values = np.asarray(hidden @ state.critic.params['head'])
    expected, returns = np.zeros((2, *MASK.shape), np.float32)
    for r, (start, length) in enumerate(zip(rollout().prompt_lengths, lengths, strict=True)):
        v = np.append(values[r, start - 1 : start - 1 + length], 0)
        reward = np.zeros(length)
        reward[-1] = REWARDS.reshape(-1)[r]
        delta = reward + 0.9 * v[1:] - v[:-1]
        expected[r, :length] = [sum(0.63 ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        returns[r, :length] = expected[r, :length] + v[:-1]
    white = (expected - expected[MASK].mean()) / (expected[MASK].std(ddof=1) + 1e-6)

    state, metrics, _ = training_step(bench, state, experience())
    assert_same_step(result(state, metrics), by_hand(nearby_params(), white))
    np.testing.assert_allclose(metrics['critic/return'], returns[MASK].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics['critic/value'], (returns - expected)[MASK].mean(), rtol=1e-4)
    explained = 1 - np.var(expected[MASK]) / np.var(returns[MASK])
    np.testing.assert_allclose(metrics['critic/explained_variance'], explained, rtol=1e-3)


@jax.jit
def hidden_states(params, tokens):
    decoder = decoders.bind(decoders.abstract(CONFIG)[0], params)
    return decoder(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.ones_like(tokens))


def test_critic_learns_before_the_policy():
    """Guards the warm-up, a critic whose gradient has the wrong sign or never reaches the decoder, and a policy's
    parameters that the critic shares instead of copying."""
    optimizer = functools.partial(adamw, 3e-2, b2=0.99)
    bench = learner(
        advantages=gae, critic=Critic(optimizer, value_clip=None, warmup_steps=25), minibatch_prompts=GROUPS // 2
    )
    state = bench.init(copy(policy_params()))
    metrics = []
    for _ in range(25):
        state, row, updates = training_step(bench, state, experience())
        metrics.append(row)
        assert [update.policy for update in updates] == [None, None] and 'update/loss' not in row
    jax.tree.map(np.testing.assert_array_equal, state.params, policy_params())
    assert metrics[-1]['critic/explained_variance'] > 0.8 > 0.1 > metrics[0]['critic/explained_variance']
    assert metrics[-1]['critic/loss'] < 0.1 * metrics[0]['critic/loss']
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), state.critic.params['decoder']['layers'], policy_params()['layers']
    )
    assert min(jax.tree.leaves(moved)) > 0
    assert int(state.progress.updates) == 0 and int(state.progress.step) == 25
    state, row, _ = training_step(bench, state, experience())
    assert int(state.progress.updates) == 2 and row['update/gradient_norm'] > 0


def test_responses_that_are_all_masked_teach_nothing():
    """Guards 0/0 in means over no tokens: nothing is learnt, by no model, and every number is finite."""
    pull = functools.partial(kl_to_reference, coefficient=0.1)
    bench = learner(
        advantages=gae,
        critic=Critic(optimizer=lambda: SGD),
        regularisers=[pull],
        whiten_advantages=True,
        mask_truncated=True,
    )
    cut = rollout()._replace(stop_token=np.full(ROWS, -1, np.int32))
    state = bench.init(copy(nearby_params()))
    head = np.asarray(state.critic.params['head'])
    state, metrics, _ = training_step(bench, state, Experience(cut, REWARDS, None, 1, {}))
    jax.tree.map(np.testing.assert_array_equal, state.params, nearby_params())
    np.testing.assert_array_equal(state.critic.params['head'], head)
    for kind in ('update', 'critic'):
        assert metrics[f'{kind}/loss'] == metrics[f'{kind}/gradient_norm'] == metrics[f'{kind}/skipped'] == 0
    assert np.isfinite(list(metrics.values())).all(), metrics


@pytest.mark.parametrize('whiten', [False, True])
def test_what_was_not_graded_is_neither_compared_nor_learnt_from(whiten):
    """Guards a broken grading that counts as a wrong answer: it leaves its group, and its tokens the loss.

    The others of its group have the advantages of a smaller group; one alone has none.
    """
    graded = np.array([[True, True], [True, False], [False, False], [True, True]])
    bench = learner(advantages=mean_centred, whiten_advantages=whiten)
    packed = bench.pack(rollout(), graded)
    rewards = np.where(graded, REWARDS, 100.0).astype(np.float32)
    batches, _ = bench.assign_advantages(packed, Experience(rollout(), rewards, None, 1, {}, graded))
    to_responses = lambda name: packed.to_responses([getattr(batch, name) for batch in batches])
    learnt = to_responses('loss_weights')[MASK] > 0
    of_tokens = np.broadcast_to(graded.reshape(-1, 1), MASK.shape)[MASK]
    np.testing.assert_array_equal(learnt, of_tokens)
    expected = np.array([[0.5, -0.5], [0, 0], [0, 0], [-1.5, 1.5]], np.float32)
    if whiten:
        expected = np.where(graded, expected / np.std(expected[graded], ddof=1), 0)
    advantages = to_responses('advantages')
    np.testing.assert_allclose(advantages[MASK], np.broadcast_to(expected.reshape(-1, 1), MASK.shape)[MASK], atol=1e-5)


def test_a_skipped_update_does_not_blank_the_row():
    """Guards the log of a step in which one of several updates was skipped: the others' figures are there."""
    data = rollout()
    broken = data._replace(log_probs=np.where(np.arange(ROWS)[:, None] == 0, np.nan, data.log_probs))
    rows = []
    for part in (broken, data):
        bench = learner(objective=importance_weighted, minibatch_prompts=GROUPS // 2)
        _, row, _ = training_step(bench, bench.init(copy(nearby_params())), Experience(part, REWARDS, None, 1, {}))
        rows.append(row)
    assert rows[0]['update/skipped'] == 0.5 and rows[1]['update/skipped'] == 0
    assert np.isfinite(list(rows[0].values())).all(), rows[0]


@pytest.mark.parametrize('settings', [{'value_clip': 1e-3}, {'optimizer': lambda: optax.sgd(0.05)}])
def test_settings_of_a_critic(settings):
    """Guards settings of the critic that nothing reads."""
    after, slow = [], {'optimizer': lambda: optax.sgd(0.1)}  # at a rate of 1 values explode, and no clip matters
    for critic in (Critic(**slow), Critic(**slow | settings)):
        bench = learner(advantages=gae, critic=critic, minibatch_prompts=GROUPS // 2)
        state = bench.init(copy(policy_params()))
        for _ in range(2):  # at the first update a value has not moved, and the head alone has a gradient
            state, *_ = training_step(bench, state, experience())
        after.append(np.asarray(state.critic.params['head']))
    assert np.abs(after[0] - after[1]).max() > 1e-4


def test_values_do_not_see_their_token():
    """Guards the shift by one: a baseline that knows the token it is a baseline of biases the gradient."""
    bench = learner(advantages=gae, critic=Critic())
    params = with_head(bench.init(copy(policy_params())).critic, 1.0).params
    weights = np.ones(ROWS, np.float32)
    batch = make_batch(rollout(), weights, weights, make_layout(rollout(), batch_shape(ROWS, PROMPT + RESPONSE)))
    changed = batch.tokens.copy()
    row, at = 0, int(np.flatnonzero(batch.loss_weights[0, 0])[2])  # the third response token of the first row
    changed[0, row, at] = (changed[0, row, at] + 1) % CONFIG.vocab_size
    values = make_values(CONFIG)
    before, after = (np.asarray(values(params, batch._replace(tokens=x))) for x in (batch.tokens, changed))
    np.testing.assert_array_equal(before[0, row, : at + 1], after[0, row, : at + 1])
    assert abs(before[0, row, at + 1] - after[0, row, at + 1]) > 1e-3


def test_greedy_baseline():
    """Guards which prompt's greedy reward is taken off which group."""
    greedy = np.array([0.5, 1.0, 0.0, -2.0], np.float32)
    bench = learner(advantages=greedy_baseline)
    state, metrics, _ = training_step(bench, bench.init(copy(nearby_params())), experience(greedy))
    assert_same_step(result(state, metrics), by_hand(nearby_params(), (REWARDS - greedy[:, None]).reshape(-1)))


def log_ratio_to_nearby() -> np.ndarray:
    """log π_old − log π_ref [R, T] of the sampled tokens; 0 behind the end."""
    other = np.asarray(all_log_probs(nearby_params(), jnp.asarray(rollout().tokens)))
    out = np.zeros(MASK.shape, np.float32)
    for r, start in enumerate(rollout().prompt_lengths):
        for t in np.flatnonzero(MASK[r]):
            out[r, t] = rollout().log_probs[r, t] - other[r, start + t - 1, rollout().tokens[r, start + t]]
    return out


def test_reference_in_the_reward():
    """Guards sign and place of the penalty: an estimate that is taken off the response's reward, for the policy that
    sampled and not for the current one."""
    penalty = functools.partial(kl_to_reference, coefficient=0.3, estimator=k1)
    bench = learner(advantages=no_baseline, reward_penalty=penalty)
    state = bench.init(copy(nearby_params()))
    state, metrics, _ = training_step(bench, state, experience())
    costs = 0.3 * log_ratio_to_nearby().sum(axis=1)
    np.testing.assert_allclose(metrics['reward/penalty'], costs.mean(), rtol=1e-4)
    assert_same_step(result(state, metrics), by_hand(nearby_params(), REWARDS.reshape(-1) - costs))


@pytest.mark.parametrize('tail_rule', [default_tail, bucket_tail])
def test_reference_in_the_loss(tail_rule):
    """Guards the reference model's own values: no pull at the reference, a pull towards it elsewhere, of the size that
    the whole vocabulary gives."""
    pull = functools.partial(kl_to_reference, coefficient=1.0)
    bench = learner(objective=importance_weighted, advantages=no_baseline, regularisers=[pull], tail_rule=tail_rule)
    nothing = experience()._replace(rewards=np.zeros_like(REWARDS))
    state, metrics, _ = training_step(bench, bench.init(copy(nearby_params())), nothing)
    assert metrics['update/gradient_norm'] < 1e-5

    state = bench.init(copy(nearby_params()))._replace(params=copy(policy_params()))
    _, metrics, _ = training_step(bench, state, nothing)
    policy, reference = (all_log_probs(p, jnp.asarray(rollout().tokens)) for p in (policy_params(), nearby_params()))
    dense = np.asarray(jnp.sum(jnp.exp(policy) * (policy - reference), axis=-1))
    start, length = rollout().prompt_lengths[:, None], rollout().response_lengths[:, None]
    index = np.arange(dense.shape[1]) + 1
    dense = dense[(index >= start) & (index < start + length)].mean()
    assert 0.6 * dense < metrics['update/loss'] < dense  # eleven of 38 tokens, and one entry for all others
    assert metrics['update/gradient_norm'] > 0.01


def test_reference_is_refreshed_and_laid_out_like_the_policy():
    """Guards a reference that is never refreshed or is the policy itself, and one that lies whole on every device."""
    penalty = functools.partial(kl_to_reference, coefficient=0.1)
    bench = learner(Compute(data=2, fsdp=2, tensor=2, row_tokens=13), reward_penalty=penalty, refresh_reference_every=2)
    with jax.set_mesh(bench.mesh):
        shardings = jax.tree.map(lambda x: x.sharding, bench.shapes.params)
        state = bench.init(jax.device_put(copy(nearby_params()), shardings))
        start = jax.tree.map(np.array, state.reference)
        same = jax.tree.map(lambda x, sharding: x.sharding == sharding, state.reference, shardings)
        assert all(jax.tree.leaves(same))
        states = []
        for _ in range(2):
            state, *_ = training_step(bench, state, experience())
            states.append(jax.tree.map(np.array, (state.params, state.reference)))
    jax.tree.map(np.testing.assert_array_equal, states[0][1], start)
    jax.tree.map(np.testing.assert_array_equal, *states[1])
    assert np.abs(states[1][1]['embedding'] - start['embedding']).max() > 0


def test_draws_are_counted():
    """Guards data that a resumed run would see twice after groups were replaced."""
    bench = learner()
    state, *_ = training_step(bench, bench.init(copy(policy_params())), experience(draws=3))
    assert (int(state.progress.draws), int(state.progress.step)) == (3, 1)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.array, x) for x in (one, other)))


@pytest.mark.parametrize(
    'settings',
    [
        {'advantages': mean_centred},
        {
            'advantages': discounted,
            'critic': Critic(optimizer=lambda: SGD),
            'whiten_advantages': True,
            'old_policy': 'recompute',
            'importance': functools.partial(truncated_importance, limit=1.01),
            'regularisers': [functools.partial(kl_to_reference, coefficient=0.1)],
            'refresh_reference_every': 1,
        },
    ],
    ids=['no model is asked', 'all models are asked'],
)
def test_pieces_on_their_own_are_a_step(settings):
    """Guards pieces that count on something that another leaves behind in the learner, or that use up a state which is
    still needed: in any order, several times and of several states, they give what a step gives."""
    bench = learner(minibatch_prompts=GROUPS // 2, **settings)

    def begin():
        state = bench.init(copy(policy_params()))
        params = copy(nearby_params())  # a policy that has left the reference
        return state._replace(params=params) if 'critic' in settings else state

    state, row, updates = training_step(bench, begin(), experience(draws=3))

    packed = bench.pack(rollout())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(packed.batches)), 'on the host'
    own, state_of_another = begin(), bench.init(copy(nearby_params()))
    scored = bench.score(own, packed)
    others = bench.score(state_of_another, packed)
    assert_equal(bench.score(own, packed), scored)
    assert_equal(packed.batches, bench.pack(rollout()).batches)
    if 'critic' in settings:
        np.testing.assert_array_equal(scored.values, 0)  # of a critic whose head is zero
        assert np.abs(scored.batches[0].reference.log_probs - others.batches[0].reference.log_probs).max() > 0.1
    bench.assign_advantages(scored, experience()._replace(rewards=-REWARDS))
    batches, metrics = bench.assign_advantages(scored, experience())
    bench.update(state_of_another, batches[1])
    taken = []
    for batch in batches:
        own, updated = bench.update(own, batch)
        taken.append(updated)
    own = bench.end_step(own, 3)
    assert_equal(own, state)
    assert_equal(taken, updates)
    timed = {'update/tokens_per_second', 'seconds/update'}
    assert summarise(taken) | metrics == {name: x for name, x in row.items() if name not in timed}


def test_an_update_of_the_critic_alone():
    """Guards a policy that moves while only its critic is meant to."""
    bench = learner(advantages=gae, critic=Critic(optimizer=lambda: SGD))
    state = bench.init(copy(policy_params()))
    (batch,), _ = bench.assign_advantages(bench.score(state, bench.pack(rollout())), experience())
    state, updated = bench.update(state, batch, critic_only=True)
    assert updated.policy is None and updated.critic['gradient_norm'] > 0
    assert_equal(state.params, policy_params())
    assert int(state.progress.updates) == 0 and np.abs(state.critic.params['head']).max() > 0


def test_an_objective_of_ones_own_is_counted():
    """Guards the table of constrained tokens against knowing objectives by the names in their logs."""

    def without_losers(row, advantages, progress=START) -> LossOutputs:
        losses = importance_weighted(row, advantages, progress)
        left_out = advantages < 0
        return LossOutputs(jnp.where(left_out, 0.0, losses.loss), left_out, {})

    bench = learner(objective=without_losers, advantages=mean_centred)
    _, row, (updated,) = training_step(bench, bench.init(copy(nearby_params())), experience())
    lost = (REWARDS < REWARDS.mean(axis=1, keepdims=True)).reshape(-1, 1)
    expected = MASK & lost
    np.testing.assert_array_equal(bench.to_responses(rollout(), [updated.policy.flags]), MASK * 1 + expected)
    assert 0 < expected.sum() < MASK.sum()
    assert row['update/constrained_share'] == pytest.approx(expected.sum() / MASK.sum())


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({'advantages': gae}, 'the values of a critic, and there is none; set Method.critic'),
        ({'critic': Critic()}, 'critic is set but unused'),
        ({'refresh_reference_every': 3}, 'refresh_reference_every = 3 without a reference model; expected 0'),
        ({'reward_penalty': lambda row: row.entropy}, 'reward_penalty must compare with a reference model'),
        ({'old_policy': 'rollouts'}, "old_policy is 'rollouts'; expected one of"),
        ({'importance': truncated_importance}, 'set old_policy to'),
        (
            {'reward_penalty': functools.partial(kl_to_reference, coefficient=0.1), 'mask_truncated': True},
            'reward_penalty and mask_truncated do not go together',
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, said):
    """Guards knobs that would be silently ignored."""
    with pytest.raises(ValueError, match=said):
        method(**settings)


@pytest.mark.parametrize('devices', [[3], [2, 3]])
def test_the_pieces_need_no_mesh_in_context(devices):
    """Guards pieces that are called in a notebook: they run on the learner's devices, not on the first of all."""
    bench = learner(Compute(row_tokens=13, devices=[jax.devices()[i] for i in devices]))
    shardings = jax.tree.map(lambda x: x.sharding, bench.shapes.params)
    state = bench.init(jax.device_put(copy(policy_params()), shardings))
    batches, _ = bench.assign_advantages(bench.score(state, bench.pack(rollout())), experience())
    state, updated = bench.update(state, batches[0])
    assert np.isfinite(updated.policy.metrics['loss']) and int(bench.end_step(state, 1).progress.step) == 1


def test_moments_of_policy_and_critic_live_on_the_host_if_asked_for():
    """Guards a setting that nothing reads."""
    compute = Compute(row_tokens=13, devices=jax.devices()[:1], offload_optimizer=True)
    momentum = lambda: optax.sgd(0.1, momentum=0.9)
    shapes = learner(compute, advantages=gae, critic=Critic(optimizer=momentum), optimizer=momentum).shapes
    for state in (shapes.opt_state, shapes.critic.opt_state):
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}
        assert kinds == {'pinned_host'}
