"""The frozen pytrees that the stages hand to each other, and the axis letters of the whole library.

Axis glossary (a prime marks another size or a part: K' of another list, V' on one device; einsums have k for KH):

    B   prompts in a rollout batch
    G   samples per prompt
    R   responses, R = B·G, the samples of one prompt next to each other
    P   prompt positions, T response positions
    S   positions of a row: P + T in a rollout; in a batch for an update several sequences may share a row
    M   micro-batches of a batch, Z rows in each
    N   tokens, any of the above flattened, C chunks of them
    K   kept tokens of a sparse distribution
    V   vocabulary, D model width, I and O inputs and outputs of a weight

    H   query heads, KH key-value heads, F head dimension
    X   queries per key-value head, H/KH
    L   positions of keys and values
    E   shards of a batch, each with decode slots and pages on its own devices
    U   decode slots of a shard, A rows of a prefill; W sequences, of these or of those, of all shards
    C   tokens of a sequence that a prefill takes at a time, N steps of a decode program
    NP  pages of a shard's KV cache, J of one sequence at most, PS tokens of a page
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


class SparseLogProbs(NamedTuple):
    """A distribution over the vocabulary that lists only some of its tokens.

    Entries with token −1 and log-probability −inf are padding. A token of −2 stands for all that are not listed
    (`troll_jax.ops.support.bucket_tail`). Log-probabilities are those of the whole vocabulary
    (their sum is one minus the mass left out) unless a function says that it renormalises.
    """

    tokens: jax.Array  # [..., K] int32, distinct except for the padding
    log_probs: jax.Array  # [..., K] float32


class Prompts(NamedTuple):
    """Prompts, padded on the right."""

    tokens: jax.Array  # [B, P] int32
    lengths: jax.Array  # [B] int32, between 1 and P


class RolloutStats(NamedTuple):
    """Speed and size of a rollout."""

    steps: int  # decode steps
    slots: int  # decode slots, responses that are decoded at a time
    prefills: int  # batches of prompts that were prefilled
    evictions: int  # responses that lost their slot for want of memory, and went on later
    listed: int  # tokens that all recorded distributions list
    prefill_seconds: float  # on this host's clock, with the time that the host takes to start them
    decode_seconds: float  # the same of the decode steps


class Rollout(NamedTuple):
    """Responses, and a record of the policy that sampled them at each of their tokens.

    A row of `tokens` is prompt, response, padding, without a gap. The other arrays start at the response's first
    token; entries past `response_lengths` are meaningless. An end-of-sequence token belongs to its response.
    Each process has the `support` of R' of them, see `troll_jax.sharding.SampleParts`, and all of the others.
    """

    tokens: jax.Array  # [R, S] int32
    prompt_lengths: jax.Array  # [R] int32
    response_lengths: jax.Array  # [R] int32, between 1 and T
    stop_token: jax.Array  # [R] int32, the end-of-sequence token that it ended with; −1: the length limit cut it
    log_probs: jax.Array  # [R, T] float32, of the sampled tokens, at the sampling temperature
    entropy: jax.Array  # [R, T] float32, nats
    support: SparseLogProbs  # [R', T, K] the distributions that were sampled from
    stats: RolloutStats | None = None

    @property
    def stopped(self) -> jax.Array:
        """[R] bool: ended with an end-of-sequence token."""
        return self.stop_token >= 0


class Reference(NamedTuple):
    """Reference log-probabilities of the tokens of a batch, at the sampling temperature."""

    log_probs: jax.Array  # [M, Z, S] float32
    on_old_support: jax.Array  # [M, Z, S, K] float32, of the tokens that the old policy lists


class Batch(NamedTuple):
    """The data of one update: rows in which sequences, each a prompt and its response, are packed end to end.

    Data of a token is at the token itself. Micro-batches without a sequence come last and cost nothing.
    """

    tokens: jax.Array  # [M, Z, S] int32
    positions: jax.Array  # [M, Z, S] int32, of each token in its own sequence
    segment_ids: jax.Array  # [M, Z, S] int32: the sequences of a row, numbered from 1; 0 is padding
    loss_weights: jax.Array  # [M, Z, S] float32, of the tokens in the loss; 0: not trained on
    advantages: jax.Array  # [M, Z, S] float32
    old_log_probs: jax.Array  # [M, Z, S] float32
    old: SparseLogProbs  # [M, Z, S, K]
    reference: Reference | None = None  # if there is a reference model
    values: jax.Array | None = None  # [M, Z, S] float32, by the critic before its update, if there is one
    returns: jax.Array | None = None  # [M, Z, S] float32, its regression targets


class Progress(NamedTuple):
    """Progress of a run: the input of schedules, and the position in the data to resume from."""

    step: jax.Array | int = 0  # [] int32, rollout batches learnt from so far
    updates: jax.Array | int = 0  # [] int32, of the parameters
    projected: jax.Array | float = 0.0  # [] float32, the share of tokens that were projected, summed over the updates
    draws: jax.Array | int = 0  # [] int32, batches of prompts taken so far: one a step, more if groups are replaced


START = Progress(np.int32(0), np.int32(0), np.float32(0), np.int32(0))


class CriticState(NamedTuple):
    """A critic and its optimizer."""

    params: Any  # nested dict of arrays, float32
    opt_state: Any


class TrainState(NamedTuple):
    """State of a run, to resume from. Data order and random keys are functions of the seed and of `progress`."""

    progress: Progress
    params: Any  # nested dict of arrays, float32
    opt_state: Any  # as optax returns it
    critic: CriticState | None = None
    reference: Any = None  # parameters of the reference model, in the dtype that it computes in
    past: tuple[Any, ...] | None = None  # policies that are still to sample, oldest first, in the same dtype
    base: Any = None  # if `params` and `reference` are adapters: the frozen parameters that they adapt

    @property
    def policy(self) -> Any:
        """All parameters of the policy."""
        return join(self.base, self.params)


def join(base: dict[str, Any] | None, params: dict[str, Any]) -> dict[str, Any]:
    """Frozen parameters, if there are any, and trained ones as one nested dict."""
    return params if base is None else unflatten_dict(flatten_dict(base) | flatten_dict(params))
