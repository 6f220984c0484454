"""Advantages, of the samples of one prompt or the tokens of one response. Batch them with `jax.vmap`.

An estimator is a function of the rewards [G] of one prompt's samples, with that of the greedy response if it has a
parameter `greedy_reward`; or of the rewards and values [T] of one response's tokens, if it has a parameter `values`
(`troll_jax.ops.needs`). `whiten` alone looks at all of a batch, and takes what any of the others gives.
"""

import chex
import jax
import jax.numpy as jnp

from troll_jax.ops.ranges import check_range, is_positive


def group_normalised(rewards: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """GRPO (arXiv 2402.03300): rewards less their mean, over their standard deviation.

        A_i = (r_i − mean(r)) / (std(r) + epsilon),   std with G − 1 in the denominator

    Args:
      rewards: [G], G ≥ 2.
      epsilon: keeps a group whose rewards are all equal at zero.

    Raises:
      ValueError: a group of one has no spread, or `epsilon` is not positive.
    """
    check_range('epsilon of group_normalised', epsilon, is_positive, 'positive')
    centred = mean_centred(rewards)
    return centred / (jnp.sqrt(jnp.sum(centred**2) / (rewards.shape[0] - 1)) + epsilon)


def mean_centred(rewards: jax.Array) -> jax.Array:
    """Dr.GRPO (arXiv 2503.20783): rewards less their mean, without more weight for prompts of little spread.

        A_i = r_i − mean(r)

    Args:
      rewards: [G], G ≥ 2.

    Raises:
      ValueError: a group of one has nothing to compare with.
    """
    _check_group(rewards)
    rewards = rewards.astype(jnp.result_type(rewards, float))  # integers and bools as well
    # Less the first one before the mean, which rounds: equal rewards, whatever they are, leave exactly nothing.
    rewards = rewards - rewards[0]
    return rewards - jnp.mean(rewards)


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """RLOO (arXiv 2402.14740): rewards less the mean of the other samples' rewards.

        A_i = r_i − Σ_{j ≠ i} r_j / (G − 1) = (r_i − mean(r)) · G / (G − 1)

    Args:
      rewards: [G], G ≥ 2.

    Raises:
      ValueError: a group of one has no others.
    """
    return mean_centred(rewards) * (rewards.shape[0] / (rewards.shape[0] - 1))


def no_baseline(rewards: jax.Array) -> jax.Array:
    """REINFORCE: the rewards [G] as they are; with `whiten` behind it REINFORCE++. G may be 1."""
    return rewards


def greedy_baseline(rewards: jax.Array, greedy_reward: jax.Array) -> jax.Array:
    """ReMax (arXiv 2310.10505): rewards less that of the greedy response to the same prompt.

        A_i = r_i − r(greedy)

    Args:
      rewards: [G]
      greedy_reward: []
    """
    chex.assert_rank([rewards, greedy_reward], [1, 0])
    return rewards - greedy_reward


def whiten(advantages: jax.Array, mask: jax.Array | None = None, *, epsilon: float = 1e-6) -> jax.Array:
    """REINFORCE++ (arXiv 2501.03262): less their mean over the batch, over their standard deviation over the batch.

        A ← (A − mean(A)) / (std(A) + epsilon),   std with n − 1 in the denominator

    Of `no_baseline` this makes REINFORCE++, of `mean_centred` its variant with a baseline; there every response counts
    alike, however long it is. Of `gae` it makes PPO's normalised advantages, over tokens.

    Args:
      advantages: [B, G] of all responses of a batch, or [R, T] of all tokens; at least two.
      mask: advantages that count; None: all. The results for the others have no meaning.
      epsilon: keeps a batch whose advantages are all equal at zero.

    Raises:
      ValueError: one advantage has no spread.
    """
    if advantages.ndim != 2 or advantages.size < 2:
        raise ValueError(f'whitening needs at least two advantages, as an array [B, G]; got shape {advantages.shape}')
    mask = jnp.ones_like(advantages) if mask is None else mask
    count = jnp.maximum(jnp.sum(mask), 2)
    # As in `mean_centred`: less one that counts.
    advantages = advantages.astype(jnp.result_type(advantages, float))
    advantages = advantages - advantages.reshape(-1)[jnp.argmax(mask.reshape(-1))]
    centred = advantages - jnp.sum(advantages * mask) / count
    return centred / (jnp.sqrt(jnp.sum(centred**2 * mask) / (count - 1)) + epsilon)


def gae(rewards: jax.Array, values: jax.Array, *, gamma: float = 1.0, lam: float = 1.0) -> jax.Array:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16) of one response, after whose end all is zero.

        A_t = δ_t + γ λ A_{t+1},   δ_t = r_t + γ V_{t+1} − V_t

    A + V is the λ-return that a critic learns. Padding behind the response must hold zeros.

    Args:
      rewards: [T] of each token; that of the response is at its last one.
      values: [T] V_t, what the critic expects from token t on, before it is seen.
      gamma: γ, discount.
      lam: λ; 1 is the return less the value, 0 the error of one step.

    Returns:
      [T]

    Raises:
      ValueError: `gamma` or `lam` is not in [0, 1].
    """
    for name, value in (('gamma', gamma), ('lam', lam)):
        check_range(name, value, lambda x: 0 <= x <= 1, 'in [0, 1]')
    chex.assert_rank([rewards, values], 1)
    chex.assert_equal_shape([rewards, values])
    errors = rewards + gamma * jnp.append(values[1:], 0) - values

    def step(following, error):
        advantage = error + gamma * lam * following
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(errors[0]), errors, reverse=True)
    return advantages


def _check_group(rewards: jax.Array) -> None:
    if rewards.ndim != 1 or rewards.shape[0] < 2:
        raise ValueError(f'a group needs at least two samples, as an array [G]; got shape {rewards.shape}')
