"""On-policy sampling by continuous batching: responses, and a record of the distributions they were sampled from.

All requests of a rollout, G samples of each of B prompts, are known when it begins. A fixed number of decode slots
works through them, over a paged KV cache. The host runs three programs: one lays the weights out for decoding; one
prefills, a chunk of some sequences at a time; one decodes a fixed number of tokens in every slot, without waiting for
the host. In between, `scheduler.py` gives slots and pages to requests. Shapes depend on no length; a second form of the
prefill is compiled where a response has lost its slot for want of memory.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from troll_jax.models import decoder as decoders
from troll_jax.models.head import logits
from troll_jax.models.paged_attention import PAGE_SIZE, copy_pages, init_pool
from troll_jax.ops import categorical
from troll_jax.ops.ranges import check_range
from troll_jax.ops.support import select
from troll_jax.record import Steps, add, empty_rollout
from troll_jax.scheduler import Block, Prefill, Scheduler, Sizes
from troll_jax.sharding import (
    RULES,
    SampleParts,
    axis_size,
    constrain,
    current_mesh,
    fetch,
    gather,
    one_device_mesh,
    platform,
    sample_parts,
    shard_map,
)
from troll_jax.types import Prompts, Rollout, RolloutStats

MOST_SLOTS = 512
"""Decode slots of a shard where nothing else is said: beyond these a step takes longer in proportion."""
MEMORY_SHARE = 0.85
"""Of a device's memory, with all that is there already, that the KV cache may fill up; the rest is for temporaries."""
CPU_MEMORY_SHARE = 0.5
"""The same of a host's memory, whatever is there already."""
PREFILL_TOKENS = 4096
"""Tokens of a shard that are prefilled at a time: attention holds the logits of all of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Samples G responses to each prompt. Called with parameters and prompts, it returns a `Rollout`.

    Args:
      config: the decoder's.
      samples_per_prompt: G.
      max_response_length: T; a response that gets no stop token is cut there.
      temperature: sampling temperature; 0 takes the most probable token, and records the policy at temperature 1.
      stop_tokens: a response ends with any of these.
      support_size, support_mass: K and the probability to keep of each recorded distribution, see `troll_jax.sparsify`.
      top_k, top_p: for evaluation, bounds that leave only the most probable tokens, see `categorical.truncate`. The
        truncated distribution is recorded, and an update compares with the whole one.
      slots: decode slots, responses that are decoded at a time, at most, on all devices together. A matter of speed: no
        response depends on it. None: 512 for each shard of the batch. Fewer requests take the next power of two.
      cache_gb: memory of the KV cache on each device. A request waits, or starts again where it was, if there is no
        room for it; no response depends on it. None: what is free, as far as all slots may need it.
      prefill_chunk: tokens of each sequence that a prefill takes at a time.
      steps: decode steps between two looks of the host; a slot whose response has ended is idle until then. None: 16,
        and 4 on a CPU, which need not be waited for.
      gather_weights: true: weights are laid out for decoding once per rollout, the parts of all `fsdp` devices on each;
        false: they keep the layout of training, which takes less memory and sends them at every step.

    Raises:
      ValueError: a negative temperature, no stop token, fewer than one sample, response token, slot or step, K > V,
        top_k or top_p out of range.
    """

    config: decoders.DecoderConfig
    _: dataclasses.KW_ONLY
    samples_per_prompt: int
    max_response_length: int
    temperature: float
    stop_tokens: Sequence[int]
    support_size: int
    support_mass: float
    top_k: int | None = None
    top_p: float | None = None
    slots: int | None = None
    cache_gb: float | None = None
    prefill_chunk: int = 256
    steps: int | None = None
    gather_weights: bool = True

    def __post_init__(self):
        vocab_size = self.config.tokenizer_size or self.config.vocab_size
        of_vocab = f'between 1 and the vocabulary size {vocab_size}'
        for name in ('samples_per_prompt', 'max_response_length', 'slots', 'prefill_chunk', 'steps'):
            check_range(name, getattr(self, name), lambda x: x >= 1, 'at least 1')
        for name, fits, expected in [
            ('temperature', lambda x: x >= 0, 'positive, or 0 for greedy decoding'),
            ('support_size', lambda x: 1 <= x <= vocab_size, f'kept tokens per position, {of_vocab}'),
            ('support_mass', lambda x: 0 < x <= 1, 'the probability to keep, in (0, 1]'),
            ('cache_gb', lambda x: x > 0, 'above 0, or None for what is free'),
            ('top_k', lambda x: 1 <= x <= vocab_size, f'{of_vocab}, or None for all'),
            ('top_p', lambda x: 0 < x <= 1, 'in (0, 1], or None for all'),
        ]:
            check_range(name, getattr(self, name), fits, expected)
        if self.temperature == 0 and self.truncates:
            raise ValueError('top_k and top_p change nothing at temperature 0; set a temperature, or leave them out')
        if not self.stop_tokens:
            raise ValueError('no stop token: every response would run to max_response_length; set eos_token_id')

    @property
    def truncates(self) -> bool:
        return self.top_k is not None or self.top_p is not None

    def __call__(
        self,
        params,
        prompts: Prompts,
        keys: jax.Array,
        limits: np.ndarray | None = None,
        watch: Callable[[Rollout, np.ndarray], None] = lambda rollout, ended: None,
        keep: Mesh | None = None,
    ) -> Rollout:
        """The responses to a prompt depend on the parameters, the prompt and its own key, not on the other prompts.

        Args:
          params: the decoder's.
          prompts: B of them, the same on every process.
          keys: [B] random keys.
          limits: [R] int32, between 1 and T: lengths at which single responses are cut.
          watch: is called with the rollout so far and the rows that have ended since the last call, while the devices
            decode the next block; what it raises ends the rollout.
          keep: mesh that learns from the responses, if not that in context: its processes keep the distributions.

        Returns:
          Rollout in numpy; on every process all but the distributions, of which each has those of its parts.

        Raises:
          ValueError: prompts that are empty or longer than their array, limits out of range, slots that the devices do
            not divide, and a cache that does not hold the longest sequence.
        """
        if current_mesh() is None:
            with jax.set_mesh(one_device_mesh()):
                return self(params, prompts, keys, limits, watch, keep)
        prompts = Prompts(*map(np.asarray, prompts))
        count = len(prompts.tokens) * self.samples_per_prompt
        limits = np.full(count, self.max_response_length) if limits is None else np.asarray(limits)
        self.check(prompts, keys, limits)
        weights = jax.block_until_ready(self.begin(params))
        sizes = self.sizes(*prompts.tokens.shape, self._free_memory(jax.sharding.get_mesh()))
        cache = self.init_cache(weights, sizes)
        keys = fetch(jax.random.key_data(keys))
        prompts_of_rows = [row[:size] for row, size in zip(*prompts, strict=True)]
        scheduler = Scheduler(prompts_of_rows, limits, sizes, self.decode_steps)
        parts = sample_parts(keep or jax.sharding.get_mesh(), self.samples_per_prompt)
        rollout = self._empty(prompts, parts)
        blocks, prefills, seconds, listed, decoded = 0, 0, [0.0, 0.0], [], None

        def take(block: Block, steps: Steps) -> None:
            listed.append(add(rollout, block, steps, parts))
            rows = block.rows[block.rows >= 0]
            watch(rollout, rows[(rollout.stop_token[rows] >= 0) | (rollout.response_lengths[rows] == limits[rows])])

        while scheduler.work_is_left:
            begin = time.perf_counter()
            for jobs in scheduler.schedule():
                for arguments in _chunks(jobs, sizes):
                    cache = jax.block_until_ready(self.prefill(weights, cache, *arguments))
                prefills += 1
            between = time.perf_counter()
            block = scheduler.block()
            cache, steps = self.decode(weights, cache, block, keys[block.rows // self.samples_per_prompt])
            if decoded is not None:
                take(*decoded)  # while the devices decode
            decoded = block, steps
            tokens, counts, stop_token = (np.asarray(x) for x in steps[:3])  # waits; the same on every process
            scheduler.record(tokens, counts, stop_token >= 0)
            blocks += 1
            seconds[0] += between - begin
            seconds[1] += time.perf_counter() - between
        take(*decoded)
        slots = sizes.shards * sizes.slots
        stats = RolloutStats(blocks * self.decode_steps, slots, prefills, scheduler.evictions, sum(listed), *seconds)
        return rollout._replace(stats=stats)

    def _empty(self, prompts: Prompts, parts: SampleParts) -> Rollout:
        return empty_rollout(prompts, self.samples_per_prompt, self.max_response_length, self.support_size, parts)

    def shapes(self, params, prompts: Prompts, keys: jax.Array) -> Rollout:
        """Traces all programs on shapes; nothing is compiled. Returns those of a rollout, without its `stats`."""
        self.check(prompts, keys)
        for program, arguments in self.programs(params, self.sizes(*prompts.tokens.shape)).values():
            jax.eval_shape(program, *arguments)
        parts = sample_parts(one_device_mesh(), self.samples_per_prompt)
        return jax.eval_shape(lambda: self._empty(Prompts(*(np.zeros(x.shape, np.int32) for x in prompts)), parts))

    def programs(self, params, sizes: Sizes, *, shape_of=jax.eval_shape) -> dict:
        """The programs 'prefill' and 'decode', each with arguments or their shapes.

        Args:
          params: the decoder's, or their shapes.
          sizes: see `sizes`.
          shape_of: (program, *arguments) → shapes of what it returns.
        """
        weights = shape_of(self.begin, params)
        cache = shape_of(jax.jit(lambda weights: self.init_cache(weights, sizes), keep_unused=True), weights)
        prefill = next(_chunks([[Prefill(np.zeros(1, np.int32), 0, [0])]] * sizes.shards, sizes))
        block = Scheduler([np.zeros(1, np.int32)], np.ones(1), sizes, self.decode_steps).block()
        keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.split(jax.random.key(0), len(block.rows))))
        return {
            'prefill': (self.prefill, (weights, cache, *prefill)),
            'decode': (self.decode, (weights, cache, block, keys)),
        }

    def check(self, prompts: Prompts, keys, limits=None) -> None:
        """Raises a ValueError with the numbers, before anything is compiled."""
        shards, (batch, length) = axis_size('batch'), prompts.tokens.shape
        if not batch:
            raise ValueError('no prompts; expected at least one')
        for name, values, needed in [('keys', keys, (batch,)), ('limits', limits, (batch * self.samples_per_prompt,))]:
            if values is not None and values.shape != needed:
                of = f'{batch} prompts × {self.samples_per_prompt} samples'
                raise ValueError(f'{of} need {name} of shape {needed}; got {values.shape}')
        if self.slots is not None and self.slots % shards:
            raise ValueError(
                f'slots = {self.slots} must be a multiple of the {shards} devices of the mesh axes {RULES["batch"]}'
            )
        for name, values, most, what in [
            ('prompts', prompts.lengths, length, 'the length of their array'),
            ('limits', limits, self.max_response_length, 'max_response_length'),
        ]:
            if isinstance(values, np.ndarray) and (values.min() < 1 or values.max() > most):
                got = f'between {values.min()} and {values.max()}'
                raise ValueError(f'{name} are {got} tokens long; expected 1 to {most}, {what}')

    def sizes(self, batch: int, length: int, memory: float | None = None) -> Sizes:
        """The sizes of a rollout of B prompts of at most P tokens.

        Args:
          memory: bytes that are free on each device; None: as much as the slots may need.

        Raises:
          ValueError: the cache does not hold a prompt and a response of full length.
        """
        shards, chunk = axis_size('batch'), min(self.prefill_chunk, length)
        requests = -(-batch // shards) * self.samples_per_prompt  # of a shard, which keeps the samples of its prompts
        # Powers of two, so that a few prompts more or less mean the same programs.
        slots = min(MOST_SLOTS if self.slots is None else self.slots // shards, 1 << (requests - 1).bit_length())
        rows = min(-(-slots // (4 * self.samples_per_prompt)), -(-PREFILL_TOKENS // chunk))
        width, prompt_width = (-(-tokens // PAGE_SIZE) for tokens in (length + self.max_response_length, length))
        # A sequence on its own needs the pages of its prompt, and for its last tokens and its response others. A slot
        # is given them if one is left for each of the others, and `rows` prompts are there before their slots.
        least = width + 1
        pages = slots * (least + 1) + rows * prompt_width
        memory = memory if self.cache_gb is None else 1e9 * self.cache_gb
        if memory is not None:
            pool = jax.eval_shape(partial(self._pool, shards))
            page = self.config.layers * sum(x.size * x.dtype.itemsize for x in pool) // (shards * axis_size('kv_heads'))
            if memory // page < least:
                raise ValueError(
                    f'the KV cache has {memory / 1e9:.2f} GB on each device, but a prompt of {length} tokens with a '
                    f'response of {self.max_response_length} takes {least * page / 1e9:.2f}; shorten them, raise '
                    'Compute.cache_gb or Compute.tensor, or free memory'
                )
            pages = min(pages, int(memory // page))
        width += -width % 4  # kernels read several pages
        return Sizes(shards, slots, rows, chunk, pages, PAGE_SIZE, prompt_width, width)

    @property
    def decode_steps(self) -> int:
        """N, see `steps`."""
        return min(self.steps or (4 if platform() == 'cpu' else 16), self.max_response_length)

    @cached_property
    def _graphdef(self):
        return decoders.abstract(dataclasses.replace(self.config, lora=None))[0]  # adapters are merged by `begin`

    def _decoder(self, weights):
        """The decoder, and the weights of its layers."""
        others, layers = weights
        return decoders.bind(self._graphdef, others | {'layers': layers[0]}), layers

    @cached_property
    def begin(self):
        """(params) → weights for decoding."""
        return jax.jit(partial(decoders.decode_weights, config=self.config, gather=self.gather_weights))

    @cached_property
    def init_cache(self):
        """(weights, sizes) → an empty KV cache, a pool of pages for each layer, on the devices of the weights."""

        def init_cache(weights, sizes: Sizes):
            return [self._pool(sizes.shards * sizes.pages) for _ in range(self.config.layers)]

        return jax.jit(init_cache, static_argnums=1, keep_unused=True)

    def _pool(self, pages: int):
        return init_pool(self.config, pages, PAGE_SIZE, self.config.decode_attention)

    @cached_property
    def prefill(self):
        """(weights, cache, tokens [E · A, C], positions [E · A, C], block table) → cache, with these tokens."""

        def prefill(weights, cache, tokens, positions, table):
            decoder, layers = self._decoder(weights)
            rows = lambda x: constrain(x, 'batch', None)
            return decoder.decode(layers, rows(tokens), rows(positions), rows(table), cache)[1]

        return jax.jit(prefill, donate_argnames='cache')

    @cached_property
    def decode(self):
        """(weights, cache, block, key data [E · U, 2] of the slots' prompts) → cache, `Steps`."""

        def decode(weights, cache, block: Block, keys):
            decoder, layers = self._decoder(weights)
            block = Block(*(constrain(x, 'batch', *[None] * (x.ndim - 1)) for x in block))
            keys = jax.random.wrap_key_data(constrain(keys, 'batch', None))
            keys = jax.vmap(jax.random.fold_in)(keys, block.rows % self.samples_per_prompt)
            with jax.named_scope('copy_pages'):
                copy = partial(copy_pages, implementation=self.config.decode_attention)
                cache = [copy(pool, block.source, block.target) for pool in cache]
            stops = jnp.asarray(tuple(self.stop_tokens), jnp.int32)

            def step(carry, _):
                cache, token, t, active, stop_token = carry
                positions = jnp.where(active, block.lengths - block.t + t - 1, -1)
                hidden, cache = decoder.decode(layers, token[:, None], positions[:, None], block.table, cache)
                with jax.named_scope('draw'):
                    choose = shard_map(self._choose, (('batch',), ('vocab', None), ('batch',)), ('batch',))
                    token, *chosen = choose(hidden[:, 0], decoder.unembedding, _uniforms(keys, t))
                t = t + active
                is_stop = active & jnp.any(token[:, None] == stops[None], axis=1)
                stop_token = jnp.where(is_stop, token, stop_token)
                active = active & ~is_stop & (t < block.limits)
                return (cache, token, t, active, stop_token), (token, *chosen)

            carry = cache, block.tokens, block.t, block.lengths > 0, jnp.full_like(block.t, -1)
            (cache, _, t, _, stop_token), (tokens, *chosen) = jax.lax.scan(step, carry, length=self.decode_steps)
            steps = Steps(tokens, t - block.t, stop_token, *chosen)
            return cache, jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), steps)  # on every device

        return jax.jit(decode, donate_argnames='cache')

    def _choose(self, hidden: jax.Array, unembedding: jax.Array, uniforms: jax.Array) -> tuple:
        """Draws and records the next token of rows [N], on one device with its part of the vocabulary.

        Args:
          hidden: [N, D], unembedding: [V', D], uniforms: [N, 2].

        Returns:
          tokens, log-probabilities and entropy [N], and the support [N, K].
        """
        scores = logits(
            hidden,
            unembedding,
            temperature=self.temperature or 1.0,
            dtype=self.config.compute_dtype,
            tokenizer_size=self.config.tokenizer_size,
            first=jax.lax.axis_index(RULES['vocab']) * unembedding.shape[0],
        )
        axis_name = None if self.truncates else RULES['vocab']
        if self.truncates:
            scores = jax.lax.all_gather(scores, RULES['vocab'], axis=1, tiled=True)

        def one_row(scores, uniforms):
            if self.truncates:
                scores = categorical.truncate(scores, top_k=self.top_k, top_p=self.top_p)
            blocks = categorical.summarise(scores, axis_name, one_pass=platform() != 'cpu')
            if self.temperature:
                token, log_prob = categorical.draw(uniforms, blocks, axis_name)
            else:
                token, log_prob = categorical.most_probable(blocks, axis_name)
            best, best_log_probs = categorical.largest(blocks, self.support_size, axis_name)
            support = select(best, best_log_probs, token, log_prob, support_mass=self.support_mass)
            return token, log_prob, blocks.entropy, support

        tokens, *others = jax.vmap(one_row)(scores, uniforms)
        # A policy of NaN draws anything: still a token of the vocabulary, and not of the padding of its last block.
        return jnp.minimum(tokens, (self.config.tokenizer_size or self.config.vocab_size) - 1), *others

    @cached_property
    def _free_memory(self) -> Callable[[Mesh], float]:
        """(mesh) → bytes that the cache may take on each device, the same on all processes and in all rollouts.

        By what is free later, it would have other shapes, and programs would be compiled again.
        """

        @cache
        def free_memory(mesh: Mesh) -> float:
            stats = mesh.local_devices[0].memory_stats()
            if stats and 'bytes_limit' in stats:
                free = MEMORY_SHARE * stats['bytes_limit'] - stats['bytes_in_use']
            else:
                total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
                free = CPU_MEMORY_SHARE * total / jax.local_device_count()
            return float(gather(np.float32(free), mesh).min())

        return free_memory


def _chunks(jobs: list[list[Prefill]], sizes: Sizes):
    """Yields what `Sampler.prefill` takes: tokens, positions and block table of some sequences, chunk by chunk."""
    rows = [(e * sizes.rows + a, job) for e, of_shard in enumerate(jobs) for a, job in enumerate(of_shard)]
    longest = max(len(job.tokens) for _, job in rows)
    is_prompt = max(len(job.pages) for _, job in rows) <= sizes.prompt_width
    count = sizes.shards * sizes.rows
    tokens = np.zeros((count, -(-longest // sizes.chunk) * sizes.chunk), np.int32)
    positions, table = tokens - 1, np.zeros((count, sizes.prompt_width if is_prompt else sizes.width), np.int32)
    for row, job in rows:
        tokens[row, : len(job.tokens)] = job.tokens
        positions[row, : len(job.tokens)] = job.begin + np.arange(len(job.tokens))
        table[row, : len(job.pages)] = job.pages
    for begin in range(0, longest, sizes.chunk):
        part = slice(begin, begin + sizes.chunk)
        yield tokens[:, part], positions[:, part], table


def _uniforms(keys: jax.Array, t: jax.Array) -> jax.Array:
    """The numbers in [0, 1) by which each slot [U] draws token t of its request, [U, 2]; no other token uses them."""
    return jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t), (categorical.UNIFORMS,)))(keys, t)
