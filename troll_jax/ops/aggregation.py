"""Loss aggregation, the mean over a batch's tokens: one weight per response, from the lengths of all responses."""

import jax
import jax.numpy as jnp


def token_mean(lengths: jax.Array, max_length: int) -> jax.Array:
    """Weights of a mean over all tokens of a batch (GRPO and PPO in the paper).

    Args:
      lengths: [R] tokens of each response; those without any do not count.
      max_length: T, tokens of the longest possible response.

    Returns:
      [R] the weight of each token of a response in the loss.
    """
    del max_length
    return jnp.full(lengths.shape, 1 / jnp.maximum(jnp.sum(lengths), 1))


def sequence_mean(lengths: jax.Array, max_length: int) -> jax.Array:
    """Weights of a mean over responses of the mean over their tokens (GRPO as published, GSPO); as `token_mean`."""
    del max_length
    return 1 / (jnp.maximum(lengths, 1) * jnp.maximum(jnp.sum(lengths > 0), 1))


def sequence_sum(lengths: jax.Array, max_length: int) -> jax.Array:
    """Weights of a mean over responses of the sum over their tokens (RLOO, arXiv 2402.14740); as `token_mean`."""
    del max_length
    return jnp.full(lengths.shape, 1 / jnp.maximum(jnp.sum(lengths > 0), 1))


def constant_length(lengths: jax.Array, max_length: int) -> jax.Array:
    """Weights of a mean over responses of the sum of their tokens / T (Dr.GRPO, arXiv 2503.20783); as `token_mean`."""
    return jnp.full(lengths.shape, 1 / (max_length * jnp.maximum(jnp.sum(lengths > 0), 1)))
