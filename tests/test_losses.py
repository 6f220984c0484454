"""Objectives by hand, against each other, and against float64 differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from troll_jax.ops.categorical import entropy
from troll_jax.ops.losses import (
    LossInputs,
    cispo,
    importance_weighted,
    ppo_clip,
    sequence_ratio,
    troll,
)
from troll_jax.ops.masked_losses import dppo, masked
from troll_jax.ops.needs import give
from troll_jax.ops.projection import kl_divergence, project_sparse, project_sparse_sequence
from troll_jax.ops.regions import (
    chi_squared_region,
    entropy_region,
    sequence_region,
    token_region,
    total_variation_region,
)
from troll_jax.ops.schedules import linear_bound
from troll_jax.ops.support import at_tokens, bucket_tail, default_tail, sparsify
from troll_jax.types import Progress, SparseLogProbs

INF = np.inf
VOCAB, LENGTH, KEPT = 13, 5, 7
TOKENS = jnp.array([3, 11, 0, 7, 3])
ADVANTAGES = jnp.array([1.0, -0.5, 2.0, -1.5, 0.7])


def response_of(new_scores, old_scores, tokens=TOKENS, kept=KEPT, tail_rule=default_tail) -> LossInputs:
    """The inputs that the head gives to an objective, from scores [T, V] of both policies."""

    def one(new, old, token):
        new, old = jax.nn.log_softmax(new), jax.nn.log_softmax(old)
        own, listed = (
            sparsify(jax.lax.stop_gradient(x), token, support_size=kept, support_mass=1.0) for x in (new, old)
        )
        own = own._replace(log_probs=at_tokens(new, own.tokens))
        on_support = tail_rule(at_tokens(new, listed.tokens), listed, **give(tail_rule, new=own))
        return LossInputs(token, jnp.int32(1), new[token], old[token], *on_support, entropy(new))

    return jax.vmap(one)(new_scores, old_scores, tokens)


def policy(seed: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (LENGTH, VOCAB))


def outside_and_inside() -> tuple[jax.Array, jax.Array]:
    """Scores of a new and an old policy: three tokens far apart, two nearly equal."""
    old = policy(0)
    change = jnp.array([1.0, 0.01, 1.5, 0.02, 0.7])[:, None]
    return old + change * policy(1), old


@functools.cache
def gradient_of(objective, **settings):
    """Jitted gradient [T, V] of the summed loss by the scores of the new policy, with the LossOutputs."""

    def total(new_scores, old_scores, advantages, kept, tail_rule=default_tail):
        response = response_of(new_scores, old_scores, kept=kept, tail_rule=tail_rule)
        losses = objective(response, advantages, **settings)
        return jnp.sum(losses.loss), losses

    return jax.jit(jax.grad(total, has_aux=True), static_argnames=('kept', 'tail_rule'))


def policy_gradient(scores, advantages) -> np.ndarray:
    """Gradient of −Σ_t A_t log p(o_t) by the scores, which is that of −Σ_t A_t r_t at a ratio of one."""
    return -np.asarray(advantages)[:, None] * (np.eye(VOCAB)[np.asarray(TOKENS)] - jax.nn.softmax(scores))


def constrained(losses) -> np.ndarray:
    """The tokens that an objective projected or clipped, which its log says too."""
    (name,) = {'projected', 'clipped'} & losses.logs.keys()
    np.testing.assert_array_equal(losses.logs[name], losses.constrained)
    return np.asarray(losses.constrained)


@pytest.mark.parametrize('kept', [VOCAB, KEPT, 2])
@pytest.mark.parametrize(
    ('objective', 'settings', 'tail_rule'),
    [
        (troll, {}, default_tail),
        (troll, {}, bucket_tail),
        (troll, {'region': sequence_region}, default_tail),
        (ppo_clip, {}, default_tail),
    ],
)
def test_on_policy_gradient_is_the_plain_one(objective, settings, tail_rule, kept):
    """Guards the first update of every rollout: ratio one, nothing projected or clipped, no regression."""
    scores = policy(0, 2.0)
    gradient, losses = gradient_of(objective, **settings)(scores, scores, ADVANTAGES, kept, tail_rule)
    np.testing.assert_allclose(losses.loss, -ADVANTAGES, rtol=1e-6)
    np.testing.assert_allclose(gradient, policy_gradient(scores, ADVANTAGES), atol=1e-6)
    assert not constrained(losses).any() and np.all(losses.logs.get('regression', 0) == 0)


def test_zero_advantage_has_no_policy_gradient():
    """Guards groups without a signal: the clip gives exactly nothing, TROLL its regression alone."""
    new, old = outside_and_inside()
    gradient, losses = gradient_of(ppo_clip)(new, old, jnp.zeros(LENGTH), KEPT)
    assert np.all(gradient == 0) and np.all(losses.loss == 0) and not constrained(losses).any()
    gradient, losses = gradient_of(troll, alpha=0.0)(new, old, jnp.zeros(LENGTH), KEPT)
    assert np.all(gradient == 0) and np.all(losses.loss == 0)


# --- TROLL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kept', [VOCAB, 3])
def test_inside_the_region_there_is_no_regression(kept):
    """Guards zero to the bit, value and gradient: a truncated KL would push mass out of the support at every token."""
    old = policy(0)
    new = old + 0.05 * policy(1)
    gradient, losses = gradient_of(troll)(new, old, jnp.zeros(LENGTH), kept)
    assert not constrained(losses).any() and np.all(losses.logs['regression'] == 0)
    assert np.all(np.asarray(gradient) == 0)
    assert np.all(losses.logs['evaluations'] == 1) and not losses.logs['unconverged'].any()


def test_loss_by_its_definition():
    """Guards signs, the sampled token and α: −π(o)/π_old(o) · A + α KL(π̃ ‖ π) with π from the projection."""
    new, old = outside_and_inside()
    response = response_of(new, old)
    gradient, losses = gradient_of(troll, alpha=0.5, bound=0.05)(new, old, ADVANTAGES, KEPT)
    np.testing.assert_array_equal(losses.logs['projected'], [True, False, True, False, True])
    for t in range(LENGTH):
        row = jax.tree.map(lambda x, t=t: x[t], response)
        result = project_sparse(row.new, row.old, bound=0.05)
        at = int(np.flatnonzero(row.new.tokens == TOKENS[t])[0])
        ratio = np.exp(result.log_probs[at] - row.old.log_probs[at])
        on = np.isfinite(row.new.log_probs)
        q, p = np.asarray(row.new.log_probs, np.float64)[on], np.asarray(result.log_probs, np.float64)[on]
        regression = 0.5 * np.sum(np.exp(q) * (q - p))
        np.testing.assert_allclose(losses.logs['regression'][t], regression, rtol=1e-4, atol=1e-7)
        for name, expected in [('weight', result.weight), ('eta', 1 / result.weight - 1), ('kl_projected', result.kl)]:
            np.testing.assert_allclose(losses.logs[name][t], expected, rtol=1e-4, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(losses.logs['kl_unprojected'][t], result.kl_unprojected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(losses.loss[t], regression - ratio * ADVANTAGES[t], rtol=1e-4)
    assert np.isfinite(gradient).all()


def central_by_scores(function, scores, step=1e-5) -> np.ndarray:
    """Gradient of a function of float64 scores [T, V] by central differences."""
    scores = np.asarray(scores, np.float64)
    gradient = np.zeros_like(scores)
    for index in np.ndindex(*scores.shape):
        change = np.zeros_like(scores)
        change[index] = step
        gradient[index] = (function(scores + change) - function(scores - change)) / (2 * step)
    return gradient


def test_gradient_of_troll_equals_differences():
    """Guards the chain of ratio, projection and log-sum-exp, and the stopped gradient of the regression's target."""
    new, old = (np.asarray(x, np.float64) for x in outside_and_inside())
    advantages = np.asarray(ADVANTAGES, np.float64)
    with jax.enable_x64(True):
        ratio_gradient, _ = gradient_of(troll, alpha=0.0)(new, old, advantages, KEPT)
        whole_gradient, _ = gradient_of(troll, alpha=0.7)(new, old, advantages, KEPT)
        target = jax.jit(
            jax.vmap(
                lambda row: project_sparse(row.new, row.old, bound=0.05).log_probs,
            )
        )(response_of(new, old))
        ratio_loss = jax.jit(lambda x: jnp.sum(troll(response_of(x, old), advantages, alpha=0.0).loss))
        regression = jax.jit(
            lambda x: 0.7 * jnp.sum(jax.vmap(kl_divergence)(response_of(x, old).new.log_probs, target))
        )
        np.testing.assert_allclose(ratio_gradient, central_by_scores(ratio_loss, new), atol=1e-6)
        expected = central_by_scores(regression, new)
    np.testing.assert_allclose(whole_gradient - ratio_gradient, expected, atol=1e-7)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize('tail_rule', [default_tail, bucket_tail])
@pytest.mark.parametrize(
    'region', [token_region, sequence_region, entropy_region, total_variation_region, chi_squared_region]
)
def test_gradient_of_every_region_and_tail_equals_differences(region, tail_rule):
    """Guards the choices of gin together: a shared w or an entry for the tail that the gradient does not reach."""
    new, old = (np.asarray(x, np.float64) for x in outside_and_inside())
    advantages = np.asarray(ADVANTAGES, np.float64)
    settings = dict(alpha=0.0, region=region, bound=0.05)
    with jax.enable_x64(True):
        gradient, losses = gradient_of(troll, **settings)(new, old, advantages, KEPT, tail_rule)
        loss = lambda x: jnp.sum(troll(response_of(x, old, tail_rule=tail_rule), advantages, **settings).loss)
        expected = central_by_scores(jax.jit(loss), new)
    assert constrained(losses).any()
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert np.abs(expected).max() > 0.01


def test_a_region_for_the_response_by_its_definition():
    """Guards the mask on its way to the region, and values of the response that the log wants for each token."""
    new, old = outside_and_inside()
    segments = jnp.array([1, 1, 1, 1, 0])
    response = response_of(new, old)._replace(segments=segments)
    losses = jax.jit(functools.partial(troll, bound=0.05, alpha=0.5, region=sequence_region))(response, ADVANTAGES)
    result = jax.jit(functools.partial(project_sparse_sequence, bound=0.05))(response.new, response.old, segments)
    np.testing.assert_array_equal(constrained(losses), segments > 0)
    assert result.weight[0] < 1 and np.all(result.weight[:4] == result.weight[0])
    np.testing.assert_allclose(losses.logs['weight'], result.weight, rtol=1e-5)
    np.testing.assert_allclose(losses.logs['kl_projected'][:4].mean(), 0.05, rtol=1e-3)
    assert losses.logs['kl_projected'][:4].max() > 0.06, 'a token was meant to be beyond the bound on its own'
    for t in range(4):
        at = int(np.flatnonzero(response.new.tokens[t] == TOKENS[t])[0])
        ratio = np.exp(result.log_probs[t, at] - response.old.log_probs[t, at])
        regression = 0.5 * kl_divergence(response.new.log_probs[t], result.log_probs[t])
        np.testing.assert_allclose(losses.loss[t], regression - ratio * ADVANTAGES[t], rtol=1e-4)


def test_a_schedule_is_the_number_that_it_gives():
    """Guards a schedule that is read at the wrong time, or not at all."""
    new, old = outside_and_inside()
    response = response_of(new, old)
    schedule = functools.partial(linear_bound, start=0.01, end=0.05, steps=4)
    at = jax.jit(lambda step: troll(response, ADVANTAGES, Progress(step=step), bound=schedule))
    for step, bound in [(0, 0.01), (2, 0.03), (9, 0.05)]:
        found, expected = at(step), jax.jit(functools.partial(troll, bound=bound))(response, ADVANTAGES)
        for losses in (found, expected):
            losses.logs.pop('evaluations')  # rounding may end a search one later
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected)
    assert at._cache_size() == 1
    start = jax.jit(functools.partial(troll, bound=schedule))(response, ADVANTAGES)
    np.testing.assert_allclose(start.loss, at(0).loss, rtol=1e-5)


def test_regression_alone_brings_the_policy_back():
    """Guards the direction of the pull: each step gets closer to the projection, and at last into the region."""
    new, old = outside_and_inside()
    run = gradient_of(troll)
    divergences = []
    for _ in range(60):
        gradient, losses = run(new, old, jnp.zeros(LENGTH), VOCAB)
        divergences.append(np.asarray(losses.logs['regression']))
        new = new - 2.0 * gradient
    divergences = np.stack(divergences)
    outside = divergences[0] > 0
    assert outside.sum() == 3
    assert np.all(np.diff(divergences[:10, outside], axis=0) < 0)
    assert np.all(divergences[-1, outside] < 0.01 * divergences[0, outside])
    assert np.all(divergences[:, ~outside] == 0)


def test_one_absurd_token_gives_a_number():
    """Guards overflow: a token that became e¹⁰⁰ times as probable must not make the loss or a gradient infinite."""
    old = jnp.zeros((LENGTH, VOCAB)).at[:, 0].set(100.0)
    new = jnp.zeros((LENGTH, VOCAB)).at[:, 3].set(100.0)
    for objective in (troll, ppo_clip):
        for first, second in ((new, old), (old, new)):
            gradient, losses = gradient_of(objective)(first, second, ADVANTAGES, KEPT)
            assert np.isfinite(losses.loss).all() and np.isfinite(gradient).all()
            assert not np.any(losses.logs.get('unconverged', False))
            assert all(np.isfinite(value).all() for value in losses.logs.values())


# --- clip -------------------------------------------------------------------------------------------------------------

# Ratio, advantage → loss, whether clipped; with lower 0.1, upper 0.3, dual 3.
CLIP_TABLE = [
    (1.0, 2.0, -2.0, False),
    (1.2, 2.0, -2.4, False),  # within the upper bound, beyond what the lower one would allow
    (1.5, 2.0, -2.6, True),
    (0.5, 2.0, -1.0, False),  # the pessimistic one of the two
    (0.95, -2.0, 1.9, False),
    (0.5, -2.0, 1.8, True),
    (1.5, -2.0, 3.0, False),
    (2.9, -2.0, 5.8, False),
    (5.0, -2.0, 6.0, True),  # dual clip
    (5.0, 0.0, 0.0, False),
]


def clip_response(ratios) -> LossInputs:
    ratios = jnp.asarray(ratios)
    old = jnp.full(len(ratios), -1.5, ratios.dtype)
    return LossInputs(
        jnp.zeros(len(ratios), jnp.int32),
        jnp.ones(len(ratios), jnp.int32),
        old + jnp.log(ratios),
        old,
        None,
        None,
        None,
    )


def test_clip_by_hand():
    """Guards each side with its own bound, the pessimistic maximum, the dual clip, and where the gradient is gone."""
    ratios, advantages, losses, clipped = (np.array(column) for column in zip(*CLIP_TABLE, strict=True))
    settings = dict(lower=0.1, upper=0.3, dual=3.0)
    result = ppo_clip(clip_response(ratios), jnp.asarray(advantages), **settings)
    np.testing.assert_allclose(result.loss, losses, rtol=1e-5)
    np.testing.assert_array_equal(result.logs['clipped'], clipped)
    assert result.logs.keys() == {'clipped'}

    def total(new_log_probs):
        response = clip_response(ratios)._replace(new_log_probs=new_log_probs)
        return jnp.sum(ppo_clip(response, jnp.asarray(advantages), **settings).loss)

    gradient = jax.jit(jax.grad(total))(clip_response(ratios).new_log_probs)
    np.testing.assert_allclose(gradient, np.where(clipped, 0, -ratios * advantages), rtol=1e-5, atol=1e-7)


def test_clip_without_dual_clip():
    """Guards None as "off": no NaN from inf · 0 where the advantage is zero."""
    ratios, advantages = jnp.array([50.0, 50.0, 50.0]), jnp.array([-2.0, 0.0, 1.0])
    result = ppo_clip(clip_response(ratios), advantages, dual=None)
    np.testing.assert_allclose(result.loss, [100, 0, -1.2], rtol=1e-5)
    total = lambda x: jnp.sum(ppo_clip(clip_response(ratios)._replace(new_log_probs=x), advantages, dual=None).loss)
    np.testing.assert_allclose(jax.grad(total)(clip_response(ratios).new_log_probs), [100, 0, 0], rtol=1e-5)


def test_gradient_of_clip_equals_differences():
    """Guards the gradient by the scores: nothing of it may pass through the supports."""
    new, old = (np.asarray(x, np.float64) for x in outside_and_inside())
    advantages = -np.asarray(ADVANTAGES, np.float64)
    with jax.enable_x64(True):
        gradient, losses = gradient_of(ppo_clip)(new, old, advantages, KEPT)
        total = jax.jit(lambda x: jnp.sum(ppo_clip(response_of(x, old), advantages).loss))
        np.testing.assert_allclose(gradient, central_by_scores(total, new), atol=1e-8)
    ratios = np.exp(np.asarray(new - old)[range(LENGTH), TOKENS] - logsumexp(new, axis=1) + logsumexp(old, axis=1))
    assert np.abs(ratios - np.array([[0.8], [1.2]])).min() > 1e-3, 'no token was meant to be at a kink'
    assert constrained(losses).any() and not constrained(losses).all()


# --- ratios, and what objectives do with one --------------------------------------------------------------------------


def test_the_ratio_of_a_response_by_hand():
    """Guards the geometric mean, whose gradient is each token's own, and the limit from above."""
    log_ratios = jnp.log(jnp.array([2.0, 8.0, 9.0, 3.0]))
    segments = jnp.array([2, 2, 0, 1])
    ratio, backward = jax.vjp(lambda x: sequence_ratio(x, segments), log_ratios)
    np.testing.assert_allclose(ratio[jnp.array([0, 1, 3])], [4, 4, 3], rtol=1e-6)  # √(2 · 8)
    np.testing.assert_allclose(backward(jnp.array([1.0, 10.0, 0.0, 1.0]))[0], [4, 40, 0, 3], rtol=1e-6)
    far = lambda x: sequence_ratio(x, jnp.ones(2, jnp.int32))
    np.testing.assert_allclose(far(jnp.array([30.0, 50.0])), np.exp([10, 10]), rtol=1e-6)
    np.testing.assert_array_equal(far(jnp.array([-300.0, -500.0])), [0, 0])


def test_clip_on_the_ratio_of_the_response():
    """Guards GSPO: a response whose mean is within the bounds is kept, though each of its tokens is far outside."""
    ratios, advantages = jnp.array([0.1, 10.0, 2.0, 2.0]), jnp.ones(4)
    row = clip_response(ratios)._replace(segments=jnp.array([1, 1, 2, 2]))
    result = ppo_clip(row, advantages, ratio=sequence_ratio)
    np.testing.assert_allclose(result.loss, [-1, -1, -1.2, -1.2], rtol=1e-5)
    np.testing.assert_array_equal(result.logs['clipped'], [False, False, True, True])


def test_cispo_by_hand():
    """Guards the weight, clipped on each side, and that the gradient is lost nowhere."""
    ratios, advantages = jnp.array([0.2, 0.9, 1.1, 4.0]), jnp.array([1.0, -2.0, 0.5, 3.0])

    def total(new_log_probs):
        result = cispo(clip_response(ratios)._replace(new_log_probs=new_log_probs), advantages, lower=0.5, upper=1.0)
        return jnp.sum(result.loss), result

    log_probs = clip_response(ratios).new_log_probs
    gradient, result = jax.jit(jax.grad(total, has_aux=True))(log_probs)
    weights = np.array([0.5, 0.9, 1.1, 2.0])
    np.testing.assert_allclose(result.loss, -weights * advantages * log_probs, rtol=1e-5)
    np.testing.assert_allclose(gradient, -weights * advantages, rtol=1e-5)
    np.testing.assert_array_equal(result.logs['clipped'], [True, False, False, True])


def test_dppo_by_hand():
    """Guards the four corners: what leads further out is left out, what leads back or is inside is not; and δ."""
    old, far = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.7, 0.2, 0.1]))  # total variation 0.2
    near = jnp.log(jnp.array([0.55, 0.25, 0.2]))  # 0.05
    tokens = jnp.array([0, 1, 0, 1, 0, 1])
    new = jnp.stack([far] * 4 + [near] * 2)
    row = LossInputs(
        tokens,
        jnp.ones(6, jnp.int32),
        jnp.take_along_axis(new, tokens[:, None], axis=1)[:, 0],
        old[tokens],
        SparseLogProbs(jnp.tile(jnp.arange(3), (6, 1)), new),
        SparseLogProbs(jnp.tile(jnp.arange(3), (6, 1)), jnp.tile(old, (6, 1))),
        None,
    )
    advantages = jnp.array([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    result = masked(row, advantages, drop=functools.partial(dppo, bound=0.1))
    np.testing.assert_array_equal(result.logs['clipped'], [True, True, False, False, False, False])
    ratios = np.array([0, 0, 1.4, 2 / 3, 1.1, 5 / 6])
    np.testing.assert_allclose(result.loss, -ratios * advantages, rtol=1e-5, atol=1e-7)
    assert not dppo(row, advantages, bound=0.21).any()
    all_outside = dppo(row, advantages, bound=0.04)
    np.testing.assert_array_equal(all_outside, [True, True, False, False, True, True])
    # The divergence is that of the old policy from the new one.
    by_kl = lambda bound: dppo(row, advantages, bound=bound, divergence=kl_divergence)
    kl_old_new = 0.5 * np.log(5 / 7) + 0.3 * np.log(3 / 2) + 0.2 * np.log(2)
    kl_new_old = 0.7 * np.log(7 / 5) + 0.2 * np.log(2 / 3) + 0.1 * np.log(1 / 2)
    assert kl_new_old + 1e-3 < kl_old_new
    np.testing.assert_array_equal(by_kl(kl_old_new - 1e-4), [True, True, False, False, False, False])
    assert not by_kl(kl_old_new + 1e-4).any()


def test_importance_weighted_by_hand():
    """Guards that nothing holds it back."""
    result = importance_weighted(clip_response([0.2, 9.0]), jnp.array([-1.0, 2.0]))
    np.testing.assert_allclose(result.loss, [0.2, -18], rtol=1e-5)
    assert not result.constrained.any() and not result.logs
