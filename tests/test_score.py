"""Log-probabilities by a model that does not change: π_old recomputed, and a reference model."""

import functools

import jax
import numpy as np
import pytest
from updates import CONFIG, PACKED, SCORING, assert_same, batch, nearby_params, policy_params, run, updater

from troll_jax.ops.importance import truncated_importance
from troll_jax.ops.losses import ppo_clip
from troll_jax.ops.regularisers import kl_to_reference
from troll_jax.ops.support import bucket_tail, default_tail
from troll_jax.score import make_recompute, make_reference


@pytest.mark.parametrize('tail_rule', [default_tail, bucket_tail])
def test_recomputed_old_policy_is_the_recorded_one(tail_rule):
    """Guards the two ways to π_old: from the same parameters the training forward finds what the sampler recorded."""
    recompute = make_recompute(CONFIG, SCORING._replace(tail_rule=tail_rule, head_chunk=7))
    data = batch(PACKED[1])
    learnt = data.loss_weights > 0
    result, kl, importance = jax.tree.map(np.asarray, recompute(policy_params(), data))
    np.testing.assert_array_equal(importance, 1)
    np.testing.assert_allclose(result.old_log_probs, data.old_log_probs, atol=1e-5)
    np.testing.assert_array_equal(np.sort(result.old.tokens[learnt]), np.sort(data.old.tokens[learnt]))
    np.testing.assert_allclose(np.exp(result.old.log_probs[learnt]), np.exp(data.old.log_probs[learnt]), atol=1e-5)
    assert kl < 1e-6
    # From other parameters it is their policy, whatever was recorded; and the noise is the distance between the two.
    moved, kl, _ = jax.tree.map(np.asarray, recompute(nearby_params(), data))
    assert np.abs(moved.old_log_probs - data.old_log_probs)[learnt].max() > 0.1 and kl > 1e-3
    step, metrics = run(updater(ppo_clip), nearby_params(), moved)
    np.testing.assert_allclose(metrics['ratio_max'], 1, atol=1e-4)
    for name in ('tokens', 'positions', 'segment_ids', 'loss_weights', 'advantages'):
        np.testing.assert_array_equal(getattr(moved, name), getattr(data, name))


def test_recompute_weighs_advantages():
    """Guards which policy is above the line, the limit, and that nothing else depends on it."""
    scoring = SCORING._replace(tail_rule=bucket_tail, head_chunk=7)
    data = batch(PACKED[1])
    plain, *_ = jax.tree.map(np.asarray, make_recompute(CONFIG, scoring)(nearby_params(), data))
    weighted, _, importance = jax.tree.map(
        np.asarray,
        make_recompute(CONFIG, scoring, importance=functools.partial(truncated_importance, limit=1.1))(
            nearby_params(), data
        ),
    )
    ratio = np.exp(plain.old_log_probs - data.old_log_probs)
    learnt = data.loss_weights > 0
    np.testing.assert_allclose(importance[learnt], np.minimum(ratio, 1.1)[learnt], rtol=1e-4)
    assert (ratio[learnt] > 1.1).any() and (ratio[learnt] < 1).any()
    assert_same(weighted, plain)


@pytest.mark.parametrize('tail_rule', [default_tail, bucket_tail])
def test_a_reference_that_is_the_policy_is_no_distance_away(tail_rule):
    """Guards the reference model's log-probabilities, which are at the token itself and at π_old's tokens, and the
    penalty: nothing at prompts and padding, whatever the tail rule. What else there is in the batch stays."""
    penalty = functools.partial(kl_to_reference, coefficient=2.0)
    reference = make_reference(CONFIG, SCORING._replace(tail_rule=tail_rule, head_chunk=7), penalty=penalty)
    data = batch(PACKED[1])
    learnt = data.loss_weights > 0
    same, penalties = jax.tree.map(np.asarray, reference(policy_params(), data))
    np.testing.assert_allclose(same.reference.log_probs[learnt], data.old_log_probs[learnt], atol=1e-5)
    listed = learnt[..., None] & (data.old.tokens >= 0)
    np.testing.assert_allclose(same.reference.on_old_support[listed], data.old.log_probs[listed], atol=1e-4)
    assert np.abs(penalties).max() < 1e-5
    assert_same(same._replace(reference=None), data)
    _, penalties = jax.tree.map(np.asarray, reference(nearby_params(), data))
    assert penalties[learnt].min() > -1e-6 and penalties.max() > 0.01 and np.all(penalties[~learnt] == 0)
