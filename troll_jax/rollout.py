"""Sampling responses, and recording what they were sampled from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.models import decoder as decoders
from troll_jax.models.head import logits
from troll_jax.ops.categorical import entropy, sample
from troll_jax.ops.support import sparsify
from troll_jax.sharding import constrain
from troll_jax.types import Prompts, Rollout, SparseLogProbs


class _Record(NamedTuple):
    """One position of all rows."""

    tokens: jax.Array  # [R]
    log_probs: jax.Array  # [R]
    entropy: jax.Array  # [R]
    support: SparseLogProbs  # [R, K]


class _Decoding(NamedTuple):
    """The state of the decoding loop, about to choose response token t of every row."""

    t: jax.Array  # []
    hidden: jax.Array  # [R, D] of each row's last token
    cache: decoders.KVCache
    records: _Record  # [T, R, ...]
    lengths: jax.Array  # [R] response tokens so far
    stopped: jax.Array  # [R] bool


def make_sampler(
    config: decoders.DecoderConfig,
    *,
    samples_per_prompt: int,
    max_response_length: int,
    temperature: float,
    stop_tokens: Sequence[int],
    max_tokens: int,
    mass: float,
) -> Callable[[dict, Prompts, jax.Array], Rollout]:
    """Builds the jitted function that samples G responses to each prompt.

    Args:
      config: of the decoder.
      samples_per_prompt: G.
      max_response_length: T; a response that gets no stop token is cut there.
      temperature: of the sampling; 0 takes the most probable token, and records the policy at temperature 1.
      stop_tokens: a response ends with any of these.
      max_tokens, mass: of the recorded distributions, see `troll_jax.sparsify`.

    Returns:
      sample(params, prompts, keys[B]) → Rollout. The responses to a prompt depend on the parameters, the prompt and its
      own key, not on the other prompts of the batch.

    Raises:
      ValueError: a negative temperature, no stop token, fewer than one sample or response token, or K > V.
    """
    if temperature < 0:
        raise ValueError(f'temperature must be positive, or 0 for greedy decoding; got {temperature}')
    if not stop_tokens:
        raise ValueError('no stop token: every response would run to max_response_length; set eos_token_id')
    if samples_per_prompt < 1 or max_response_length < 1:
        raise ValueError(
            'samples_per_prompt and max_response_length must be at least 1; got '
            f'{samples_per_prompt} and {max_response_length}'
        )
    if not 1 <= max_tokens <= config.vocab_size:
        raise ValueError(
            f'max_tokens (kept tokens per position) must be between 1 and the vocabulary size {config.vocab_size}; '
            f'got {max_tokens}'
        )
    graphdef, _ = decoders.abstract(config)

    def choose(hidden, unembedding, keys, t):
        scores = logits(hidden, unembedding, temperature=temperature or 1.0, dtype=config.compute_dtype)
        scores = constrain(scores, 'batch', 'vocab')

        def one_row(scores, key):
            log_probs = jax.nn.log_softmax(scores)
            uniform = jax.random.uniform(jax.random.fold_in(key, t))
            token = sample(uniform, log_probs) if temperature else jnp.argmax(log_probs).astype(jnp.int32)
            support = sparsify(log_probs, token, max_tokens=max_tokens, mass=mass)
            return _Record(token, log_probs[token], entropy(log_probs), support)

        return jax.vmap(one_row)(scores, keys)

    @jax.jit
    def sampler(params: dict, prompts: Prompts, keys: jax.Array) -> Rollout:
        decoder = decoders.bind(graphdef, decoders.cast_weights(params, config.compute_dtype))
        prompts = Prompts(constrain(prompts.tokens, 'batch', 'length'), constrain(prompts.lengths, 'batch'))
        with jax.named_scope('prefill'):
            hidden, cache = _prefill(decoder, prompts)
        # From here on a row is a response.
        repeat = lambda x, axis: jnp.repeat(x, samples_per_prompt, axis=axis)
        hidden, prompt_lengths = repeat(hidden, 0), repeat(prompts.lengths, 0)
        room = [(0, 0), (0, 0), (0, max_response_length), (0, 0), (0, 0)]
        cache = jax.tree.map(lambda x: constrain(jnp.pad(repeat(x, 1), room), *decoders.CACHE_AXES), cache)
        keys = jax.vmap(lambda key: jax.random.split(key, samples_per_prompt))(keys).reshape(-1)

        rows = prompt_lengths.shape[0]
        record = jax.eval_shape(choose, hidden, decoder.unembedding, keys, 0)
        records = jax.tree.map(lambda x: jnp.zeros((max_response_length, *x.shape), x.dtype), record)
        stop = jnp.asarray(stop_tokens, jnp.int32)

        def unfinished(state):
            return (state.t < max_response_length) & ~jnp.all(state.stopped)

        def step(state):
            with jax.named_scope('choose'):
                record = choose(state.hidden, decoder.unembedding, keys, state.t)
            records = jax.tree.map(
                lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, state.t, 0), state.records, record
            )
            lengths = jnp.where(state.stopped, state.lengths, state.t + 1)
            stopped = state.stopped | jnp.any(record.tokens[:, None] == stop[None, :], axis=1)
            # A stopped row goes on decoding into the void until all have stopped; its length says what counts.
            positions = prompt_lengths + state.t
            hidden, cache = decoder.extend(record.tokens[:, None], positions[:, None], state.cache)
            return _Decoding(state.t + 1, hidden[:, 0], cache, records, lengths, stopped)

        start = _Decoding(jnp.int32(0), hidden, cache, records, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool))
        with jax.named_scope('decode'):
            end = jax.lax.while_loop(unfinished, step, start)
        records = jax.tree.map(lambda x: constrain(x.swapaxes(0, 1), 'batch', *[None] * (x.ndim - 1)), end.records)
        return Rollout(
            tokens=_concatenate(repeat(prompts.tokens, 0), prompt_lengths, records.tokens, end.lengths),
            prompt_lengths=prompt_lengths,
            response_lengths=end.lengths,
            stopped=end.stopped,
            log_probs=records.log_probs,
            entropy=records.entropy,
            support=records.support,
        )

    return sampler


def _prefill(decoder: decoders.Decoder, prompts: Prompts) -> tuple[jax.Array, decoders.KVCache]:
    """The hidden state [B, D] of each prompt's last token, and the cache of its tokens."""
    batch, length = prompts.tokens.shape
    cache = decoders.init_cache(decoder.config, batch, length)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    hidden, cache = decoder.extend(prompts.tokens, positions, cache)
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)
    return last[:, 0], cache


def _concatenate(prompts: jax.Array, prompt_lengths: jax.Array, responses: jax.Array, lengths: jax.Array) -> jax.Array:
    """Rows of prompt [R, P], response [R, T] and zeros, without a gap: [R, P + T]."""
    _, prompt_room = prompts.shape
    _, response_room = responses.shape
    index = jnp.arange(prompt_room + response_room)[None, :]
    t = index - prompt_lengths[:, None]
    response = jnp.take_along_axis(responses, jnp.clip(t, 0, response_room - 1), axis=1)
    prompt = jnp.pad(prompts, [(0, 0), (0, response_room)])
    return jnp.where(t < 0, prompt, jnp.where(t < lengths[:, None], response, 0))
