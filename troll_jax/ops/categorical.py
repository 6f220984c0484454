"""Categorical distributions over a whole vocabulary: what is wanted of each, in as few passes over it as it takes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.ops.top_k import to_blocks, top_k, top_k_of_blocks


def entropy(log_probs: jax.Array) -> jax.Array:
    """−Σ p log p in nats, of normalised `log_probs` [V]; entries of −inf count as zero."""
    return -jnp.sum(jnp.exp(log_probs) * jnp.where(log_probs > -jnp.inf, log_probs, 0.0))


class Blocks(NamedTuple):
    """Logits in blocks of neighbouring tokens, and the sums that drawing, recording and listing tokens share."""

    logits: jax.Array  # [n, 64], past the vocabulary −inf
    maxima: jax.Array  # [n]
    sums: jax.Array  # [n], Σ exp(logit − largest of all)
    log_partition: jax.Array  # []
    entropy: jax.Array  # [] nats


def summarise(logits: jax.Array) -> Blocks:
    """Two passes over logits [V], of which at least one is above −inf: for the maxima, and for the sums."""
    blocks = to_blocks(logits)
    maxima = jnp.max(blocks, axis=1)
    highest = jnp.max(maxima)
    centred = blocks - highest
    weights = jnp.exp(centred)
    sums = jnp.sum(weights, axis=1)
    # Σ w (x − largest), with 0 · −inf = 0.
    first = jnp.sum(weights * jnp.maximum(centred, jnp.finfo(centred.dtype).min))
    total = jnp.sum(sums)
    log_total = jnp.log(total)
    return Blocks(blocks, maxima, sums, highest + log_total, log_total - first / total)


def draw(uniform: jax.Array, blocks: Blocks) -> jax.Array:
    """Draws a token by inverting the cumulative distribution: of the blocks first, then within one of them.

    One random number per draw instead of one per entry, and no cumulative sum over the vocabulary.

    Args:
      uniform: [] in [0, 1).

    Returns:
      [] int32, never a token of probability zero.
    """
    cumulative = jnp.cumsum(blocks.sums)
    target = uniform * cumulative[-1]
    block = _first_above(cumulative, blocks.sums > 0, target)
    weights = jnp.exp(blocks.logits[block] - jnp.max(blocks.maxima))
    before = jnp.where(block > 0, cumulative[block - 1], 0.0)
    within = _first_above(jnp.cumsum(weights), weights > 0, target - before)
    return (block * blocks.logits.shape[1] + within).astype(jnp.int32)


def _first_above(cumulative: jax.Array, possible: jax.Array, target: jax.Array) -> jax.Array:
    """The first possible entry whose cumulative sum is above the target; the last possible one if none is.

    The entries of a parallel sum are rounded apart from each other: it may rise a little where nothing is added, and
    the target may be the sum itself.
    """
    above = possible & (cumulative > target)
    last = possible.size - 1 - jnp.argmax(possible[::-1])
    return jnp.where(jnp.any(above), jnp.argmax(above), last)


def sample(uniform: jax.Array, log_probs: jax.Array) -> jax.Array:
    """A token [] int32 drawn from the distribution `log_probs` [V] with a uniform number [] in [0, 1)."""
    return draw(uniform, summarise(log_probs))


def most_probable(blocks: Blocks) -> jax.Array:
    """The token [] int32 with the largest logit, of equal ones the first."""
    block = jnp.argmax(blocks.maxima)
    return (block * blocks.logits.shape[1] + jnp.argmax(blocks.logits[block])).astype(jnp.int32)


def log_prob(blocks: Blocks, token: jax.Array) -> jax.Array:
    """log p [] of a token []."""
    return blocks.logits.reshape(-1)[token] - blocks.log_partition


def largest(blocks: Blocks, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most probable tokens [k], most probable first, and their log-probabilities; −1 and −inf for impossible ones."""
    logits, tokens = top_k_of_blocks(blocks.logits, blocks.maxima, k)
    return jnp.where(logits > -jnp.inf, tokens, -1), logits - blocks.log_partition


def truncate(logits: jax.Array, *, top_k_tokens: int | None, top_p: float | None) -> jax.Array:
    """Logits [V] with −inf for all but the most probable tokens.

    Args:
      top_k_tokens: how many are kept; None: all.
      top_p: then, of what is left, the fewest whose probabilities sum to at least this; None: all.

    Tokens that are as probable as the last one kept are kept too.
    """
    if top_k_tokens is not None:
        least = top_k(logits, top_k_tokens)[0][-1]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p is not None:
        falling = jnp.sort(logits)[::-1]
        probs = jax.nn.softmax(falling)
        count = jnp.sum(jnp.cumsum(probs) - probs < top_p)
        logits = jnp.where(logits >= falling[count - 1], logits, -jnp.inf)
    return logits
