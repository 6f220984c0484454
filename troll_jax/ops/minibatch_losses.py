"""Trust regions of all tokens of an update: what happens to a token depends on those of other responses.

Each objective has a parameter `minibatch`, all tokens by the policy before the update. The learner computes it in a
forward pass of its own, so neither packing nor the number of micro-batches changes what is learnt. Thresholds lie
between two tokens, where rounding does not move any across.
"""

import jax.numpy as jnp

from troll_jax.ops.losses import LossInputs, LossOutputs, Minibatch, importance_weighted
from troll_jax.ops.masked_losses import leads_out, masked
from troll_jax.ops.ranges import check_range, is_not_negative, is_positive
from troll_jax.types import START, Progress


def m2po(
    row: LossInputs, advantages, progress: Progress = START, *, minibatch: Minibatch, budget: float = 0.04
) -> LossOutputs:
    """M2PO (arXiv 2510.01161, algorithm 1 and equation 5), from a row of T tokens and advantages [T].

        loss = − M r A,   M = 0 at the largest log² r among the tokens whose r is on A's side of one, as few as it
                          takes for the mean log² r of the others among them to be at most the budget

    The authors' code clips these tokens instead, never inside of [0.7, 1.5] (github.com/Infini-AI-Lab/M2PO).
    """
    check_range('budget', budget, is_positive, 'positive')
    squares = lambda x: (x.new_log_probs - x.old_log_probs) ** 2
    counted = minibatch.inside & leads_out(minibatch, minibatch.advantages)
    rising = jnp.sort(jnp.where(counted, squares(minibatch), jnp.inf).ravel())
    kept = jnp.sum(jnp.cumsum(rising) <= budget * jnp.arange(1, rising.size + 1))
    rising = jnp.concatenate([jnp.zeros(1), rising, jnp.full(1, jnp.inf)])
    limit = (rising[kept] + rising[kept + 1]) / 2
    return masked(row, advantages, progress, drop=lambda row, a: leads_out(row, a) & (squares(row) > limit))


def kl_cov(
    row: LossInputs,
    advantages,
    progress: Progress = START,
    *,
    minibatch: Minibatch,
    share: float = 2e-3,
    coefficient: float = 1.0,
) -> LossOutputs:
    """KL-Cov (arXiv 2505.22617), from a row of T tokens and advantages [T].

        loss = − r A + coefficient |log r| at the share of tokens with the largest (A − mean A) (log π̃ − mean log π̃)

    These are the tokens that take most of the entropy; at least one of them is pulled to the old policy.
    """
    check_range('share', share, lambda x: 0 < x <= 1, 'in (0, 1]')
    check_range('coefficient', coefficient, is_not_negative, 'at least 0')
    inside, count = minibatch.inside, jnp.sum(minibatch.inside)
    mean = lambda x: jnp.sum(jnp.where(inside, x, 0.0)) / jnp.maximum(count, 1)
    means = mean(minibatch.advantages), mean(minibatch.new_log_probs)
    covariance = lambda a, log_probs: (a - means[0]) * (log_probs - means[1])
    of_all = jnp.where(inside, covariance(minibatch.advantages, minibatch.new_log_probs), -jnp.inf)
    falling = jnp.append(-jnp.sort(-of_all.ravel()), -jnp.inf)
    last = jnp.maximum(jnp.floor(share * count).astype(jnp.int32), 1) - 1
    pulled = covariance(advantages, row.new_log_probs) > (falling[last] + falling[last + 1]) / 2
    losses = importance_weighted(row, advantages, progress)
    log_ratio = row.new_log_probs - row.old_log_probs
    pull = jnp.where(pulled, coefficient * jnp.abs(log_ratio), 0.0)
    held = pulled & (log_ratio != 0)
    return LossOutputs(losses.loss + pull, held, {'clipped': held})
