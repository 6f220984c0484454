"""Sampling responses, and recording what they were sampled from.

All requests of a rollout, G samples of each of B prompts, are known when it begins: a fixed number of slots decodes,
and a slot whose response has ended takes the next request in the step after that. A prompt is prefilled once, shortly
before its first sample is due, and its keys and values exist once for all of its samples. Shapes depend on no length:
as long as as many prompts come, nothing compiles twice. The bookkeeping is in `slots.py`, on the devices as well.

The host runs two programs in turn: one prefills as long as a prefill is due, the other decodes, step after step, until
one is due again or everything has ended. It takes the time of each, and is told only whether anything is left.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.models import decoder as decoders
from troll_jax.models.head import logits
from troll_jax.models.pages import grow, write_pages
from troll_jax.ops import categorical
from troll_jax.ops.support import select
from troll_jax.sharding import RULES, constrain, current_mesh, partition_spec
from troll_jax.slots import (
    Record,
    Requests,
    State,
    end_responses,
    enqueue,
    idle_state,
    lay_out,
    prefill_batch,
    prefill_is_due,
    prefixes,
    record_tokens,
    refill,
    work_is_left,
)
from troll_jax.types import Prompts, Rollout, RolloutWork

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
          params: of the decoder.
          prompts: B of them, as many as the devices of the mesh's batch axes divide.
          keys: [B] random keys.
          limits: [R] int32, between 1 and T: lengths at which single responses are cut.

        Raises:
          ValueError: prompts that are empty or longer than their array, limits out of range, and numbers of prompts or
            slots that the devices do not divide.
        """
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
        work = RolloutWork(state.steps, slots, state.prefills, prefill_seconds, decode_seconds)
        return self.end(prompts, state)._replace(work=work)

    def shapes(self, params, prompts: Prompts, keys: jax.Array) -> Rollout:
        """Traces all programs on shapes; nothing is compiled. Returns those of a rollout, without its `work`."""
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
    max_tokens: int,
    mass: float,
    top_k: int | None = None,
    top_p: float | None = None,
    slots: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    gather_weights: bool = True,
) -> Sampler:
    """Builds the function that samples G responses to each prompt.

    Args:
      config: of the decoder.
      samples_per_prompt: G.
      max_response_length: T; a response that gets no stop token is cut there.
      temperature: of the sampling; 0 takes the most probable token, and records the policy at temperature 1.
      stop_tokens: a response ends with any of these.
      max_tokens, mass: of the recorded distributions, see `troll_jax.sparsify`.
      top_k, top_p: sample from the most probable tokens only, see `categorical.truncate`. What is recorded is the
        truncated distribution.
      slots: responses that are decoded at a time, on all devices together. Memory grows with it, no response depends
        on it. None: one for every request, so that none waits.
      prefill_chunk: tokens of each prompt that a prefill takes at a time.
      gather_weights: lays the weights out for decoding once per rollout, the parts of all `fsdp` devices on each;
        false: they stay as they lie for training, which takes less memory and sends them at every step.

    Raises:
      ValueError: a negative temperature, no stop token, fewer than one sample, response token or slot, K > V, top_k or
        top_p out of range.
    """
    _check_settings(config, locals())
    graphdef, _ = decoders.abstract(config)
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)
    group, room = samples_per_prompt, max_response_length
    truncated = top_k is not None or top_p is not None

    def choose(axis_name, hidden, unembedding, uniform) -> Record:
        """Draws the next token of rows [N], and what is recorded of it, on one device with its part of the vocabulary.

        Args:
          axis_name: over which the other parts lie; None: there are none.
          hidden: [N, D], unembedding: [V', D], uniform: [N].
        """
        scores = logits(hidden, unembedding, temperature=temperature or 1.0, dtype=config.compute_dtype)
        if truncated and axis_name is not None:
            scores, axis_name = jax.lax.all_gather(scores, axis_name, axis=1, tiled=True), None

        def one_row(scores, uniform):
            if truncated:
                scores = categorical.truncate(scores, count=top_k, mass=top_p)
            blocks = categorical.summarise(scores, axis_name)
            if temperature:
                token, log_prob = categorical.draw(uniform, blocks, axis_name)
            else:
                token, log_prob = categorical.most_probable(blocks, axis_name)
            best, best_log_probs = categorical.largest(blocks, max_tokens, axis_name)
            support = select(best, best_log_probs, token, log_prob, mass=mass)
            return Record(token, log_prob, blocks.entropy, support)

        record = jax.vmap(one_row)(scores, uniform)
        # A policy of NaN draws anything: still a token of the vocabulary, and not of the padding of its last block.
        return record._replace(tokens=jnp.minimum(record.tokens, config.vocab_size - 1))

    @jax.jit
    def begin(params: dict, prompts: Prompts, keys: jax.Array, limits: jax.Array | None):
        weights = decoders.cast_weights(params, config.compute_dtype)
        if gather_weights:
            weights = decoders.decode_layout(weights, config)
        requests = enqueue(prompts, keys, limits, _batch_shards(), group, room, prefill_chunk)
        return weights, requests, idle_state(config, requests, slots, group, room, max_tokens)

    @partial(jax.jit, donate_argnames='state')
    def prefill(weights: dict, requests: Requests, state: State) -> State:
        one = partial(_prefill, decoders.bind(graphdef, weights), requests, chunk=prefill_chunk, group=group)
        return lay_out(jax.lax.while_loop(partial(prefill_is_due, group=group), one, state))

    @partial(jax.jit, donate_argnames='state')
    def decode(weights: dict, requests: Requests, state: State) -> tuple[State, jax.Array]:
        decoder = decoders.bind(graphdef, weights)

        def step(state: State) -> State:
            with jax.named_scope('refill'):
                state = refill(state, group)
            with jax.named_scope('draw'):
                rows = lambda x: x.reshape(-1, *x.shape[2:])
                uniform = jax.vmap(_uniform)(requests.keys, state.request, state.t)
                record = _over_devices(choose)(rows(state.hidden), decoder.unembedding, rows(uniform))
                record = jax.tree.map(lambda x: x.reshape(*state.t.shape, *x.shape[1:]), record)
            with jax.named_scope('record'):
                state, ended = record_tokens(state, record, requests, stops)
                state, active = end_responses(state, ended, group)
            with jax.named_scope('decode'):
                response_lengths = jnp.where(active, state.t, 0)
                responses = grow(state.responses, response_lengths)
                hidden, responses = decoder.decode(record.tokens, response_lengths, prefixes(state, group), responses)
            return state._replace(hidden=hidden, responses=responses, steps=state.steps + 1)

        state = jax.lax.while_loop(lambda state: work_is_left(state) & ~prefill_is_due(state, group), step, state)
        return lay_out(state), constrain(work_is_left(state))

    @jax.jit
    def end(prompts: Prompts, state: State) -> Rollout:
        rows = lambda x: constrain(x.reshape(-1, *x.shape[2:]), 'batch', *[None] * (x.ndim - 2))
        records = jax.tree.map(rows, state.records)
        lengths = rows(state.lengths)
        prompt_lengths = jnp.repeat(prompts.lengths, group)
        return Rollout(
            tokens=_concatenate(jnp.repeat(prompts.tokens, group, axis=0), prompt_lengths, records.tokens, lengths),
            prompt_lengths=prompt_lengths,
            response_lengths=lengths,
            stop_token=rows(state.stop_token),
            log_probs=records.log_probs,
            entropy=records.entropy,
            support=records.support,
        )

    check = partial(_check_requests, slots=slots, group=group, room=room)
    return Sampler(check, begin, prefill, decode, end)


def _check_settings(config, settings) -> None:
    temperature, slots, top_k, top_p = (settings[name] for name in ('temperature', 'slots', 'top_k', 'top_p'))
    if temperature < 0:
        raise ValueError(f'temperature must be positive, or 0 for greedy decoding; got {temperature}')
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError('top_k and top_p change nothing at temperature 0; set a temperature, or leave them out')
    if not settings['stop_tokens']:
        raise ValueError('no stop token: every response would run to max_response_length; set eos_token_id')
    if settings['samples_per_prompt'] < 1 or settings['max_response_length'] < 1:
        raise ValueError(
            'samples_per_prompt and max_response_length must be at least 1; got '
            f'{settings["samples_per_prompt"]} and {settings["max_response_length"]}'
        )
    if not 1 <= settings['max_tokens'] <= config.vocab_size:
        raise ValueError(
            f'max_tokens (kept tokens per position) must be between 1 and the vocabulary size {config.vocab_size}; '
            f'got {settings["max_tokens"]}'
        )
    if not 0 < settings['mass'] <= 1:
        raise ValueError(f'mass is the probability to keep, in (0, 1]; got {settings["mass"]}')
    if slots is not None and slots < 1:
        raise ValueError(f'slots (responses decoded at a time) must be at least 1, or None for all; got {slots}')
    if settings['prefill_chunk'] < 1:
        raise ValueError(f'prefill_chunk must be at least 1 token; got {settings["prefill_chunk"]}')
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(
            f'top_k must be between 1 and the vocabulary size {config.vocab_size}, or None for all; got {top_k}'
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f'top_p must be in (0, 1], or None for all; got {top_p}')


def _check_requests(prompts: Prompts, keys, limits, *, slots: int | None, group: int, room: int) -> None:
    """Raises a ValueError with the numbers, before anything is compiled."""
    shards = _batch_shards()
    batch, length = prompts.tokens.shape
    if keys.shape != (batch,):
        raise ValueError(f'{batch} prompts need as many keys; got keys of shape {keys.shape}')
    if limits is not None and limits.shape != (batch * group,):
        raise ValueError(f'{batch} prompts × {group} samples need as many limits; got limits of shape {limits.shape}')
    for name, count in [('prompts', batch), ('slots', slots or shards)]:
        if count % shards:
            raise ValueError(
                f'{name} = {count} must be a multiple of the {shards} devices of the mesh axes {RULES["batch"]}'
            )
    bounds = [('prompts are', prompts.lengths, length, 'the cache for prompts')]
    if limits is not None:
        bounds.append(('limits are', limits, room, 'max_response_length'))
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


def _batch_shards() -> int:
    """E: over how many devices, or groups of them, the mesh in context spreads a batch."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES['batch'])


def _over_devices(choose):
    """`choose` on each device with its rows and its part of the vocabulary; outputs are the same over the latter."""
    if current_mesh() is None:
        return partial(choose, None)
    rows = partition_spec(['batch'])
    specs = (rows, partition_spec(['vocab', None]), rows)
    return jax.shard_map(partial(choose, RULES['vocab']), in_specs=specs, out_specs=rows, check_vma=False)


def _uniform(keys: jax.Array, request: jax.Array, t: jax.Array) -> jax.Array:
    """The number in [0, 1) by which each slot [U] draws token t of its request: no other token has to do with it."""
    draw = lambda key, t: jax.random.uniform(jax.random.fold_in(key, t))
    return jax.vmap(draw)(keys.at[request].get(mode='clip'), t)


def _prefill(decoder, requests: Requests, state: State, *, chunk: int, group: int) -> State:
    """Brings the next prompts into free places, chunk by chunk, as far as the longest of them goes."""
    shards, prompts, room = requests.tokens.shape
    chunk = min(chunk, room)
    places = state.unfinished.shape[1]
    batch = prefill_batch(state.request.shape[1], group, prompts)
    free = jax.vmap(lambda x: jnp.nonzero(x == 0, size=batch, fill_value=places)[0])(state.unfinished)
    index = state.next_prompt[:, None] + jnp.arange(batch)[None]
    fits = (index < prompts) & (free < places)
    take = jax.vmap(lambda x, index: x.at[index].get(mode='clip'))
    lengths = jnp.where(fits, take(requests.lengths, index), 0)
    rows = lambda x: x.reshape(shards * batch, *x.shape[2:])
    tokens, row_lengths = rows(take(requests.tokens, index)), rows(lengths)

    def extend(i, carry):
        hidden, cache = carry
        positions = jnp.broadcast_to(i * chunk + jnp.arange(chunk, dtype=jnp.int32), (shards * batch, chunk))
        part = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        new, cache = decoder.extend(part, positions, cache)
        last = row_lengths - 1 - i * chunk
        at = jnp.take_along_axis(new, jnp.clip(last, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(((last >= 0) & (last < chunk))[:, None], at, hidden), cache

    hidden = jnp.zeros((shards * batch, decoder.config.width), decoder.config.compute_dtype)
    cache = decoders.init_cache(decoder.config, shards * batch, room)
    hidden, cache = jax.lax.fori_loop(0, -(-jnp.max(lengths) // chunk), extend, (hidden, cache))

    place = jnp.where(fits, free, places)
    put = jax.vmap(lambda x, place, new: x.at[place].set(new, mode='drop'))
    prompt_lengths = put(state.prompt_lengths, place, lengths)
    pages = grow(state.prompts, prompt_lengths)
    table = jax.vmap(lambda table, place: table.at[place].get(mode='fill', fill_value=pages.owner.shape[1]))(
        pages.table, place
    )

    def paged(x: jax.Array) -> jax.Array:
        """[layers, E · batch, L, M, F] → [layers, E, pages, M, page, F]."""
        layers, _, _, kv_heads, head_dim = x.shape
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pages.table.shape[2] * pages.size - room), (0, 0), (0, 0)])
        return x.reshape(layers, shards, -1, pages.size, kv_heads, head_dim).swapaxes(3, 4)

    table = table.reshape(shards, -1)
    pages = pages._replace(k=write_pages(pages.k, table, paged(cache.k)), v=write_pages(pages.v, table, paged(cache.v)))
    return state._replace(
        next_prompt=state.next_prompt + jnp.sum(fits, axis=1),
        prompts=pages,
        prompt_lengths=prompt_lengths,
        prompt_hidden=put(state.prompt_hidden, place, hidden.reshape(shards, batch, -1)),
        unfinished=put(state.unfinished, place, jnp.full_like(place, group)),
        place=put(state.place, jnp.where(fits, index, prompts), place),
        prefills=state.prefills + 1,
    )


def _concatenate(prompts: jax.Array, prompt_lengths: jax.Array, responses: jax.Array, lengths: jax.Array) -> jax.Array:
    """Rows of prompt [R, P], response [R, T] and zeros, without a gap: [R, P + T]."""
    _, prompt_room = prompts.shape
    _, response_room = responses.shape
    index = jnp.arange(prompt_room + response_room)[None, :]
    t = index - prompt_lengths[:, None]
    response = jnp.take_along_axis(responses, jnp.clip(t, 0, response_room - 1), axis=1)
    prompt = jnp.pad(prompts, [(0, 0), (0, response_room)])
    return jnp.where(t < 0, prompt, jnp.where(t < lengths[:, None], response, 0))
