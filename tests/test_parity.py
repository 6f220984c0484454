"""Losses, gradients, advantages and estimates beside the numbers of TRL's and verl's own code.

tests/parity/README.md says which functions made these numbers, in float64, and of which versions. Here float64 shows
that a formula is the same, float32 that what a run computes is. Where this library differs on purpose, `Case` says
where and why, and the test wants the difference to be there.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.ops.advantages import gae, greedy_baseline, group_normalised, leave_one_out, mean_centred, whiten
from troll_jax.ops.aggregation import constant_length, sequence_mean, sequence_sum, token_mean
from troll_jax.ops.losses import (
    LossInputs,
    LossOutputs,
    ReferenceView,
    cispo,
    importance_weighted,
    ppo_clip,
    sequence_ratio,
)
from troll_jax.ops.masked_losses import dppo_binary, masked
from troll_jax.ops.projection import kl_divergence
from troll_jax.ops.regularisers import k1, k2, k3, kl_to_reference, regularised
from troll_jax.ops.support import bucket_tail
from troll_jax.ops.values import value_loss
from troll_jax.types import SparseLogProbs

pytestmark = pytest.mark.slow

INF = np.inf
GOLDEN = {name: dict(np.load(Path(__file__).parent / f'parity/{name}.npz')) for name in ('trl', 'verl')}
GIVEN = GOLDEN['verl']  # both files hold the same inputs
SETTING = {name: GIVEN[name].item() for name in ('lower', 'upper', 'dual', 'weight', 'beta', 'divergence', 'limit')}

# verl adds 1e-8 to denominators. A sum of terms of both signs has an absolute error in float32.
TOLERANCES = {'float32': dict(rtol=1e-5, atol=1e-7), 'float64': dict(rtol=1e-7, atol=1e-14)}


@pytest.fixture(params=TOLERANCES)
def precision(request):
    with jax.enable_x64(request.param == 'float64'):
        yield request.param


# --- objectives -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An objective of this library beside one of theirs, and where the two differ on purpose."""

    objective: Callable
    aggregation: Callable
    same_value: bool = True  # else the gradient alone
    differs: Callable = lambda log_ratio, advantage: np.zeros_like(log_ratio, bool)  # single tokens
    empty: float = 1.0  # theirs over ours in a batch of 8 responses of which one has no token
    off_policy: bool = True  # False: on responses of several tokens the two agree before the first update alone


def beyond(low: float, high: float, also=lambda log_ratio, advantage: True) -> Callable:
    """Tokens with a log-ratio outside of these bounds for which `also` is true."""
    return lambda log_ratio, advantage: ((log_ratio < low) | (log_ratio > high)) & also(log_ratio, advantage)


def pull(estimator) -> Callable:
    """An estimate of KL(π̃ ‖ π_ref) as a loss of its own."""
    return lambda row, advantages: LossOutputs(estimator(row.new_log_probs, row.reference.log_probs), None, {})


learnt = lambda log_ratio, advantage: advantage != 0
unclipped = lambda log_ratio, advantage: log_ratio * advantage < 0
FAR = beyond(-20, 20, unclipped)
CLIP = partial(ppo_clip, lower=SETTING['lower'], upper=SETTING['upper'], dual=None)
DUAL = partial(CLIP, dual=SETTING['dual'])
SEQUENCE = dict(lower=GIVEN['sequence_lower'].item(), upper=GIVEN['sequence_upper'].item())
GSPO = partial(ppo_clip, ratio=sequence_ratio, dual=None, **SEQUENCE)
CISPO = partial(cispo, lower=1.0, upper=SETTING['weight'])
WITH_KL = regularised(CLIP, [partial(kl_to_reference, coefficient=SETTING['beta'], estimator=k3)])
DPPO = partial(dppo_binary, bound=SETTING['divergence'])
BY_KL = partial(DPPO, divergence=kl_divergence)

# TRL's mean over responses counts those without tokens, as the 1/G of the papers does, where all have some. This
# library's and verl's leave them out.
ALL_COUNT = 7 / 8

CASES = {
    # verl cuts ratios at e^±20, and those of a response at e^10, as this library does. In the papers nothing is cut
    # (PPO, arXiv 1707.06347, equation 7; GSPO, arXiv 2507.18071, equation 5).
    'verl/dapo': Case(CLIP, token_mean),
    'verl/dual': Case(DUAL, token_mean),
    'verl/grpo': Case(CLIP, sequence_mean),
    'verl/dr_grpo': Case(CLIP, constant_length),
    'verl/sum': Case(CLIP, sequence_sum),
    'verl/gspo': Case(GSPO, sequence_mean),
    'verl/cispo': Case(CISPO, token_mean),
    # Their loss is −⌊r⌋ A log π; that of −r A (DPPO, arXiv 2602.04879, equation 12) has the same gradient, but none
    # where the ratio is cut.
    'verl/dppo_tv': Case(partial(masked, drop=DPPO), token_mean, False, FAR),
    'verl/dppo_kl': Case(partial(masked, drop=BY_KL), token_mean, False, FAR),
    'verl/reinforce': Case(importance_weighted, sequence_sum, False, beyond(-20, 20, learnt)),
    'verl/k1': Case(pull(k1), token_mean),
    'verl/k2': Case(pull(k2), token_mean),
    # verl cuts this estimate at 10, beyond which it does not pull. GRPO's (arXiv 2402.03300, equation 4) has no bound.
    'verl/k3': Case(pull(k3), token_mean, differs=beyond(-2.6, 11)),
    # TRL cuts no ratio.
    'trl/grpo': Case(CLIP, sequence_mean, differs=FAR, empty=ALL_COUNT),
    'trl/bnpo': Case(CLIP, token_mean, differs=FAR),
    'trl/dapo': Case(CLIP, token_mean, differs=FAR),
    'trl/dual': Case(DUAL, token_mean, differs=beyond(-20, INF, unclipped)),
    'trl/dr_grpo': Case(CLIP, constant_length, differs=FAR, empty=ALL_COUNT),
    'trl/gspo': Case(GSPO, sequence_mean, differs=beyond(-INF, 10, unclipped), empty=ALL_COUNT),
    'trl/gspo_token': Case(GSPO, sequence_mean, differs=beyond(-INF, 10, unclipped), empty=ALL_COUNT),
    'trl/cispo': Case(CISPO, token_mean, differs=beyond(-20, INF, learnt)),
    # From a log-ratio of −20 on this library's k3 is a straight line.
    'trl/grpo_kl': Case(WITH_KL, sequence_mean, differs=lambda *x: FAR(*x) | beyond(-20, INF)(*x), empty=ALL_COUNT),
    # Off-policy TRL's ratio is that of a response, the product of its tokens'. RLOO (arXiv 2402.14740) has no ratio.
    'trl/rloo': Case(importance_weighted, sequence_sum, False, beyond(-20, 20, learnt), ALL_COUNT, off_policy=False),
}
for_all = pytest.mark.parametrize('name', CASES)


def token_losses(case, new, old, reference, lengths, advantages, dtype):
    """Weighted losses [N] of all tokens of responses [R, T] and their gradient [N], as an update has them; the mask."""
    mask = np.arange(new.shape[1]) < lengths[:, None]
    pack = lambda x: jnp.asarray(np.broadcast_to(x, mask.shape)[mask], dtype)
    old, reference, advantages = pack(old), pack(reference), pack(advantages[:, None])
    weights = pack(np.asarray(case.aggregation(jnp.asarray(lengths), SETTING['limit']))[:, None])
    tokens, segments = jnp.zeros(old.shape, int), jnp.asarray(np.nonzero(mask)[0] + 1)

    def total(new):
        listed = SparseLogProbs(tokens[:, None], old[:, None])
        supports = jax.vmap(bucket_tail)(new[:, None], listed)
        view = ReferenceView(reference, None, None)
        row = LossInputs(tokens, segments, new, old, *supports, jnp.zeros_like(new), view)
        losses = case.objective(row, advantages).loss * weights
        return jnp.sum(losses), losses

    gradient, losses = jax.grad(total, has_aux=True)(pack(new))
    return np.asarray(losses), np.asarray(gradient), mask


@for_all
@pytest.mark.parametrize('kind', ['batch', 'empty', 'start'])
def test_objective_and_aggregation(name, kind, precision):
    """Guards signs, bounds, masks and denominators of a batch's loss, and every entry of its gradient.

    In `empty` one response has no token, at `start` the policy is the old one.
    """
    case, (library, _, key) = CASES[name], name.partition('/')
    rows = slice(None) if kind == 'empty' else slice(-1)
    old, reference, lengths, advantages = (GIVEN[x][rows] for x in ('old', 'reference', 'lengths', 'advantages'))
    new = old if kind == 'start' else GIVEN['new'][rows]
    losses, gradient, mask = token_losses(case, new, old, reference, lengths, advantages, precision)
    factor = case.empty if kind == 'empty' else 1.0
    expected = GOLDEN[library][f'{key}/{kind}/gradient'][mask] / factor
    assert np.abs(expected).max() > 1e-3
    if not case.off_policy and kind != 'start':
        assert not np.allclose(gradient, expected, rtol=0.01)
        return
    np.testing.assert_allclose(gradient, expected, **TOLERANCES[precision])
    if case.same_value:
        total = GOLDEN[library][f'{key}/{kind}/loss'] / factor
        np.testing.assert_allclose(losses.sum(), total, **TOLERANCES[precision])


@for_all
def test_objective_at_every_ratio(name, precision):
    """Guards each token on its own: log-ratios of 0, ±0.001, ±1, ±5 and ±30, advantages of both signs and zero."""
    case, (library, _, key) = CASES[name], name.partition('/')
    new, old, advantages = (GIVEN[f'token_{x}'] for x in ('new', 'old', 'advantages'))
    losses, gradient, _ = token_losses(case, new, old, old, np.ones(len(new), int), advantages, precision)
    loss_there, gradient_there = (GOLDEN[library][f'{key}/token/{x}'] for x in ('loss', 'gradient'))
    pairs = [(gradient, gradient_there), (losses, loss_there)][: 1 + case.same_value]
    # Theirs is of a batch of this one token, ours a share of a mean over all.
    close = np.all([np.isclose(len(new) * ours, theirs, **TOLERANCES[precision]) for ours, theirs in pairs], axis=0)
    expected = case.differs((new - old)[:, 0], advantages)
    assert np.isfinite(gradient).all() and np.isfinite(losses).all()
    if precision == 'float64':  # in float32 e⁻²⁰ and e⁻³⁰ are both nothing
        np.testing.assert_array_equal(~close, expected)
    assert close[~expected].all()


# --- advantages, critic -----------------------------------------------------------------------------------------------

REWARD_MASK = np.arange(GIVEN['reward_lengths'].max()) < GIVEN['reward_lengths'][:, None]

# TRL adds 1e-4 to a standard deviation, verl's whitening 1e-8 to a variance. The papers add nothing.
ADVANTAGES = {
    'verl/group_normalised': jax.vmap(group_normalised),
    'verl/mean_centred': jax.vmap(mean_centred),
    'verl/leave_one_out': jax.vmap(leave_one_out),
    'verl/greedy_baseline': lambda rewards: jax.vmap(greedy_baseline)(rewards, GIVEN['greedy'].astype(rewards.dtype)),
    'trl/group_normalised': jax.vmap(partial(group_normalised, epsilon=1e-4)),
    'trl/mean_centred': jax.vmap(mean_centred),
    'trl/leave_one_out': jax.vmap(leave_one_out),
    'trl/leave_one_out_whitened': lambda rewards: whiten(jax.vmap(leave_one_out)(rewards), epsilon=1e-4),
}


@pytest.mark.parametrize('name', ADVANTAGES)
def test_advantages(name, precision):
    """Guards means, denominators of G − 1 and ε; among the groups are grades of 0 and 1, equal ones and an outlier."""
    library, _, key = name.partition('/')
    ours = np.asarray(ADVANTAGES[name](jnp.asarray(GIVEN['rewards'], precision))).reshape(-1)
    theirs = GOLDEN[library][f'advantages/{key}']
    if theirs.ndim == 2:  # verl's, for every token
        ours, theirs = np.broadcast_to(ours[:, None], theirs.shape)[REWARD_MASK], theirs[REWARD_MASK]
    np.testing.assert_allclose(ours, theirs, **TOLERANCES[precision])


def test_equal_rewards_are_no_signal():
    """Guards seven rewards of 0.2: theirs make advantages of a mean's rounding in float32, of 0.015 in verl."""
    np.testing.assert_array_equal(group_normalised(jnp.asarray(GIVEN['equal'])), 0)


@pytest.mark.parametrize('baseline', [False, True])
def test_whitening(baseline, precision):
    """Guards REINFORCE++: verl's mean and deviation are those of all tokens, so that a long response counts for more.

    Given tokens, `whiten` is the same; a run gives it responses, and each counts alike. The paper's advantage
    (arXiv 2501.03262) is one of a token, whose KL penalty is that from this token on.
    """
    rewards = jnp.asarray(GIVEN['rewards'], precision)
    rewards = (jax.vmap(mean_centred)(rewards) if baseline else rewards).reshape(-1, 1)
    theirs = GOLDEN['verl']['advantages/' + 'centred_' * baseline + 'whitened']
    of_tokens = whiten(jnp.broadcast_to(rewards, theirs.shape), REWARD_MASK, epsilon=1e-10)
    of_responses = np.broadcast_to(whiten(rewards), theirs.shape)
    np.testing.assert_allclose(of_tokens[REWARD_MASK], theirs[REWARD_MASK], **TOLERANCES[precision])
    assert not np.allclose(of_responses[REWARD_MASK], theirs[REWARD_MASK], rtol=0.01)


def test_gae_and_value_loss(precision):
    """Guards the recursion at a response's end, whitening under a mask, and the clip of a critic's step."""
    mask = np.arange(GIVEN['values'].shape[1]) < GIVEN['lengths'][:, None]
    cast = lambda x: jnp.asarray(np.where(mask, x, 0), precision)
    rewards, values, old_values = (cast(GIVEN[x]) for x in ('token_rewards', 'values', 'old_values'))
    returns = cast(GOLDEN['verl']['gae/returns'])
    advantages = jax.vmap(partial(gae, gamma=GIVEN['gamma'].item(), lam=GIVEN['lam'].item()))(rewards, values)
    close = partial(np.testing.assert_allclose, **TOLERANCES[precision])
    close((advantages + values)[mask], returns[mask])
    close(whiten(advantages, mask, epsilon=1e-10)[mask], GOLDEN['verl']['gae/whitened'][mask])

    def loss(values):
        return jnp.mean(value_loss(values, old_values, returns, clip=GIVEN['value_clip'].item())[mask])

    value, gradient = jax.value_and_grad(loss)(values)
    close(value, GOLDEN['verl']['value/loss'])
    close(gradient, np.where(mask, GOLDEN['verl']['value/gradient'], 0))
