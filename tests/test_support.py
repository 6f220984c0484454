"""Sparse supports: what is listed, what is not, and two of them on common ground."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from troll_jax.ops.projection import kl_divergence, project, project_sparse
from troll_jax.ops.support import TAIL, at_token, at_tokens, bucket_tail, default_tail, sparsify
from troll_jax.types import SparseLogProbs

INF = np.inf
VOCAB = 13


def log_probs_of(seed: int, scale: float = 2.0, size: int = VOCAB) -> jax.Array:
    return jax.nn.log_softmax(scale * jax.random.normal(jax.random.key(seed), size))


listed = jax.jit(sparsify, static_argnames=('support_size', 'support_mass'))


@functools.partial(jax.jit, static_argnames=('probability', 'renormalise'))
def united(new_log_probs, new, old, **settings):
    """The default tail rule on the union, from all of log π̃ [V]."""
    return default_tail(at_tokens(new_log_probs, old.tokens), old, new, **settings)


@jax.jit
def bucketed(new_log_probs, old):
    return bucket_tail(at_tokens(new_log_probs, old.tokens), old)


def test_most_probable_first_with_their_exact_log_probs():
    """Guards order and values: what is kept is not renormalised."""
    log_probs = log_probs_of(0)
    order = np.argsort(-np.asarray(log_probs))
    result = listed(log_probs, order[1], support_size=5, support_mass=1.0)
    np.testing.assert_array_equal(result.tokens, order[:5])
    np.testing.assert_array_equal(result.log_probs, log_probs[order[:5]])
    assert result.tokens.dtype == jnp.int32 and result.log_probs.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(logsumexp(result.log_probs)), np.exp(log_probs[order[:5]]).sum(), rtol=1e-6)


def test_all_are_kept_when_there_is_room():
    """Guards K = V with mass 1: the dense distribution, every token once."""
    log_probs = log_probs_of(1)
    result = listed(log_probs, 0, support_size=VOCAB, support_mass=1.0)
    assert sorted(result.tokens.tolist()) == list(range(VOCAB))
    np.testing.assert_array_equal(result.log_probs, log_probs[result.tokens])


@pytest.mark.parametrize(('support_mass', 'kept'), [(0.49, 1), (0.51, 2), (0.76, 3), (0.9, 4), (0.95, 5), (1.0, 5)])
def test_tokens_are_kept_until_they_hold_the_mass(support_mass, kept):
    """Guards off-by-one: the token with which the mass is reached is kept, the next one is not."""
    log_probs = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]))
    result = listed(log_probs, 0, support_size=5, support_mass=support_mass)
    np.testing.assert_array_equal(result.tokens, [*range(kept), *[-1] * (5 - kept)])
    np.testing.assert_array_equal(result.log_probs[kept:], [-INF] * (5 - kept))


def test_sampled_token_takes_a_free_place_or_the_last():
    """Guards the sampled token: it is always listed, with its exact value, and costs at most the least probable one."""
    log_probs = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]))
    np.testing.assert_array_equal(listed(log_probs, 4, support_size=4, support_mass=0.7).tokens, [0, 1, 4, -1])
    full = listed(log_probs, 4, support_size=4, support_mass=1.0)
    np.testing.assert_array_equal(full.tokens, [0, 1, 2, 4])
    assert full.log_probs[3] == log_probs[4]
    # Among the K most probable, but cut off by the mass.
    np.testing.assert_array_equal(listed(log_probs, 3, support_size=4, support_mass=0.7).tokens, [0, 1, 3, -1])
    np.testing.assert_array_equal(listed(log_probs, 5, support_size=1, support_mass=1.0).tokens, [5])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([-90.0, -20.0, -1.0, 0.0, 0.5, 3.0, -INF]), min_size=VOCAB, max_size=VOCAB),
    st.integers(0, VOCAB - 1),
    st.sampled_from([(1, 1.0), (5, 1.0), (5, 0.9), (5, 1 - 1e-5), (VOCAB, 1.0), (VOCAB, 1 - 1e-5)]),
)
def test_no_duplicates_and_the_sampled_token_for_any_scores(scores, token, limits):
    """Guards ties and zeros: the token is listed once, no token twice, and padding is marked in both arrays."""
    scores[token] = max(scores[token], -20.0)
    log_probs = jax.nn.log_softmax(jnp.array(scores))
    support_size, support_mass = limits
    result = jax.tree.map(np.asarray, listed(log_probs, token, support_size=support_size, support_mass=support_mass))
    real = result.tokens[result.tokens >= 0]
    assert len(set(real)) == len(real) and np.sum(real == token) == 1
    assert np.all(result.log_probs[result.tokens < 0] == -INF)
    np.testing.assert_array_equal(result.log_probs[result.tokens >= 0], np.asarray(log_probs)[real])
    kept = np.exp(result.log_probs.astype(np.float64)).sum()
    assert len(real) >= support_size or kept >= support_mass - 1e-6


def test_impossible_limits_are_refused():
    """Guards messages with the numbers: K beyond the vocabulary would fail deep inside the compiler."""
    log_probs = log_probs_of(0)
    for support_size in (0, VOCAB + 1):
        with pytest.raises(ValueError, match=f'vocabulary size {VOCAB}; got {support_size}'):
            sparsify(log_probs, 0, support_size=support_size)
    for support_mass in (0.0, 1.5):
        with pytest.raises(ValueError, match=f'got {support_mass}'):
            sparsify(log_probs, 0, support_size=3, support_mass=support_mass)


def test_look_up_of_tokens():
    """Guards padding: token −1 must not read the last entry of the vocabulary, nor send it a gradient."""
    log_probs = log_probs_of(2)
    tokens = jnp.array([3, -1, 0])
    np.testing.assert_array_equal(at_tokens(log_probs, tokens), [log_probs[3], -INF, log_probs[0]])
    gradient = jax.grad(lambda x: jnp.sum(jnp.where(tokens >= 0, at_tokens(x, tokens), 0.0)))(log_probs)
    np.testing.assert_array_equal(np.flatnonzero(gradient), [0, 3])


def test_look_up_of_one_token():
    """Guards the gradient of a sum over entries of −inf: one for the token, zero elsewhere, no NaN."""
    distribution = SparseLogProbs(jnp.array([4, 2, -1]), jnp.array([-0.5, -2.0, -INF]))
    assert at_token(distribution, 2) == -2.0
    gradient = jax.grad(lambda x: at_token(SparseLogProbs(distribution.tokens, x), 2))(distribution.log_probs)
    np.testing.assert_array_equal(gradient, [0, 1, 0])


def test_a_token_that_is_not_listed_has_no_probability():
    """Guards a ratio of one, and no gradient, for a token that a support does not list: p = 1 in its place."""
    distribution = SparseLogProbs(jnp.array([4, 2, -1]), jnp.array([-0.5, -2.0, -INF]))
    assert at_token(distribution, 3) == -INF


def test_union_of_different_supports():
    """Guards the tail rule: exact values for π̃ everywhere, the default for π_old where only π̃ lists the token."""
    new_log_probs, old_log_probs = log_probs_of(3), log_probs_of(4)
    new = listed(new_log_probs, 6, support_size=5, support_mass=1.0)
    old = listed(old_log_probs, 6, support_size=4, support_mass=1.0)
    a, b = jax.tree.map(np.asarray, united(new_log_probs, new, old, probability=1e-9))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    real = a.tokens[a.tokens >= 0]
    assert len(real) == len(set(real)) and set(real) == {*new.tokens.tolist(), *old.tokens.tolist()}
    assert len(real) < 9, 'the pair was meant to overlap'
    np.testing.assert_array_equal(a.log_probs[a.tokens >= 0], new_log_probs[real])
    added = ~np.isin(a.tokens, old.tokens) & (a.tokens >= 0)
    assert added.any()
    np.testing.assert_array_equal(b.log_probs[:4], old.log_probs)
    np.testing.assert_allclose(b.log_probs[added], np.log(1e-9), rtol=1e-6)
    assert np.all(a.log_probs[a.tokens < 0] == -INF) and np.all(b.log_probs[b.tokens < 0] == -INF)


@pytest.mark.parametrize('support_mass', [1.0, 1 - 1e-5, 0.8])
@pytest.mark.parametrize('renormalise', [False, True])
def test_equal_policies_are_equal_on_the_union(support_mass, renormalise):
    """Guards the first update of every rollout: one rule for both supports, or the sampled token would differ.

    The KL is exactly zero, also where the token sampled is not among the most probable.
    """
    for seed in range(3):
        log_probs = log_probs_of(seed, scale=3.0)
        for token in (int(jnp.argmax(log_probs)), int(jnp.argmin(log_probs))):
            own = listed(log_probs, token, support_size=5, support_mass=support_mass)
            new, old = united(log_probs, own, own, renormalise=renormalise)
            np.testing.assert_array_equal(new.log_probs, old.log_probs)
            assert kl_divergence(new.log_probs, old.log_probs) == 0


def test_union_leaves_padding_out_of_the_projection():
    """Guards short supports: the padding of either has no part in the result."""
    new_log_probs, old_log_probs = log_probs_of(5), log_probs_of(6)
    run = jax.jit(lambda new, old: project_sparse(*united(new_log_probs, new, old), bound=0.05))
    new = listed(new_log_probs, 1, support_size=5, support_mass=1.0)
    old = listed(old_log_probs, 1, support_size=5, support_mass=1.0)
    longer = lambda x: SparseLogProbs(
        jnp.concatenate([x.tokens, jnp.full(2, -1)]), jnp.concatenate([x.log_probs, jnp.full(2, -INF)])
    )
    short, long = run(new, old), run(longer(new), longer(old))
    assert short.violated
    kept = np.r_[0:5, 7:12]
    np.testing.assert_allclose(long.log_probs[kept], short.log_probs, atol=1e-6)
    assert np.all(long.log_probs[np.r_[5:7, 12:14]] == -INF)


def test_gradient_flows_to_the_exact_entries():
    """Guards the union as a gather: each listed entry of π̃ gets its own gradient once, none goes to π_old's tail."""
    log_probs = log_probs_of(7)
    new = listed(log_probs, 2, support_size=4, support_mass=1.0)
    old = listed(log_probs_of(8), 2, support_size=4, support_mass=1.0)

    def total(x):
        exact = new._replace(log_probs=at_tokens(x, new.tokens))
        entries = united(x, exact, old)[0].log_probs
        return jnp.sum(jnp.where(entries > -INF, entries, 0.0))

    gradient = np.asarray(jax.jit(jax.grad(total))(log_probs))
    expected = np.zeros(VOCAB)
    expected[list({*new.tokens.tolist(), *old.tokens.tolist()})] = 1
    np.testing.assert_array_equal(gradient, expected)


def test_renormalised_union_sums_to_one():
    """Guards the paper's form: both are distributions on the union, in the proportions they had; padding stays."""
    new_log_probs, old_log_probs = log_probs_of(3), log_probs_of(4)
    new = listed(new_log_probs, 6, support_size=5, support_mass=0.8)
    old = listed(old_log_probs, 6, support_size=4, support_mass=0.8)
    plain = united(new_log_probs, new, old)
    for before, after in zip(plain, united(new_log_probs, new, old, renormalise=True), strict=True):
        np.testing.assert_array_equal(before.tokens, after.tokens)
        real = np.asarray(before.tokens) >= 0
        np.testing.assert_allclose(np.exp(after.log_probs).sum(), 1, rtol=1e-6)
        np.testing.assert_allclose(
            after.log_probs[real], (before.log_probs - logsumexp(before.log_probs))[real], rtol=1e-5
        )
        assert np.all(after.log_probs[~real] == -INF) and not real.all()
        assert np.exp(logsumexp(before.log_probs)) < 1 - 1e-3, 'something was meant to be left out'


@pytest.mark.parametrize('renormalise', [True, False])
def test_only_kept_tokens_get_a_gradient_when_renormalised(renormalise):
    """Guards the difference of the two forms: whether the tail's logits are pushed when kept tokens gain."""
    scores, old = log_probs_of(7), listed(log_probs_of(8), 2, support_size=4, support_mass=1.0)
    own_tokens = listed(scores, 2, support_size=4, support_mass=1.0).tokens

    def value(scores):
        log_probs = jax.nn.log_softmax(scores)
        own = SparseLogProbs(own_tokens, at_tokens(log_probs, own_tokens))
        return at_token(united(log_probs, own, old, renormalise=renormalise)[0], 2)

    gradient = np.asarray(jax.jit(jax.grad(value))(scores))
    kept = np.isin(np.arange(VOCAB), [*own_tokens.tolist(), *old.tokens.tolist()])
    assert np.all(np.abs(gradient[kept]) > 1e-4) and not kept.all()
    expected = 0 if renormalise else -np.exp(scores[~kept])
    np.testing.assert_allclose(gradient[~kept], expected, rtol=1e-4, atol=1e-8)


# --- the bucket -------------------------------------------------------------------------------------------------------

scores_strategy = st.tuples(
    *[st.lists(st.one_of(st.floats(-12, 12, width=32), st.just(-60.0)), min_size=VOCAB, max_size=VOCAB)] * 2
)


@settings(max_examples=60, deadline=None)
@given(scores_strategy, st.integers(0, VOCAB - 1), st.sampled_from([(1, 1.0), (4, 1.0), (9, 0.9), (VOCAB, 1.0)]))
def test_bucket_has_a_mass_of_one_and_never_more_divergence(scores, token, limits):
    """Guards the data-processing inequality: a tail mass of its own would put tokens outside that are not."""
    support_size, support_mass = limits
    new_log_probs, old_log_probs = (jax.nn.log_softmax(jnp.array(x)) for x in scores)
    old = listed(old_log_probs, token, support_size=support_size, support_mass=support_mass)
    new_bucket, old_bucket = bucketed(new_log_probs, old)
    np.testing.assert_array_equal(new_bucket.tokens, [*old.tokens.tolist(), TAIL])
    np.testing.assert_array_equal(old_bucket.tokens, new_bucket.tokens)
    for bucket in (new_bucket, old_bucket):
        assert not np.isnan(bucket.log_probs).any()
        np.testing.assert_allclose(np.exp(bucket.log_probs).sum(), 1, atol=1e-6)
    assert (
        kl_divergence(new_bucket.log_probs, old_bucket.log_probs)
        <= divergence(new_log_probs, old_log_probs) * (1 + 1e-4) + 1e-5
    )


def divergence(log_p, log_q) -> float:
    """KL in float64."""
    p, q = (np.asarray(x, np.float64) for x in (log_p, log_q))
    return np.sum(np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0.0))


def test_bucket_of_the_whole_vocabulary_is_the_dense_projection():
    """Guards K = V: the tail that is left, rounding, takes no part in divergence or projection."""
    for seed in range(4):
        new_log_probs, old_log_probs = log_probs_of(seed, 3.0), log_probs_of(seed + 10, 3.0)
        old = listed(old_log_probs, 0, support_size=VOCAB, support_mass=1.0)
        sides = bucketed(new_log_probs, old)
        expected = jax.jit(functools.partial(project, bound=0.05))(new_log_probs, old_log_probs)
        result = jax.jit(functools.partial(project_sparse, bound=0.05))(*sides)
        np.testing.assert_allclose(
            kl_divergence(*(x.log_probs for x in sides)), divergence(new_log_probs, old_log_probs), rtol=1e-4
        )
        assert result.violated
        np.testing.assert_allclose(
            np.exp(result.log_probs[:-1]), np.exp(expected.log_probs[old.tokens]), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize(('support_size', 'support_mass'), [(1, 1.0), (4, 1.0), (9, 0.9), (VOCAB, 1.0)])
def test_equal_policies_have_equal_buckets(support_size, support_mass):
    """Guards the first update: a divergence of exactly zero, also where the sum of what is kept rounds above one."""
    above = 0
    for seed in range(12):
        log_probs = log_probs_of(seed, 3.0)
        old = listed(log_probs, seed % VOCAB, support_size=support_size, support_mass=support_mass)
        above += jnp.sum(jnp.exp(old.log_probs)) > 1
        new_bucket, old_bucket = bucketed(log_probs, old)
        np.testing.assert_array_equal(new_bucket.log_probs, old_bucket.log_probs)
        assert np.all(new_bucket.log_probs[:support_size] == old.log_probs)
        assert kl_divergence(new_bucket.log_probs, old_bucket.log_probs) == 0
    assert above or support_size < VOCAB, 'one sum was meant to round above one'


def test_bucket_obeys_the_chain_rule():
    """Guards the gap: KL = KL of the buckets + tail mass of π̃ · KL of the tails, in float64."""
    with jax.enable_x64(True):
        for seed in range(4):
            new, old = (np.asarray(jax.nn.log_softmax(np.float64(log_probs_of(seed + i)))) for i in (0, 20))
            support = listed(jnp.asarray(old), 3, support_size=5, support_mass=1.0)
            sides = bucketed(jnp.asarray(new), support)
            tail = ~np.isin(np.arange(VOCAB), support.tokens)
            mass = [np.exp(x[tail]).sum() for x in (new, old)]
            np.testing.assert_allclose(np.exp([x.log_probs[-1] for x in sides]), mass, rtol=1e-12)
            gap = mass[0] * divergence(new[tail] - np.log(mass[0]), old[tail] - np.log(mass[1]))
            got = kl_divergence(*(x.log_probs for x in sides))
            np.testing.assert_allclose(got + gap, divergence(new, old), rtol=1e-12)
            assert gap > 1e-3


def test_gradient_through_the_bucket_equals_differences():
    """Guards the tail's entry: logits of tokens that are not listed move the projection through it."""
    old = listed(log_probs_of(31), 3, support_size=5, support_mass=1.0)
    with jax.enable_x64(True):
        old = SparseLogProbs(old.tokens, jnp.asarray(old.log_probs, jnp.float64))
        weights = np.linspace(-1, 1, 6)

        def value(scores):
            sides = bucketed(jax.nn.log_softmax(scores), old)
            return jnp.sum(project_sparse(*sides, bound=0.05).log_probs * weights)

        scores = np.asarray(log_probs_of(30), np.float64)
        gradient = np.asarray(jax.jit(jax.grad(value))(scores))
        value, step = jax.jit(value), 1e-5
        expected = [(value(scores + step * e) - value(scores - step * e)) / (2 * step) for e in np.eye(VOCAB)]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    tail = ~np.isin(np.arange(VOCAB), old.tokens)
    assert np.abs(gradient[tail]).min() > 1e-4


@pytest.mark.parametrize('support_size', [1, VOCAB])
def test_nothing_in_the_tail_is_no_nan(support_size):
    """Guards log 0 and its gradient, where everything is kept or one token has it all."""
    scores = 200.0 * jax.nn.one_hot(3, VOCAB) if support_size == 1 else log_probs_of(0, 3.0)
    old = listed(jax.nn.log_softmax(scores), 3, support_size=support_size, support_mass=1.0)

    def value(scores):
        sides = bucketed(jax.nn.log_softmax(scores), old)
        return jnp.sum(jnp.exp(project_sparse(*sides, bound=0.05).log_probs) * jnp.arange(support_size + 1))

    for shift in (0.0, 1.0):
        total, gradient = jax.jit(jax.value_and_grad(value))(scores + shift * log_probs_of(5))
        assert np.isfinite(total) and np.isfinite(gradient).all()


# --- what is left out -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-6, 6, width=32), st.sampled_from([0.0, 1.0])), min_size=7, max_size=7),
    st.integers(0, 6),
    st.integers(1, 6),
)
def test_no_other_support_leaves_out_less(scores, token, size):
    """Guards the ordering of theorem A.1: of all supports of K tokens, the sampled one in it, ours holds most."""
    log_probs = jax.nn.log_softmax(jnp.array(scores))
    kept = set(listed(log_probs, token, support_size=size, support_mass=1.0).tokens.tolist())
    assert len(kept) == size and token in kept
    probs = np.exp(np.asarray(log_probs, np.float64))
    masses = {s: probs[list(s)].sum() for s in itertools.combinations(range(7), size) if token in s}
    assert masses[tuple(sorted(kept))] >= max(masses.values()) - 1e-12
