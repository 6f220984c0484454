"""On-policy sampling by continuous batching: responses, and a record of the distributions they were sampled from.

All requests of a rollout, G samples of each of B prompts, are known when it begins. A fixed number of decode slots
works through them: a slot whose response has ended takes the next request in the step after that. A prompt is prefilled
once, shortly before its first sample is due, and its KV cache serves all of its samples. Shapes depend on no length: as
long as as many prompts come, nothing compiles twice. Admission and queue are in `scheduler.py`, on the devices as well.

The host runs two programs in turn. One prefills as long as a prefill is due, the other decodes, step after step, until
one is due again or everything has ended. The host times each, and learns only whether any work is left.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax import scheduler
from troll_jax.models import decoder as decoders
from troll_jax.models.head import logits
from troll_jax.models.paged_cache import grow
from troll_jax.ops import categorical
from troll_jax.ops.support import select
from troll_jax.scheduler import Record, Requests, State
from troll_jax.sharding import RULES, axis_size, constrain, current_mesh, one_device_mesh, shard_map
from troll_jax.types import Prompts, Rollout, RolloutStats

PREFILL_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples G responses to each prompt. `make_sampler` builds one; its fields are compiled functions.

    The state of a rollout is donated from one to the next.
    """

    check: Callable[..., None]  # (prompts, keys, limits)
    begin: Callable[..., tuple[Any, Requests, State]]  # (params, prompts, keys, limits) → weights for decoding, …
    prefill: Callable[..., State]  # (weights, requests, state), until none is due
    decode: Callable[..., tuple[State, jax.Array]]  # (weights, requests, state), until a prefill is due, or all is done
    end: Callable[..., Rollout]  # (prompts, state)

    def __call__(self, params, prompts: Prompts, keys: jax.Array, limits: jax.Array | None = None) -> Rollout:
        """The responses to a prompt depend on the parameters, the prompt and its own key, not on the other prompts.

        Args:
          params: the decoder's.
          prompts: B of them, as many as the devices of the mesh's batch axes divide.
          keys: [B] random keys.
          limits: [R] int32, between 1 and T: lengths at which single responses are cut.

        Raises:
          ValueError: prompts that are empty or longer than their array, limits out of range, and numbers of prompts or
            slots that the devices do not divide.
        """
        if current_mesh() is None:
            with jax.set_mesh(one_device_mesh()):
                return self(params, prompts, keys, limits)
        self.check(prompts, keys, limits)
        weights, requests, state = jax.block_until_ready(self.begin(params, prompts, keys, limits))
        prefill_seconds = decode_seconds = 0.0
        is_left = True
        while is_left:
            begin = time.perf_counter()
            state = jax.block_until_ready(self.prefill(weights, requests, state))
            between = time.perf_counter()
            state, is_left = self.decode(weights, requests, state)
            is_left = bool(is_left)  # waits; the same on every process
            prefill_seconds += between - begin
            decode_seconds += time.perf_counter() - between
        slots = state.request.size
        stats = RolloutStats(state.steps, slots, state.prefills, prefill_seconds, decode_seconds)
        return self.end(prompts, state)._replace(stats=stats)

    def shapes(self, params, prompts: Prompts, keys: jax.Array) -> Rollout:
        """Traces all programs on shapes; nothing is compiled. Returns those of a rollout, without its `stats`."""
        self.check(prompts, keys, None)
        inputs = jax.eval_shape(self.begin, params, prompts, keys, None)
        jax.eval_shape(self.prefill, *inputs)
        state, _ = jax.eval_shape(self.decode, *inputs)
        return jax.eval_shape(self.end, prompts, state)


def make_sampler(
    config: decoders.DecoderConfig,
    *,
    samples_per_prompt: int,
    max_response_length: int,
    temperature: float,
    stop_tokens: Sequence[int],
    support_size: int,
    support_mass: float,
    top_k: int | None = None,
    top_p: float | None = None,
    slots: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    gather_weights: bool = True,
) -> Sampler:
    """Builds the function that samples G responses to each prompt.

    Args:
      config: the decoder's.
      samples_per_prompt: G.
      max_response_length: T; a response that gets no stop token is cut there.
      temperature: sampling temperature; 0 takes the most probable token, and records the policy at temperature 1.
      stop_tokens: a response ends with any of these.
      support_size, support_mass: K and the probability to keep of each recorded distribution, see `troll_jax.sparsify`.
      top_k, top_p: for evaluation, bounds that leave only the most probable tokens, see `categorical.truncate`. The
        truncated distribution is recorded, and an update compares with the whole one.
      slots: decode slots, responses that are decoded at a time, on all devices together. Memory grows with it, no
        response depends on it. None: one for every request, so that none waits.
      prefill_chunk: tokens of each prompt that a prefill takes at a time.
      gather_weights: true: weights are laid out for decoding once per rollout, the parts of all `fsdp` devices on each;
        false: they keep the layout of training, which takes less memory and sends them at every step.

    Raises:
      ValueError: a negative temperature, no stop token, fewer than one sample, response token or slot, K > V, top_k or
        top_p out of range.
    """
    if temperature < 0:
        raise ValueError(f'temperature must be positive, or 0 for greedy decoding; got {temperature}')
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError('top_k and top_p change nothing at temperature 0; set a temperature, or leave them out')
    if not stop_tokens:
        raise ValueError('no stop token: every response would run to max_response_length; set eos_token_id')
    if samples_per_prompt < 1 or max_response_length < 1:
        raise ValueError(
            'samples_per_prompt and max_response_length must be at least 1; got '
            f'{samples_per_prompt} and {max_response_length}'
        )
    vocab_size = config.tokenizer_size or config.vocab_size
    if not 1 <= support_size <= vocab_size:
        raise ValueError(
            f'support_size (kept tokens per position) must be between 1 and the vocabulary size {vocab_size}; got '
            f'{support_size}'
        )
    if not 0 < support_mass <= 1:
        raise ValueError(f'support_mass is the probability to keep, in (0, 1]; got {support_mass}')
    if slots is not None and slots < 1:
        raise ValueError(f'slots (responses decoded at a time) must be at least 1, or None for all; got {slots}')
    if prefill_chunk < 1:
        raise ValueError(f'prefill_chunk must be at least 1 token; got {prefill_chunk}')
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(f'top_k must be between 1 and the vocabulary size {vocab_size}, or None for all; got {top_k}')
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'top_p must be in (0, 1], or None for all; got {top_p}')
    graphdef, _ = decoders.abstract(config)
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)
    truncated = top_k is not None or top_p is not None

    def choose(hidden, unembedding, uniforms) -> Record:
        """Draws and records the next token of rows [N], on one device with its part of the vocabulary.

        Args:
          hidden: [N, D], unembedding: [V', D], uniforms: [N, 2].
        """
        scores = logits(
            hidden,
            unembedding,
            temperature=temperature or 1.0,
            dtype=config.compute_dtype,
            tokenizer_size=config.tokenizer_size,
            first=jax.lax.axis_index(RULES['vocab']) * unembedding.shape[0],
        )
        axis_name = None if truncated else RULES['vocab']
        if truncated:
            scores = jax.lax.all_gather(scores, RULES['vocab'], axis=1, tiled=True)

        def one_row(scores, uniforms):
            if truncated:
                scores = categorical.truncate(scores, top_k=top_k, top_p=top_p)
            blocks = categorical.summarise(scores, axis_name)
            if temperature:
                token, log_prob = categorical.draw(uniforms, blocks, axis_name)
            else:
                token, log_prob = categorical.most_probable(blocks, axis_name)
            best, best_log_probs = categorical.largest(blocks, support_size, axis_name)
            support = select(best, best_log_probs, token, log_prob, support_mass=support_mass)
            return Record(token, log_prob, blocks.entropy, support)

        record = jax.vmap(one_row)(scores, uniforms)
        # A policy of NaN draws anything: still a token of the vocabulary, and not of the padding of its last block.
        return record._replace(tokens=jnp.minimum(record.tokens, vocab_size - 1))

    @jax.jit
    def begin(params: dict, prompts: Prompts, keys: jax.Array, limits: jax.Array | None):
        weights = decoders.cast_weights(params, config.compute_dtype)
        if gather_weights:
            weights = decoders.decode_layout(weights, config)
        sizes = axis_size('batch'), samples_per_prompt, max_response_length, prefill_chunk
        requests = scheduler.enqueue(prompts, keys, limits, *sizes)
        return weights, requests, scheduler.idle_state(config, requests, slots, max_response_length, support_size)

    @partial(jax.jit, donate_argnames='state')
    def prefill(weights: dict, requests: Requests, state: State) -> State:
        one = partial(_prefill, decoders.bind(graphdef, weights), requests, chunk=prefill_chunk)
        return scheduler.lay_out(jax.lax.while_loop(scheduler.prefill_is_due, one, state))

    @partial(jax.jit, donate_argnames='state')
    def decode(weights: dict, requests: Requests, state: State) -> tuple[State, jax.Array]:
        decoder = decoders.bind(graphdef, weights)

        def step(state: State) -> State:
            with jax.named_scope('refill'):
                state = scheduler.refill(state)
            with jax.named_scope('draw'):
                rows = lambda x: x.reshape(-1, *x.shape[2:])
                uniforms = jax.vmap(_uniforms)(requests.keys, state.request, state.t)
                over_devices = shard_map(choose, (('batch',), ('vocab', None), ('batch',)), ('batch',))
                record = over_devices(rows(state.hidden), decoder.unembedding, rows(uniforms))
                record = jax.tree.map(lambda x: x.reshape(*state.t.shape, *x.shape[1:]), record)
            with jax.named_scope('record'):
                state, ended = scheduler.record_tokens(state, record, requests, stops)
                state, active = scheduler.end_responses(state, ended)
            with jax.named_scope('decode'):
                response_lengths = jnp.where(active, state.t, 0)
                responses = grow(state.responses, response_lengths)
                prompts = scheduler.prefixes(state)
                hidden, responses = decoder.decode(record.tokens, response_lengths, prompts, responses)
            return state._replace(hidden=hidden, responses=responses, steps=state.steps + 1)

        continues = lambda state: scheduler.work_is_left(state) & ~scheduler.prefill_is_due(state)
        state = jax.lax.while_loop(continues, step, state)
        return scheduler.lay_out(state), constrain(scheduler.work_is_left(state))

    @jax.jit
    def end(prompts: Prompts, state: State) -> Rollout:
        rows = lambda x: constrain(x.reshape(-1, *x.shape[2:]), 'batch', *[None] * (x.ndim - 2))
        records = jax.tree.map(rows, state.records)
        lengths = rows(state.lengths)
        prompt_lengths = jnp.repeat(prompts.lengths, samples_per_prompt)
        prompt_tokens = jnp.repeat(prompts.tokens, samples_per_prompt, axis=0)
        return Rollout(
            tokens=_concatenate(prompt_tokens, prompt_lengths, records.tokens, lengths),
            prompt_lengths=prompt_lengths,
            response_lengths=lengths,
            stop_token=rows(state.stop_token),
            log_probs=records.log_probs,
            entropy=records.entropy,
            support=records.support,
        )

    check = partial(
        _check_requests, slots=slots, samples_per_prompt=samples_per_prompt, max_response_length=max_response_length
    )
    return Sampler(check, begin, prefill, decode, end)


def _check_requests(
    prompts: Prompts, keys, limits, *, slots: int | None, samples_per_prompt: int, max_response_length: int
) -> None:
    """Raises a ValueError with the numbers, before anything is compiled."""
    shards = axis_size('batch')
    batch, length = prompts.tokens.shape
    if keys.shape != (batch,):
        raise ValueError(f'{batch} prompts need as many keys; got keys of shape {keys.shape}')
    if limits is not None and limits.shape != (batch * samples_per_prompt,):
        raise ValueError(
            f'{batch} prompts × {samples_per_prompt} samples need as many limits; got limits of shape {limits.shape}'
        )
    for name, count in [('prompts', batch), ('slots', slots or shards)]:
        if count % shards:
            raise ValueError(
                f'{name} = {count} must be a multiple of the {shards} devices of the mesh axes {RULES["batch"]}'
            )
    bounds = [('prompts are', prompts.lengths, length, 'the cache for prompts')]
    if limits is not None:
        bounds.append(('limits are', limits, max_response_length, 'max_response_length'))
    for name, values, most, what in bounds:
        if isinstance(values, jax.core.Tracer | jax.ShapeDtypeStruct) or not getattr(
            values, 'is_fully_addressable', True
        ):
            continue  # known only when the program runs
        values = np.asarray(values)
        if values.min() < 1 or values.max() > most:
            raise ValueError(
                f'{name} between {values.min()} and {values.max()} tokens long; expected 1 to {most}, which is {what}'
            )


def _uniforms(keys: jax.Array, request: jax.Array, t: jax.Array) -> jax.Array:
    """The numbers in [0, 1) by which each slot [U] draws token t of its request, [U, 2]; no other token uses them."""
    draw = lambda key, t: jax.random.uniform(jax.random.fold_in(key, t), (categorical.UNIFORMS,))
    return jax.vmap(draw)(keys.at[request].get(mode='clip'), t)


def _prefill(decoder, requests: Requests, state: State, *, chunk: int) -> State:
    """Runs the model over the prompts that are admitted next, chunk by chunk, as far as the longest of them goes."""
    admission = scheduler.admit(state, requests)
    length = admission.tokens.shape[2]
    chunk = min(chunk, length)
    tokens, lengths = admission.tokens.reshape(-1, length), admission.lengths.reshape(-1)
    rows = lengths.size

    def extend(i, carry):
        hidden, cache = carry
        positions = jnp.broadcast_to(i * chunk + jnp.arange(chunk, dtype=jnp.int32), (rows, chunk))
        part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        new, cache = decoder.extend(part, positions, cache)
        last = lengths - 1 - i * chunk
        at = jnp.take_along_axis(new, jnp.clip(last, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((last >= 0) & (last < chunk))[:, None], at, hidden), cache

    hidden = jnp.zeros((rows, decoder.config.width), decoder.config.compute_dtype)
    cache = decoders.init_cache(decoder.config, rows, length)
    hidden, cache = jax.lax.fori_loop(0, -(-jnp.max(admission.lengths) // chunk), extend, (hidden, cache))
    return scheduler.store_prompts(state, admission, hidden, cache)


def _concatenate(prompts: jax.Array, prompt_lengths: jax.Array, responses: jax.Array, lengths: jax.Array) -> jax.Array:
    """Rows of prompt [R, P], response [R, T] and zeros, without a gap: [R, P + T]."""
    prompt_size, response_size = prompts.shape[1], responses.shape[1]
    index = jnp.arange(prompt_size + response_size)[None, :]
    t = index - prompt_lengths[:, None]
    response = jnp.take_along_axis(responses, jnp.clip(t, 0, response_size - 1), axis=1)
    prompt = jnp.pad(prompts, [(0, 0), (0, response_size)])
    return jnp.where(t < 0, prompt, jnp.where(t < lengths[:, None], response, 0))
