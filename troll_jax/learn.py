"""The learner: scores, advantages and updates of one rollout batch, each callable on its own."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from troll_jax.collect import Experience
from troll_jax.critic import abstract_critic, init_critic, make_critic_update, make_values, token_rewards
from troll_jax.models import decoder as decoders
from troll_jax.models.lora import split
from troll_jax.ops.advantages import whiten
from troll_jax.ops.needs import give
from troll_jax.ops.regularisers import regularised
from troll_jax.ops.values import explained_variance
from troll_jax.packing import Packing, abstract_batch, make_packing
from troll_jax.score import make_recompute, make_reference
from troll_jax.settings import Compute, Method, Sampling, minibatch_shape, scoring
from troll_jax.sharding import BATCH_AXES, checksum, fetch, named_sharding, place, place_parts, sample_parts, send
from troll_jax.types import START, Batch, Reference, Rollout, TrainState, join
from troll_jax.update import UpdateLog, abstract_policy, make_update

_logger = logging.getLogger(__name__)


class Minibatches(NamedTuple):
    """R responses in minibatches of packed rows, with the scores of all models before any of them changes."""

    rollout: Rollout
    packings: list[Packing]  # of each minibatch
    batches: list[Batch]  # without advantages; on the devices once they are scored, else this process's rows in numpy
    metrics: dict[str, float]
    importance: list[jax.Array] | None = None  # [M, Z, S] of each minibatch, factors of the advantages
    penalties: np.ndarray | None = None  # [R, T] to be taken off the reward
    values: np.ndarray | None = None  # [R, T] by the critic
    learnt: np.ndarray | None = None  # [R] bool, responses with a loss weight

    def to_responses(self, arrays: Sequence[jax.Array]) -> np.ndarray:
        """Arrays [M, Z, S] of each minibatch, as [R, T] in numpy."""
        return _to_responses(self.packings, arrays)


class Updated(NamedTuple):
    """The metrics of one minibatch's updates, on the devices."""

    policy: UpdateLog | None  # None while only the critic learns
    critic: dict[str, jax.Array] | None
    advantages: jax.Array  # [M, Z, S] float32, that it learnt from


def _on_mesh(method: Callable) -> Callable:
    """A method of a learner that runs with its mesh in context."""

    @wraps(method)
    def call(self, *args, **kwargs):
        with jax.set_mesh(self.mesh):
            return method(self, *args, **kwargs)

    return call


class Learner:
    """The pieces of a training step; each can be called on its own. Programs compile once.

    Args:
      config: sizes of the policy.
      sampling: how the responses are sampled.
      method: advantages, loss and optimizer.
      compute: mesh and memory.
      max_prompt_length: P, tokens.
      max_response_length: T, tokens.

    Raises:
      ValueError: rows or micro-batches that do not hold the longest sequence.
    """

    shapes: TrainState
    """Shapes and shardings of all that is trained."""
    rollout_mesh: Mesh
    """Mesh of the devices that sample."""

    def __init__(
        self,
        config: decoders.DecoderConfig,
        sampling: Sampling,
        method: Method,
        compute: Compute,
        *,
        max_prompt_length: int,
        max_response_length: int,
    ):
        config = dataclasses.replace(config, lora=method.lora)
        self.config, self.method, self.mesh = config, method, compute.mesh
        self._max_response_length, self._support_size = max_response_length, sampling.support_size
        self._minibatch = method.minibatch_prompts * sampling.samples_per_prompt
        self._shape = minibatch_shape(sampling, method, compute, max_prompt_length + max_response_length)
        self._parts = sample_parts(compute.mesh, sampling.samples_per_prompt)
        self._optimizer, policy = compute.place_optimizer(method.optimizer()), scoring(sampling, method, compute)
        self._update = make_update(config, self._optimizer, regularised(method.objective, method.regularisers), policy)
        self._recompute = make_recompute(config, policy, importance=method.importance)
        self._reference = make_reference(config, policy, penalty=method.reward_penalty)
        if method.critic is not None:
            optimizer = compute.place_optimizer(method.critic.optimizer())
            self._critic_optimizer = optimizer
            self._values = make_values(config)
            self._update_critic = make_critic_update(config, optimizer, value_clip=method.critic.value_clip)
        # True if a model is asked about all minibatches before the first update.
        self._scores_first = method.old_policy == 'recompute' or method.has_reference or method.critic is not None
        self.shapes = abstract_state(
            config,
            self._optimizer,
            compute.mesh,
            critic_optimizer=None if method.critic is None else self._critic_optimizer,
            has_reference=method.has_reference,
            lag=sampling.lag,
        )
        self.lag = sampling.lag
        self._copy = jax.jit(
            lambda params: jax.tree.map(jnp.copy, decoders.cast_weights(params, config.compute_dtype)),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.shapes.params),
        )
        self.rollout_mesh, self._rollout_shapes = compute.rollout_mesh, None
        if compute.rollout_devices is not None:
            self._rollout_shapes = decoders.abstract(config, compute.rollout_mesh)[1]
        self._group_advantages = jax.jit(self._group_advantages_of)
        self._token_advantages = jax.jit(self._token_advantages_of)

    @_on_mesh
    def init(self, params: Any) -> TrainState:
        """The state before the first step. The start model's parameters become part of it."""
        critic, reference = None, None
        state = start_state(params, self._optimizer, self.shapes)
        if self.method.critic is not None:
            critic = init_critic(params, self._critic_optimizer, self.shapes.critic)
        if self.method.has_reference:
            reference = self._copy(state.params)
        past = self.shapes.past and tuple(self._copy(state.params) for _ in self.shapes.past)
        return state._replace(critic=critic, reference=reference, past=past)

    @_on_mesh
    def sampling_params(self, state: TrainState, ahead: bool = False) -> Any:
        """The parameters to sample the next rollout batch with, those of `Sampling.lag` steps before; or the one after.

        That one is known before the next update if there is a lag.
        """
        if not state.past:
            return state.policy
        sampling, *later = state.past
        if ahead:
            sampling = later[0] if later else self._copy(state.params)
        return join(state.base, sampling)

    @_on_mesh
    def hand_over(self, state: TrainState, ahead: bool = False) -> tuple[Any, jax.Array | None]:
        """`sampling_params` on the devices that sample, and their `checksum` before they went there.

        Where these are the devices that train nothing goes anywhere, and the checksum is None.
        """
        params = self.sampling_params(state, ahead)
        if self._rollout_shapes is None:
            return params, None
        params = decoders.cast_weights(params, self.config.compute_dtype)
        shardings = jax.tree.map(lambda x: x.sharding, self._rollout_shapes)
        return send(params, shardings), checksum(params)

    @property
    def sampling_shapes(self) -> Any:
        """Shapes and shardings of the parameters that `hand_over` returns."""
        if self._rollout_shapes is None:
            return self.sampling_params(self.shapes)
        return decoders.cast_shapes(self._rollout_shapes, self.config.compute_dtype)

    @_on_mesh
    def keep_policy(self, state: TrainState) -> TrainState:
        """With lag, copies the policy before its updates, to sample with later, and drops the oldest copy."""
        return state._replace(past=(*state.past[1:], self._copy(state.params))) if state.past else state

    def pack(self, rollout: Rollout, graded: np.ndarray | None = None) -> Minibatches:
        """Cuts a rollout into minibatches, and packs each into rows; on the host, in numpy, this process's rows.

        Responses that are not `graded` [B, G] have no loss weight; None: all are.
        """
        is_learnt = rollout.stopped | (not self.method.mask_truncated)
        if graded is not None:
            is_learnt = is_learnt & graded.reshape(-1)
        packings, batches, padding = self._cut(rollout), [], []
        for packing in packings:
            at = packing.responses
            lengths = np.where(is_learnt[at], rollout.response_lengths[at], 0)
            weights = np.asarray(self.method.aggregation(lengths, self._max_response_length))
            batches.append(packing.pack(rollout, np.where(is_learnt[at], weights, 0)))
            padding.append(packing.padding_share(np.sum((rollout.prompt_lengths + rollout.response_lengths)[at])))
        return Minibatches(rollout, packings, batches, {'update/padding_share': np.mean(padding)}, learnt=is_learnt)

    @_on_mesh
    def score(self, state: TrainState, minibatches: Minibatches) -> Minibatches:
        """Adds π_old if it is recomputed, the reference model's log-probabilities, and the critic's values."""
        method, batches, metrics = self.method, minibatches.batches, dict(minibatches.metrics)
        importance = penalties = values = None
        if self._scores_first:
            batches = [place_parts(batch, self.mesh, self._parts) for batch in batches]
        if method.old_policy == 'recompute':
            batches, noise, importance = zip(*[self._recompute(state.policy, batch) for batch in batches], strict=True)
            metrics[first_kl(self.lag)] = np.mean(noise)
        if method.has_reference:
            reference = join(state.base, state.reference)
            batches, found = zip(*[self._reference(reference, batch) for batch in batches], strict=True)
            if not method.loss_needs_reference:
                batches = [batch._replace(reference=None) for batch in batches]
            if method.reward_penalty is not None:
                penalties = minibatches.to_responses(found)
                metrics['reward/penalty'] = penalties.sum(axis=1).mean()
        if method.critic is not None:
            values = minibatches.to_responses([self._values(state.critic.params, batch) for batch in batches])
        return minibatches._replace(
            batches=list(batches), metrics=metrics, importance=importance, penalties=penalties, values=values
        )

    @_on_mesh
    def assign_advantages(self, scored: Minibatches, experience: Experience) -> tuple[list[Batch], dict[str, float]]:
        """Minibatches with advantages, by group or with a critic by token, and metrics of the scores so far."""
        rollout, metrics = scored.rollout, dict(scored.metrics)
        lengths, shape = rollout.response_lengths, rollout.log_probs.shape
        penalties = np.zeros(shape, np.float32) if scored.penalties is None else scored.penalties
        added = {}  # arrays [R, T]
        if scored.values is None:
            rewards = experience.rewards - penalties.sum(axis=1).reshape(experience.rewards.shape)
            advantages = self._advantages_of(rewards, experience.greedy_rewards, experience.graded).reshape(-1, 1)
            added['advantages'] = np.broadcast_to(advantages, shape)
        else:
            added['values'] = scored.values
            mask = (np.arange(shape[1]) < lengths[:, None]) & scored.learnt[:, None]
            rewards = token_rewards(experience.rewards.reshape(-1), penalties, lengths)
            found = self._token_advantages(rewards, added['values'], mask)
            added['advantages'], added['returns'] = map(np.asarray, found)
            if mask.any():
                values, returns = added['values'][mask], added['returns'][mask]
                metrics |= {
                    'critic/explained_variance': explained_variance(values, returns),
                    'critic/value': values.mean(),
                    'critic/return': returns.mean(),
                }
        batches = []
        for i, packing in enumerate(scored.packings):
            known = {name: packing.scatter(array[packing.responses]) for name, array in added.items()}
            if self._scores_first:
                known = place_parts(known, self.mesh, self._parts)
            if scored.importance is not None:
                known['advantages'] = known['advantages'] * scored.importance[i]
            batches.append(scored.batches[i]._replace(**known))
        return batches, metrics

    def place(self, batch: Batch) -> Batch:
        """A minibatch on the devices, where it is not yet if no model scored it: only one at a time is there."""
        return batch if self._scores_first else place_parts(batch, self.mesh, self._parts)

    @_on_mesh
    def update(self, state: TrainState, batch: Batch, *, critic_only: bool = False) -> tuple[TrainState, Updated]:
        """One update of the policy, and one of the critic if there is one. The state that is passed in is consumed."""
        policy = critic = None
        batch = self.place(batch)
        if self.method.critic is not None:
            new, critic = self._update_critic(state.critic, batch)
            state = state._replace(critic=new)
        if not critic_only:
            new, policy = self._update(state._replace(past=None), batch)
            state = new._replace(past=state.past)
        return state, Updated(policy, critic, batch.advantages)

    def to_responses(self, rollout: Rollout, arrays: Sequence[jax.Array]) -> np.ndarray:
        """Arrays [M, Z, S] of each minibatch of a rollout's step, as [R, T] in numpy. All processes call it."""
        return _to_responses(self._cut(rollout), arrays)

    @_on_mesh
    def end_step(self, state: TrainState, draws: int) -> TrainState:
        """Advances the progress by a step with so many draws; refreshes the reference model when that is due."""
        done, every = state.progress.step + 1, self.method.refresh_reference_every
        progress = state.progress._replace(step=done, draws=state.progress.draws + draws)
        state = state._replace(progress=progress)
        if every and int(done) % every == 0:
            state = state._replace(reference=self._copy(state.params))
        return state

    def programs(self) -> dict[str, tuple[Callable, tuple]]:
        """The compiled functions of a step by name, with the shapes of their arguments."""
        sharded = lambda x: named_sharding(self.mesh, (*BATCH_AXES, *[None] * (x.ndim - 3)))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded(x)),
            abstract_batch(self._shape, self._support_size),
        )
        shapes, floats, found = self.shapes, batch.loss_weights, {}
        if self.method.old_policy == 'recompute':
            found['recompute'] = self._recompute, (shapes.policy, batch)
        if self.method.has_reference:
            found['reference'] = self._reference, (join(shapes.base, shapes.reference), batch)
            if self.method.loss_needs_reference:
                batch = batch._replace(reference=Reference(floats, batch.old.log_probs))
        if self.method.critic is not None:
            found['values'] = self._values, (shapes.critic.params, batch)
            batch = batch._replace(values=floats, returns=floats)
            found['critic'] = self._update_critic, (shapes.critic, batch)
        return found | {'update': (self._update, (shapes._replace(past=None), batch))}

    def trace(self, rollout: Rollout, prompts: int) -> None:
        """Traces all programs for a rollout's shapes: what they refuse is an error before weights are loaded."""
        responses, length = rollout.log_probs.shape
        jax.eval_shape(lambda x: self.method.aggregation(x, self._max_response_length), rollout.response_lengths)
        if self.method.critic is None:
            rewards = jax.ShapeDtypeStruct((prompts, responses // prompts), jnp.float32)
            greedy = jax.ShapeDtypeStruct((prompts,), jnp.float32)
            jax.eval_shape(self._group_advantages, rewards, greedy)
        else:
            tokens = jax.ShapeDtypeStruct((responses, length), jnp.float32)
            jax.eval_shape(self._token_advantages, tokens, tokens, jax.ShapeDtypeStruct((responses, length), bool))
        for program, arguments in self.programs().values():
            jax.eval_shape(program, *arguments)

    def _cut(self, rollout: Rollout) -> list[Packing]:
        """The responses of each minibatch, and the places of their tokens in it."""
        count = len(rollout.response_lengths)
        slices = [slice(i, min(i + self._minibatch, count)) for i in range(0, count, self._minibatch)]
        return [make_packing(rollout, at, self._shape, self._parts) for at in slices]

    def _advantages_of(self, rewards: np.ndarray, greedy: np.ndarray | None, graded: np.ndarray | None) -> np.ndarray:
        """Advantages [B, G] of groups; 0 of what was not graded, or is alone in a group and cannot be by itself."""
        if graded is None or graded.all():
            return np.asarray(self._group_advantages(rewards, greedy))
        advantages = np.zeros(rewards.shape, np.float32)
        for i, kept in enumerate(graded):
            given = give(self.method.advantages, greedy_reward=None if greedy is None else greedy[i])
            with suppress(ValueError):
                advantages[i, kept] = self.method.advantages(jnp.asarray(rewards[i, kept]), **given)
        if self.method.whiten_advantages and graded.sum() > 1:
            advantages = np.where(graded, whiten(jnp.asarray(advantages), jnp.asarray(graded)), 0.0)
        return advantages

    def _group_advantages_of(self, rewards: jax.Array, greedy_rewards: jax.Array | None) -> jax.Array:
        advantages = jax.vmap(self.method.advantages)(
            rewards, **give(self.method.advantages, greedy_reward=greedy_rewards)
        )
        return whiten(advantages) if self.method.whiten_advantages else advantages

    def _token_advantages_of(self, rewards: jax.Array, values: jax.Array, mask: jax.Array):
        advantages = jax.vmap(self.method.advantages)(rewards, **give(self.method.advantages, values=values))
        advantages = jnp.where(mask, advantages, 0.0)
        return whiten(advantages, mask) if self.method.whiten_advantages else advantages, advantages + values


def _to_responses(packings: Sequence[Packing], arrays: Sequence[jax.Array]) -> np.ndarray:
    return np.concatenate([packing.gather(fetch(x)) for packing, x in zip(packings, arrays, strict=True)])


def abstract_state(
    config: decoders.DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    critic_optimizer: optax.GradientTransformation | None = None,
    has_reference: bool = False,
    lag: int = 0,
) -> TrainState:
    """Shapes and shardings of all that is trained."""
    params, opt_state = abstract_policy(config, optimizer, mesh)
    base, _ = split(decoders.abstract(config, mesh)[1])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    cast = partial(decoders.cast_shapes, dtype=config.compute_dtype)
    return TrainState(
        progress=jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=replicated), START),
        params=params,
        opt_state=opt_state,
        critic=None if critic_optimizer is None else abstract_critic(config, critic_optimizer, mesh),
        reference=cast(params) if has_reference else None,
        past=(cast(params),) * lag or None,
        base=None if base is None else cast(base),
    )


def start_state(params, optimizer: optax.GradientTransformation, shapes: TrainState) -> TrainState:
    """A policy before its first update, without a critic or a reference model. `params` become part of it."""
    base, params = split(params)
    if base is not None:
        sizes = [sum(x.size for x in jax.tree.leaves(part)) for part in (params, base)]
        count = len(jax.tree.leaves(params)) // 2
        _logger.info('LoRA: %d adapters in each layer; %d parameters are trained, %d are frozen', count, *sizes)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    progress = jax.tree.map(lambda x, sharding: place(x, sharding.mesh, ()), START, shardings.progress)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(progress, params, opt_state, base=base)


def first_kl(lag: int) -> str:
    """The metric of the KL between sampler and policy before any update: without lag it is noise between the two."""
    return 'update/kl_lag' if lag else 'update/kl_noise'


def summarise(updates: Sequence[Updated], lag: int = 0) -> dict[str, float]:
    """Metrics of a step: means over its updates; a maximum stays one. Updates that were skipped are only counted."""
    of_policy = fetch([update.policy.metrics for update in updates if update.policy is not None])
    of_critic = fetch([update.critic for update in updates if update.critic is not None])
    metrics = _summarise('update', of_policy) | _summarise('critic', of_critic)
    if of_policy:
        first = next((log for log in of_policy if not log['skipped']), of_policy[0])
        metrics[first_kl(lag)] = first['kl_mean']
    return metrics


def _summarise(kind: str, logs: list[dict[str, np.ndarray]]) -> dict[str, float]:
    done = [log for log in logs if not log['skipped']] or logs

    def over(name: str) -> float:
        reduce = np.max if name.endswith('_max') else np.mean
        return reduce([log[name] for log in (logs if name == 'skipped' else done)])

    return {f'{kind}/{name}': over(name) for name in (logs[0] if logs else ())}
