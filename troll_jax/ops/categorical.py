"""Categorical distributions over a whole vocabulary: draws, entropy and top-k, in as few passes as possible.

A row of logits is cut into blocks of 128 neighbouring tokens. Drawing, the entropy and the most probable tokens then
need no more than the maximum and the sum of every block, and the entries of few of them. The vocabulary may lie in
parts on several devices, each with blocks of its own: below `jax.shard_map`, over the axis of that name, only maxima,
sums and the few blocks travel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.ops.collectives import all_gather, axis_index, pmax, psum
from troll_jax.ops.top_k import BLOCK, best_blocks, to_blocks
from troll_jax.ops.top_k import top_k as largest_k


def entropy(log_probs: jax.Array) -> jax.Array:
    """−Σ p log p in nats, of normalised `log_probs` [V]; entries of −inf count as zero."""
    return -jnp.sum(jnp.exp(log_probs) * jnp.where(log_probs > -jnp.inf, log_probs, 0.0))


def total_variation(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """½ Σ |p − q| of two distributions [V]."""
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)))


class Blocks(NamedTuple):
    """A row of logits in n blocks. On several devices each holds the entries of its own n' of them."""

    logits: jax.Array  # [n', 128], past the end of a part −inf
    tokens: jax.Array  # [n] int32, the first token of each
    maxima: jax.Array  # [n]
    sums: jax.Array  # [n], Σ exp(logit − largest of all)
    largest: jax.Array  # [] of all logits
    log_sum: jax.Array  # [] log Σ exp(logit − largest of all)
    entropy: jax.Array  # [] nats


def summarise(
    logits: jax.Array, axis_name: str | None = None, *, one_pass: bool = False, gather: bool = True
) -> Blocks:
    """Blocks of logits, of which at least one is above −inf, in two passes or one over them.

    Args:
      logits: [V]; or a device's part of them, all of the same size.
      axis_name: mesh axis over which the vocabulary is split, in its order; None: it is not.
      one_pass: reads the logits once, for two exponentials each: better on accelerators, worse on a CPU.
      gather: false: `tokens`, `maxima` and `sums` are those of this device's part alone.
    """
    first = axis_index(axis_name) * logits.size
    blocks = to_blocks(logits)
    tokens = first + BLOCK * jnp.arange(len(blocks), dtype=jnp.int32)
    sums = _in_one_pass(blocks) if one_pass else _in_two_passes(blocks)
    if gather:
        tokens, *sums = (all_gather(x, axis_name) for x in (tokens, *sums))
        axis_name = None
    maxima, *sums = sums
    highest = pmax(jnp.max(maxima), axis_name)
    sums, moments = _relative_to(highest, maxima, *sums)
    total, moment = (psum(jnp.sum(x), axis_name) for x in (sums, moments))
    log_sum = jnp.log(total)
    return Blocks(blocks, tokens, maxima, sums, highest, log_sum, log_sum - moment / total)


def _relative_to(maximum, other, total, moment) -> tuple[jax.Array, jax.Array]:
    """Σ w and Σ w (logit − maximum) of logits, w = exp(logit − maximum), from the same sums with another maximum."""
    # Of −inf alone the maximum is −inf as well. From −10⁶ on w is zero, and 0 · −inf would not be.
    below = jnp.maximum(other - jnp.maximum(maximum, jnp.finfo(other.dtype).min), -1e6)
    scale = jnp.exp(below)
    return scale * total, scale * (moment + total * below)


def _in_two_passes(blocks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each block [n] the maximum, and with it Σ w and Σ w (logit − maximum)."""
    # Left to itself XLA takes the maximum of all in a pass of its own over the logits, and not from these.
    maxima = jax.lax.optimization_barrier(jnp.max(blocks, axis=1))
    weights, moments = _relative_to(maxima[:, None], blocks, 1.0, 0.0)
    return maxima, jnp.sum(weights, axis=1), jnp.sum(moments, axis=1)


def _in_one_pass(blocks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same by joining parts of a block. That takes two exponentials per logit, too many for a CPU."""

    def join(a, b):
        maximum = jnp.maximum(a[0], b[0])
        return maximum, *jax.tree.map(jnp.add, _relative_to(maximum, *a), _relative_to(maximum, *b))

    parts = blocks, jnp.ones_like(blocks), jnp.zeros_like(blocks)
    zero = jnp.zeros((), blocks.dtype)
    return tuple(jax.lax.reduce(parts, (zero - jnp.inf, zero, zero), join, (1,)))


def _normalised(blocks: Blocks, logits: jax.Array) -> jax.Array:
    """Log-probabilities of these logits; in this order, or they would be rounded at the size of the logits."""
    return (logits - blocks.largest) - blocks.log_sum


def _entries(blocks: Blocks, index: jax.Array, axis_name: str | None) -> jax.Array:
    """The logits [m, 128] of some blocks [m]."""
    if axis_name is None:
        return blocks.logits[index]
    local = index - axis_index(axis_name) * len(blocks.logits)
    here = (local >= 0) & (local < len(blocks.logits))
    return pmax(jnp.where(here[:, None], blocks.logits[jnp.where(here, local, 0)], -jnp.inf), axis_name)


class Token(NamedTuple):
    """One token of a vocabulary."""

    token: jax.Array  # [] int32
    log_prob: jax.Array  # []


UNIFORMS = 2
"""Random numbers of a draw: the second one continues the first, which has 23 bits."""

_GROUP = 32  # blocks


def draw(uniforms: jax.Array, blocks: Blocks, axis_name: str | None = None) -> Token:
    """Draws a token by inverting the cumulative distribution: first of 32 blocks at a time, of these, of one's entries.

    Two random numbers per draw instead of one per entry, and no cumulative sum over the vocabulary. Each stage goes on
    with what is left of the number, whose digits are not lost in sums of one. What the first sum rounds is about 1e-6
    in all; within 4,096 neighbours every token is within reach.

    Args:
      uniforms: [2] in [0, 1).
      blocks, axis_name: output and argument of `summarise`.

    Returns:
      Token, never one of probability zero.
    """
    first, rest = uniforms[0], 2.0**-23 * uniforms[1]
    groups = to_blocks(blocks.sums / jnp.sum(blocks.sums), block=_GROUP, fill=0.0)
    group, first = _choose(first, rest, jnp.sum(groups, axis=1))
    within, first = _choose(first, rest, groups[group])
    block = group * _GROUP + within
    (entries,) = _entries(blocks, block[None], axis_name)
    place, _ = _choose(first, rest, jnp.exp(_normalised(blocks, entries)))
    return _token(blocks, block, entries, place)


def _choose(first: jax.Array, rest: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index [] of the entry of `weights` [n] at which their sum exceeds first + rest, and what `first` has left.

    The entries of a parallel sum are rounded apart from each other: it may rise a little where nothing is added, and
    the target may be the sum itself. So it is the first possible entry above the target, or the last possible one.
    """
    cumulative, possible, index = jnp.cumsum(weights), weights > 0, jnp.arange(weights.size)
    above = jnp.min(jnp.where(possible & (cumulative > first + rest), index, weights.size))
    last = jnp.max(jnp.where(possible, index, 0))
    index = jnp.minimum(above, last)
    return index, first - jnp.where(index > 0, cumulative[index - 1], 0.0)


def _token(blocks: Blocks, block: jax.Array, entries: jax.Array, within: jax.Array) -> Token:
    return Token((blocks.tokens[block] + within).astype(jnp.int32), _normalised(blocks, entries[within]))


def most_probable(blocks: Blocks, axis_name: str | None = None) -> Token:
    """The token with the largest logit, of equal ones the first."""
    block = jnp.argmax(blocks.maxima)
    (entries,) = _entries(blocks, block[None], axis_name)
    return _token(blocks, block, entries, jnp.argmax(entries))


def largest(blocks: Blocks, k: int, axis_name: str | None = None) -> tuple[jax.Array, jax.Array]:
    """The k most probable tokens [k], most probable first, and their log-probabilities; of equal ones the first.

    They lie in the k blocks with the largest maxima. Impossible tokens, and those past the vocabulary, are −1 and −inf.
    """
    best = best_blocks(blocks.maxima, k)
    logits, places = largest_k(_entries(blocks, best, axis_name).reshape(-1), k, block=BLOCK // 8)
    tokens = blocks.tokens[best[places // BLOCK]] + places % BLOCK
    return jnp.where(logits > -jnp.inf, tokens, -1), _normalised(blocks, logits)


def sample(uniforms: jax.Array, log_probs: jax.Array) -> jax.Array:
    """A token [] int32 drawn from the distribution `log_probs` [V] with uniform numbers [2] in [0, 1)."""
    return draw(uniforms, summarise(log_probs)).token


def truncate(logits: jax.Array, *, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits [V] with −inf for all but the most probable tokens.

    Args:
      top_k: number of tokens kept; None: all.
      top_p: nucleus sampling: of these the fewest whose probabilities sum to at least this are kept; None: all.

    Tokens that are as probable as the last one kept are kept too.
    """
    if top_k is not None:
        logits = jnp.where(logits >= largest_k(logits, top_k)[0][-1], logits, -jnp.inf)
    if top_p is not None and top_p < 1:
        falling = jnp.sort(logits)[::-1]
        probs = jax.nn.softmax(falling)
        kept = jnp.sum(jnp.cumsum(probs) - probs < top_p)
        logits = jnp.where(logits >= falling[kept - 1], logits, -jnp.inf)
    return logits
