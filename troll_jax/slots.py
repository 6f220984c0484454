"""The queue of a rollout and the slots that work through it: who decodes what, in arrays of fixed shapes.

Functions of a `State` alone: no model is asked here. A prompt takes a place before its first sample is due and keeps it
until the last one has ended; a slot decodes one request and takes the next when that has ended.

Letters besides those of `types.py`: E shards of the batch, each with a queue, slots and pages of its own on its own
devices; U slots and Q places for prompts of a shard.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from troll_jax.models.pages import Pages, Prefixes, init_pages, release, response_pages
from troll_jax.sharding import constrain
from troll_jax.types import Prompts, SparseLogProbs

# A text of full length takes 16 pages, unless they would be smaller than this. What a page says to its queries is
# written and read once more: with those of all samples, a small page of a prompt would cost more than its keys.
_PAGES = 16
_LEAST_PROMPT_PAGE, _LEAST_RESPONSE_PAGE = 128, 16


class Requests(NamedTuple):
    """What is asked for; the requests of a prompt lie next to each other."""

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
    # Slots.
    request: jax.Array  # [E, U] int32; R: idle
    t: jax.Array  # [E, U] int32, response tokens so far
    hidden: jax.Array  # [E, U, D] of the last token
    responses: Pages
    # What comes out.
    records: Record  # [E, R, T, ...]
    lengths: jax.Array  # [E, R] int32
    stop_token: jax.Array  # [E, R] int32
    steps: jax.Array  # [] int32
    prefills: jax.Array  # [] int32


def _shard(x: jax.Array, shards: int) -> jax.Array:
    """[B, ...] → [E, B / E, ...]."""
    x = x.reshape(shards, -1, *x.shape[1:])
    return constrain(x, 'batch', *[None] * (x.ndim - 1))


def enqueue(prompts: Prompts, keys, limits, shards: int, group: int, room: int, chunk: int) -> Requests:
    """Spreads prompts, each with the keys of its samples, over the shards of the batch."""
    batch, length = prompts.tokens.shape
    chunk = min(chunk, length)
    tokens = jnp.pad(prompts.tokens, [(0, 0), (0, -length % chunk)])
    keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(group)))(keys).reshape(-1)
    if limits is None:
        limits = jnp.full(batch * group, room, jnp.int32)
    limits = jnp.asarray(limits, jnp.int32)  # not weakly typed: that would be another program
    return Requests(*(_shard(x, shards) for x in (tokens, prompts.lengths, keys, limits)))


def idle_state(config, requests: Requests, slots: int | None, group: int, room: int, kept: int) -> State:
    """Nothing prefilled, all slots idle."""
    (shards, batch, length), (_, count) = requests.tokens.shape, requests.keys.shape
    slots = count if slots is None else min(slots // shards, count)
    # A prompt keeps its place until the last of its samples has ended: several times as long as a mean response takes.
    # Never in use are more than one for every slot and those of a prefill, which is due when a slot has none.
    places = min(batch, 4 * -(-slots // group) + 1, slots + prefill_batch(slots, group, batch))

    def full(value, *sizes, dtype=jnp.int32):
        return jnp.full((shards, *sizes), value, dtype)

    def pages(kind, users, length, least):
        return init_pages(kind, config, shards, users, length, min(max(least, -(-length // _PAGES)), length))

    floats = partial(full, 0.0, dtype=jnp.float32)
    hidden = partial(full, 0.0, dtype=config.compute_dtype)
    support = SparseLogProbs(full(0, count, room, kept), floats(count, room, kept))
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
        responses=pages(response_pages(config), slots, room, _LEAST_RESPONSE_PAGE),
        records=Record(full(0, count, room), floats(count, room), floats(count, room), support),
        lengths=full(0, count),
        stop_token=full(-1, count),
        steps=jnp.int32(0),
        prefills=jnp.int32(0),
    )
    return lay_out(state)


def lay_out(state: State) -> State:
    """Every shard's part on its own devices. All programs of a rollout end with this: they hand on what they expect."""

    def one(x: jax.Array | Pages) -> jax.Array | Pages:
        return x.lay_out() if isinstance(x, Pages) else constrain(x, *['batch', *[None] * x.ndim][: x.ndim])

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Pages))


def prefill_is_due(state: State, group: int) -> jax.Array:
    """Whether slots of any shard wait for a prompt for which there is a place: [] bool."""
    (_, count), (_, prompts) = state.lengths.shape, state.place.shape
    idle = jnp.sum(state.request == count, axis=1)
    left = prompts - state.next_prompt
    free = jnp.sum(state.unfinished == 0, axis=1)
    waiting = idle > state.next_prompt * group - state.next_request
    enough = free >= jnp.minimum(left, prefill_batch(state.request.shape[1], group, prompts))
    return jnp.any(waiting & (left > 0) & enough)


def work_is_left(state: State) -> jax.Array:
    """Whether any request waits or is being decoded: [] bool."""
    count = state.lengths.shape[1]
    return jnp.any(state.next_request < count) | jnp.any(state.request < count)


def prefill_batch(slots: int, group: int, batch: int) -> int:
    """Prompts of a shard that are prefilled together: a quarter of those that fill its slots."""
    return min(-(-slots // (4 * group)), batch)


def refill(state: State, group: int) -> State:
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


def _places(state: State, request: jax.Array, group: int) -> jax.Array:
    """Where the prompts of requests [E, U] lie; Q for idle slots."""
    get = jax.vmap(lambda place, prompt: place.at[prompt].get(mode='fill', fill_value=state.unfinished.shape[1]))
    return get(state.place, request // group)


def prefixes(state: State, group: int) -> Prefixes:
    places, slots = state.unfinished.shape[1], state.request.shape[1]
    member = _places(state, state.request, group) * group + state.request % group
    by_member = jax.vmap(
        lambda member: (
            jnp.full(places * group, slots, jnp.int32).at[member].set(jnp.arange(slots, dtype=jnp.int32), mode='drop')
        )
    )(member)
    return Prefixes(state.prompts, state.prompt_lengths, member, by_member.reshape(-1, places, group))


def record_tokens(state: State, record: Record, requests: Requests, stops: jax.Array) -> tuple[State, jax.Array]:
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


def end_responses(state: State, ended: jax.Array, group: int) -> tuple[State, jax.Array]:
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
