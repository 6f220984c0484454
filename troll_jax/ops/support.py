"""Sparse distributions: which tokens of the vocabulary a distribution lists, and two of them on common ground."""

import jax
import jax.numpy as jnp

from troll_jax.types import SparseLogProbs


def sparsify(log_probs: jax.Array, token: jax.Array, *, max_tokens: int, mass: float = 1 - 1e-5) -> SparseLogProbs:
    """Lists the most probable tokens until they hold a given mass, and always the sampled one.

    Keeping the most probable tokens leaves out least of the KL divergence (TROLL, arXiv 2510.03817, theorem A.1). If
    the sampled token is not among them it takes the next free place, or the least probable one's.

    Args:
      log_probs: [V] normalised.
      token: [] int, the sampled token.
      max_tokens: K, at most V.
      mass: the probability that the kept tokens are to hold, 1 − δ in the paper; 1 keeps K tokens whatever they hold.

    Returns:
      SparseLogProbs [K], most probable first, not renormalised.

    Raises:
      ValueError: K is not within 1 … V, or the mass not within (0, 1].
    """
    (size,) = log_probs.shape
    if not 1 <= max_tokens <= size:
        raise ValueError(f'max_tokens must be between 1 and the vocabulary size {size}; got {max_tokens}')
    if not 0 < mass <= 1:
        raise ValueError(f'mass is the probability to keep, in (0, 1]; got {mass}')
    top_log_probs, top_tokens = jax.lax.top_k(log_probs, max_tokens)
    # Counted, because rounding may let the sum fall below the mass again.
    count = 1 + jnp.sum(jnp.cumsum(jnp.exp(top_log_probs))[:-1] < mass) if mass < 1 else max_tokens
    index = jnp.arange(max_tokens)
    kept = index < count
    missing = ~jnp.any(kept & (top_tokens == token))
    here = missing & (index == jnp.minimum(count, max_tokens - 1))
    tokens = jnp.where(here, token, jnp.where(kept, top_tokens, -1)).astype(jnp.int32)
    return SparseLogProbs(tokens, at_tokens(log_probs, tokens))


def at_tokens(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """The log-probabilities [K] of `tokens` [K] in `log_probs` [V]; −inf for padding (−1)."""
    return jnp.where(tokens >= 0, log_probs[jnp.maximum(tokens, 0)], -jnp.inf)


def at_token(distribution: SparseLogProbs, token: jax.Array) -> jax.Array:
    """The log-probability [] of one token that is on the support [K]."""
    # A sum over one non-zero term, so that the gradient of every other entry is zero and not 0 · inf.
    return jnp.sum(jnp.where(distribution.tokens == token, distribution.log_probs, 0.0))


def log_mass(distribution: SparseLogProbs) -> jax.Array:
    """The log of the probability that the support [K] holds."""
    return jax.nn.logsumexp(distribution.log_probs)


def union_with_default(
    log_probs: jax.Array, new: SparseLogProbs, old: SparseLogProbs, *, default: float = 1e-12
) -> tuple[SparseLogProbs, SparseLogProbs]:
    """Puts π̃ and π_old on the union of their supports (tail rule `default`, TROLL, section 3.3).

    π̃ is known everywhere, so its values at π_old's tokens are exact. π_old is known on its own support alone: at the
    tokens that only π̃ lists it gets a default probability. Both must be listed by the same rule, sampled token
    included: only then do equal policies have equal supports and a divergence of zero.

    Args:
      log_probs: [V] log π̃.
      new: π̃ on its own support [K'].
      old: π_old on its support [K].
      default: probability of a token that π_old's support leaves out.

    Returns:
      π̃ and π_old as SparseLogProbs on the same tokens [K + K']: those of `old`, then what π̃ adds. Not renormalised.
    """
    known = (new.tokens < 0) | jnp.any(new.tokens[:, None] == old.tokens[None, :], axis=1)
    added = jnp.where(known, -1, new.tokens)
    tokens = jnp.concatenate([old.tokens, added])
    at_added = jnp.where(known, -jnp.inf, jnp.log(jnp.asarray(default, log_probs.dtype)))
    return (
        SparseLogProbs(tokens, at_tokens(log_probs, tokens)),
        SparseLogProbs(tokens, jnp.concatenate([old.log_probs, at_added])),
    )
