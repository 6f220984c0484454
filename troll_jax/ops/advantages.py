"""Advantages of the samples of one prompt. Batch them with `jax.vmap`."""

import jax
import jax.numpy as jnp


def group_normalised(rewards: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """GRPO (arXiv 2402.03300): rewards less their mean, over their standard deviation.

        A_i = (r_i − mean(r)) / (std(r) + epsilon),   std with G − 1 in the denominator

    Args:
      rewards: [G], G ≥ 2.
      epsilon: keeps a group whose rewards are all equal at zero.

    Raises:
      ValueError: a group of one has no spread.
    """
    if rewards.ndim != 1 or rewards.shape[0] < 2:
        raise ValueError(f'a group needs at least two samples, as an array [G]; got shape {rewards.shape}')
    centred = rewards - jnp.mean(rewards)
    return centred / (jnp.std(rewards, ddof=1) + epsilon)
