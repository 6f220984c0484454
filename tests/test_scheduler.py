"""The scheduler alone, with a model that reads and writes what it is told: pages, copies, evictions, one queue."""

import numpy as np
import pytest

from troll_jax.scheduler import Scheduler, Sizes

SIZE, STEPS = 4, 3


def sizes(shards: int, slots: int, pages: int, width: int, rows: int = 2) -> Sizes:
    return Sizes(shards, slots, rows, 0, pages, SIZE, 0, width)


def token(row: int, position: int) -> int:
    """The token of a response at a position of its sequence; prompts have negative tokens."""
    return 1000 * row + position


def play(prompts, limits, *, shards=1, slots=4, pages=20, rows=2, stop=lambda row, t: False, watch=lambda _: None):
    """Plays a schedule with a cache that holds tokens, and returns every response. Each step looks at what the sequence
    has in the cache: all of its tokens but the last, which it writes."""
    longest = max(map(len, prompts)) + max(limits)
    scheduler = Scheduler(prompts, np.array(limits), sizes(shards, slots, pages, -(-longest // SIZE), rows), STEPS)
    cache = np.zeros((shards, pages, SIZE), int)
    found = [[] for _ in limits]
    while scheduler.work_is_left:
        for batch in scheduler.schedule():
            assert len(batch) == shards and max(map(len, batch)) <= rows
            before = cache.copy()  # sequences of a batch do not see each other
            for e, jobs in enumerate(batch):
                for job in jobs:
                    for i, value in enumerate(job.tokens):
                        page, offset = divmod(job.begin + i, SIZE)
                        cache[e, job.pages[page], offset] = value
                    seen = before[e, job.pages].reshape(-1)[: job.begin]
                    assert len(seen) == job.begin and np.all(seen != 0)
        block = scheduler.block()
        watch(block)
        copies = block.target < pages
        before = cache.copy()
        for slot in np.flatnonzero(copies):
            cache[slot // slots, block.target[slot]] = before[slot // slots, block.source[slot]]
        tokens, counts = np.zeros((STEPS, shards * slots), int), np.zeros(shards * slots, int)
        stopped = np.zeros(shards * slots, bool)
        for n in range(STEPS):  # all slots write before any reads: none may write into a page that another one reads
            busy = [s for s in range(shards * slots) if block.rows[s] >= 0 and not stopped[s]]
            busy = [s for s in busy if block.t[s] + n < block.limits[s]]
            for s in busy:
                position = block.lengths[s] + n - 1
                last = block.tokens[s] if n == 0 else tokens[n - 1, s]
                cache[s // slots, block.table[s, position // SIZE], position % SIZE] = last
            for s in busy:
                row, position = block.rows[s], block.lengths[s] + n
                prompt = prompts[row * len(prompts) // len(limits)]
                expected = [*prompt, *(token(row, p) for p in range(len(prompt), position))]
                seen = cache[s // slots, block.table[s]].reshape(-1)[:position]
                np.testing.assert_array_equal(seen, expected)
                tokens[n, s], counts[s] = token(row, position), n + 1
                found[row].append(token(row, position))
                stopped[s] = stop(row, block.t[s] + n)
        scheduler.record(tokens, counts, stopped)
    for e, shard in enumerate(scheduler.shards):
        assert sorted(shard.free) == list(range(pages)) and len(shard.idle) == slots, e
    return found, scheduler


def prompts_of(*lengths):
    return [-np.arange(1, length + 1) - 100 * i for i, length in enumerate(lengths)]


@pytest.mark.parametrize('pages', [20, 9, 8])
@pytest.mark.parametrize('shards', [1, 2])
def test_every_token_sees_its_own_sequence(shards, pages):
    """Guards shared pages that a sample writes into, pages that two have, and what an eviction loses: full pages, parts
    of pages, prompts of one token, and less memory than two sequences of full length take."""
    prompts = prompts_of(1, 4, 5, 6, 9, 13, 2, 8)
    limits = np.random.default_rng(0).integers(1, 15, 3 * len(prompts))
    stop = lambda row, t: row % 5 == 0 and t == 3
    found, scheduler = play(prompts, limits, shards=shards, pages=pages, stop=stop)
    for row, (response, limit) in enumerate(zip(found, limits, strict=True)):
        length = min(limit, 4) if row % 5 == 0 else limit
        assert response == [token(row, len(prompts[row // 3]) + t) for t in range(length)]
    assert (scheduler.evictions > 0) == (pages < 20)


def test_one_queue_for_all_shards():
    """Guards a shard that idles while another one has the long responses still before it."""
    blocks = []
    limits = [30] * 8 + [3] * 24
    play(prompts_of(*[2] * 8), limits, shards=2, slots=4, pages=60, watch=blocks.append)
    of_shards = [{row for block in blocks for row in block.rows.reshape(2, 4)[e] if row >= 0} for e in range(2)]
    assert not of_shards[0] & of_shards[1] and len(blocks) == 13  # (8 · 30 + 24 · 3) / 8 slots / 3 steps


def test_a_prompt_is_prefilled_once_and_in_full_batches():
    """Guards the work of prefills: one per prompt, and batches that are not half empty."""
    batches = []
    prompts = prompts_of(*range(2, 14))
    scheduler = Scheduler(prompts, np.full(24, 6), sizes(1, 4, 60, 5), STEPS)
    while scheduler.work_is_left:
        batches += [batch[0] for batch in scheduler.schedule()]
        block = scheduler.block()
        tokens = np.ones((STEPS, 4), int)
        scheduler.record(tokens, np.where(block.rows >= 0, STEPS, 0), np.zeros(4, bool))
    assert [len(batch) for batch in batches] == [2] * 6
    assert [len(job.tokens) + 1 for batch in batches for job in batch] == list(range(2, 14))
