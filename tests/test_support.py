"""Sparse supports: what is listed, what is not, and two of them on common ground."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from troll_jax.ops.projection import kl_divergence, project_sparse
from troll_jax.ops.support import at_token, at_tokens, log_mass, sparsify, union_with_default
from troll_jax.types import SparseLogProbs

INF = np.inf
VOCAB = 13


def log_probs_of(seed: int, scale: float = 2.0, size: int = VOCAB) -> jax.Array:
    return jax.nn.log_softmax(scale * jax.random.normal(jax.random.key(seed), size))


listed = jax.jit(sparsify, static_argnames=('max_tokens', 'mass'))
united = jax.jit(union_with_default, static_argnames='default')


def test_most_probable_first_with_their_exact_log_probs():
    """Guards order and values: what is kept is not renormalised."""
    log_probs = log_probs_of(0)
    order = np.argsort(-np.asarray(log_probs))
    result = listed(log_probs, order[1], max_tokens=5, mass=1.0)
    np.testing.assert_array_equal(result.tokens, order[:5])
    np.testing.assert_array_equal(result.log_probs, log_probs[order[:5]])
    assert result.tokens.dtype == jnp.int32 and result.log_probs.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(log_mass(result)), np.exp(log_probs[order[:5]]).sum(), rtol=1e-6)


def test_all_are_kept_when_there_is_room():
    """Guards K = V with mass 1: the dense distribution, every token once."""
    log_probs = log_probs_of(1)
    result = listed(log_probs, 0, max_tokens=VOCAB, mass=1.0)
    assert sorted(result.tokens.tolist()) == list(range(VOCAB))
    np.testing.assert_array_equal(result.log_probs, log_probs[result.tokens])


@pytest.mark.parametrize(('mass', 'kept'), [(0.49, 1), (0.51, 2), (0.76, 3), (0.9, 4), (0.95, 5), (1.0, 5)])
def test_tokens_are_kept_until_they_hold_the_mass(mass, kept):
    """Guards off-by-one: the token with which the mass is reached is kept, the next one is not."""
    log_probs = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]))
    result = listed(log_probs, 0, max_tokens=5, mass=mass)
    np.testing.assert_array_equal(result.tokens, [*range(kept), *[-1] * (5 - kept)])
    np.testing.assert_array_equal(result.log_probs[kept:], [-INF] * (5 - kept))


def test_sampled_token_takes_a_free_place_or_the_last():
    """Guards the sampled token: it is always listed, with its exact value, and costs at most the least probable one."""
    log_probs = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]))
    np.testing.assert_array_equal(listed(log_probs, 4, max_tokens=4, mass=0.7).tokens, [0, 1, 4, -1])
    full = listed(log_probs, 4, max_tokens=4, mass=1.0)
    np.testing.assert_array_equal(full.tokens, [0, 1, 2, 4])
    assert full.log_probs[3] == log_probs[4]
    # Among the K most probable, but cut off by the mass.
    np.testing.assert_array_equal(listed(log_probs, 3, max_tokens=4, mass=0.7).tokens, [0, 1, 3, -1])
    np.testing.assert_array_equal(listed(log_probs, 5, max_tokens=1, mass=1.0).tokens, [5])


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
    max_tokens, mass = limits
    result = jax.tree.map(np.asarray, listed(log_probs, token, max_tokens=max_tokens, mass=mass))
    real = result.tokens[result.tokens >= 0]
    assert len(set(real)) == len(real) and np.sum(real == token) == 1
    assert np.all(result.log_probs[result.tokens < 0] == -INF)
    np.testing.assert_array_equal(result.log_probs[result.tokens >= 0], np.asarray(log_probs)[real])
    kept = np.exp(result.log_probs.astype(np.float64)).sum()
    assert len(real) >= max_tokens or kept >= mass - 1e-6


def test_impossible_limits_are_refused():
    """Guards messages with the numbers: K beyond the vocabulary would fail deep inside the compiler."""
    log_probs = log_probs_of(0)
    for max_tokens in (0, VOCAB + 1):
        with pytest.raises(ValueError, match=f'vocabulary size {VOCAB}; got {max_tokens}'):
            sparsify(log_probs, 0, max_tokens=max_tokens)
    for mass in (0.0, 1.5):
        with pytest.raises(ValueError, match=f'got {mass}'):
            sparsify(log_probs, 0, max_tokens=3, mass=mass)


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


def test_union_of_different_supports():
    """Guards the tail rule: exact values for π̃ everywhere, the default for π_old where only π̃ lists the token."""
    new_log_probs, old_log_probs = log_probs_of(3), log_probs_of(4)
    new = listed(new_log_probs, 6, max_tokens=5, mass=1.0)
    old = listed(old_log_probs, 6, max_tokens=4, mass=1.0)
    a, b = jax.tree.map(np.asarray, united(new_log_probs, new, old, default=1e-9))
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


@pytest.mark.parametrize('mass', [1.0, 1 - 1e-5, 0.8])
def test_equal_policies_are_equal_on_the_union(mass):
    """Guards the first update of every rollout: one rule for both supports, or the sampled token would differ.

    The KL is exactly zero, also where the token sampled is not among the most probable.
    """
    for seed in range(3):
        log_probs = log_probs_of(seed, scale=3.0)
        for token in (int(jnp.argmax(log_probs)), int(jnp.argmin(log_probs))):
            own = listed(log_probs, token, max_tokens=5, mass=mass)
            new, old = united(log_probs, own, own)
            np.testing.assert_array_equal(new.log_probs, old.log_probs)
            assert kl_divergence(new.log_probs, old.log_probs) == 0


def test_union_leaves_padding_out_of_the_projection():
    """Guards short supports: the padding of either has no part in the result."""
    new_log_probs, old_log_probs = log_probs_of(5), log_probs_of(6)
    run = jax.jit(lambda new, old: project_sparse(*union_with_default(new_log_probs, new, old), bound=0.05))
    new = listed(new_log_probs, 1, max_tokens=5, mass=1.0)
    old = listed(old_log_probs, 1, max_tokens=5, mass=1.0)
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
    new = listed(log_probs, 2, max_tokens=4, mass=1.0)
    old = listed(log_probs_of(8), 2, max_tokens=4, mass=1.0)

    def total(x):
        entries = union_with_default(x, new, old)[0].log_probs
        return jnp.sum(jnp.where(entries > -INF, entries, 0.0))

    gradient = np.asarray(jax.jit(jax.grad(total))(log_probs))
    expected = np.zeros(VOCAB)
    expected[list({*new.tokens.tolist(), *old.tokens.tolist()})] = 1
    np.testing.assert_array_equal(gradient, expected)
