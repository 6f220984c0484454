"""Responses of different lengths, end to end in rows of one length; on the host, in numpy.

A padded batch computes as many tokens as its longest response has, for all of them. Here sequences (a prompt and its
response) share rows, which are told apart by segment ids, and rows are grouped into micro-batches of a token budget.
All batches of a run have one shape, that of a batch in which every sequence is as long as it may be. Micro-batches that
hold nothing come last, and an update does not compute them; the last one that does may be filled in part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from troll_jax.sharding import SampleParts
from troll_jax.types import Batch, Rollout, SparseLogProbs

_MICRO_BATCH_TOKENS = 8192  # on each device: enough to keep it busy
_ROW_TOKENS = 1024  # rows up to this length hold two of the longest sequences; in longer ones attention costs more


class BatchShape(NamedTuple):
    """The shape of a batch's arrays, see `Batch`."""

    micro_batches: int  # M
    rows: int  # Z
    row_tokens: int  # S


def batch_shape(
    sequences: int,
    max_length: int,
    *,
    row_tokens: int | None = None,
    micro_batch_tokens: int | None = None,
    devices: int = 1,
    context: int = 1,
) -> BatchShape:
    """The shape that holds a number of sequences, whatever their lengths.

    Args:
      sequences: number of sequences in a batch.
      max_length: tokens of the longest possible sequence, prompt and response.
      row_tokens: S. By default `max_length`; or twice that, up to 1,024, if they do not fit into one micro-batch:
        sequences of a little more than half of `max_length` would each have a row of their own.
      micro_batch_tokens: the budget of a micro-batch on each device, in tokens; by default 8,192 or one row. No more
        of it is taken than as many equal micro-batches need.
      devices: over which rows are spread, data × fsdp of the mesh.
      context: over which the length of a row is split, and each of `devices` is so many. Default rows are rounded up.

    Raises:
      ValueError: a row does not hold the longest sequence, a budget not one row, or `context` does not divide a row.
    """
    budget = context * (micro_batch_tokens or _MICRO_BATCH_TOKENS)
    if row_tokens is None:
        twice = sequences * max_length > budget * devices and 2 * max_length <= min(_ROW_TOKENS, budget)
        row_tokens = _ceil(2 * max_length if twice else max_length, context) * context
    if row_tokens < max_length:
        raise ValueError(
            f'row_tokens = {row_tokens} is less than the {max_length} tokens that a prompt and its response may have; '
            'raise it, or lower max_prompt_length or max_response_length'
        )
    if row_tokens % context:
        raise ValueError(f'row_tokens = {row_tokens} must be a multiple of context = {context}; change one of them')
    if micro_batch_tokens is None:
        budget = max(budget, row_tokens)
    if budget < row_tokens:
        raise ValueError(
            f'micro_batch_tokens = {micro_batch_tokens} tokens on each device, of context = {context}, is less than '
            f'one row of {row_tokens}; raise it, or lower row_tokens'
        )
    # First-fit needs no more rows than this: a row that has no room for a sequence holds at least as many as fit at
    # their greatest length.
    rows = _ceil(_ceil(sequences, row_tokens // max_length), devices)  # of each device
    micro_batches = _ceil(rows, budget // row_tokens)
    # Equal micro-batches, not full ones and a rest: each is computed whole, and the budget may be more than that takes.
    return BatchShape(micro_batches, _ceil(rows, micro_batches) * devices, row_tokens)


def abstract_batch(shape: BatchShape, kept: int) -> Batch:
    """A batch of `jax.ShapeDtypeStruct` whose distributions list `kept` tokens."""
    array = lambda dtype, *more: jax.ShapeDtypeStruct((*shape, *more), dtype)
    old = SparseLogProbs(array(jnp.int32, kept), array(jnp.float32, kept))
    ints, floats = array(jnp.int32), array(jnp.float32)
    return Batch(
        tokens=ints,
        positions=ints,
        segment_ids=ints,
        loss_weights=floats,
        advantages=floats,
        old_log_probs=floats,
        old=old,
    )


def first_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs sequences into rows by first-fit decreasing: the longest first, each into the first row with room for it.

    Args:
      lengths: [R] tokens, none more than `capacity`.
      capacity: tokens of a row.

    Returns:
      The row of each sequence [R] and where in it the sequence begins [R].
    """
    rows, starts = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    used = np.zeros(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind='stable'):
        row = np.argmax(used + lengths[i] <= capacity)
        rows[i], starts[i] = row, used[row]
        used[row] += lengths[i]
    return rows, starts


class Layout(NamedTuple):
    """The places of R sequences, and of the N tokens of their responses, in the rows of a batch."""

    shape: BatchShape
    rows: np.ndarray  # [R] of M · Z
    starts: np.ndarray  # [R] of S
    padded: tuple[int, int]  # R, T
    response: np.ndarray  # [N] of R
    t: np.ndarray  # [N] of T
    at: np.ndarray  # [N] of M · Z · S

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """Values of responses' tokens [R, T] at their places in a batch [M, Z, S]; 0 elsewhere."""
        out = np.zeros(np.prod(self.shape), values.dtype)
        out[self.at] = values[self.response, self.t]
        return out.reshape(self.shape)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """The way back, from [M, Z, S] to [R, T]; 0 behind the end of a response."""
        out = np.zeros(self.padded, values.dtype)
        out[self.response, self.t] = values.reshape(-1)[self.at]
        return out


def make_layout(rollout: Rollout, shape: BatchShape) -> Layout:
    """Packs R responses with their prompts; `shape` is what `batch_shape` gives for as many sequences."""
    rows, starts = first_fit(rollout.prompt_lengths + rollout.response_lengths, shape.row_tokens)
    begin = rows * shape.row_tokens + starts + rollout.prompt_lengths
    response, t = _every_token(rollout.response_lengths)
    return Layout(shape, rows, starts, rollout.log_probs.shape, response, t, begin[response] + t)


def make_batch(rollout: Rollout, advantages: np.ndarray, weights: np.ndarray, layout: Layout) -> Batch:
    """Packs responses, with their advantages and loss weights, into a batch.

    Args:
      rollout: R responses, in numpy.
      advantages: [R]
      weights: [R] loss weight of a response's tokens, see `troll_jax.ops.aggregation`; 0 leaves it out.
      layout: layout of these responses.

    Returns:
      A Batch in numpy.
    """
    lengths, rows, starts = rollout.prompt_lengths + rollout.response_lengths, layout.rows, layout.starts
    # Segments are numbered by where they begin, from 1.
    order = np.lexsort((starts, rows))
    new_row = np.diff(rows[order], prepend=-1) != 0
    count = np.arange(len(order))
    segments = np.empty_like(count)
    segments[order] = 1 + count - np.maximum.accumulate(np.where(new_row, count, 0))

    kept = rollout.support.tokens.shape[-1]
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_batch(layout.shape, kept))
    batch.old.tokens.fill(-1)
    batch.old.log_probs.fill(-np.inf)

    def fill(array: np.ndarray, to: np.ndarray, values: np.ndarray) -> None:
        array.reshape(-1, *array.shape[3:])[to] = values

    source, position = _every_token(lengths)
    to = (rows * layout.shape.row_tokens + starts)[source] + position
    fill(batch.tokens, to, rollout.tokens[source, position])
    fill(batch.positions, to, position)
    fill(batch.segment_ids, to, segments[source])

    source, t, to = layout.response, layout.t, layout.at
    fill(batch.loss_weights, to, weights[source])
    fill(batch.advantages, to, advantages[source])
    fill(batch.old_log_probs, to, rollout.log_probs[source, t])
    fill(batch.old.tokens, to, rollout.support.tokens[source, t])
    fill(batch.old.log_probs, to, rollout.support.log_probs[source, t])
    return batch


class Packing(NamedTuple):
    """The places of a minibatch's R responses. Those of each part share rows, which its processes pack."""

    responses: slice  # of the rollout
    layouts: list[Layout]  # of each part, in its share [M, Z / n, S] of the rows
    parts: SampleParts

    def pack(self, rollout: Rollout, weights: np.ndarray) -> Batch:
        """A batch [M, Z', S] of the rows of this process's parts, without advantages.

        Args:
          rollout: of which the minibatch is a part.
          weights: [R] loss weight of a response's tokens, see `make_batch`.
        """

        def batch(part: int) -> Batch:
            mine = _responses_of(rollout, self.responses, part, len(self.layouts))
            index = self.parts.index(np.arange(self.responses.start + part, self.responses.stop, len(self.layouts)))
            at = slice(index[0], index[-1] + 1, len(self.parts.held))
            mine = mine._replace(support=jax.tree.map(lambda x: x[at], rollout.support))
            return make_batch(mine, np.zeros(len(index), np.float32), self._of(part, weights), self.layouts[part])

        return self._join(batch)

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """Values of responses' tokens [R, T] at their places in the batch [M, Z', S] of this process."""
        return self._join(lambda part: self.layouts[part].scatter(self._of(part, values)))

    def gather(self, values: np.ndarray) -> np.ndarray:
        """The way back, from the whole batch [M, Z, S] to [R, T]; 0 behind the end of a response."""
        by_shard = values.reshape(len(values), self.parts.shards.size, -1, values.shape[-1])
        out = np.empty((self.responses.stop - self.responses.start, self.layouts[0].padded[1]), values.dtype)
        for part, (layout, shards) in enumerate(zip(self.layouts, self.parts.shards, strict=True)):
            self._of(part, out)[:] = layout.gather(by_shard[:, shards])
        return out

    def padding_share(self, tokens: int) -> float:
        """The share of the positions that an update computes and that hold none of so many tokens."""
        micro_batches = max(layout.rows.max() // layout.shape.rows + 1 for layout in self.layouts)
        _, rows, row_tokens = self.layouts[0].shape
        return 1 - tokens / (micro_batches * rows * len(self.layouts) * row_tokens)

    def _of(self, part: int, values: np.ndarray) -> np.ndarray:
        return values[part :: len(self.layouts)]

    def _join(self, one: Callable[[int], Any]) -> Any:
        """The rows of all parts that this process holds, next to each other."""
        first, *others = map(one, self.parts.held)
        return jax.tree.map(lambda *x: np.concatenate(x, axis=1), first, *others) if others else first


def make_packing(rollout: Rollout, responses: slice, shape: BatchShape, parts: SampleParts) -> Packing:
    """Packs some responses of a rollout, the same on every process; `shape` is what `batch_shape` gives for as many."""
    count = len(parts.here)
    shape = shape._replace(rows=shape.rows // count)
    layouts = [make_layout(_responses_of(rollout, responses, part, count), shape) for part in range(count)]
    return Packing(responses, layouts, parts)


def _responses_of(rollout: Rollout, responses: slice, part: int, count: int) -> Rollout:
    """Those of a part, without their support."""
    at = slice(responses.start + part, responses.stop, count)
    return jax.tree.map(lambda x: x[at], rollout._replace(support=None, stats=None))


def _every_token(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sequence of every token, and the index in it, for sequences of these lengths [R]."""
    source = np.repeat(np.arange(len(lengths)), lengths)
    return source, np.arange(len(source)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _ceil(x: int, y: int) -> int:
    return -(-x // y)
