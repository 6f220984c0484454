"""The projection on a support: what it keeps of the rest, and how far it is from that of the whole vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import INF, exact, kl, normalise, projected_pairs
from scipy.special import logsumexp

from troll_jax.ops.needs import give
from troll_jax.ops.projection import project, project_sparse
from troll_jax.ops.support import TAIL, at_tokens, bucket_tail, default_tail, sparsify
from troll_jax.types import SparseLogProbs


def sparse(log_probs) -> SparseLogProbs:
    return SparseLogProbs(jnp.arange(len(log_probs), dtype=jnp.int32), jnp.asarray(log_probs, jnp.float32))


@jax.jit
def sparse_solution(new, old, bound):
    return project_sparse(new, old, bound=bound)


def test_whole_vocabulary_kept_equals_dense():
    """Guards K = V: what is sparse must be the oracle when nothing is left out."""
    for name, bound, new, old, dense in projected_pairs(7, 'float32'):
        result = sparse_solution(sparse(new), sparse(old), bound)
        np.testing.assert_allclose(np.exp(result.log_probs), np.exp(dense.log_probs), atol=1e-5, err_msg=name)
        assert result.violated == dense.violated, name


def truncated():
    """A pair of which 5 of 11 tokens are kept; outside of the region on those."""
    rng = np.random.default_rng(11)
    new, old = (normalise(2 * rng.normal(size=11)) for _ in range(2))
    return new, old, np.array([2, 10, 5, 7, 3])


def test_result_keeps_the_mass_of_the_support():
    """Guards the normalisation: on the support, π is the projected conditional times π̃(S)."""
    new, old, kept = truncated()
    result = sparse_solution(sparse(new[kept]), sparse(old[kept]), 0.05)
    assert result.violated
    expected = logsumexp(new[kept]) + exact(normalise(new[kept]), normalise(old[kept]), 0.05)
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-3)
    np.testing.assert_allclose(logsumexp(result.log_probs), logsumexp(new[kept]), atol=1e-6)
    assert 0.05 * (1 - 1e-3) < kl(result.log_probs, old[kept]) < 0.05


def test_padding_does_no_harm():
    """Guards −inf in both: values and gradients of the real entries stay, those of the padding are zero."""
    new, old, kept = truncated()
    padding = np.full(3, -INF)

    def value(new_log_probs, old_log_probs):
        result = project_sparse(sparse(new_log_probs), sparse(old_log_probs), bound=0.05)
        return jnp.sum(jnp.exp(result.log_probs) * jnp.arange(len(new_log_probs))), result

    run = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))
    (by_new, by_old), plain = run(jnp.float32(new[kept]), jnp.float32(old[kept]))
    padded_inputs = (jnp.float32(np.concatenate([x[kept], padding])) for x in (new, old))
    (padded_by_new, padded_by_old), padded = run(*padded_inputs)
    np.testing.assert_allclose(padded.log_probs[:5], plain.log_probs, atol=1e-6)
    assert np.all(padded.log_probs[5:] == -INF)
    np.testing.assert_allclose(padded_by_new, np.concatenate([by_new, np.zeros(3)]), atol=1e-5)
    np.testing.assert_allclose(padded_by_old, np.concatenate([by_old, np.zeros(3)]), atol=1e-5)


def test_sparse_identity_inside():
    """Guards the identity to the bit: taking the mass out and putting it back would round."""
    new, _, kept = truncated()
    inputs = sparse(new[kept])
    shifted = sparse(new[kept] + 1e-3 * np.arange(5))
    result = sparse_solution(inputs, shifted, 0.05)
    assert not result.violated
    np.testing.assert_array_equal(result.log_probs, inputs.log_probs)


def test_renormalised_input_gives_the_form_of_the_paper():
    """Guards the two forms against each other: with π̃(S) = 1 the result is a distribution on the support."""
    new, old, kept = truncated()
    full = sparse_solution(sparse(new[kept]), sparse(old[kept]), 0.05)
    paper = sparse_solution(sparse(normalise(new[kept])), sparse(normalise(old[kept])), 0.05)
    np.testing.assert_allclose(logsumexp(paper.log_probs), 0, atol=1e-6)
    np.testing.assert_allclose(paper.log_probs, full.log_probs - logsumexp(new[kept]), atol=1e-5)


def test_gradient_reaches_tokens_that_were_not_kept():
    """Guards against a tail whose mass grows unseen: more of it must lower log π on the support, as it lowers π̃'s."""
    new, old, kept = truncated()
    tail = np.setdiff1d(np.arange(11), kept)

    def value(scores):
        log_probs = jax.nn.log_softmax(scores)[kept]
        return project_sparse(SparseLogProbs(jnp.asarray(kept), log_probs), sparse(old[kept]), bound=0.05).log_probs[1]

    gradient = jax.jit(jax.grad(value))(jnp.float32(new))
    np.testing.assert_allclose(gradient[tail], -np.exp(new[tail]), rtol=1e-4)
    assert abs(gradient.sum()) < 1e-6


# --- against the whole vocabulary -------------------------------------------------------------------------------------

VOCAB = 12


@functools.partial(jax.jit, static_argnames=('kept', 'tail_rule'))
def project_kept(new, old, bounds, kept, tail_rule):
    """Projections [M, E, …] on the most probable tokens of both, as an update makes them; and π_old's support."""

    def one(new, old, bound):
        token = jnp.argmax(old)
        own, listed = (sparsify(x, token, support_size=kept, support_mass=1.0) for x in (new, old))
        sides = tail_rule(at_tokens(new, listed.tokens), listed, **give(tail_rule, new=own))
        return sides[0].tokens, project_sparse(*sides, bound=bound).log_probs, listed.tokens

    return jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))(new, old, bounds)


@jax.jit
def project_dense(new, old, bounds):
    one = lambda new, old, bound: project(new, old, bound=bound).log_probs
    return jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))(new, old, bounds)


def whole(new, tokens, log_probs) -> np.ndarray:
    """A projection on a support, for all tokens [V]: where nothing is listed, π̃, scaled to the tail's mass."""
    full, real = np.array(new), tokens >= 0
    full[tokens[real]] = log_probs[real]
    tail = ~np.isin(np.arange(VOCAB), tokens[real])
    if TAIL in tokens and tail.any():
        full[tail] = log_probs[tokens == TAIL] + new[tail] - logsumexp(new[tail])
    return full


@pytest.mark.parametrize(('tail_rule', 'constant', 'most'), [(default_tail, 30, VOCAB), (bucket_tail, 3, VOCAB - 1)])
def test_error_is_bounded_by_the_mass_left_out(tail_rule, constant, most):
    """Guards the spirit of theorem A.2: what is left out bounds the error, and with it the error vanishes.

    The total variation from the dense projection is at most a constant times the mass of either policy that π_old's
    support leaves out.

    The constants are measured: over 1,440 pairs and bounds like these the largest ratio was 11.2 for the default rule
    (a token at 1e-12 that has changed places counts for log 1e12 = 28 times its probability) and 1.08 for the bucket.
    """
    rng = np.random.default_rng(21)
    bounds, kept = np.array([0.01, 0.05, 0.25]), (3, 8, most)  # a bucket of one token is that token
    old = np.stack([normalise(scale * rng.normal(size=VOCAB)) for scale in (1, 2, 4) for _ in range(8)])
    new = np.stack([normalise(row + (0.1, 0.5, 1, 2)[i % 4] * rng.normal(size=VOCAB)) for i, row in enumerate(old)])
    with jax.enable_x64(True):
        dense = np.exp(project_dense(new, old, bounds))
        results = [jax.tree.map(np.asarray, project_kept(new, old, bounds, k, tail_rule)) for k in kept]
    means = []
    for tokens, log_probs, listed in results:
        errors = []
        for i, j in np.ndindex(len(new), len(bounds)):
            error = np.abs(np.exp(whole(new[i], tokens[i, j], log_probs[i, j])) - dense[i, j]).sum() / 2
            left_out = max(1 - np.exp(x[i][listed[i, j]]).sum() for x in (new, old))
            assert error <= constant * max(left_out, 0) + 1e-9, (i, j, error, left_out)
            errors.append(error)
        means.append(np.mean(errors))
    assert means[0] > 0.01 and means[0] > 2 * means[1] and means[2] < 1e-9
