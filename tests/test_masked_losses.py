"""Rules by hand: which tokens are left out, at ratios and probabilities on both sides of every bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.losses import LossInputs, capped_ratio, importance_weighted, ppo_clip
from troll_jax.ops.masked_losses import dppo_binary, erc, icepop, ipo, kpop, masked, opsm, shuffled, trm, vaco
from troll_jax.ops.projection import kl_divergence
from troll_jax.types import START, SparseLogProbs


def row_of(old, new, segments=None) -> LossInputs:
    """A row of a vocabulary of two: the probability of the sampled token 0 under both policies."""
    old, new = (jnp.asarray(x, jnp.float32) for x in (old, new))
    tokens = jnp.zeros(len(old), jnp.int32)
    segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments)
    listed = lambda p: SparseLogProbs(jnp.tile(jnp.arange(2), (len(p), 1)), jnp.log(jnp.stack([p, 1 - p], axis=1)))
    return LossInputs(tokens, segments, jnp.log(new), jnp.log(old), listed(new), listed(old), None)


def kl(p, q) -> float:
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


OLD, NEW, ADVANTAGES = (
    [0.3, 0.3, 0.3, 0.01, 0.5, 0.5],
    [0.5, 0.5, 0.1, 0.09, 0.55, 0.4],
    jnp.array([1.0, -1.0, -1.0, 1.0, 1.0, 1.0]),
)


@pytest.mark.parametrize(
    ('rule', 'dropped'),
    [
        (functools.partial(dppo_binary, bound=0.15), [1, 0, 1, 0, 0, 0]),
        (functools.partial(dppo_binary, bound=0.07), [1, 0, 1, 1, 0, 0]),
        (functools.partial(dppo_binary, bound=kl(0.3, 0.5) + 1e-4, divergence=kl_divergence), [0, 0, 1, 0, 0, 0]),
        (functools.partial(dppo_binary, bound=kl(0.3, 0.5) - 1e-4, divergence=kl_divergence), [1, 0, 1, 0, 0, 0]),
        (functools.partial(ipo, bound=0.15), [1, 1, 1, 0, 0, 0]),
        (functools.partial(icepop, lower=0.5, upper=5.0), [0, 0, 1, 1, 0, 0]),
        # Of 0.01 and 0.09 it is 0.13 nats one way and 0.06 the other.
        (functools.partial(kpop, bound=0.1), [0, 0, 1, 1, 0, 0]),
        (functools.partial(kpop, bound=0.014), [1, 1, 1, 1, 0, 1]),
    ],
)
def test_tokens_by_hand(rule, dropped):
    """Guards each bound, the side of the advantage, and a divergence that is taken the wrong way round."""
    np.testing.assert_array_equal(rule(row_of(OLD, NEW), ADVANTAGES), np.array(dropped, bool))


SEGMENTS = [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ('rule', 'dropped'),
    [
        # The largest KL(π_old ‖ π̃) of each response; of the second by its token of 0.3 and 0.1 alone.
        (functools.partial(trm, bound=kl(0.3, 0.5) + 0.01), [0, 0, 1, 1, 0, 0]),
        (functools.partial(trm, bound=kl(0.5, 0.4) - 1e-3), [1, 1, 1, 1, 1, 1]),
        # The mean of −log r is −0.51, −0.55 and 0.06.
        (functools.partial(opsm, bound=0.05), [0, 0, 0, 0, 0, 0]),
        # The mean of |r − 1| is 0.67, 4.33 and 0.15.
        (functools.partial(vaco, bound=0.2), [1, 0, 1, 1, 0, 0]),
        (functools.partial(vaco, bound=1.0), [0, 0, 1, 1, 0, 0]),
    ],
)
def test_responses_by_hand(rule, dropped):
    """Guards means and maxima over a response, and what of it is left out."""
    np.testing.assert_array_equal(rule(row_of(OLD, NEW, SEGMENTS), ADVANTAGES), np.array(dropped, bool))


def test_off_policy_responses_with_a_negative_advantage():
    """Guards the sign of the advantage and of the divergence: unlikely tokens of bad responses are left out."""
    row = row_of([0.5, 0.5, 0.5, 0.5], [0.1, 0.6, 0.1, 0.6], [1, 1, 2, 2])
    assert np.log(5) / 2 - np.log(1.2) / 2 > 0.7
    dropped = opsm(row, jnp.array([-1.0, -1.0, 1.0, 1.0]), bound=0.7)
    np.testing.assert_array_equal(dropped, [True, True, False, False])


def test_entropies_by_hand():
    """Guards the ratio that is taken: entropies 0.611, 0.693 and 0.325 against 0.611 of the old policy."""
    row = row_of([0.3] * 4, [0.3, 0.5, 0.1, 0.29])
    np.testing.assert_array_equal(erc(row, jnp.ones(4)), [False, True, True, False])
    np.testing.assert_array_equal(erc(row, jnp.ones(4), upper=1.2), [False, False, True, False])


def test_masked_keeps_what_the_objective_constrains():
    """Guards the union of both constraints, and that what is kept is the objective's, gradient included."""
    row, drop = row_of(OLD, NEW), functools.partial(ipo, bound=0.15)
    clip = ppo_clip(row, ADVANTAGES)
    result = masked(row, ADVANTAGES, drop=drop, objective=ppo_clip)
    np.testing.assert_array_equal(result.loss, np.where([1, 1, 1, 0, 0, 0], 0, clip.loss))
    np.testing.assert_array_equal(result.constrained, np.array([1, 1, 1, 0, 0, 0]) | np.asarray(clip.constrained))
    np.testing.assert_array_equal(result.logs['clipped'], result.constrained)


def test_a_random_mask_has_the_share_of_the_objective():
    """Guards a control that leaves out more or less of a response than the clip, or the same tokens each time."""
    segments = np.repeat([1, 2, 0, 3], [13, 7, 5, 17])
    new = np.random.default_rng(0).uniform(0.15, 0.6, len(segments))
    row, advantages = row_of([0.3] * len(segments), new, segments), jnp.ones(len(segments))
    clipped = ppo_clip(row, advantages).constrained
    masks = [masked(row, advantages, START._replace(updates=n), drop=shuffled).constrained for n in (0, 0, 1)]
    for segment in (1, 2, 3):
        counts = [int(jnp.sum(mask[segments == segment])) for mask in (clipped, *masks)]
        assert len(set(counts)) == 1 and 0 < counts[0] < np.sum(segments == segment)
    np.testing.assert_array_equal(masks[0], masks[1])
    assert np.any(masks[0] != masks[2]) and np.any(masks[0] != clipped)


def test_a_capped_ratio_keeps_its_gradient():
    """Guards truncated importance weights against a clip, which has no gradient beyond its bound."""

    def total(new_log_probs):
        row = row_of(OLD, NEW)._replace(new_log_probs=new_log_probs)
        capped = functools.partial(capped_ratio, limit=1.5)
        return jnp.sum(importance_weighted(row, ADVANTAGES, ratio=capped).loss)

    weights = np.minimum(np.array(NEW) / np.array(OLD), 1.5)
    np.testing.assert_allclose(total(jnp.log(jnp.array(NEW))), -np.sum(weights * ADVANTAGES), rtol=1e-5)
    gradient = jax.grad(total)(jnp.log(jnp.array(NEW)))
    np.testing.assert_allclose(gradient, -weights * ADVANTAGES, rtol=1e-5)


def test_bounds_out_of_range():
    """Guards a mask that would leave out every token, or none."""
    row = row_of(OLD, NEW)
    for rule, message in [
        (functools.partial(ipo, bound=0.0), 'bound must be positive; got 0.0'),
        (functools.partial(icepop, upper=0.9), 'upper must be at least 1; got 0.9'),
        (functools.partial(erc, lower=1.0), r'lower must be in \[0, 1\); got 1.0'),
    ]:
        with pytest.raises(ValueError, match=message):
            rule(row, ADVANTAGES)
