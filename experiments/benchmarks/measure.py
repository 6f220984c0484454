"""Shared by the benchmarks: times, ceilings of a machine, a model's shape, random batches, Clip with plain logits."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.models import decoder as decoders
from troll_jax.models.decoder import DecoderConfig
from troll_jax.models.head import logits
from troll_jax.ops.losses import LossInputs, ppo_clip
from troll_jax.packing import BatchShape
from troll_jax.types import Batch, Prompts, SparseLogProbs

PROMPT, RESPONSE, KEPT = 64, 256, 64  # tokens of a sequence of `random_batch`, and of a recorded distribution


def timed(function: Callable, *arguments) -> float:
    """Seconds of one call, to the end of what it has put into a device's queue."""
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def median_seconds(function: Callable, *arguments, repeats: int, calls: int = 1) -> float:
    """Seconds of a call, the median of `repeats`, after one that warms up; of `calls` in a row where one is short."""
    jax.block_until_ready(function(*arguments))
    several = lambda: [function(*arguments) for _ in range(calls)]
    return statistics.median(timed(several) for _ in range(repeats)) / calls


def relative_distance(found: Any, exact: Any) -> float:
    """|found − exact| / |exact| of two trees of arrays, each taken as one vector."""
    flat = lambda tree: np.concatenate([np.ravel(np.asarray(x, np.float32)) for x in jax.tree.leaves(tree)])
    return float(np.linalg.norm(flat(found) - flat(exact)) / np.linalg.norm(flat(exact)))


def copy_bandwidth(repeats: int = 8, size: int | None = None) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes, by default more than any cache holds."""
    size = size or (2**29 if jax.default_backend() == 'cpu' else 2**31)
    source = jax.random.normal(jax.random.key(0), (size // 4,))
    return 2 * source.nbytes / median_seconds(jax.jit(lambda x: x + 1), source, repeats=repeats)


def matmul_rate(repeats: int = 8, size: int = 8192) -> float:
    """FLOP per second of a square product of random bfloat16 numbers."""
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    return 2 * size**3 / median_seconds(jax.jit(jnp.matmul), left, right, repeats=repeats, calls=4)


def qwen3_0_6b(**options) -> DecoderConfig:
    """The shape of Qwen3-0.6B, or one that differs in these options."""
    sizes = {'vocab_size': 151_936, 'width': 1024, 'layers': 28, 'heads': 16, 'kv_heads': 8, 'head_dim': 128}
    rest = {'mlp_width': 3072, 'rope_theta': 1e6, 'norm_eps': 1e-6, 'tied_embeddings': True, 'remat': 'dots'}
    return DecoderConfig(**sizes | rest | options)


def random_batch(shape: BatchShape, vocab_size: int) -> Batch:
    """Sequences of full length, end to end, whose responses were sampled from distributions over KEPT random tokens."""
    keys, length = jax.random.split(jax.random.key(0), 4), PROMPT + RESPONSE
    if shape.row_tokens % length:
        raise ValueError(f'rows of {shape.row_tokens} tokens do not hold whole sequences of {length}')
    tokens = jax.random.randint(keys[0], shape, 0, vocab_size)
    kept = jax.random.randint(keys[1], (*shape, KEPT), 0, vocab_size).at[..., 0].set(tokens)
    log_probs = jax.nn.log_softmax(jax.random.normal(keys[2], kept.shape))
    at = jnp.broadcast_to(jnp.arange(shape.row_tokens, dtype=jnp.int32), shape)
    advantages = jax.random.normal(keys[3], (*shape[:2], shape.row_tokens // length))
    is_response = at % length >= PROMPT
    return Batch(
        tokens=tokens,
        positions=at % length,
        segment_ids=1 + at // length,
        loss_weights=is_response / jnp.sum(is_response),
        advantages=jnp.repeat(advantages, length, axis=2),
        old_log_probs=log_probs[..., 0],
        old=SparseLogProbs(kept.astype(jnp.int32), log_probs),
    )


def plain_clip_gradient(config: DecoderConfig) -> Callable:
    """gradient(params, progress, batch) of Clip as it is usually written: log-softmax over [N, V], gather the sampled.

    For batches of one micro-batch and of one sequence in a row.
    """
    graphdef, _ = decoders.abstract(config)

    def loss(params, _, batch: Batch) -> jax.Array:
        decoder, rows = decoders.bind(graphdef, params), jax.tree.map(lambda x: x[0], batch)
        hidden = decoder(rows.tokens, rows.positions, rows.segment_ids)[:, PROMPT - 1 : -1]
        scores = logits(hidden, decoder.unembedding, temperature=1.0, dtype=config.compute_dtype)
        response = jax.tree.map(lambda x: x[:, PROMPT:], rows)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(scores), response.tokens[:, :, None], axis=2)[:, :, 0]
        old = response.old_log_probs, response.old, response.old
        row = LossInputs(response.tokens, response.segment_ids, log_probs, *old, None)
        return jnp.mean(jax.vmap(ppo_clip)(row, response.advantages).loss)

    return jax.grad(loss)


def random_prompts(count: int, shortest: int, longest: int, room: int, vocab_size: int) -> Prompts:
    """Prompts of random tokens and of lengths between two, in arrays of `room` tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(shortest, longest + 1, count).astype(np.int32)
    tokens = generator.integers(0, vocab_size, (count, room)).astype(np.int32)
    return Prompts(jnp.asarray(np.where(np.arange(room) < lengths[:, None], tokens, 0)), jnp.asarray(lengths))


def decode_bytes(config: DecoderConfig, params, prompts: Prompts, limits: np.ndarray, steps: int) -> float:
    """The bytes that all decode steps of a rollout read at least: weights and the live KV cache, once a step.

    Args:
      limits: [R] tokens of each response; R / B of them belong to a prompt, whose cache they share.
    """
    size = jnp.dtype(config.compute_dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(params)) * size
    token = 2 * config.layers * config.kv_heads * config.head_dim * size
    own = np.sum(limits * (limits + 1.0) / 2)
    of_prompt = np.asarray(limits).reshape(len(prompts.lengths), -1).mean(axis=1)
    return steps * weights + token * (own + np.sum(np.asarray(prompts.lengths) * of_prompt))
