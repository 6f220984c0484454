"""What a rollout has sampled, in the host's memory. Axis letters: `troll_jax/types.py`."""

from typing import NamedTuple

import jax
import numpy as np

from troll_jax.scheduler import Block
from troll_jax.sharding import SampleParts
from troll_jax.types import Prompts, Rollout, SparseLogProbs


class Steps(NamedTuple):
    """N decode steps of all slots, whole on every device. Of each slot the first `counts` are valid."""

    tokens: jax.Array  # [N, E · U] int32
    counts: jax.Array  # [E · U] int32
    stop_token: jax.Array  # [E · U] int32, with which the response ended; −1: it did not
    log_probs: jax.Array  # [N, E · U] float32
    entropy: jax.Array  # [N, E · U] float32
    support: SparseLogProbs  # [N, E · U, K]


def empty_rollout(prompts: Prompts, samples: int, length: int, support_size: int, parts: SampleParts) -> Rollout:
    """A rollout of G samples of each prompt before its first token, in numpy, with room for T tokens of each.

    Of the distributions there is room for those of this process's parts.
    """
    count = len(prompts.tokens) * samples
    floats = lambda: np.zeros((count, length), np.float32)
    kept = count // len(parts.here) * len(parts.held), length, support_size
    return Rollout(
        tokens=np.pad(np.repeat(prompts.tokens, samples, axis=0), [(0, 0), (0, length)]),
        prompt_lengths=np.repeat(prompts.lengths, samples),
        response_lengths=np.zeros(count, np.int32),
        stop_token=np.full(count, -1, np.int32),
        log_probs=floats(),
        entropy=floats(),
        support=SparseLogProbs(np.zeros(kept, np.int32), np.zeros(kept, np.float32)),
    )


def add(rollout: Rollout, block: Block, steps: Steps, parts: SampleParts) -> int:
    """Writes into a rollout what was decoded of the rows of a block. Returns how many tokens the distributions list."""
    steps = jax.tree.map(np.asarray, steps)
    n, slot = np.nonzero(np.arange(len(steps.tokens))[:, None] < steps.counts)
    row, t = block.rows[slot], block.t[slot] + n
    rollout.tokens[row, block.lengths[slot] + n] = steps.tokens[n, slot]
    rollout.log_probs[row, t], rollout.entropy[row, t] = steps.log_probs[n, slot], steps.entropy[n, slot]
    index = parts.index(row)
    here = index >= 0
    for all, new in zip(rollout.support, steps.support, strict=True):
        all[index[here], t[here]] = new[n[here], slot[here]]
    busy = block.rows >= 0
    rollout.response_lengths[block.rows[busy]] = (block.t + steps.counts)[busy]
    rollout.stop_token[block.rows[busy]] = steps.stop_token[busy]
    return int(np.sum(steps.support.tokens[n, slot] >= 0))
