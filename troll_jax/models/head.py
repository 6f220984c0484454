"""From hidden states to log-probabilities, by chunks of tokens: no array of N × V numbers is ever kept."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.ops.categorical import entropy
from troll_jax.ops.support import log_mass, sparsify, union_with_default
from troll_jax.sharding import constrain
from troll_jax.types import SparseLogProbs


class HeadOutput(NamedTuple):
    """What the losses and the log need of N tokens."""

    log_probs: jax.Array  # [N] of the tokens given
    entropy: jax.Array  # [N] nats
    new: SparseLogProbs  # [N, K'] the current policy, on the union of both supports
    old: SparseLogProbs  # [N, K'] the old one, on the same tokens
    tail_mass: jax.Array  # [N] what the current policy gives to tokens outside the union


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
    old: SparseLogProbs,
    *,
    temperature: float,
    max_tokens: int,
    mass: float,
    chunk: int,
    dtype,
) -> HeadOutput:
    """Log-probabilities of N tokens and the current policy on the support of the old one and its own.

    The chunks are computed one after the other and again in the backward pass, so memory is that of `chunk` × V logits.

    Args:
      hidden: [N, D]
      unembedding: [V, D]
      tokens: [N] int32
      old: [N, K] what the tokens were sampled from.
      temperature: of the sampling; the policy is the one that sampled.
      max_tokens, mass: of the current policy's own support, see `troll_jax.sparsify`; those that `old` was made with.
      chunk: tokens per chunk, a multiple of the number of devices that hold tokens.
      dtype: of the matrix product.
    """

    def one_token(token_logits, token, old):
        all_log_probs = jax.nn.log_softmax(token_logits)
        own = sparsify(jax.lax.stop_gradient(all_log_probs), token, max_tokens=max_tokens, mass=mass)
        new, united_old = union_with_default(all_log_probs, own, old)
        tail_mass = -jnp.expm1(jnp.minimum(log_mass(new), 0.0))
        return HeadOutput(all_log_probs[token], entropy(all_log_probs), new, united_old, tail_mass)

    @jax.checkpoint
    def one_chunk(inputs):
        hidden, tokens, old = inputs
        return jax.vmap(one_token)(logits(hidden, unembedding, temperature=temperature, dtype=dtype), tokens, old)

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

        outputs = jax.lax.map(one_chunk, jax.tree.map(split, (hidden, tokens, old)))
        return jax.tree.map(join, outputs)
