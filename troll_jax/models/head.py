"""From hidden states to log-probabilities, by chunks of tokens: no array of N × V numbers is ever kept."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.ops.categorical import entropy
from troll_jax.ops.support import at_tokens, sparsify
from troll_jax.sharding import constrain
from troll_jax.types import SparseLogProbs


class HeadOutput(NamedTuple):
    """What the losses and the log need of N tokens."""

    log_probs: jax.Array  # [N] of the tokens given
    entropy: jax.Array  # [N] nats
    at_old: jax.Array  # [N, K] log π̃ of the tokens that π_old lists
    own: SparseLogProbs | None  # [N, K'] π̃ on its own most probable tokens


def logits(hidden: jax.Array, unembedding: jax.Array, *, temperature: float, dtype) -> jax.Array:
    """[..., V] float32 logits of hidden states [..., D] at a temperature. The product is taken in `dtype`."""
    product = jnp.einsum(
        '...d,vd->...v', hidden.astype(dtype), unembedding.astype(dtype), preferred_element_type=jnp.float32
    )
    return product / temperature


def sparse_head(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    old_tokens: jax.Array,
    *,
    temperature: float,
    max_tokens: int | None,
    mass: float,
    chunk: int,
    dtype,
) -> HeadOutput:
    """Log-probabilities of N tokens, and of those that the current policy and the old one list.

    The chunks are computed one after the other and again in the backward pass, so memory is that of `chunk` × V logits.

    Args:
      hidden: [N, D]
      unembedding: [V, D]
      tokens: [N] int32
      old_tokens: [N, K] the support of the distribution that each token was sampled from.
      temperature: of the sampling; the policy is the one that sampled.
      max_tokens, mass: of the current policy's own support, see `troll_jax.sparsify`; those that the old one was made
        with. None: the current policy's own support is not needed.
      chunk: tokens per chunk, a multiple of the number of devices that hold tokens.
      dtype: of the matrix product.
    """

    def one_token(token_logits, token, old_tokens):
        all_log_probs = jax.nn.log_softmax(token_logits)
        own = None
        if max_tokens is not None:
            own = sparsify(jax.lax.stop_gradient(all_log_probs), token, max_tokens=max_tokens, mass=mass)
            own = own._replace(log_probs=at_tokens(all_log_probs, own.tokens))
        return HeadOutput(all_log_probs[token], entropy(all_log_probs), at_tokens(all_log_probs, old_tokens), own)

    @jax.checkpoint
    def one_chunk(inputs):
        hidden, tokens, old_tokens = inputs
        scores = logits(hidden, unembedding, temperature=temperature, dtype=dtype)
        return jax.vmap(one_token)(scores, tokens, old_tokens)

    with jax.named_scope('head'):
        # Gathered over 'embed' once, and not again for every chunk.
        unembedding = constrain(unembedding.astype(dtype), 'vocab', None)
        count = tokens.shape[0]
        chunks = -(-count // chunk)

        def split(x):
            # Strided, so that every chunk holds tokens of every device and the sharded axis stays in its place.
            x = jnp.pad(x, [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(chunk, chunks, *x.shape[1:]).swapaxes(0, 1)

        def join(x):
            return x.swapaxes(0, 1).reshape(chunk * chunks, *x.shape[2:])[:count]

        outputs = jax.lax.map(one_chunk, jax.tree.map(split, (hidden, tokens, old_tokens)))
        return jax.tree.map(join, outputs)
