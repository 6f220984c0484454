"""Continuous batching with fixed shapes: request queue and decode slots.

Functions of a `State` alone: no model runs here. A prompt is admitted to a free place before its first sample is due,
and keeps it until its last sample has ended. A decode slot decodes one request, and takes the next when that has ended.
Axis letters: `troll_jax/types.py`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.models.paged_attention import Prefixes
from troll_jax.models.paged_cache import Pages, grow, init_pages, release, response_pages, write_pages
from troll_jax.sharding import constrain
from troll_jax.types import Prompts, SparseLogProbs

# A sequence of full length takes 16 pages, unless they would be smaller than this. The partial softmax of a page is
# written and read once more: with those of all samples, a small page of a prompt would cost more than its keys.
_PAGES = 16
_LEAST_PROMPT_PAGE, _LEAST_RESPONSE_PAGE = 128, 16


class Requests(NamedTuple):
    """The queue of a rollout; the requests of a prompt are next to each other."""

    tokens: jax.Array  # [E, B, P] int32, P a multiple of the chunk of a prefill
    lengths: jax.Array  # [E, B] int32
    keys: jax.Array  # [E, R] random keys
    limits: jax.Array  # [E, R] int32, tokens of the response


class Record(NamedTuple):
    """One position of all slots; or, [E, R, T, ...], of all responses."""

    tokens: jax.Array  # [E, U] int32
    log_probs: jax.Array  # [E, U] float32
    entropy: jax.Array  # [E, U] float32
    support: SparseLogProbs  # [E, U, K]


class State(NamedTuple):
    """A rollout between two tokens: every slot is about to choose its next one."""

    # The queue.
    next_prompt: jax.Array  # [E] int32, the first that is not prefilled
    next_request: jax.Array  # [E] int32, the first that no slot has taken
    # Prompts in their places.
    prompts: Pages
    prompt_lengths: jax.Array  # [E, Q] int32
    prompt_hidden: jax.Array  # [E, Q, D] of the last token
    unfinished: jax.Array  # [E, Q] int32, requests of each; 0: a free place
    place: jax.Array  # [E, B] int32, of each prompt
    # Decode slots.
    request: jax.Array  # [E, U] int32; R: idle
    t: jax.Array  # [E, U] int32, response tokens so far
    hidden: jax.Array  # [E, U, D] of the last token
    responses: Pages
    # The responses.
    records: Record  # [E, R, T, ...]
    lengths: jax.Array  # [E, R] int32
    stop_token: jax.Array  # [E, R] int32
    steps: jax.Array  # [] int32
    prefills: jax.Array  # [] int32

    @property
    def samples_per_prompt(self) -> int:
        return self.lengths.shape[1] // self.place.shape[1]


class Admission(NamedTuple):
    """The next A prompts of the queue, and the free places that they are admitted to."""

    index: jax.Array  # [E, A] int32, in the queue
    place: jax.Array  # [E, A] int32; Q: no other is free
    admitted: jax.Array  # [E, A] bool, there are such a prompt and such a place
    lengths: jax.Array  # [E, A] int32; 0: not admitted
    tokens: jax.Array  # [E, A, P] int32


def _shard(x: jax.Array, shards: int) -> jax.Array:
    """[B, ...] → [E, B / E, ...]."""
    x = x.reshape(shards, -1, *x.shape[1:])
    return constrain(x, 'batch', *[None] * (x.ndim - 1))


def enqueue(
    prompts: Prompts, keys, limits, shards: int, samples_per_prompt: int, max_response_length: int, chunk: int
) -> Requests:
    """Spreads prompts, each with the keys of its samples, over the shards of the batch."""
    batch, length = prompts.tokens.shape
    chunk = min(chunk, length)
    tokens = jnp.pad(prompts.tokens, [(0, 0), (0, -length % chunk)])
    samples = jnp.arange(samples_per_prompt)
    keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(samples))(keys).reshape(-1)
    if limits is None:
        limits = jnp.full(batch * samples_per_prompt, max_response_length, jnp.int32)
    limits = jnp.asarray(limits, jnp.int32)  # not weakly typed: that would be another program
    return Requests(*(_shard(x, shards) for x in (tokens, prompts.lengths, keys, limits)))


def idle_state(config, requests: Requests, slots: int | None, max_response_length: int, support_size: int) -> State:
    """Nothing prefilled, all slots idle."""
    (shards, batch, length), (_, count) = requests.tokens.shape, requests.keys.shape
    slots = count if slots is None else min(slots // shards, count)
    # A prompt keeps its place until the last of its samples has ended: several times as long as a mean response takes.
    # Never in use are more than one for every slot and those of a prefill, which is due when a slot has none.
    samples = count // batch
    places = min(batch, 4 * -(-slots // samples) + 1, slots + prefill_batch(slots, samples, batch))

    def full(value, *sizes, dtype=jnp.int32):
        return jnp.full((shards, *sizes), value, dtype)

    def pages(kind, sequences, length, least):
        return init_pages(kind, config, shards, sequences, length, min(max(least, -(-length // _PAGES)), length))

    floats = partial(full, 0.0, dtype=jnp.float32)
    hidden = partial(full, 0.0, dtype=config.compute_dtype)
    each = count, max_response_length
    support = SparseLogProbs(full(0, *each, support_size), floats(*each, support_size))
    state = State(
        next_prompt=full(0),
        next_request=full(0),
        prompts=pages(Pages, places, length, _LEAST_PROMPT_PAGE),
        prompt_lengths=full(0, places),
        prompt_hidden=hidden(places, config.width),
        unfinished=full(0, places),
        place=full(0, batch),
        request=full(count, slots),
        t=full(0, slots),
        hidden=hidden(slots, config.width),
        responses=pages(response_pages(config), slots, max_response_length, _LEAST_RESPONSE_PAGE),
        records=Record(full(0, *each), floats(*each), floats(*each), support),
        lengths=full(0, count),
        stop_token=full(-1, count),
        steps=jnp.int32(0),
        prefills=jnp.int32(0),
    )
    return lay_out(state)


def lay_out(state: State) -> State:
    """Every shard's part on its own devices. All programs of a rollout end with this, and expect it of each other."""

    def one(x: jax.Array | Pages) -> jax.Array | Pages:
        return x.lay_out() if isinstance(x, Pages) else constrain(x, *['batch', *[None] * x.ndim][: x.ndim])

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Pages))


def prefill_is_due(state: State) -> jax.Array:
    """True if slots of any shard wait for a prompt for which there is a place: [] bool."""
    (_, count), (_, prompts) = state.lengths.shape, state.place.shape
    idle = jnp.sum(state.request == count, axis=1)
    left = prompts - state.next_prompt
    free = jnp.sum(state.unfinished == 0, axis=1)
    waiting = idle > state.next_prompt * state.samples_per_prompt - state.next_request
    enough = free >= jnp.minimum(left, prefill_batch(state.request.shape[1], state.samples_per_prompt, prompts))
    return jnp.any(waiting & (left > 0) & enough)


def work_is_left(state: State) -> jax.Array:
    """True if any request waits or is being decoded: [] bool."""
    count = state.lengths.shape[1]
    return jnp.any(state.next_request < count) | jnp.any(state.request < count)


def prefill_batch(slots: int, samples_per_prompt: int, batch: int) -> int:
    """A, prompts of a shard that are prefilled together: a quarter of those that fill its slots."""
    return min(-(-slots // (4 * samples_per_prompt)), batch)


def admit(state: State, requests: Requests) -> Admission:
    """Admits the next prompts of the queue to free places, as many as a prefill takes and places are free."""
    prompts, places = state.place.shape[1], state.unfinished.shape[1]
    batch = prefill_batch(state.request.shape[1], state.samples_per_prompt, prompts)
    free = jax.vmap(lambda x: jnp.nonzero(x == 0, size=batch, fill_value=places)[0])(state.unfinished)
    index = state.next_prompt[:, None] + jnp.arange(batch)[None]
    admitted = (index < prompts) & (free < places)
    take = jax.vmap(lambda x, index: x.at[index].get(mode='clip'))
    lengths = jnp.where(admitted, take(requests.lengths, index), 0)
    return Admission(index, free, admitted, lengths, take(requests.tokens, index))


def store_prompts(state: State, admission: Admission, hidden: jax.Array, cache) -> State:
    """Puts prefilled prompts into their places, and copies their keys and values into pages.

    Args:
      hidden: [E · A, D], hidden states of the last tokens.
      cache: keys and values, [layers, E · A, P, KH, F] each.
    """
    (shards, prompts), places = state.place.shape, state.unfinished.shape[1]
    place = jnp.where(admission.admitted, admission.place, places)
    put = jax.vmap(lambda x, place, new: x.at[place].set(new, mode='drop'))
    prompt_lengths = put(state.prompt_lengths, place, admission.lengths)
    pages = grow(state.prompts, prompt_lengths)
    table = jax.vmap(lambda table, place: table.at[place].get(mode='fill', fill_value=pages.owner.shape[1]))(
        pages.table, place
    )

    def paged(x: jax.Array) -> jax.Array:
        """[layers, E · A, P, KH, F] → [layers, E, A · J, KH, PS, F]."""
        layers, _, length, kv_heads, head_dim = x.shape
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pages.table.shape[2] * pages.size - length), (0, 0), (0, 0)])
        return x.reshape(layers, shards, -1, pages.size, kv_heads, head_dim).swapaxes(3, 4)

    table = table.reshape(shards, -1)
    pages = pages._replace(k=write_pages(pages.k, table, paged(cache.k)), v=write_pages(pages.v, table, paged(cache.v)))
    return state._replace(
        next_prompt=state.next_prompt + jnp.sum(admission.admitted, axis=1),
        prompts=pages,
        prompt_lengths=prompt_lengths,
        prompt_hidden=put(state.prompt_hidden, place, hidden.reshape(shards, -1, hidden.shape[1])),
        unfinished=put(state.unfinished, place, jnp.full_like(place, state.samples_per_prompt)),
        place=put(state.place, jnp.where(admission.admitted, admission.index, prompts), place),
        prefills=state.prefills + 1,
    )


def refill(state: State) -> State:
    """Gives idle slots the next requests whose prompts are prefilled."""
    count = state.lengths.shape[1]
    idle = state.request == count
    request = state.next_request[:, None] + jnp.cumsum(idle, axis=1) - 1
    new = idle & (request < state.next_prompt[:, None] * state.samples_per_prompt)
    request = jnp.where(new, request, state.request)
    place = _places(state, request)
    hidden = jax.vmap(lambda x, place: x.at[place].get(mode='clip'))(state.prompt_hidden, place)
    return state._replace(
        next_request=state.next_request + jnp.sum(new, axis=1),
        request=request,
        t=jnp.where(new, 0, state.t),
        hidden=jnp.where(new[:, :, None], hidden, state.hidden),
    )


def _places(state: State, request: jax.Array) -> jax.Array:
    """The places of the prompts of requests [E, U]; Q for idle slots."""
    get = jax.vmap(lambda place, prompt: place.at[prompt].get(mode='fill', fill_value=state.unfinished.shape[1]))
    return get(state.place, request // state.samples_per_prompt)


def prefixes(state: State) -> Prefixes:
    """The prompts in their places, for paged attention."""
    places, slots, samples = state.unfinished.shape[1], state.request.shape[1], state.samples_per_prompt
    sample = _places(state, state.request) * samples + state.request % samples
    none = jnp.full(places * samples, slots, jnp.int32)
    slot = jax.vmap(lambda sample: none.at[sample].set(jnp.arange(slots, dtype=jnp.int32), mode='drop'))(sample)
    return Prefixes(state.prompts, state.prompt_lengths, sample, slot.reshape(-1, places, samples))


def record_tokens(state: State, record: Record, requests: Requests, stops: jax.Array) -> tuple[State, jax.Array]:
    """Records the tokens of all slots. Also returns which slots' responses end with them, [E, U] bool."""
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


def end_responses(state: State, ended: jax.Array) -> tuple[State, jax.Array]:
    """Frees slots, pages and places of responses [E, U] that have ended. Also returns which slots are still active."""
    count, places = state.lengths.shape[1], state.unfinished.shape[1]
    place = _places(state, state.request)
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
