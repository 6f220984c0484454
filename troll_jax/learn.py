"""From graded responses to new parameters: advantages, minibatches, and one update for each of these."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from troll_jax.collect import Experience
from troll_jax.critic import Critic, abstract_critic, init_critic, make_critic_update, make_values, token_rewards
from troll_jax.models import decoder as decoders
from troll_jax.ops.advantages import needs_greedy_reward, needs_values, whiten
from troll_jax.ops.regularisers import Regulariser, needs_reference, regularised
from troll_jax.ops.values import explained_variance
from troll_jax.packing import BatchShape, Layout, abstract_batch, make_batch, make_layout, padding_share
from troll_jax.saved_batches import save_batches
from troll_jax.sharding import fetch, named_sharding, place
from troll_jax.types import START, Batch, Reference, Rollout, TrainState
from troll_jax.update import (
    Objective,
    TailRule,
    UpdateLog,
    abstract_policy,
    make_recompute,
    make_reference,
    make_update,
)

Aggregation = Callable[..., jax.Array]
Estimator = Callable[..., jax.Array]
OLD_POLICIES = ('rollout', 'recompute')


class Learner(NamedTuple):
    """What `make_learner` builds."""

    shapes: TrainState  # of what is trained, with shardings
    start: Callable[[Any], TrainState]  # from the start model's parameters, which become part of it
    learn: Callable[..., tuple[TrainState, dict[str, float], list[UpdateLog]]]  # of a state and an Experience
    programs: Callable[[int], dict[str, tuple]]  # of the step and their arguments' shapes, if rollouts list K tokens
    check: Callable[[Rollout, int], None]  # traces all programs for a rollout's shapes, before there are any weights


def make_learner(
    config: decoders.DecoderConfig,
    optimizer: optax.GradientTransformation,
    shape: BatchShape,
    *,
    objective: Objective,
    aggregation: Aggregation,
    estimator: Estimator,
    tail_rule: TailRule,
    temperature: float,
    max_tokens: int,
    mass: float,
    minibatch: int,
    max_response_length: int,
    mesh: Mesh,
    head_chunk: int = 1024,
    old_policy: str = 'rollout',
    importance_limit: float | None = None,
    regularisers: Sequence[Regulariser] = (),
    reward_penalty: Regulariser | None = None,
    refresh_reference_every: int = 0,
    critic: Critic | None = None,
    whiten_advantages: bool = False,
    mask_truncated: bool = False,
) -> Learner:
    """Builds what learns from an experience. `experiments.train` documents the settings under the same names.

    Args:
      config: of the decoder.
      optimizer: of the policy.
      shape: of a minibatch's arrays.
      minibatch: responses of an update.
      max_response_length: T.
      mesh: of the devices.

    Raises:
      ValueError: settings that do not go together.
    """
    has_reference = any(needs_reference(x) for x in (*regularisers, reward_penalty))
    _check_settings(estimator, critic, old_policy, importance_limit)
    _check_reference(has_reference, reward_penalty, refresh_reference_every, mask_truncated)
    in_loss = any(map(needs_reference, regularisers))
    policy = {'temperature': temperature, 'tail_rule': tail_rule, 'max_tokens': max_tokens, 'mass': mass}
    policy['head_chunk'] = head_chunk
    update = make_update(config, optimizer, objective=regularised(objective, regularisers), **policy)
    recompute = make_recompute(config, importance_limit=importance_limit, **policy)
    reference = make_reference(config, temperature=temperature, head_chunk=head_chunk, penalty=reward_penalty)
    if critic is not None:
        values_of = make_values(config)
        update_critic = make_critic_update(config, critic.optimizer, value_clip=critic.value_clip)
    passes_first = old_policy == 'recompute' or has_reference or critic is not None

    shapes = abstract_state(config, optimizer, mesh, critic=critic, has_reference=has_reference)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)

    @partial(jax.jit, out_shardings=shardings.reference)
    def copy_reference(params):
        return jax.tree.map(jnp.copy, decoders.cast_weights(params, config.compute_dtype))

    def start(params) -> TrainState:
        return start_state(params, optimizer, shapes)._replace(
            critic=None if critic is None else init_critic(params, critic.optimizer, shapes.critic),
            reference=copy_reference(params) if has_reference else None,
        )

    @jax.jit
    def estimate(rewards, greedy_rewards):
        advantages = jax.vmap(estimator)(rewards, *(() if greedy_rewards is None else (greedy_rewards,)))
        return whiten(advantages) if whiten_advantages else advantages

    @jax.jit
    def estimate_by_values(rewards, values, mask):
        advantages = jnp.where(mask, jax.vmap(estimator)(rewards, values), 0.0)
        return whiten(advantages, mask) if whiten_advantages else advantages, advantages + values

    def is_learnt(part: Rollout) -> np.ndarray:
        return part.stopped | (not mask_truncated)

    def pack(part: Rollout, layout: Layout) -> Batch:
        """Without advantages, which are not known yet."""
        learnt = is_learnt(part)
        weights = np.asarray(aggregation(np.where(learnt, part.response_lengths, 0), max_length=max_response_length))
        return make_batch(part, np.zeros(len(learnt), np.float32), np.where(learnt, weights, 0), layout)

    def learn(
        state: TrainState, experience: Experience, save_to: Path | None = None
    ) -> tuple[TrainState, dict[str, float], list[UpdateLog]]:
        rollout, lengths = experience.rollout, experience.rollout.response_lengths
        slices = [slice(i, i + minibatch) for i in range(0, len(lengths), minibatch)]
        parts = [jax.tree.map(lambda x, at=at: x[at], rollout) for at in slices]
        layouts = [make_layout(part, shape) for part in parts]
        batches = [pack(part, layout) for part, layout in zip(parts, layouts, strict=True)]
        metrics = {'update/padding_share': np.mean([padding_share(batch) for batch in batches])}
        to_responses = lambda arrays: np.concatenate(
            [layout.gather(x) for layout, x in zip(layouts, fetch(arrays), strict=True)]
        )

        # What is asked of models before any of them changes.
        if passes_first:
            batches = [place(batch, mesh, (None, 'batch')) for batch in batches]
        importance = [1.0] * len(batches)
        if old_policy == 'recompute':
            batches, noise, importance = zip(*[recompute(state.params, batch) for batch in batches], strict=True)
            metrics['update/kl_noise'] = np.mean(noise)
        penalties = np.zeros(rollout.log_probs.shape, np.float32)
        if has_reference:
            batches, of_parts = zip(*[reference(state.reference, batch) for batch in batches], strict=True)
            if not in_loss:  # nothing reads it any more
                batches = [batch._replace(reference=None) for batch in batches]
            if reward_penalty is not None:
                penalties = to_responses(of_parts)
                metrics['reward/penalty'] = penalties.sum(axis=1).mean()

        added = {}  # to a batch: arrays [R, T]
        if critic is None:
            rewards = experience.rewards - penalties.sum(axis=1).reshape(experience.rewards.shape)
            advantages = np.asarray(estimate(rewards, experience.greedy_rewards)).reshape(-1, 1)
            added['advantages'] = np.broadcast_to(advantages, rollout.log_probs.shape)
        else:
            added['values'] = to_responses([values_of(state.critic.params, batch) for batch in batches])
            mask = (np.arange(rollout.log_probs.shape[1]) < lengths[:, None]) & is_learnt(rollout)[:, None]
            rewards = token_rewards(experience.rewards.reshape(-1), penalties, lengths)
            added['advantages'], added['returns'] = map(np.asarray, estimate_by_values(rewards, added['values'], mask))
            if mask.any():
                values, returns = added['values'][mask], added['returns'][mask]
                metrics |= {
                    'critic/explained_variance': explained_variance(values, returns),
                    'critic/value': values.mean(),
                    'critic/return': returns.mean(),
                }

        def complete(i: int):
            """Minibatch i; on the devices if it has been there, else in numpy."""
            known = {name: layouts[i].scatter(array[slices[i]]) for name, array in added.items()}
            if not passes_first:
                return batches[i]._replace(**known)
            batch = batches[i]._replace(**place(known, mesh, (None, 'batch')))
            return batch._replace(advantages=batch.advantages * importance[i])

        if save_to is not None:
            save_batches(save_to, [complete(i) for i in range(len(slices))], step=int(state.progress.step))
        warming_up = critic is not None and int(state.progress.step) < critic.warmup_steps
        logs, critic_logs, batches = [], [], list(batches)
        for i in range(len(slices)):
            batch, batches[i] = complete(i), None  # not to be kept
            batch = batch if passes_first else place(batch, mesh, (None, 'batch'))
            if critic is not None:
                new, log = update_critic(state.critic, batch)
                state = state._replace(critic=new)
                critic_logs.append(log)
            if not warming_up:
                state, log = update(state, batch)
                logs.append(log)
        of_updates = fetch([log.metrics for log in logs])
        metrics |= _summarise('update', of_updates) | _summarise('critic', fetch(critic_logs))
        if of_updates:
            # Before the first update the policy is the one that sampled: what is left is the noise between the two.
            first = next((log for log in of_updates if not log['skipped']), of_updates[0])
            metrics = {'update/kl_noise': first['kl_mean']} | metrics

        done = state.progress.step + 1
        progress = state.progress._replace(step=done, draws=state.progress.draws + experience.draws)
        state = state._replace(progress=progress)
        if has_reference and refresh_reference_every and int(done) % refresh_reference_every == 0:
            state = state._replace(reference=copy_reference(state.params))
        return state, metrics, logs

    def programs(kept: int) -> dict[str, tuple[Callable, tuple]]:
        batch = abstract_batch(shape, kept)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=named_sharding(mesh, (None, 'batch', *[None] * (x.ndim - 2)))
            ),
            batch,
        )
        floats, found = batch.weights, {}
        if old_policy == 'recompute':
            found['recompute'] = recompute, (shapes.params, batch)
        if has_reference:
            found['reference'] = reference, (shapes.reference, batch)
            if in_loss:
                batch = batch._replace(reference=Reference(floats, batch.old.log_probs))
        if critic is not None:
            found['values'] = values_of, (shapes.critic.params, batch)
            batch = batch._replace(values=floats, returns=floats)
            found['critic'] = update_critic, (shapes.critic, batch)
        return found | {'update': (update, (shapes, batch))}

    def check(rollout: Rollout, prompts: int) -> None:
        responses, room = rollout.log_probs.shape
        jax.eval_shape(partial(aggregation, max_length=max_response_length), rollout.response_lengths)
        if critic is None:
            rewards = jax.ShapeDtypeStruct((prompts, responses // prompts), jnp.float32)
            greedy = jax.ShapeDtypeStruct((prompts,), jnp.float32) if needs_greedy_reward(estimator) else None
            jax.eval_shape(estimate, rewards, greedy)
        else:
            tokens = jax.ShapeDtypeStruct((responses, room), jnp.float32)
            jax.eval_shape(estimate_by_values, tokens, tokens, jax.ShapeDtypeStruct((responses, room), bool))
        for program, arguments in programs(rollout.support.tokens.shape[-1]).values():
            jax.eval_shape(program, *arguments)

    return Learner(shapes, start, learn, programs, check)


def _check_settings(estimator, critic, old_policy, importance_limit) -> None:
    if old_policy not in OLD_POLICIES:
        raise ValueError(f'old_policy must be one of {OLD_POLICIES}; got {old_policy!r}')
    if importance_limit is not None and old_policy != 'recompute':
        raise ValueError(
            f'importance_limit = {importance_limit} compares the sampler with what the trainer recomputes; set '
            f"old_policy to 'recompute', or leave it out; got {old_policy!r}"
        )
    if needs_values(estimator) and critic is None:
        raise ValueError('this estimator takes the values of a critic, and there is none; set train.critic = @Critic()')
    if critic is not None and not needs_values(estimator):
        raise ValueError(
            'the critic would learn what nothing uses; set train.estimator = @gae, or leave the critic out'
        )


def _check_reference(has_reference, reward_penalty, refresh_every, mask_truncated) -> None:
    if reward_penalty is not None and mask_truncated:
        raise ValueError(
            'reward_penalty and mask_truncated do not go together: of masked responses no penalty is known, and their '
            'rewards count for the others; choose one, or put the pull into train.regularisers'
        )
    if reward_penalty is not None and not needs_reference(reward_penalty):
        raise ValueError('reward_penalty must compare with a reference model, such as @kl_to_reference')
    if refresh_every < 0 or (refresh_every and not has_reference):
        raise ValueError(
            f'refresh_reference_every = {refresh_every}; expected 0, which is never, or with @kl_to_reference among '
            'regularisers or as reward_penalty a number of steps'
        )


def abstract_state(
    config: decoders.DecoderConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    critic: Critic | None = None,
    has_reference: bool = False,
) -> TrainState:
    """Shapes and shardings of all that is trained."""
    params, opt_state = abstract_policy(config, optimizer, mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    as_reference = jax.eval_shape(partial(decoders.cast_weights, dtype=config.compute_dtype), params)
    like = lambda x, sharded: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded.sharding)
    return TrainState(
        progress=jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=replicated), START),
        params=params,
        opt_state=opt_state,
        critic=None if critic is None else abstract_critic(config, critic.optimizer, mesh),
        reference=jax.tree.map(like, as_reference, params) if has_reference else None,
    )


def start_state(params, optimizer: optax.GradientTransformation, shapes: TrainState) -> TrainState:
    """A policy before its first update, without a critic or a reference model. `params` become part of it."""
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    progress = jax.tree.map(lambda x, sharding: place(x, sharding.mesh, ()), START, shardings.progress)
    return TrainState(progress, params, jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params))


def _summarise(kind: str, logs: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Metrics of a step's updates: their mean; a maximum stays one. Updates that were skipped are only counted."""
    done = [log for log in logs if not log['skipped']] or logs

    def over(name: str) -> float:
        reduce = np.max if name.endswith('_max') else np.mean
        return reduce([log[name] for log in (logs if name == 'skipped' else done)])

    return {f'{kind}/{name}': over(name) for name in (logs[0] if logs else ())}
