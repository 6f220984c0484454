"""Sampling responses, and recording what they were sampled from.

All requests of a rollout, G samples of each of B prompts, are known when it begins, so that the whole of it is one
program: a fixed number of slots decodes in one loop, and a slot whose response has ended takes the next request in the
iteration after that. A prompt is prefilled once, shortly before its first sample is due, and its keys and values exist
once for all of its samples. Shapes depend on no length: as long as as many prompts come, nothing compiles twice.

Letters besides those of `types.py`: E shards of the batch, each with a queue, slots and caches of its own on its own
devices; U slots and Q places for prompts of a shard.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.models import decoder as decoders
from troll_jax.models.head import logits
from troll_jax.models.pages import Pages, Prefixes, grow, init_pages, release, write_pages
from troll_jax.ops import categorical
from troll_jax.ops.support import select
from troll_jax.sharding import RULES, constrain, partition_spec
from troll_jax.types import Prompts, Rollout, RolloutWork, SparseLogProbs

# A text of full length takes 16 pages, unless they would be smaller than this. What a page says to its queries is
# written and read once more: with those of all samples, a small page of a prompt would cost more than its keys.
_PAGES = 16
_LEAST_PROMPT_PAGE, _LEAST_RESPONSE_PAGE = 128, 16


class _Requests(NamedTuple):
    """What is asked for; the requests of a prompt lie next to each other."""

    tokens: jax.Array  # [E, B, P] int32, P a multiple of the chunk of a prefill
    lengths: jax.Array  # [E, B] int32
    keys: jax.Array  # [E, R] random keys
    limits: jax.Array  # [E, R] int32, tokens of the response


class _Record(NamedTuple):
    """One position of all slots; or, [E, R, T, ...], of all responses."""

    tokens: jax.Array  # [E, U] int32
    log_probs: jax.Array  # [E, U] float32
    entropy: jax.Array  # [E, U] float32
    support: SparseLogProbs  # [E, U, K]


class _State(NamedTuple):
    """The loop, about to choose the next token of every slot."""

    # The queue.
    next_prompt: jax.Array  # [E] int32, the first that is not prefilled
    next_request: jax.Array  # [E] int32, the first that no slot has taken
    # Prompts in their places.
    prompts: Pages
    prompt_lengths: jax.Array  # [E, Q] int32
    prompt_hidden: jax.Array  # [E, Q, D] of the last token
    unfinished: jax.Array  # [E, Q] int32, requests of each; 0: a free place
    place: jax.Array  # [E, B] int32, of each prompt
    # Slots.
    request: jax.Array  # [E, U] int32; R: idle
    t: jax.Array  # [E, U] int32, response tokens so far
    hidden: jax.Array  # [E, U, D] of the last token
    responses: Pages
    # What comes out.
    records: _Record  # [E, R, T, ...]
    lengths: jax.Array  # [E, R] int32
    stop_token: jax.Array  # [E, R] int32
    steps: jax.Array  # [] int32
    prefills: jax.Array  # [] int32


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
    prefill_chunk: int = 256,
    gather_weights: bool = True,
) -> Callable[..., Rollout]:
    """Builds the function that samples G responses to each prompt, in one program.

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

    Returns:
      sample(params, prompts, keys[B], limits[R] = None) → Rollout. The responses to a prompt depend on the parameters,
      the prompt and its own key, not on slots or on the other prompts. `limits`, between 1 and T, are lengths at which
      single responses are cut. The compiled function is `sample.program`.

    Raises:
      ValueError: a negative temperature, no stop token, fewer than one sample, response token or slot, K > V, top_k or
        top_p out of range. `sample` raises one for prompts that are empty or longer than their array, limits out of
        range, and numbers of prompts or slots that the devices do not divide.
    """
    _check_settings(config, locals())
    graphdef, _ = decoders.abstract(config)
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)
    group, room = samples_per_prompt, max_response_length
    truncated = top_k is not None or top_p is not None

    def choose(axis_name, hidden, unembedding, uniform) -> _Record:
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
            return _Record(token, log_prob, blocks.entropy, support)

        record = jax.vmap(one_row)(scores, uniform)
        # A policy of NaN draws anything: still a token of the vocabulary, and not of the padding of its last block.
        return record._replace(tokens=jnp.minimum(record.tokens, config.vocab_size - 1))

    @jax.jit
    def program(params: dict, prompts: Prompts, keys: jax.Array, limits: jax.Array | None) -> Rollout:
        params = decoders.cast_weights(params, config.compute_dtype)
        if gather_weights:
            params = decoders.decode_layout(params, config)
        decoder = decoders.bind(graphdef, params)
        shards = _batch_shards()
        requests = _queue(prompts, keys, limits, shards, group, room, prefill_chunk)
        chunk = min(prefill_chunk, prompts.tokens.shape[1])
        state = _start(config, requests, slots, group, room, max_tokens)
        batch = _prefill_batch(state.request.shape[1], group, state.place.shape[1])

        def prefill_is_due(state: _State) -> jax.Array:
            """Whether slots of any shard wait for a prompt for which there is a place."""
            idle = jnp.sum(state.request == requests.keys.shape[1], axis=1)
            left = requests.lengths.shape[1] - state.next_prompt
            free = jnp.sum(state.unfinished == 0, axis=1)
            waiting = idle > state.next_prompt * group - state.next_request
            return jnp.any(waiting & (left > 0) & (free >= jnp.minimum(left, batch)))

        def unfinished(state: _State) -> jax.Array:
            count = requests.keys.shape[1]
            return jnp.any(state.next_request < count) | jnp.any(state.request < count)

        def step(state: _State) -> _State:
            with jax.named_scope('prefill'):
                prefill = partial(_prefill, decoder, requests, batch=batch, chunk=chunk, group=group)
                state = jax.lax.while_loop(prefill_is_due, prefill, state)
            with jax.named_scope('refill'):
                state = _refill(state, group)
            with jax.named_scope('draw'):
                rows = lambda x: x.reshape(-1, *x.shape[2:])
                uniform = jax.vmap(_uniform)(requests.keys, state.request, state.t)
                record = _over_devices(choose)(rows(state.hidden), decoder.unembedding, rows(uniform))
                record = jax.tree.map(lambda x: x.reshape(*state.t.shape, *x.shape[1:]), record)
            with jax.named_scope('record'):
                state, ended = _write(state, record, requests, stops)
                state, active = _end(state, ended, group)
            with jax.named_scope('decode'):
                response_lengths = jnp.where(active, state.t, 0)
                responses = grow(state.responses, response_lengths)
                hidden, responses = decoder.decode(record.tokens, response_lengths, _prefixes(state, group), responses)
            return state._replace(hidden=hidden, responses=responses, steps=state.steps + 1)

        end = jax.lax.while_loop(unfinished, step, state)
        rows = lambda x: constrain(x.reshape(-1, *x.shape[2:]), 'batch', *[None] * (x.ndim - 2))
        records = jax.tree.map(rows, end.records)
        lengths = rows(end.lengths)
        prompt_lengths = jnp.repeat(prompts.lengths, group)
        return Rollout(
            tokens=_concatenate(jnp.repeat(prompts.tokens, group, axis=0), prompt_lengths, records.tokens, lengths),
            prompt_lengths=prompt_lengths,
            response_lengths=lengths,
            stop_token=rows(end.stop_token),
            log_probs=records.log_probs,
            entropy=records.entropy,
            support=records.support,
            work=RolloutWork(end.steps, jnp.int32(end.request.size), end.prefills),
        )

    def sample(params, prompts: Prompts, keys: jax.Array, limits: jax.Array | None = None) -> Rollout:
        _check_requests(prompts, keys, limits, slots, group, room)
        return program(params, prompts, keys, limits)

    sample.program = program
    return sample


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


def _check_requests(prompts: Prompts, keys, limits, slots: int | None, group: int, room: int) -> None:
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
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES['batch'])


def _over_devices(choose):
    """`choose` on each device with its rows and its part of the vocabulary; outputs are the same over the latter."""
    if jax.sharding.get_abstract_mesh().empty:
        return partial(choose, None)
    rows = partition_spec(['batch'])
    specs = (rows, partition_spec(['vocab', None]), rows)
    return jax.shard_map(partial(choose, RULES['vocab']), in_specs=specs, out_specs=rows, check_vma=False)


def _uniform(keys: jax.Array, request: jax.Array, t: jax.Array) -> jax.Array:
    """The number in [0, 1) by which each slot [U] draws token t of its request: no other token has to do with it."""
    draw = lambda key, t: jax.random.uniform(jax.random.fold_in(key, t))
    return jax.vmap(draw)(keys.at[request].get(mode='clip'), t)


def _shard(x: jax.Array, shards: int) -> jax.Array:
    """[B, ...] → [E, B / E, ...]."""
    x = x.reshape(shards, -1, *x.shape[1:])
    return constrain(x, 'batch', *[None] * (x.ndim - 1))


def _queue(prompts: Prompts, keys, limits, shards: int, group: int, room: int, chunk: int) -> _Requests:
    batch, length = prompts.tokens.shape
    chunk = min(chunk, length)
    tokens = jnp.pad(prompts.tokens, [(0, 0), (0, -length % chunk)])
    keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(group)))(keys).reshape(-1)
    if limits is None:
        limits = jnp.full(batch * group, room, jnp.int32)
    return _Requests(*(_shard(x, shards) for x in (tokens, prompts.lengths, keys, limits)))


def _start(config, requests: _Requests, slots: int | None, group: int, room: int, kept: int) -> _State:
    """Nothing prefilled, all slots idle."""
    (shards, batch, length), (_, count) = requests.tokens.shape, requests.keys.shape
    slots = count if slots is None else min(slots // shards, count)
    # A prompt keeps its place until the last of its samples has ended: several times as long as a mean response takes.
    # Never in use are more than one for every slot and those of a prefill, which is due when a slot has none.
    places = min(batch, 4 * -(-slots // group) + 1, slots + _prefill_batch(slots, group, batch))

    def full(value, *sizes, dtype=jnp.int32):
        return constrain(jnp.full((shards, *sizes), value, dtype), 'batch', *[None] * len(sizes))

    def pages(users, length, least):
        return init_pages(config, shards, users, length, min(max(least, -(-length // _PAGES)), length))

    floats = partial(full, 0.0, dtype=jnp.float32)
    hidden = partial(full, 0.0, dtype=config.compute_dtype)
    support = SparseLogProbs(full(0, count, room, kept), floats(count, room, kept))
    return _State(
        next_prompt=full(0),
        next_request=full(0),
        prompts=pages(places, length, _LEAST_PROMPT_PAGE),
        prompt_lengths=full(0, places),
        prompt_hidden=hidden(places, config.width),
        unfinished=full(0, places),
        place=full(0, batch),
        request=full(count, slots),
        t=full(0, slots),
        hidden=hidden(slots, config.width),
        responses=pages(slots, room, _LEAST_RESPONSE_PAGE),
        records=_Record(full(0, count, room), floats(count, room), floats(count, room), support),
        lengths=full(0, count),
        stop_token=full(-1, count),
        steps=jnp.int32(0),
        prefills=jnp.int32(0),
    )


def _prefill_batch(slots: int, group: int, batch: int) -> int:
    """Prompts of a shard that are prefilled together: a quarter of those that fill its slots."""
    return min(-(-slots // (4 * group)), batch)


def _prefill(decoder, requests: _Requests, state: _State, *, batch: int, chunk: int, group: int) -> _State:
    """Brings the next prompts into free places, chunk by chunk, as far as the longest of them goes."""
    shards, prompts, room = requests.tokens.shape
    places = state.unfinished.shape[1]
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


def _refill(state: _State, group: int) -> _State:
    """Gives idle slots the next requests whose prompts are there."""
    count = state.lengths.shape[1]
    idle = state.request == count
    request = state.next_request[:, None] + jnp.cumsum(idle, axis=1) - 1
    new = idle & (request < state.next_prompt[:, None] * group)
    request = jnp.where(new, request, state.request)
    place = _places(state, request, group)
    hidden = jax.vmap(lambda x, place: x.at[place].get(mode='clip'))(state.prompt_hidden, place)
    return state._replace(
        next_request=state.next_request + jnp.sum(new, axis=1),
        request=request,
        t=jnp.where(new, 0, state.t),
        hidden=jnp.where(new[:, :, None], hidden, state.hidden),
    )


def _places(state: _State, request: jax.Array, group: int) -> jax.Array:
    """Where the prompts of requests [E, U] lie; Q for idle slots."""
    get = jax.vmap(lambda place, prompt: place.at[prompt].get(mode='fill', fill_value=state.unfinished.shape[1]))
    return get(state.place, request // group)


def _prefixes(state: _State, group: int) -> Prefixes:
    places, slots = state.unfinished.shape[1], state.request.shape[1]
    member = _places(state, state.request, group) * group + state.request % group
    by_member = jax.vmap(
        lambda member: (
            jnp.full(places * group, slots, jnp.int32).at[member].set(jnp.arange(slots, dtype=jnp.int32), mode='drop')
        )
    )(member)
    return Prefixes(state.prompts, state.prompt_lengths, member, by_member.reshape(-1, places, group))


def _write(state: _State, record: _Record, requests: _Requests, stops: jax.Array) -> tuple[_State, jax.Array]:
    """Records the tokens of all slots; says which responses [E, U] end with them."""
    count = state.lengths.shape[1]
    put = jax.vmap(lambda all, request, t, new: all.at[request, t].set(new, mode='drop'))
    records = jax.tree.map(lambda all, new: put(all, state.request, state.t, new), state.records, record)
    t = state.t + 1
    is_stop = jnp.any(record.tokens[:, :, None] == stops[None, None], axis=2)
    limit = jax.vmap(lambda limits, request: limits.at[request].get(mode='clip'))(requests.limits, state.request)
    ended = (state.request < count) & (is_stop | (t >= limit))
    put = jax.vmap(lambda all, request, new: all.at[request].set(new, mode='drop'))
    return (
        state._replace(
            records=records,
            t=t,
            lengths=put(state.lengths, state.request, t),
            stop_token=put(state.stop_token, state.request, jnp.where(is_stop, record.tokens, -1)),
        ),
        ended,
    )


def _end(state: _State, ended: jax.Array, group: int) -> tuple[_State, jax.Array]:
    """Takes back what responses [E, U] held that have ended; says which slots are still active."""
    count, places = state.lengths.shape[1], state.unfinished.shape[1]
    place = _places(state, state.request, group)
    fewer = jnp.sum(ended[:, :, None] & (place[:, :, None] == jnp.arange(places)[None, None]), axis=1)
    left = state.unfinished - fewer
    request = jnp.where(ended, count, state.request)
    return (
        state._replace(
            request=request,
            responses=release(state.responses, ended),
            unfinished=left,
            prompts=release(state.prompts, left == 0),
            prompt_lengths=jnp.where(left == 0, 0, state.prompt_lengths),
        ),
        request < count,
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
