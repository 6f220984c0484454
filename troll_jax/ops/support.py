"""Sparse distributions: which tokens of the vocabulary a distribution lists, and two of them on common ground."""

import jax
import jax.numpy as jnp

from troll_jax.ops.ranges import check_range
from troll_jax.ops.top_k import top_k
from troll_jax.types import SparseLogProbs


def sparsify(
    log_probs: jax.Array, token: jax.Array, *, support_size: int, support_mass: float = 1 - 1e-5
) -> SparseLogProbs:
    """Lists the most probable tokens until they hold a given mass, and always the sampled one.

    Keeping the most probable tokens leaves out least of the KL divergence (TROLL, arXiv 2510.03817, theorem A.1). If
    the sampled token is not among them it takes the next free place, or the least probable one's.

    Args:
      log_probs: [V] normalised.
      token: [] int, the sampled token.
      support_size: K, at most V.
      support_mass: the probability that the kept tokens are to hold, 1 − δ in the paper; 1 keeps K tokens whatever they
        hold.

    Returns:
      SparseLogProbs [K], most probable first, not renormalised.

    Raises:
      ValueError: K is not within 1 … V, or the mass not within (0, 1].
    """
    (size,) = log_probs.shape
    if not 1 <= support_size <= size:
        raise ValueError(f'support_size must be between 1 and the vocabulary size {size}; got {support_size}')
    if not 0 < support_mass <= 1:
        raise ValueError(f'support_mass is the probability to keep, in (0, 1]; got {support_mass}')
    best_log_probs, best = top_k(log_probs, support_size)
    return select(best, best_log_probs, token, log_probs[token], support_mass=support_mass)


def select(
    best: jax.Array, best_log_probs: jax.Array, token: jax.Array, token_log_prob: jax.Array, *, support_mass: float
) -> SparseLogProbs:
    """`sparsify`, given the K most probable tokens [K], most probable first, and the sampled one []."""
    (support_size,) = best.shape
    # Counted, because rounding may let the sum fall below the mass again.
    count = 1 + jnp.sum(jnp.cumsum(jnp.exp(best_log_probs))[:-1] < support_mass) if support_mass < 1 else support_size
    index = jnp.arange(support_size)
    kept = index < count
    missing = ~jnp.any(kept & (best == token))
    here = missing & (index == jnp.minimum(count, support_size - 1))
    tokens = jnp.where(here, token, jnp.where(kept, best, -1)).astype(jnp.int32)
    log_probs = jnp.where(here, token_log_prob, jnp.where(kept, best_log_probs, -jnp.inf))
    return SparseLogProbs(tokens, log_probs)


def at_tokens(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probabilities [K] of `tokens` [K] in `log_probs` [V]; −inf for padding (−1)."""
    return jnp.where(tokens >= 0, log_probs[jnp.maximum(tokens, 0)], -jnp.inf)


def at_token(distribution: SparseLogProbs, token: jax.Array) -> jax.Array:
    """The log-probability [] of one token in a distribution [K]; −inf if it is not listed."""
    found = distribution.tokens == token
    # A sum over one non-zero term, so that the gradient of every other entry is zero and not 0 · inf.
    return jnp.where(jnp.any(found), jnp.sum(jnp.where(found, distribution.log_probs, 0.0)), -jnp.inf)


TAIL = -2
"""The token that stands for all tokens that are not listed, where a tail rule lumps them together."""


def default_tail(
    new_on_old_support: jax.Array,
    old: SparseLogProbs,
    new: SparseLogProbs,
    *,
    probability: float = 1e-12,
    renormalise: bool = False,
) -> tuple[SparseLogProbs, SparseLogProbs]:
    """Tail rule of the paper (section 3.3): both on the union of their supports, what π_old does not list is 1e-12.

    π̃ is known everywhere, so its values at π_old's tokens are exact. π_old is known on its own support alone: at the
    tokens that only π̃ lists it gets a default probability. Both must be listed by the same rule, sampled token
    included: only then do equal policies have equal supports and a divergence of zero.

    Args:
      new_on_old_support: [K] log π̃ of π_old's tokens.
      old: π_old on its support [K].
      new: π̃ on its own support [K'].
      probability: probability of a token that π_old's support leaves out.
      renormalise: makes each sum to one on the union, as in the paper. Tokens that are not kept then get no gradient.

    Returns:
      π̃ and π_old as SparseLogProbs on the same tokens [K + K']: those of `old`, then what π̃ adds.

    Raises:
      ValueError: `probability` is none, or certainty.
    """
    check_range('probability of the default tail', probability, lambda x: 0 < x < 1, 'between 0 and 1')
    known = (new.tokens < 0) | jnp.any(new.tokens[:, None] == old.tokens[None, :], axis=1)
    tokens = jnp.concatenate([old.tokens, jnp.where(known, -1, new.tokens)])
    at_added = jnp.where(known, -jnp.inf, jnp.log(jnp.asarray(probability, old.log_probs.dtype)))
    log_probs = [
        jnp.concatenate([new_on_old_support, jnp.where(known, -jnp.inf, new.log_probs)]),
        jnp.concatenate([old.log_probs, at_added]),
    ]
    if renormalise:
        log_probs = [jax.nn.log_softmax(x) for x in log_probs]
    return SparseLogProbs(tokens, log_probs[0]), SparseLogProbs(tokens, log_probs[1])


def bucket_tail(new_on_old_support: jax.Array, old: SparseLogProbs) -> tuple[SparseLogProbs, SparseLogProbs]:
    """Tail rule: π_old's support, and one more entry that holds the mass of all other tokens.

    Both masses are known exactly, so nothing is made up, and the divergence is never more than that of the whole
    vocabulary (data-processing inequality). Within the tail the new policy stays as it is. π̃'s own support is not
    needed.

    Args:
      new_on_old_support: [K] log π̃ of π_old's tokens.
      old: π_old on its support [K].

    Returns:
      π̃ and π_old as SparseLogProbs on the same tokens [K + 1], each with a mass of one; the last one is `TAIL`.
    """
    tokens = jnp.append(old.tokens, TAIL)
    add_tail = lambda log_probs: jnp.append(log_probs, _log_tail(log_probs))
    return SparseLogProbs(tokens, add_tail(new_on_old_support)), SparseLogProbs(tokens, add_tail(old.log_probs))


def sampled_or_not(log_prob: jax.Array) -> jax.Array:
    """The distribution [2] of one token and all others together, from the token's log-probability []."""
    return jnp.append(log_prob, _log_tail(log_prob[None]))


def _log_tail(log_probs: jax.Array) -> jax.Array:
    """The log of what [K] leaves out of one, at least the resolution of the dtype: one below would be rounding."""
    mass = jnp.sum(jnp.exp(log_probs))
    return jnp.log1p(-jnp.minimum(mass, 1 - jnp.finfo(log_probs.dtype).eps))
