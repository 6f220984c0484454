"""Continuous batching, on the host: which request decodes in which slot, and whose the pages of the KV cache are.

No model runs here. A request is one sample of a prompt. Prompts wait in one queue for all shards; the shard that takes
one prefills it once, and its pages serve all of its samples: these read the full ones, and copy the last one, which
they go on writing. The cache holds every token of a sequence but the last: that one is what a decode step takes in.

A shard that runs out of pages gives up prompts that no slot decodes first, and then the request that began last. It
goes on later, after a prefill of what it had. All processes come to the same schedule.
Axis letters: `troll_jax/types.py`.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """The sizes of a rollout's arrays."""

    shards: int  # E
    slots: int  # U, decode slots of each shard
    rows: int  # A, sequences of each shard that a prefill takes
    chunk: int  # C, tokens of each of them
    pages: int  # NP, of each shard
    page_size: int  # PS, tokens of a page
    prompt_width: int  # pages of the longest prompt
    width: int  # J, pages of the longest sequence


class Prefill(NamedTuple):
    """A part of a sequence that is to be written into the cache."""

    tokens: np.ndarray  # int32
    begin: int  # position of the first of them
    pages: list[int]  # of the sequence, from position 0 on


class Block(NamedTuple):
    """What the decode program is told of every slot, those of shard 0 first."""

    rows: np.ndarray  # [E · U] int32, the response that it decodes; −1: idle
    tokens: np.ndarray  # [E · U] int32, the last token
    lengths: np.ndarray  # [E · U] int32, tokens of prompt and response so far; 0: idle
    t: np.ndarray  # [E · U] int32, response tokens so far
    limits: np.ndarray  # [E · U] int32, response tokens at most
    table: np.ndarray  # [E · U, J] int32, pages of the sequence in order
    source: np.ndarray  # [E · U] int32, a page that is copied before the first step
    target: np.ndarray  # [E · U] int32, to this one; NP: none is


@dataclasses.dataclass(eq=False)
class _Prompt:
    row: int  # the first of its samples, in the rollout
    tokens: np.ndarray
    unfinished: int  # samples that have not ended
    decoding: int = 0  # samples in slots
    pages: list[int] | None = None  # None: not in the cache


@dataclasses.dataclass(eq=False)
class _Request:
    row: int  # of the rollout
    prompt: _Prompt
    limit: int
    response: list[int] = dataclasses.field(default_factory=list)  # tokens so far
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)  # its own, after the full ones of the prompt


class _Shard:
    """Slots and pages of one device, or of the devices that share its batch."""

    def __init__(self, table: np.ndarray, sizes: Sizes):
        self.table, self.size = table, sizes.page_size  # [U, J]
        self.idle, self.free = list(range(sizes.slots))[::-1], list(range(sizes.pages))[::-1]
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []  # the oldest first
        self.prompts: list[_Prompt] = []  # in the cache
        # Due before the next steps: prompts, and after them requests that go on.
        self.prefills: list[Prefill] = []
        self.resumed: list[Prefill] = []

    def shared(self, prompt: _Prompt) -> int:
        """Full pages of a prompt, without its last token: those that its samples read."""
        return (len(prompt.tokens) - 1) // self.size

    def wanted(self, request: _Request, steps: int) -> int:
        """Pages that a request lacks for its next steps."""
        written = len(request.prompt.tokens) + min(len(request.response) + steps, request.limit) - 1
        return -(-written // self.size) - self.shared(request.prompt) - len(request.pages)

    def take(self, count: int) -> list[int]:
        taken = self.free[len(self.free) - count :]
        del self.free[len(self.free) - count :]
        return taken

    def prefill(self, prompt: _Prompt, spare: int) -> bool:
        """Gives a prompt its pages, if `spare` others are left, and has it prefilled."""
        count = -(-(len(prompt.tokens) - 1) // self.size)
        if len(self.free) < count + spare:
            return False
        prompt.pages = self.take(count)
        self.prompts.append(prompt)
        if count:
            self.prefills.append(Prefill(prompt.tokens[:-1], 0, prompt.pages))
        return True

    def start(self, steps: int) -> bool:
        """Starts the first waiting request, if there are a slot and pages for it."""
        request = self.waiting[0]
        prompt, shared = request.prompt, self.shared(request.prompt)
        count = self.wanted(request, steps)
        spare = count + len(self.running)  # a page for each of the others, or they would soon drive this one out
        while (prompt.pages is None and not self.prefill(prompt, spare)) or len(self.free) < spare:
            if not self.drop_prompt(besides=prompt):
                return False
        self.waiting.popleft()
        request.slot, request.pages = self.idle.pop(), self.take(count)
        pages = prompt.pages[:shared] + request.pages
        self.table[request.slot] = pages + [0] * (self.table.shape[1] - len(pages))
        self.running.append(request)
        prompt.decoding += 1
        if request.response:  # evicted before
            begin = shared * self.size
            tokens = np.append(prompt.tokens, np.array(request.response, np.int32))[begin:-1]
            self.resumed.append(Prefill(tokens, begin, pages))
        return True

    def grow(self, steps: int) -> int:
        """Gives running requests the pages of their next steps. Returns how many were evicted for that."""
        evicted = 0
        for request in list(self.running):
            while request.slot >= 0 and len(self.free) < (count := self.wanted(request, steps)):
                if not self.drop_prompt():
                    self.waiting.appendleft(self.running[-1])
                    self.leave(self.running[-1])
                    evicted += 1
            if request.slot >= 0:
                begin = self.shared(request.prompt) + len(request.pages)
                self.table[request.slot, begin : begin + count] = taken = self.take(count)
                request.pages += taken
        return evicted

    def drop_prompt(self, besides: _Prompt | None = None) -> bool:
        """Gives up the pages of a prompt that no slot decodes."""
        for prompt in self.prompts:
            if not prompt.decoding and prompt is not besides:
                self.free += prompt.pages
                self.prompts.remove(prompt)
                prompt.pages = None
                return True
        return False

    def leave(self, request: _Request) -> None:
        """Takes a request out of its slot."""
        self.running.remove(request)
        self.idle.append(request.slot)
        self.free += request.pages
        request.slot, request.pages = -1, []
        request.prompt.decoding -= 1

    def end(self, request: _Request) -> None:
        """Takes out a request whose response has ended, and its prompt if that was the last one."""
        self.leave(request)
        request.prompt.unfinished -= 1
        if not request.prompt.unfinished:
            self.free += request.prompt.pages
            self.prompts.remove(request.prompt)


class Scheduler:
    """The schedule of a rollout.

    Args:
      prompts: the tokens of each of B prompts.
      limits: [R] most tokens of each response, the samples of a prompt next to each other.
      sizes: of slots, pages and prefills.
      steps: decode steps from one schedule to the next.
    """

    def __init__(self, prompts: Sequence[np.ndarray], limits: np.ndarray, sizes: Sizes, steps: int):
        self.table = np.zeros((sizes.shards, sizes.slots, sizes.width), np.int32)
        self.shards = [_Shard(table, sizes) for table in self.table]
        self.sizes, self.steps = sizes, steps
        self.limits, self.samples = limits, len(limits) // len(prompts)
        self.queue = deque(_Prompt(i * self.samples, tokens, self.samples) for i, tokens in enumerate(prompts))
        self.evictions = 0

    @property
    def work_is_left(self) -> bool:
        return bool(self.queue) or any(shard.waiting or shard.running for shard in self.shards)

    def schedule(self) -> Iterator[list[list[Prefill]]]:
        """Gives running requests the pages of the next steps, and idle slots their next requests.

        Yields:
          what has to be prefilled before these steps, one after the other: for each shard at most A sequences.
        """
        rows = self.sizes.rows
        for shard in self.shards:
            shard.prefills, shard.resumed = [], []
        evicted = [shard.grow(self.steps) for shard in self.shards]
        self.evictions += sum(evicted)
        filling = [shard for shard, count in zip(self.shards, evicted, strict=True) if not count]
        while filling:  # one request for each shard in turn
            filling = [shard for shard in filling if shard.idle and self._has_next(shard) and shard.start(self.steps)]
        for shard in self.shards:  # the next prompts take the rows that a prefill has left
            for _ in range(-len(shard.prefills) % rows):
                if self.queue and shard.prefill(self.queue[0], spare=2 * self.sizes.slots):
                    self._take_prompt(shard)
        for kind in ('prefills', 'resumed'):
            of_shards = [getattr(shard, kind) for shard in self.shards]
            for begin in range(0, max(map(len, of_shards)), rows):
                yield [jobs[begin : begin + rows] for jobs in of_shards]

    def _has_next(self, shard: _Shard) -> bool:
        if not shard.waiting and self.queue:
            self._take_prompt(shard)
        return bool(shard.waiting)

    def _take_prompt(self, shard: _Shard) -> None:
        prompt = self.queue.popleft()
        rows = range(prompt.row, prompt.row + self.samples)
        shard.waiting.extend(_Request(row, prompt, int(self.limits[row])) for row in rows)

    def block(self) -> Block:
        """What the decode program has to know for the next steps."""
        count = self.sizes.shards * self.sizes.slots
        full = lambda value: np.full(count, value, np.int32)
        table = self.table.reshape(count, -1).copy()
        block = Block(full(-1), full(0), full(0), full(0), full(0), table, full(0), full(self.sizes.pages))
        for e, shard in enumerate(self.shards):
            for request in shard.running:
                slot, prompt, t = e * self.sizes.slots + request.slot, request.prompt.tokens, len(request.response)
                token = request.response[-1] if t else prompt[-1]
                for x, value in zip(block, (request.row, token, len(prompt) + t, t, request.limit), strict=False):
                    x[slot] = value
                if not t and (partly_filled := request.prompt.pages[shard.shared(request.prompt) :]):
                    block.source[slot], block.target[slot] = partly_filled[0], request.pages[0]
        return block

    def record(self, tokens: np.ndarray, counts: np.ndarray, stopped: np.ndarray) -> None:
        """Takes in what the slots have decoded.

        Args:
          tokens: [steps, E · U], of which each slot has `counts` [E · U].
          stopped: [E · U] bool, ended with a stop token.
        """
        for e, shard in enumerate(self.shards):
            for request in list(shard.running):
                slot = e * self.sizes.slots + request.slot
                request.response += tokens[: counts[slot], slot].tolist()
                if stopped[slot] or len(request.response) == request.limit:
                    shard.end(request)
