"""Categorical distributions given by the log-probabilities [V] of a whole vocabulary."""

import jax
import jax.numpy as jnp


def entropy(log_probs: jax.Array) -> jax.Array:
    """−Σ p log p in nats, of normalised `log_probs` [V]; entries of −inf count as zero."""
    return -jnp.sum(jnp.exp(log_probs) * jnp.where(log_probs > -jnp.inf, log_probs, 0.0))


def total_variation(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """½ Σ |p − q| of two distributions [V]."""
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)))


def sample(uniform: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Draws a token by inverting the cumulative distribution: one random number per draw instead of one per entry.

    Args:
      uniform: [] in [0, 1).
      log_probs: [V]

    Returns:
      [] int32, never a token of probability zero.
    """
    probs = jnp.exp(log_probs)
    possible = probs > 0
    cumulative = jnp.cumsum(probs)
    # The entries of a parallel sum are rounded apart from each other: where p = 0 the sum may yet rise a little.
    above = possible & (cumulative > uniform * cumulative[-1])
    # Rounding may lift the target to the sum itself; the last token of any probability is then the one meant.
    last = possible.size - 1 - jnp.argmax(possible[::-1])
    return jnp.where(jnp.any(above), jnp.argmax(above), last).astype(jnp.int32)
