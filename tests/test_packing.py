"""Packing responses into rows: every token where it belongs, little padding, and sizes that cannot work are refused."""

import jax
import numpy as np
import pytest

from troll_jax.packing import (
    BatchShape,
    abstract_batch,
    batch_shape,
    first_fit,
    make_batch,
    make_layout,
    make_packing,
)
from troll_jax.sharding import SampleParts
from troll_jax.types import Batch, Rollout, SparseLogProbs

PROMPT, RESPONSE, KEPT = 5, 11, 3


def padding_share(batch: Batch) -> float:
    """The share of the positions that an update computes and that hold no token."""
    computed = batch.segment_ids[np.any(batch.segment_ids > 0, axis=(1, 2))]
    return float(np.mean(computed == 0)) if computed.size else 0.0


def rollout(lengths) -> Rollout:
    """Responses with prompts of these lengths [R, 2], in which every value is different."""
    prompts, responses = np.asarray(lengths).T
    count = len(prompts)
    values = lambda first, *shape: first + np.arange(np.prod(shape)).reshape(shape)
    tokens = values(1, count, PROMPT + RESPONSE).astype(np.int32)
    floats = lambda first, *shape: values(first, *shape).astype(np.float32)
    support = SparseLogProbs(values(7, count, RESPONSE, KEPT).astype(np.int32), floats(20_000, count, RESPONSE, KEPT))
    return Rollout(
        tokens,
        prompts,
        responses,
        np.full(count, -1, np.int32),
        floats(50_000, count, RESPONSE),
        floats(60_000, count, RESPONSE),
        support,
    )


def random_lengths(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(1, PROMPT + 1, count), rng.integers(1, RESPONSE + 1, count)], axis=1)


def sequences(batch, micro: int, row: int):
    """The sequences of a row, each as indices into it."""
    ids = batch.segment_ids[micro, row]
    return [np.flatnonzero(ids == i) for i in range(1, ids.max() + 1)]


@pytest.mark.parametrize('shape', [BatchShape(7, 3, 16), BatchShape(4, 2, 37), BatchShape(1, 21, 16)])
def test_every_token_is_there_once(shape):
    """Guards against values that stand one off, at another response's tokens, or twice; and gaps within a sequence."""
    data, advantages = rollout(random_lengths(21)), np.linspace(-1, 1, 21, dtype=np.float32)
    weights = np.linspace(1, 2, 21, dtype=np.float32)
    batch = make_batch(data, advantages, weights, make_layout(data, shape))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_batch(shape, KEPT)
    )
    found = set()
    for micro, row in np.ndindex(*shape[:2]):
        for at in sequences(batch, micro, row):
            pick = lambda x, at=at, micro=micro, row=row: x[micro, row][at]
            r = int(np.flatnonzero(data.tokens[:, 0] == pick(batch.tokens)[0])[0])
            found.add(r)
            start, length = data.prompt_lengths[r], data.response_lengths[r]
            assert np.all(np.diff(at) == 1) and len(at) == start + length
            np.testing.assert_array_equal(pick(batch.tokens), data.tokens[r, : start + length])
            np.testing.assert_array_equal(pick(batch.positions), np.arange(start + length))
            for got, expected in [
                (batch.loss_weights, np.full(length, weights[r])),
                (batch.advantages, np.full(length, advantages[r])),
                (batch.old_log_probs, data.log_probs[r, :length]),
                (batch.old.tokens, data.support.tokens[r, :length]),
                (batch.old.log_probs, data.support.log_probs[r, :length]),
            ]:
                np.testing.assert_array_equal(pick(got)[start:], expected)
            assert np.all(pick(batch.loss_weights)[:start] == 0) and np.all(pick(batch.old.tokens)[:start] == -1)
    assert found == set(range(21))
    empty = batch.segment_ids == 0
    assert np.all(batch.tokens[empty] == 0) and np.all(batch.loss_weights[empty] == 0)
    assert (~empty).sum() == (data.prompt_lengths + data.response_lengths).sum()
    used = np.any(~empty, axis=(1, 2))
    assert np.all(used == (np.arange(shape.micro_batches) < used.sum())), 'empty micro-batches were meant to come last'


def test_numbers_of_tokens_find_their_places_and_the_way_back():
    """Guards values and advantages of a critic that end up at other tokens than the batch's own."""
    shape, data = BatchShape(7, 3, 16), rollout(random_lengths(21))
    layout = make_layout(data, shape)
    inside = np.arange(RESPONSE) < data.response_lengths[:, None]
    ones = np.ones(21, np.float32)
    batch = make_batch(data, ones, ones, layout)
    np.testing.assert_array_equal(layout.scatter(data.log_probs), batch.old_log_probs)
    np.testing.assert_array_equal(layout.gather(batch.old_log_probs), np.where(inside, data.log_probs, 0))


def test_the_parts_of_all_processes_are_the_whole_batch():
    """Guards a process that packs another's responses, or its own records with another response's tokens: the second
    minibatch of three, of groups of 6, by processes that hold parts 0 and 2, and 1, on interleaved shards."""
    data, shape, responses = rollout(random_lengths(54)), BatchShape(5, 6, 16), slice(18, 36)
    shards, weights = np.array([[0, 3], [1, 5], [2, 4]]), np.linspace(1, 2, 18, dtype=np.float32)
    whole = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract_batch(shape, KEPT))
    for here in ([True, False, True], [False, True, False]):
        parts = SampleParts(shards, np.array(here))
        held = np.array(here)[np.arange(54) % 3]
        kept = data._replace(support=jax.tree.map(lambda x, held=held: x[held], data.support))
        packing = make_packing(kept, responses, shape, parts)
        mine = packing.pack(kept, weights)
        rows = shards[here].ravel()  # one of each shard in a micro-batch
        for to, x in zip(jax.tree.leaves(whole), jax.tree.leaves(mine), strict=True):
            to[:, rows] = x
        np.testing.assert_array_equal(packing.scatter(data.log_probs[responses]), mine.old_log_probs)
    inside = np.arange(RESPONSE) < data.response_lengths[:, None]
    of_tokens = {'log_probs': whole.old_log_probs, 'tokens': whole.old.tokens[..., 1], 'weights': whole.loss_weights}
    expected = {'log_probs': data.log_probs[responses], 'tokens': data.support.tokens[responses, :, 1]}
    expected['weights'] = np.broadcast_to(weights[:, None], (18, RESPONSE))
    for name, values in of_tokens.items():
        np.testing.assert_array_equal(packing.gather(values), np.where(inside[responses], expected[name], 0), name)
    tokens = (data.prompt_lengths + data.response_lengths)[responses].sum()
    assert np.sum(whole.segment_ids > 0) == tokens
    assert packing.padding_share(tokens) == pytest.approx(padding_share(whole))


def test_a_weight_of_zero_is_not_learnt_from():
    """Guards responses that are masked: they are context for nothing, and the mask is the weight."""
    data = rollout([[2, 3], [1, 4]])
    weights = np.array([0, 0.5], np.float32)
    batch = make_batch(data, np.ones(2, np.float32), weights, make_layout(data, BatchShape(1, 1, 16)))
    assert np.sum(batch.loss_weights > 0) == 4


@pytest.mark.parametrize('seed', range(3))
def test_log_normal_lengths_leave_little_padding(seed):
    """Guards the reason to pack: at most 5 % of what is computed is padding, where padded rows waste most of it."""
    rng = np.random.default_rng(seed)
    responses = np.clip(rng.lognormal(5.5, 0.8, 256), 1, 2048).astype(np.int64)
    prompts = np.clip(rng.lognormal(4.5, 0.4, 256), 1, 512).astype(np.int64)
    tokens = np.zeros((256, 2560), np.int32)
    small = lambda dtype: np.zeros((256, 2048), dtype)
    support = SparseLogProbs(small(np.int32)[:, :, None], small(np.float32)[:, :, None])
    data = Rollout(tokens, prompts, responses, np.full(256, -1), small(np.float32), small(np.float32), support)
    packed, padded = batch_shape(256, 2560, micro_batch_tokens=2560), BatchShape(1, 256, 2560)
    share = lambda shape: padding_share(make_batch(data, np.ones(256), np.ones(256), make_layout(data, shape)))
    assert share(packed) <= 0.05 and share(padded) > 0.8


def test_short_limits_leave_little_padding():
    """Guards rows that hold one sequence each: texts of 75 tokens of at most 120 filled 61 % of what was computed."""
    rows = lambda *args, **sizes: batch_shape(*args, **sizes).row_tokens
    lengths = np.random.default_rng(0).normal(75, 2, 256).astype(int)
    shape = batch_shape(256, 120, micro_batch_tokens=2048)
    taken, _ = first_fit(lengths, shape.row_tokens)
    in_use = -(-(taken.max() + 1) // shape.rows) * shape.rows * shape.row_tokens
    assert shape.row_tokens == 240 and lengths.sum() / in_use > 0.9
    assert rows(256, 512) == 1024 and rows(256, 600) == 600 and rows(256, 120, micro_batch_tokens=200) == 120
    assert rows(60, 120) == rows(120, 120, devices=2) == 120, 'one micro-batch, of which nothing can be left out'


def test_micro_batches_are_equal():
    """Guards a last micro-batch for one row: it is computed whole, here as 21 rows, and all take the memory of 21."""
    assert batch_shape(128, 192) == BatchShape(4, 16, 384)
    assert batch_shape(23, 16, row_tokens=16, micro_batch_tokens=80, devices=2) == BatchShape(3, 8, 16)


def test_the_longest_sequences_fit():
    """Guards the number of rows that is promised: also where all are as long as they may be, or nearly."""
    cases = [(16, 16, 1, 1), (37, 80, 3, 1), (53, None, 2, 1), (16, 160, 8, 1), (48, 18, 2, 4)]
    for seed, (row_tokens, budget, devices, context) in enumerate(cases):
        sizes = {'row_tokens': row_tokens, 'micro_batch_tokens': budget, 'devices': devices, 'context': context}
        shape = batch_shape(23, 16, **sizes)
        assert shape.rows % devices == 0 and shape.row_tokens == row_tokens
        assert budget is None or shape.rows // devices * row_tokens <= context * budget
        for lengths in (np.full(23, 16), np.full(23, 15), np.random.default_rng(seed).integers(9, 17, 23)):
            rows, starts = first_fit(lengths, row_tokens)
            assert rows.max() < shape.micro_batches * shape.rows
            taken = np.zeros((rows.max() + 1, row_tokens), int)
            for row, start, length in zip(rows, starts, lengths, strict=True):
                taken[row, start : start + length] += 1
            assert taken.max() == 1


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'row_tokens': 15}, 'row_tokens = 15 is less than the 16 tokens'),
        ({'micro_batch_tokens': 15}, 'micro_batch_tokens = 15 .* one row of 16'),
        ({'row_tokens': 32, 'micro_batch_tokens': 31}, 'one row of 32'),
        ({'row_tokens': 30, 'context': 4}, 'row_tokens = 30 must be a multiple of context = 4'),
    ],
)
def test_a_budget_that_is_too_small_names_its_numbers(sizes, message):
    """Guards against sequences that are cut silently, and against a micro-batch of no rows."""
    with pytest.raises(ValueError, match=message):
        batch_shape(23, 16, **sizes)
