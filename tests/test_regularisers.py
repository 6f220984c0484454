"""Regularisers and estimates of a KL divergence, against definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import LossInputs, ReferenceView, ppo_clip
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.regularisers import (
    entropy_bonus,
    evaluate,
    k1,
    k2,
    k3,
    kl_to_old,
    kl_to_reference,
    regularised,
)
from troll_jax.ops.support import bucket_tail
from troll_jax.types import SparseLogProbs

P, Q = (jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), 7)) for seed in (0, 1))


def row_of(scores) -> LossInputs:
    """Three tokens of one response, sampled from Q; `scores` [3, 7] are those of the current policy."""
    new, tokens = jax.nn.log_softmax(scores), jnp.array([2, 0, 5])
    old = jnp.tile(Q, (3, 1))
    pick = lambda x: jnp.take_along_axis(x, tokens[:, None], axis=1)[:, 0]
    support = jnp.tile(jnp.arange(7), (3, 1))
    supports = SparseLogProbs(support, new), SparseLogProbs(support, old)
    return LossInputs(tokens, jnp.ones(3, jnp.int32), pick(new), pick(old), *supports, jax.vmap(entropy)(new))


def test_regularisers_are_added():
    """Guards the sum and the signs: entropy is to grow, a divergence to shrink; the log has the objective's own
    figures and each regulariser's."""
    scores, advantages = jax.random.normal(jax.random.key(2), (3, 7)), jnp.array([1.0, -1.0, 0.5])
    row = row_of(scores)
    bonus, pull = functools.partial(entropy_bonus, coefficient=0.3), functools.partial(kl_to_old, coefficient=0.7)
    plain, both = ppo_clip(row, advantages), regularised(ppo_clip, [bonus, pull])(row, advantages)
    new = jax.nn.log_softmax(scores)
    kl = jnp.sum(jnp.exp(new) * (new - Q[None]), axis=1)
    expected = plain.loss + 0.3 * jnp.sum(jnp.exp(new) * new, axis=1) + 0.7 * kl
    np.testing.assert_allclose(both.loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(both.logs['clipped'], plain.logs['clipped'])
    np.testing.assert_array_equal(both.constrained, plain.constrained)
    assert set(both.logs) == {*plain.logs, 'entropy_bonus', 'kl_to_old'}
    np.testing.assert_allclose(both.logs['kl_to_old'], 0.7 * kl, rtol=1e-5)
    with pytest.raises(ValueError, match='each may be given once; got kl_to_old, kl_to_old'):
        regularised(ppo_clip, [pull, pull])
    np.testing.assert_array_equal(regularised(ppo_clip, [])(row, advantages).loss, plain.loss)


def test_the_bonus_raises_the_entropy_and_the_pull_lowers_the_divergence():
    """Guards gradients: a step along each does what it is named for, and at π̃ = π_old the pull has none."""
    scores = 2 * jax.random.normal(jax.random.key(3), (3, 7))
    step = lambda loss: scores - 0.1 * jax.grad(lambda x: jnp.sum(loss(row_of(x), coefficient=1.0)))(scores)
    assert np.all(row_of(step(entropy_bonus)).entropy > row_of(scores).entropy)
    assert np.all(kl_to_old(row_of(step(kl_to_old)), coefficient=1.0) < kl_to_old(row_of(scores), coefficient=1.0))
    on_old_support = jax.grad(lambda x: jnp.sum(kl_to_old(row_of(x), coefficient=1.0)))(jnp.tile(Q, (3, 1)))
    np.testing.assert_allclose(on_old_support, 0, atol=1e-6)


def test_estimates_of_the_divergence():
    """Guards what each is an estimate of: expectations under P, of values and of gradients, exactly."""
    exact = kl_divergence(P, Q)
    expect = lambda values: jnp.sum(jnp.exp(P) * values)
    np.testing.assert_allclose([expect(k1(P, Q)), expect(k3(P, Q))], [exact, exact], rtol=1e-5)
    assert np.all(k3(P, Q) >= 0) and np.all(k2(P, Q) >= 0) and np.any(k1(P, Q) < 0)
    np.testing.assert_allclose(k2(P, Q), 0.5 * (P - Q) ** 2, rtol=1e-6)
    np.testing.assert_allclose([k(P, P) for k in (k1, k2, k3)], np.zeros((3, 7)), atol=1e-7)

    def gradient(k):
        """By the scores of P, of the expectation over tokens that P sampled, which is not differentiated itself."""
        return jax.grad(lambda x: jnp.sum(jnp.exp(P) * k(jax.nn.log_softmax(x), Q)))(P)

    np.testing.assert_allclose(gradient(k1), 0, atol=1e-6)
    forward = jax.grad(lambda x: kl_divergence(jax.nn.log_softmax(x), Q))(P)
    backward = jax.grad(lambda x: kl_divergence(Q, jax.nn.log_softmax(x)))(P)
    np.testing.assert_allclose(gradient(k2), forward, atol=1e-6)
    np.testing.assert_allclose(gradient(k3), backward, atol=1e-6)
    assert np.abs(forward).max() > 0.05 and np.abs(forward - backward).max() > 0.05


def with_reference(scores, reference, kept: int) -> LossInputs:
    """`row_of`, beside a reference model with these scores [7]; the old policy lists the first `kept` tokens."""
    new, ref = jax.nn.log_softmax(scores), jnp.tile(jax.nn.log_softmax(reference), (3, 1))
    listed = jnp.tile(jnp.arange(kept), (3, 1))
    bucket = lambda on_old_support, at_ref, tokens: bucket_tail(on_old_support, SparseLogProbs(tokens, at_ref))
    row = row_of(scores)
    at_sampled = jnp.take_along_axis(ref, row.tokens[:, None], axis=1)[:, 0]
    view = ReferenceView(at_sampled, *jax.vmap(bucket)(new[:, :kept], ref[:, :kept], listed))
    return row._replace(reference=view)


def pull(row: LossInputs, **settings) -> jax.Array:
    """`kl_to_reference`, as an objective with regularisers calls it."""
    return evaluate(functools.partial(kl_to_reference, **settings), row)


def test_kl_to_a_reference():
    """Guards the direction of the divergence, the tail, and estimates of another pair of policies.

    With all tokens listed it is that of the whole vocabulary, with some never more; its gradient is zero at the
    reference alone, and so are those of k2 and k3. That of k1 is not: it belongs into a reward.
    """
    scores, reference = jax.random.normal(jax.random.key(3), (3, 7)), jax.random.normal(jax.random.key(4), (7,))
    new, ref = jax.nn.log_softmax(scores), jax.nn.log_softmax(reference)
    dense = jnp.sum(jnp.exp(new) * (new - ref[None]), axis=1)
    whole, some = (pull(with_reference(scores, reference, kept), coefficient=0.5) for kept in (7, 4))
    np.testing.assert_allclose(whole, 0.5 * dense, rtol=1e-5)
    assert np.all(some < whole) and np.all(some > 0)
    row = with_reference(scores, reference, 4)
    for estimator in (k1, k2, k3):
        expected = 2.0 * estimator(row.new_log_probs, ref[row.tokens])
        got = pull(row, coefficient=2.0, estimator=estimator)
        np.testing.assert_allclose(got, expected, rtol=1e-6)

    def slope(scores, estimator) -> float:
        loss = lambda x: pull(with_reference(x, reference, 4), coefficient=1.0, estimator=estimator).sum()
        return float(np.abs(jax.grad(loss)(scores)).max())

    at_reference = jnp.tile(reference, (3, 1))
    for estimator in (None, k2, k3):
        assert slope(at_reference, estimator) < 1e-6 < 0.01 < slope(scores, estimator)
    assert slope(at_reference, k1) > 0.1


def test_without_a_reference_model_there_is_no_pull():
    """Guards a pull towards nothing."""
    with pytest.raises(ValueError, match='kl_to_reference needs a reference model'):
        pull(row_of(jnp.zeros((3, 7))), coefficient=1.0)


@pytest.mark.parametrize('log_prob', [-21.0, -25.0, -30.0, -100.0, -1e4])
def test_k3_of_an_absurd_token_is_finite(log_prob):
    """Guards an estimate that overflows, or whose bound turns the gradient around: it still pulls the policy back."""
    value, slope = jax.value_and_grad(lambda x: k3(x, -1.0))(log_prob)
    assert np.isfinite(value) and value >= k3(-21.0, -1.0) > 1e8
    np.testing.assert_allclose(slope, -np.expm1(20.0), rtol=1e-6)
    below = jax.grad(lambda x: k3(x, -1.0))(-20.9)
    np.testing.assert_allclose(below, -np.expm1(19.9), rtol=1e-5)
