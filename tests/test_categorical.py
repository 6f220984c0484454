"""Entropy and sampling from the log-probabilities of a whole vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from scipy.stats import chisquare

from troll_jax.ops import categorical
from troll_jax.ops.categorical import entropy, sample
from troll_jax.sharding import make_mesh

INF = np.inf
draw = jax.jit(jax.vmap(lambda uniform, log_probs: sample(jnp.append(uniform, 0.0), log_probs), (0, None)))


def test_entropy_by_hand():
    """Guards units and zeros: nats, and 0 · log 0 = 0, in the gradient too."""
    np.testing.assert_allclose(entropy(jnp.log(jnp.full(7, 1 / 7))), np.log(7), rtol=1e-6)
    log_probs = jnp.array([np.log(0.25), np.log(0.75), -INF])
    np.testing.assert_allclose(entropy(log_probs), -0.25 * np.log(0.25) - 0.75 * np.log(0.75), rtol=1e-6)
    assert entropy(jnp.array([0.0, -INF])) == 0
    gradient = jax.grad(entropy)(log_probs)
    np.testing.assert_allclose(gradient, [-0.25 * (np.log(0.25) + 1), -0.75 * (np.log(0.75) + 1), 0], rtol=1e-5)


def test_intervals_of_the_cumulative_sum():
    """Guards the inversion: token i for uniform numbers in [sum before i, sum with i)."""
    log_probs = jnp.log(jnp.array([0.25, 0.5, 0.125, 0.125]))
    uniforms = jnp.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.8749, 0.875, 0.9999])
    np.testing.assert_array_equal(draw(uniforms, log_probs), [0, 0, 1, 1, 2, 2, 3, 3])
    assert draw(uniforms, log_probs).dtype == jnp.int32


def test_frequencies_are_the_probabilities():
    """Guards the distribution as a whole, by a chi-square test of 100,003 draws."""
    log_probs = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(1), 23)).at[5].set(-INF)
    tokens = draw(jax.random.uniform(jax.random.key(2), 100_003), log_probs)
    counts = np.bincount(tokens, minlength=23)
    assert counts[5] == 0
    expected = np.exp(np.asarray(log_probs, np.float64))
    on = expected > 0
    result = chisquare(counts[on], expected[on] / expected.sum() * 100_003)
    assert result.pvalue > 1e-3
    assert chisquare(counts[on], np.full(22, 100_003 / 22)).pvalue < 1e-9


def test_never_a_token_of_probability_zero():
    """Guards against rounding: a parallel cumulative sum rises a little at some entries whose probability is zero.

    The uniform numbers are those that fall into such a rise.
    """
    scores = jax.random.normal(jax.random.key(3), 50_021)
    zero = jax.random.bernoulli(jax.random.key(4), 0.5, scores.shape)
    log_probs = jax.nn.log_softmax(jnp.where(zero, -INF, scores))
    sums = np.asarray(jnp.cumsum(jnp.exp(log_probs)))
    at = np.flatnonzero((np.diff(sums, prepend=0) > 0) & np.asarray(zero))
    uniforms = (np.concatenate([sums[at], sums[at - 1]]) / sums[-1])[:1009]
    uniforms = np.concatenate([uniforms, np.linspace(0, 1, 101, endpoint=False)]).astype(np.float32)
    tokens = draw(uniforms, log_probs)
    assert np.all(np.isfinite(np.asarray(log_probs)[tokens]))


def test_ends_of_the_range():
    """Guards 0 and the number next to 1, with zeros at both ends of the vocabulary and sums other than one."""
    uniforms = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0))])
    for size in (3, 7, 1009, 50_021):
        log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(size), size))
        log_probs = log_probs.at[jnp.array([0, size - 1])].set(-INF)
        for shift in (0.0, 1e-3, -1e-3):
            first, last = draw(uniforms, log_probs + shift)
            assert first == 1 and 1 <= last <= size - 2
    only = jnp.array([-INF, 0.0, -INF])
    np.testing.assert_array_equal(draw(uniforms, only), [1, 1])


def test_last_token_is_reached():
    """Guards the tail of a large vocabulary: rounding of the sum must not cut its last tokens off."""
    uniform = jnp.full(50_021, -np.log(50_021))
    uniforms = jnp.array([0.5, np.nextafter(np.float32(1), np.float32(0))])
    middle, last = draw(uniforms, uniform)
    assert abs(middle - 25_010) < 10 and last > 50_010


@pytest.mark.parametrize('quarter', range(4))
def test_rare_tokens_come_as_often_as_they_should(quarter):
    """Guards tokens of 1e-8: with 23 bits for all of a vocabulary most are never drawn, and others far too often.

    A stretch of 40 tokens with a hundred thousandth of the mass, through which the numbers go evenly.
    """
    logits = 3 * np.random.default_rng(0).normal(size=50_021).astype(np.float32)
    probs = np.exp(logits.astype(np.float64))
    edges = np.cumsum(probs / probs.sum())
    starts = np.arange(12_000 * quarter + 1, 12_000 * (quarter + 1))
    start = starts[np.argmin(np.abs(edges[starts + 40] - edges[starts] - 1e-5))]
    numbers = edges[start] + (edges[start + 40] - edges[start]) * (np.arange(200_000) + 0.5) / 200_000
    first = np.floor(numbers * 2**23) / 2**23
    uniforms = np.stack([first, (numbers - first) * 2**23], axis=1).astype(np.float32)
    tokens = np.asarray(jax.jit(jax.vmap(sample, (0, None)))(uniforms, logits))
    inner = np.arange(start + 3, start + 38)  # sums are rounded, which shifts the stretch
    got = np.bincount(tokens, minlength=len(probs))[inner] / 200_000
    expected = (np.diff(edges, prepend=0) / (edges[start + 40] - edges[start]))[inner]
    assert expected.min() < 2e-3
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=0.05)


def everything(uniforms, logits, axis_name=None, k=5):
    """All that the blocks of one row are good for."""
    blocks = categorical.summarise(logits, axis_name)
    return (
        categorical.draw(uniforms, blocks, axis_name),
        categorical.most_probable(blocks, axis_name),
        categorical.largest(blocks, k, axis_name),
        (blocks.largest + blocks.log_sum, blocks.entropy),
    )


def logits_of(size: int) -> jax.Array:
    """Rows far from normalised, some entries impossible, the largest in two places of the third row."""
    logits = 30 + 3 * jax.random.normal(jax.random.key(size), (7, size))
    logits = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.3, logits.shape), -INF, logits)
    return logits.at[2, jnp.array([3, size - 2])].set(99.0)


@pytest.mark.parametrize('size', [38, 1009])
def test_blocks_tell_what_the_whole_row_tells(size):
    """Guards sizes below one block and no multiple of one, zeros, and the order of equal logits."""
    logits = logits_of(size)
    uniforms = jax.random.uniform(jax.random.key(2), (7, 2))
    drawn, best, (tokens, log_probs), (log_partition, entropies) = jax.vmap(everything)(uniforms, logits)
    expected = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(log_partition, jax.nn.logsumexp(logits, axis=1), rtol=1e-6)
    np.testing.assert_allclose(entropies, jax.vmap(entropy)(expected), atol=1e-5)
    np.testing.assert_array_equal(best.token, jnp.argmax(logits, axis=1))
    for token, log_prob in (drawn, best):
        np.testing.assert_allclose(log_prob, expected[jnp.arange(7), token], atol=1e-5)
    values, order = jax.lax.top_k(expected, 5)
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(log_probs, values, atol=1e-5)


def test_one_pass_tells_what_two_tell():
    """Guards what accelerators do, of which other tests see nothing on a CPU: blocks without a possible token, and of
    the largest numbers there are."""
    blocks = 30 + 9 * jax.random.normal(jax.random.key(4), (37, 128))
    blocks = jnp.where(jax.random.bernoulli(jax.random.key(5), 0.3, blocks.shape), -INF, blocks)
    huge = jnp.finfo(blocks.dtype).max
    blocks = blocks.at[3].set(-INF).at[5, 100:].set(huge).at[7].set(-huge).at[9, 1:].set(-INF)
    one, two = jax.jit(categorical._in_one_pass)(blocks), jax.jit(categorical._in_two_passes)(blocks)
    np.testing.assert_array_equal(one[0], two[0])
    for ours, theirs in zip(one[1:], two[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_offset_of_the_logits_changes_no_digit():
    """Guards log-probabilities, and with them supports, that are rounded at the size of the logits."""
    logits = jnp.round(64 * jax.random.normal(jax.random.key(3), (7, 1009))) / 16  # sums with 96 are exact
    run = jax.jit(jax.vmap(everything))
    uniforms = jax.random.uniform(jax.random.key(2), (7, 2))
    *plain, (_, entropies) = run(uniforms, logits)
    *shifted, (_, others) = run(uniforms, logits + 96)
    jax.tree.map(np.testing.assert_array_equal, (plain, entropies), (shifted, others))
    exact = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(shifted[0].log_prob, exact[np.arange(7), shifted[0].token], rtol=3e-7)


@pytest.mark.parametrize('k', [5, 16])
def test_parts_of_a_vocabulary_tell_what_the_whole_row_tells(k):
    """Guards a vocabulary on several devices, whose parts are no multiple of a block: of 1,016 tokens, 254 on each."""
    logits, uniforms = logits_of(1016), jax.random.uniform(jax.random.key(2), (7, 2))
    mesh = make_mesh(2, 1, 4)
    parts = jax.shard_map(
        jax.vmap(functools.partial(everything, axis_name='tensor', k=k)),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, 'tensor')),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-5)
    jax.tree.map(
        close, jax.jit(parts)(uniforms, logits), jax.vmap(functools.partial(everything, k=k))(uniforms, logits)
    )


def test_impossible_tokens_are_padding():
    """Guards a list of the most probable tokens that has more places than there are possible ones."""
    blocks = categorical.summarise(jnp.full(70, -INF).at[jnp.array([66, 3])].set(jnp.array([1.0, 0.0])))
    tokens, log_probs = categorical.largest(blocks, 4)
    np.testing.assert_array_equal(tokens, [66, 3, -1, -1])
    assert np.all(np.isneginf(log_probs[2:])) and np.all(np.isfinite(log_probs[:2]))


def test_truncation_by_hand():
    """Guards the order of top-k and top-p, the token that crosses the mass, and ties."""
    probs = jnp.array([0.1, 0.4, 0.05, 0.25, 0.2])
    kept = lambda **changes: np.flatnonzero(
        np.isfinite(categorical.truncate(jnp.log(probs), **dict(top_k=None, top_p=None) | changes))
    ).tolist()
    assert kept() == [0, 1, 2, 3, 4] and kept(top_k=2) == [1, 3] and kept(top_k=1) == [1]
    assert kept(top_p=0.39) == [1] and kept(top_p=0.41) == [1, 3] and kept(top_p=0.84) == [1, 3, 4]
    # Of what top-k leaves: 0.4 / 0.65 = 0.62 of the mass is that of the first.
    assert kept(top_k=2, top_p=0.6) == [1] and kept(top_k=2, top_p=0.7) == [1, 3]
    probs = jnp.array([0.3, 0.2, 0.2, 0.2, 0.1])
    assert kept(top_k=2) == [0, 1, 2, 3] and kept(top_p=0.4) == [0, 1, 2, 3]
