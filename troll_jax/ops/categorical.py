"""Categorical distributions given by the log-probabilities [V] of a whole vocabulary."""

import jax
import jax.numpy as jnp


def entropy(log_probs: jax.Array) -> jax.Array:
    """−Σ p log p in nats, of normalised `log_probs` [V]; entries of −inf count as zero."""
    return -jnp.sum(jnp.exp(log_probs) * jnp.where(log_probs > -jnp.inf, log_probs, 0.0))


def sample(uniform: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Draws a token by inverting the cumulative distribution: one random number per draw instead of one per entry.

    Args:
      uniform: [] in [0, 1).
      log_probs: [V]

    Returns:
      [] int32, never a token of probability zero.
    """
    cumulative = jnp.cumsum(jnp.exp(log_probs))
    # Scaling by the sum as it was rounded keeps the target within it. The first entry above the target has p > 0.
    above = cumulative > uniform * cumulative[-1]
    # Rounding may lift the target to the sum itself; the last token of any probability is then the one meant.
    return jnp.where(above[-1], jnp.argmax(above), jnp.argmax(cumulative == cumulative[-1])).astype(jnp.int32)
