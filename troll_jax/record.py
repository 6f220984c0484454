"""What a rollout has sampled, in the host's memory. Axis letters: `troll_jax/types.py`."""

from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from troll_jax.scheduler import Block
from troll_jax.sharding import addressable_part
from troll_jax.types import Prompts, Rollout, RolloutStats, SparseLogProbs


class Steps(NamedTuple):
    """N decode steps of all slots. Of each slot the first `counts` are valid."""

    tokens: jax.Array  # [N, E · U] int32, on every device
    counts: jax.Array  # [E · U] int32, on every device
    stop_token: jax.Array  # [E · U] int32, with which the response ended; −1: it did not. On every device
    log_probs: jax.Array  # [N, E · U] float32
    entropy: jax.Array  # [N, E · U] float32
    support: SparseLogProbs  # [N, E · U, K]


class Record:
    """The responses of a rollout in the host's memory, and what was recorded of them."""

    def __init__(self, count: int, length: int, support_size: int):
        floats = lambda *shape: np.zeros((count, length, *shape), np.float32)
        integers = lambda *shape: np.zeros((count, *shape), np.int32)
        self.tokens, self.lengths, self.stop_token = integers(length), integers(), integers() - 1
        support = SparseLogProbs(integers(length, support_size), floats(support_size))
        self.of_tokens = floats(), floats(), support  # log-probabilities, entropy; those of this process
        self.mine = np.zeros(count, bool)

    def add(self, block: Block, steps: Steps) -> None:
        """Adds what was decoded of the rows of a block. The first three arrays are in numpy."""
        tokens, counts, stop_token = steps[:3]
        n, slot = np.nonzero(np.arange(len(tokens))[:, None] < counts[None])
        row, t = block.rows[slot], block.t[slot] + n
        self.tokens[row, t] = tokens[n, slot]
        busy = block.rows >= 0
        self.lengths[block.rows[busy]] = (block.t + counts)[busy]
        self.stop_token[block.rows[busy]] = stop_token[busy]
        for all, new in zip(jax.tree.leaves(self.of_tokens), jax.tree.leaves(steps[3:]), strict=True):
            slots, new = addressable_part(new, axis=1)
            place = np.full(len(counts), -1)
            place[slots] = np.arange(len(slots))
            here = place[slot] >= 0
            all[row[here], t[here]] = new[n[here], place[slot[here]]]
            self.mine[row[here]] = True

    def gather(self) -> None:
        """Gives every process what the others have recorded."""
        rows = np.flatnonzero(self.mine)
        counts = multihost_utils.process_allgather(len(rows))
        rows = np.pad(rows, (0, counts.max() - len(rows)))
        has = np.arange(counts.max())[None] < counts[:, None]
        everywhere = multihost_utils.process_allgather(rows)[has]
        for x in jax.tree.leaves(self.of_tokens):
            x[everywhere] = multihost_utils.process_allgather(x[rows])[has]

    def rollout(self, prompts: Prompts, stats: RolloutStats | None) -> Rollout:
        """The rollout of these prompts."""
        count, length = self.tokens.shape
        group = count // len(prompts.tokens)
        prompt_lengths = np.repeat(prompts.lengths, group)
        tokens = np.pad(np.repeat(prompts.tokens, group, axis=0), [(0, 0), (0, length)])
        index = np.arange(tokens.shape[1])[None] - prompt_lengths[:, None]
        response = (index >= 0) & (index < self.lengths[:, None])
        tokens[response] = self.tokens[np.arange(length)[None] < self.lengths[:, None]]
        return Rollout(tokens, prompt_lengths, self.lengths, self.stop_token, *self.of_tokens, stats)
