"""Trains a language model from verifiable rewards. Start here: this file is the whole loop.

    python -m experiments.train configs/quickstart_troll.gin ['train.steps = 20' 'troll.bound = 0.1' …]
    python -m experiments.train configs/quickstart.gin configs/objectives/gspo.gin    # a task, then a method

A run's folder holds `config.gin` (all that is needed to repeat or evaluate it), `model` (tokenizer and sizes),
`checkpoints`, `metrics.jsonl`, `held_tokens.jsonl`, `tensorboard` and, if asked for, `rollouts`. Started again, a run
goes on from its latest checkpoint. On several hosts the same command runs on each: docs/pods.md.
"""

import logging
import signal
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gin
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from tqdm import tqdm

from experiments.command import run_command
from experiments.config import Experiment, check_bindings_used, parse_command_line, register
from experiments.run_folder import (
    check_setup,
    check_writable,
    describe_setup,
    nothing_left_behind,
    restore_or_start,
    save_setup,
)
from experiments.validation import make_validation, metrics_of
from troll_jax.checkpoint import Checkpoints
from troll_jax.collect import make_collector
from troll_jax.critic import Critic
from troll_jax.data.prompts import PromptSet, batch_indices
from troll_jax.learn import Aggregation, Estimator, Learner, make_learner
from troll_jax.metrics import MetricsWriter
from troll_jax.ops.advantages import needs_greedy_reward
from troll_jax.ops.regularisers import Regulariser
from troll_jax.packing import batch_shape
from troll_jax.rewards.pool import Grader
from troll_jax.rewards.terms import Responses, RewardTerm, task_reward, weigh
from troll_jax.rollout import make_sampler
from troll_jax.sharding import fetch
from troll_jax.types import Prompts
from troll_jax.update import Objective, TailRule, UpdateLog

logger = logging.getLogger(__name__)


@register
def train(
    run_dir: str = gin.REQUIRED,
    objective: Objective = gin.REQUIRED,
    aggregation: Aggregation = gin.REQUIRED,
    estimator: Estimator = gin.REQUIRED,
    tail_rule: TailRule = gin.REQUIRED,
    optimizer: optax.GradientTransformation = gin.REQUIRED,
    steps: int = gin.REQUIRED,
    prompts_per_step: int = gin.REQUIRED,
    samples_per_prompt: int = gin.REQUIRED,
    minibatch_prompts: int = gin.REQUIRED,
    temperature: float = 1.0,
    max_tokens: int = 64,
    mass: float = 1 - 1e-5,
    old_policy: str = 'rollout',
    slots: int | None = None,
    gather_weights: bool = True,
    row_tokens: int | None = None,
    micro_batch_tokens: int | None = None,
    head_chunk: int = 1024,
    evaluate_every: int = 10,
    table_every: int = 10,
    checkpoint_every: int = 10,
    checkpoint_dir: str | None = None,
    keep_checkpoints: int = 2,
    keep_best: bool = False,
    on_change: str = 'stop',
    save_rollout_every: int = 0,
    profile_step: int | None = None,
    max_skipped: int = 8,
    debug_nans: bool = False,
    seed: int = 0,
    regularisers: Sequence[Regulariser] = (),
    reward_penalty: Regulariser | None = None,
    refresh_reference_every: int = 0,
    critic: Critic | None = None,
    whiten_advantages: bool = False,
    rewards: Sequence[tuple[str, float, RewardTerm]] = (('task', 1.0, task_reward),),
    max_draws: int = 1,
    mask_truncated: bool = False,
    importance_limit: float | None = None,
) -> None:
    """Samples a batch of responses, grades them, learns from them in minibatches; again and again.

    Args:
      run_dir: folder of the run.
      objective: the policy loss: `@troll`, `@ppo_clip`, `@cispo`, `@dppo` or `@importance_weighted`.
      aggregation: the mean that is taken of token losses, e.g. `@token_mean`.
      estimator: from the rewards of a prompt's samples to their advantages, e.g. `@group_normalised`; or, with a
        critic, from those of a response's tokens, `@gae`.
      tail_rule: what stands for the tokens that a sparse distribution leaves out, `@default_tail` or `@bucket_tail`.
      optimizer: e.g. `@adamw()`.
      steps: rollout batches.
      prompts_per_step: B, prompts in a rollout batch.
      samples_per_prompt: G.
      minibatch_prompts: prompts in an optimizer update. B / minibatch_prompts updates are made per rollout batch; all
        but the first of them are off-policy.
      temperature: of the sampling.
      max_tokens, mass: K and 1 − δ of the sparse distributions, see `troll_jax.sparsify`.
      old_policy: where π_old comes from: 'rollout', what the sampler recorded, or 'recompute', a forward pass of
        training over all responses before the first update, as in the paper.
      slots: responses that are decoded at a time, on all devices together; fewer save memory. None: all B · G.
      gather_weights: lays the weights out for decoding once per rollout, see `make_sampler`.
      row_tokens: S, of the rows into which responses are packed for an update, at least as many as a prompt and its
        response may have, which is the default.
      micro_batch_tokens: a minibatch is worked through in parts of at most so many tokens on each device, to save
        memory; at least one row. None is 8,192, or one row. What is left of the last part is padding: the fewer rows a
        part has, the less (`update/padding_share`).
      head_chunk: tokens whose logits are in memory at a time in an update, on each device.
      evaluate_every: steps between evaluations of `Experiment.validation`; 0 turns them off.
      table_every: steps between tables of the tokens that are projected or clipped most; 0 turns them off. With
        `@sequence_region` all tokens of a response count that is outside.
      checkpoint_every: steps between checkpoints. The last step is saved in any case.
      checkpoint_dir: a folder or bucket (gs://…) to keep them in; None is `run_dir`.
      keep_checkpoints: how many of the latest to keep.
      keep_best: keeps the checkpoint with the highest `eval/success` besides, of those steps that are evaluated.
      on_change: if a run would go on with another configuration, tokenizer or data than it was started with: 'stop',
        or 'go on'. What changes nothing that is learnt, such as `steps`, may always change (`run_folder.FREE`).
      save_rollout_every: steps between rollouts that are saved for `experiments/replay.py`, a multiple of
        `checkpoint_every`, as `rollouts/<step>.npz` with the step of the checkpoint that sampled it. These checkpoints
        are kept, besides the latest. 0 turns it off.
      max_skipped: after so many steps in a row with an update that was skipped, because its gradient was not finite,
        the run ends with an error. The last of these steps can be replayed: its rollout and the checkpoint that sampled
        it are saved. At least 2; 0 never ends it.
      debug_nans: ends the run where the first NaN appears (`jax_debug_nans`); slow.
      profile_step: the step of which a trace is written into the run's folder `profile`, for TensorBoard or Perfetto.
      seed: of the order of the data and of the sampling.
      regularisers: what is added to the objective, e.g. `[@entropy_bonus]`; see `troll_jax.ops.regularisers`.
        `@kl_to_reference` compares with a reference model: the one that the run starts from.
      reward_penalty: the same, taken off the reward at every token before advantages are estimated.
      refresh_reference_every: steps after which the policy becomes the reference model; 0 keeps the first.
      critic: for `@gae`, e.g. `@Critic()`; see `troll_jax.critic`.
      whiten_advantages: over all responses of a rollout batch, with a critic over all tokens; see `whiten`.
      rewards: name, weight and function of each term of a reward, see `troll_jax.rewards.terms`; the log shows them one
        by one.
      max_draws: dynamic sampling, if more than 1: groups whose rewards are all equal teach nothing, and are replaced
        by those of up to so many batches of prompts in all; see `troll_jax.collect`.
      mask_truncated: leaves responses that the length limit cut out of the loss, and out of its mean. Their rewards
        still count for the advantages of the other samples.
      importance_limit: with old_policy 'recompute', advantages are weighted by the ratio of trainer to sampler up to
        this, see `truncated_importance_weights`; None does not weight.
    """
    experiment = Experiment()
    mesh = experiment.mesh
    check_sizes(mesh, prompts_per_step, samples_per_prompt, minibatch_prompts, slots)
    shape = batch_shape(
        minibatch_prompts * samples_per_prompt,
        experiment.max_prompt_length + experiment.max_response_length,
        row_tokens=row_tokens,
        micro_batch_tokens=micro_batch_tokens,
        devices=mesh.shape['data'] * mesh.shape['fsdp'],
    )
    if '://' in run_dir:
        raise ValueError(f'run_dir must be a folder, got {run_dir!r}; bind train.checkpoint_dir to a bucket instead')
    if profile_step is not None and profile_step > steps:
        raise ValueError(f'profile_step = {profile_step} is past the last of {steps} steps; lower it')
    check_limits(
        above_zero={'temperature': temperature, 'steps': steps, 'checkpoint_every': checkpoint_every}
        | {'keep_checkpoints': keep_checkpoints, 'head_chunk': head_chunk, 'max_draws': max_draws}
        | ({} if profile_step is None else {'profile_step': profile_step}),
        at_least_zero={'evaluate_every': evaluate_every, 'table_every': table_every}
        | {'save_rollout_every': save_rollout_every, 'max_skipped': max_skipped, 'seed': seed},
    )
    if max_draws > 1 and samples_per_prompt < 2:
        raise ValueError(
            f'max_draws = {max_draws} replaces groups whose rewards are all equal, and with samples_per_prompt = 1 all '
            'are; raise samples_per_prompt, or set max_draws = 1'
        )
    if max_skipped == 1:
        raise ValueError('max_skipped must be at least 2, or 0 to go on whatever happens; got 1')
    if keep_best and not evaluate_every:
        raise ValueError('keep_best goes by eval/success, and evaluate_every = 0 turns evaluations off; raise it')
    if save_rollout_every % checkpoint_every:
        raise ValueError(
            f'save_rollout_every = {save_rollout_every} must be a multiple of checkpoint_every = {checkpoint_every}, '
            'so that the parameters that sampled a rollout are there to replay it'
        )
    is_first_process = jax.process_index() == 0
    if is_first_process:
        check_writable(run_dir)
        if checkpoint_dir is not None and '://' not in checkpoint_dir:
            check_writable(checkpoint_dir)
    tokenizer = experiment.load_tokenizer()
    config = experiment.decoder_config(tokenizer)
    prompts = experiment.load_prompts('train', tokenizer)
    batch_indices(len(prompts), prompts_per_step, seed=seed, step=0)  # an error now if there are too few
    setup = describe_setup(tokenizer, {'train': prompts})

    new_sampler = partial(
        make_sampler,
        config,
        max_response_length=experiment.max_response_length,
        stop_tokens=experiment.stop_tokens(tokenizer),
        slots=slots or prompts_per_step * samples_per_prompt,
        gather_weights=gather_weights,
    )
    sampler = new_sampler(
        samples_per_prompt=samples_per_prompt, temperature=temperature, max_tokens=max_tokens, mass=mass
    )
    greedy_sampler = new_sampler(samples_per_prompt=1, temperature=0.0, max_tokens=1, mass=1.0)
    drawing = partial(new_sampler, temperature=1.0, max_tokens=1, mass=1.0)
    validate = make_validation(
        experiment, tokenizer, lambda samples: greedy_sampler if samples == 1 else drawing(samples_per_prompt=samples)
    )
    learner = make_learner(
        config,
        optimizer,
        shape,
        objective=objective,
        aggregation=aggregation,
        estimator=estimator,
        tail_rule=tail_rule,
        temperature=temperature,
        max_tokens=max_tokens,
        mass=mass,
        minibatch=minibatch_prompts * samples_per_prompt,
        max_response_length=experiment.max_response_length,
        mesh=mesh,
        head_chunk=head_chunk,
        old_policy=old_policy,
        importance_limit=importance_limit,
        regularisers=regularisers,
        reward_penalty=reward_penalty,
        refresh_reference_every=refresh_reference_every,
        critic=critic,
        whiten_advantages=whiten_advantages,
        mask_truncated=mask_truncated,
    )
    with (
        nothing_left_behind(checkpoint_dir or run_dir),
        stop_on_signal() as stop,  # before the checkpoints, which are still written when the loop has ended
        jax.set_mesh(mesh),
        jax.debug_nans(debug_nans or jax.config.jax_debug_nans),
        Checkpoints(
            checkpoint_dir or run_dir,
            keep=keep_checkpoints,
            keep_every=save_rollout_every or None,
            keep_best=keep_best,
        ) as checkpoints,
        Grader(experiment.task.grade, deadline=experiment.task.deadline) as grader,
    ):
        grader.start()
        check_programs(sampler, learner, rewards, prompts, prompts_per_step)
        check_bindings_used()
        check_setup(checkpoints, setup, on_change)
        state = restore_or_start(checkpoints, experiment, learner.shapes, learner.start)
        first = int(state.progress.step)
        if is_first_process:
            save_setup(Path(run_dir), experiment, tokenizer, first, checkpoint_dir, setup)
        if first >= steps:
            logger.warning('nothing to do: %s is at step %d of %d', run_dir, first, steps)
        collect = make_collector(
            sampler,
            prompts,
            grader,
            tokenizer,
            prompts_per_step=prompts_per_step,
            max_response_length=experiment.max_response_length,
            rewards=rewards,
            greedy_sampler=greedy_sampler if needs_greedy_reward(estimator) else None,
            max_draws=max_draws,
            seed=seed,
            mesh=mesh,
        )

        def evaluate_now() -> dict[str, float]:
            return metrics_of(validate(state.params, jax.random.key(seed), grader))

        with MetricsWriter(run_dir, resume_after=first, write=is_first_process) as metrics:
            if first == 0 and evaluate_every:
                metrics.write(0, evaluate_now())
            hide = None if is_first_process else True  # None: hidden if there is no terminal
            skipped = 0  # steps in a row
            progress = tqdm(range(first + 1, steps + 1), initial=first, total=steps, unit='step', disable=hide)
            for step in progress:
                if step == profile_step:
                    jax.profiler.start_trace(Path(run_dir) / 'profile')
                experience = collect(state.params, int(state.progress.draws))
                start = time.perf_counter()
                last_chance = skipped and skipped == max_skipped - 1
                saved = last_chance or (save_rollout_every and (step - 1) % save_rollout_every == 0)
                save_to = Path(run_dir) / 'rollouts' / f'{step - 1}.npz' if saved else None
                state, row, logs = learner.learn(state, experience, save_to)
                row = experience.logs | row | speed(experience.rollout, time.perf_counter() - start)
                if step == profile_step:
                    jax.profiler.stop_trace()

                if old_policy == 'rollout':
                    warn_of_noise(row)
                skipped = skipped + 1 if row.get('update/skipped') or row.get('critic/skipped') else 0
                if skipped:
                    logger.warning('step %d: an update was skipped, its gradient was not finite', step)
                if table_every and step % table_every == 0 and logs:
                    metrics.write_table(step, token_table(logs, tokenizer))
                stopping = stop()
                if evaluate_every and step % evaluate_every == 0 and not stopping:
                    row |= evaluate_now()
                metrics.write(step, row)
                progress.set_postfix(reward=f'{row["reward/mean"]:.3f}', kl=f'{row.get("update/kl_mean", 0):.4f}')
                if last_chance and skipped:
                    raise FloatingPointError(not_finite(run_dir, step, skipped, save_to))
                checkpoints.check()
                if step % checkpoint_every == 0 or step == steps or stopping or 0 < skipped == max_skipped - 1:
                    checkpoints.save(state, row.get('eval/success'))
                if stopping:
                    break

    if int(state.progress.step) < steps:
        logger.warning('stopped after step %d, which is saved; start again to go on', int(state.progress.step))


def check_limits(above_zero: dict[str, float], at_least_zero: dict[str, float]) -> None:
    """Raises a ValueError for a number that makes no sense."""
    for limits, names in [('above', above_zero), ('at least', at_least_zero)]:
        for name, value in names.items():
            if value < 0 or (value == 0 and limits == 'above'):
                raise ValueError(f'{name} must be {limits} 0; got {value}')


def check_sizes(mesh, prompts_per_step, samples_per_prompt, minibatch_prompts, slots):
    """Raises a ValueError with both numbers if one of the run's sizes does not divide another."""
    devices = mesh.shape['data'] * mesh.shape['fsdp']
    for name, size, divisor_name, divisor in [
        ('prompts_per_step', prompts_per_step, 'minibatch_prompts', minibatch_prompts),
        ('prompts_per_step', prompts_per_step, 'data × fsdp devices of the mesh', devices),
        ('slots', devices if slots is None else slots, 'data × fsdp devices of the mesh', devices),
    ]:
        if divisor < 1 or size < 1 or size % divisor:
            raise ValueError(f'{name} = {size} must be a positive multiple of {divisor_name} = {divisor}')
    if samples_per_prompt < 1:
        raise ValueError(f'samples_per_prompt must be at least 1; got {samples_per_prompt}')


def check_programs(sampler, learner: Learner, rewards, prompts: PromptSet, prompts_per_step: int) -> None:
    """Traces a step's programs on shapes alone: a setting that they refuse is an error before any weight is loaded."""
    some = jax.eval_shape(lambda: Prompts(prompts.tokens[:prompts_per_step], prompts.lengths[:prompts_per_step]))
    keys = jax.eval_shape(partial(jax.random.split, num=prompts_per_step), jax.random.key(0))
    rollout = sampler.shapes(learner.shapes.params, some, keys)
    learner.check(rollout, prompts_per_step)
    weigh(rewards, Responses(['', ''], np.ones(2, np.int32), rollout.log_probs.shape[1], np.zeros(2, np.float32)))


def warn_of_noise(row: dict[str, float]) -> None:
    """A trust region means little if sampler and trainer, from the same parameters, differ by much of its size."""
    bound = row.get('update/bound_mean', np.inf)
    if row.get('update/kl_noise', 0.0) > bound / 10:
        logger.warning(
            'the KL between sampler and trainer is %.2g nats per token before any update, more than a tenth of the '
            'bound %.2g; set train.old_policy to "recompute", or Experiment.compute_dtype to "float32"',
            row['update/kl_noise'],
            bound,
        )


def token_table(logs: list[UpdateLog], tokenizer, rows: int = 20) -> list[dict]:
    """The tokens that a step's updates projected or clipped most, and how often they saw them."""
    seen, held = (sum(counts) for counts in zip(*fetch([log[1:] for log in logs]), strict=True))
    most = np.argsort(-held, kind='stable')[:rows]
    return [
        {'token': int(i), 'text': tokenizer.decode([i]), 'held': int(held[i]), 'seen': int(seen[i])}
        for i in most
        if held[i]
    ]


def not_finite(run_dir: str, step: int, skipped: int, rollout: Path) -> str:
    return (
        f'step {step}: gradients were not finite in {skipped} steps in a row (train.max_skipped). The parameters are '
        f'finite and saved as of step {step - 1}. `python -m experiments.replay {run_dir} --batch {rollout}` shows the '
        'first token whose loss is not; with train.debug_nans = True the run ends where the first NaN appears'
    )


def speed(rollout, seconds: float) -> dict[str, float]:
    return {
        'update/tokens_per_second': int(rollout.response_lengths.sum()) / seconds,
        'seconds/update': seconds,
    }


@contextmanager
def stop_on_signal():
    """Yields a function that tells whether Ctrl-C or SIGTERM has come, to this process or to another of the run.

    The loop then ends its step and saves. Twice ends at once.
    """
    received = []

    def handle(number, _):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning('%s: finishing this step and saving; once more to stop at once', signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(np.any(multihost_utils.process_allgather(np.array(bool(received)))))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main() -> None:
    parse_command_line(__doc__, named_after_files='train.run_dir')
    train()


if __name__ == '__main__':
    run_command(main)
