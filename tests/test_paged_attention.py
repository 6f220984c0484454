"""The paged KV cache, page by page, and paged attention against plain attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from troll_jax.models.paged_attention import Partial, Prefixes, attend, attend_shared, merge, scratch, view
from troll_jax.models.paged_cache import (
    Pages,
    TokenPages,
    grow,
    init_pages,
    pages_of,
    release,
    write_pages,
    write_token,
)


class Sizes(NamedTuple):
    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 6
    compute_dtype: str = 'float32'


SHARDS, SEQUENCES, LENGTH, PAGE = 2, 5, 11, 3
grow, release = jax.jit(grow), jax.jit(release)


def test_every_page_has_one_owner():
    """Guards two sequences on one page, pages that are lost, and pages of a sequence out of order, over a long life."""
    pages = init_pages(Pages, Sizes(), SHARDS, SEQUENCES, LENGTH, PAGE)
    generator = np.random.default_rng(0)
    lengths = np.zeros((SHARDS, SEQUENCES), int)
    for _ in range(40):
        ended = generator.random((SHARDS, SEQUENCES)) < 0.2
        pages = release(pages, ended)
        lengths = np.where(ended, 0, np.minimum(lengths + generator.integers(0, 4, (SHARDS, SEQUENCES)), LENGTH))
        pages = grow(pages, lengths)
        owner, first, table = (np.asarray(x) for x in (pages.owner, pages.first, pages.table))
        for shard in range(SHARDS):
            has = [[page for page in row if page < owner.shape[1]] for row in table[shard]]
            assert [len(row) for row in has] == (-(-lengths[shard] // PAGE)).tolist()
            for sequence, row in enumerate(has):
                assert owner[shard, row].tolist() == [sequence] * len(row)
                assert first[shard, row].tolist() == [PAGE * j for j in range(len(row))]
            assert np.sum(owner[shard] < SEQUENCES) == sum(map(len, has))
            assert len({page for row in has for page in row}) == sum(map(len, has))


def test_free_pages_are_taken_from_the_front():
    """Guards against pages that spread over the pool, all of which attention would have to read."""
    pages = grow(init_pages(Pages, Sizes(), 1, SEQUENCES, LENGTH, PAGE), jnp.array([[11, 11, 0, 0, 0]]))
    pages = grow(release(pages, jnp.array([[True, False, False, False, False]])), jnp.array([[0, 11, 4, 0, 0]]))
    assert pages.table[0, 2].tolist() == [0, 1, 20, 20] and view(pages, jnp.array([[0, 11, 4, 0, 0]])).chunks == 2


def normal(key: int, shape) -> jax.Array:
    return jax.random.normal(jax.random.key(key), shape)


def filled(sequences: int, lengths, k, v, kind=Pages):
    """Pages of sequences of these lengths: k and v [E, W, LENGTH, KH, F] in the second layer, token by token."""
    pages = init_pages(kind, Sizes(), SHARDS, sequences, LENGTH, PAGE)
    # Pages in no order: some sequences had others before.
    pages = release(
        grow(pages, jnp.minimum(lengths, 4)), jnp.arange(sequences)[None] % 2 == jnp.zeros((SHARDS, 1), int)
    )
    pages = grow(pages, lengths)

    @jax.jit
    def write(pages, t):
        index = jnp.full((SHARDS, sequences), t)
        page = jnp.where(t < lengths, pages_of(pages, index), pages.owner.shape[1])
        new = [
            write_token(pool, jnp.int32(1), page, index % PAGE, x[:, :, t], order=kind.order)
            for pool, x in ((pages.k, k), (pages.v, v))
        ]
        return pages._replace(k=new[0], v=new[1])

    for t in range(LENGTH):
        pages = write(pages, t)
    return pages


def plain(q, k, v, lengths):
    """Attention [E, W, KH, X, F] of queries over the first tokens of their sequence."""
    scores = jnp.einsum('ewkxf,ewlkf->ewkxl', q, k) / jnp.sqrt(6.0)
    seen = (jnp.arange(LENGTH)[None, None] < lengths[:, :, None])[:, :, None, None]
    return jnp.einsum('ewkxl,ewlkf->ewkxf', jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def result(found):
    return found.mixed / found.total[..., None]


@pytest.mark.parametrize('kind', [Pages, TokenPages])
def test_attention_over_pages_equals_plain_attention(kind):
    """Guards both orders of a page, masks at the end of a page, the softmax over several pages, and pages of others."""
    lengths = jnp.array([[1, 11, 3, 4, 7], [6, 2, 11, 1, 9]])
    k, v = normal(0, (SHARDS, SEQUENCES, LENGTH, 2, 6)), normal(1, (SHARDS, SEQUENCES, LENGTH, 2, 6))
    q = 3 * normal(2, (SHARDS, SEQUENCES, 2, 3, 6))
    pages = filled(SEQUENCES, lengths, k, v, kind)
    assert pages.size == PAGE
    found, _ = jax.jit(lambda q: attend(q, pages, jnp.int32(1), view(pages, lengths), scratch(pages, 3)))(q)
    np.testing.assert_allclose(result(found), plain(q, k, v, lengths), atol=1e-5)
    # A sequence that has ended sees nothing, and old values in the scratch do not matter.
    ended = jnp.zeros((SHARDS, SEQUENCES), bool).at[:, 1].set(True)
    pages, some = release(pages, ended), jnp.where(ended, 0, lengths)
    rubbish = jax.tree.map(lambda x: jnp.full_like(x, 7.0), scratch(pages, 3))
    found, _ = attend(q, pages, jnp.int32(1), view(pages, some), rubbish)
    assert np.all(np.asarray(found.total)[:, 1] == 0) and np.all(np.isfinite(found.mixed))
    np.testing.assert_allclose(result(found)[~ended], plain(q, k, v, lengths)[~ended], atol=1e-5)


def test_samples_share_the_pages_of_their_prompt():
    """Guards queries that meet another prompt, or come back to another slot; 3 prompts, 5 slots, one of them idle."""
    lengths = jnp.array([[4, 11, 5], [11, 1, 8]])
    k, v = normal(3, (SHARDS, 3, LENGTH, 2, 6)), normal(4, (SHARDS, 3, LENGTH, 2, 6))
    q = normal(5, (SHARDS, SEQUENCES, 2, 3, 6))
    pages = filled(3, lengths, k, v)
    sample_of_slot = np.array([[3, 0, 2, 6, 5], [5, 4, 6, 1, 0]])  # place · 2 + sample; 6: idle
    slot_of_sample = np.full((SHARDS, 6), SEQUENCES)
    for shard in range(SHARDS):
        for slot, at in enumerate(sample_of_slot[shard]):
            if at < 6:
                slot_of_sample[shard, at] = slot
    prefixes = Prefixes(pages, lengths, jnp.asarray(sample_of_slot), jnp.asarray(slot_of_sample.reshape(SHARDS, 3, 2)))
    read = jax.jit(lambda q: attend_shared(q, prefixes, jnp.int32(1), view(pages, lengths), scratch(pages, 6)))
    found, _ = read(q)
    place = np.minimum(sample_of_slot // 2, 2)
    of = lambda x: jnp.take_along_axis(x, jnp.asarray(place).reshape(place.shape + (1,) * (x.ndim - 2)), axis=1)
    expected = plain(q, of(k), of(v), of(lengths))
    np.testing.assert_allclose(result(found)[sample_of_slot < 6], expected[sample_of_slot < 6], atol=1e-5)


def test_whole_pages_are_written_as_tokens_are():
    """Guards the layout of a page, and pages that do not exist: they are not written."""
    k = normal(6, (SHARDS, SEQUENCES, LENGTH, 2, 6))
    lengths = jnp.array([[1, 11, 3, 0, 7], [6, 2, 11, 1, 9]])
    pages = filled(SEQUENCES, lengths, k, k)
    by_page = jnp.pad(k, [(0, 0), (0, 0), (0, 1), (0, 0), (0, 0)]).reshape(SHARDS, SEQUENCES * 4, PAGE, 2, 6)
    both = jnp.broadcast_to(by_page.swapaxes(2, 3)[None], (2, SHARDS, SEQUENCES * 4, 2, PAGE, 6))
    pool = write_pages(jnp.zeros_like(pages.k), pages.table.reshape(SHARDS, -1), both)
    limits = np.asarray(view(pages, lengths).limits)
    seen = np.arange(PAGE) < limits[:, :, None]
    got, expected = (np.asarray(x[1]).swapaxes(2, 3)[seen] for x in (pool, pages.k))
    np.testing.assert_array_equal(got, expected)
    assert not np.asarray(pool)[:, np.asarray(pages.owner) == SEQUENCES].any()


def test_parts_of_a_softmax():
    """Guards against overflow, and against a part that saw nothing."""
    logits, values = jnp.array([300.0, 301.0, -300.0]), normal(7, (3, 4))

    def part(at):
        largest = jnp.max(logits[at])
        weights = jnp.exp(logits[at] - largest)
        return (weights @ values[at], jnp.sum(weights), largest)

    nothing = Partial(jnp.zeros(4), jnp.zeros(()), jnp.finfo(jnp.float32).min)
    both = merge([nothing, Partial(*part(jnp.array([0, 2]))), Partial(*part(jnp.array([1])))])
    np.testing.assert_allclose(result(both), jax.nn.softmax(logits) @ values, rtol=1e-5)
    assert both.largest == 301
