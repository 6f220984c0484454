"""Trains a language model from verifiable rewards. Start here: this file is the whole loop.

    python -m experiments.train configs/quickstart_troll.gin ['train.steps = 20' 'troll.bound = 0.1' …]
    python -m experiments.train configs/quickstart.gin configs/objectives/gspo.gin    # a task, then a method

A run's folder holds `config.gin` (all that is needed to repeat or evaluate it), `model` (tokenizer and sizes),
`checkpoints`, `metrics.jsonl`, `held_tokens.jsonl` and `tensorboard`. Started again, a run goes on from its latest
checkpoint. On several hosts the same command runs on each: docs/pods.md.
"""

import difflib
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from tqdm import tqdm
from transformers import GenerationConfig

from experiments.config import Experiment, check_bindings_used, parse_command_line, register
from troll_jax.checkpoint import Checkpoints
from troll_jax.data.prompts import PromptSet, batch_indices
from troll_jax.evaluate import decode_responses, evaluate, grade, sample_responses
from troll_jax.metrics import MetricsWriter
from troll_jax.models import decoder as decoders
from troll_jax.models.hf_weights import load_config, load_pretrained
from troll_jax.ops.advantages import whiten
from troll_jax.ops.regularisers import Regulariser, regularised
from troll_jax.optimizer import state_shapes
from troll_jax.packing import BatchShape, abstract_batch, batch_shape, make_batch, padding_share
from troll_jax.rewards.pool import Grader
from troll_jax.rollout import make_sampler
from troll_jax.sharding import fetch, place
from troll_jax.types import Batch, Progress, Prompts, Rollout, TrainState
from troll_jax.update import Aggregation, Objective, TailRule, UpdateLog, make_recompute, make_update

logger = logging.getLogger(__name__)
OLD_POLICIES = ('rollout', 'recompute')


@register
def train(
    run_dir: str = gin.REQUIRED,
    objective: Objective = gin.REQUIRED,
    aggregation: Aggregation = gin.REQUIRED,
    estimator: Callable[[jax.Array], jax.Array] = gin.REQUIRED,
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
    profile_step: int | None = None,
    seed: int = 0,
    regularisers: Sequence[Regulariser] = (),
    whiten_advantages: bool = False,
    length_penalty: Callable[..., np.ndarray] | None = None,
    mask_truncated: bool = False,
    importance_limit: float | None = None,
) -> None:
    """Samples a batch of responses, grades them, learns from them in minibatches; again and again.

    Args:
      run_dir: folder of the run.
      objective: the policy loss: `@troll`, `@ppo_clip`, `@cispo`, `@dppo` or `@importance_weighted`.
      aggregation: the mean that is taken of token losses, e.g. `@token_mean`.
      estimator: from the rewards of a prompt's samples to their advantages, e.g. `@group_normalised`.
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
      evaluate_every: steps between greedy evaluations on the test split; 0 turns them off.
      table_every: steps between tables of the tokens that are projected or clipped most; 0 turns them off. With
        `@sequence_region` all tokens of a response count that is outside.
      checkpoint_every: steps between checkpoints. The last step is saved in any case.
      checkpoint_dir: a folder or bucket (gs://…) to keep them in; None is `run_dir`.
      keep_checkpoints: how many of the latest to keep.
      profile_step: the step of which a trace is written into the run's folder `profile`, for TensorBoard or Perfetto.
      seed: of the order of the data and of the sampling.
      regularisers: what is added to the objective, e.g. `[@entropy_bonus]`; see `troll_jax.ops.regularisers`.
      whiten_advantages: over all responses of a rollout batch, after the estimator; see `whiten`.
      length_penalty: what the length of a response adds to its reward, e.g. `@soft_overlong`; None is nothing.
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
    if old_policy not in OLD_POLICIES:
        raise ValueError(f'old_policy must be one of {OLD_POLICIES}; got {old_policy!r}')
    if importance_limit is not None and old_policy != 'recompute':
        raise ValueError(
            f'importance_limit = {importance_limit} compares the sampler with what the trainer recomputes; set '
            f"old_policy to 'recompute', or leave it out; got {old_policy!r}"
        )
    check_limits(
        above_zero={'temperature': temperature, 'steps': steps, 'checkpoint_every': checkpoint_every}
        | {'keep_checkpoints': keep_checkpoints, 'head_chunk': head_chunk}
        | ({} if profile_step is None else {'profile_step': profile_step}),
        at_least_zero={'evaluate_every': evaluate_every, 'table_every': table_every},
    )
    tokenizer = experiment.load_tokenizer()
    config = experiment.decoder_config(tokenizer)
    prompts, held_out = (experiment.load_prompts(split, tokenizer) for split in ('train', 'test'))
    batch_indices(len(prompts), prompts_per_step, seed=seed, step=0)  # an error now if there are too few

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
    policy = {'temperature': temperature, 'tail_rule': tail_rule, 'max_tokens': max_tokens, 'mass': mass}
    objective = regularised(objective, regularisers)
    update = make_update(config, optimizer, objective=objective, head_chunk=head_chunk, **policy)
    recompute = make_recompute(config, head_chunk=head_chunk, importance_limit=importance_limit, **policy)
    with (
        stop_on_signal() as stop,  # before the checkpoints, which are still written when the loop has ended
        jax.set_mesh(mesh),
        Checkpoints(checkpoint_dir or run_dir, keep=keep_checkpoints) as checkpoints,
        Grader(experiment.task.grade, deadline=experiment.task.deadline) as grader,
    ):
        grader.start()
        shapes = abstract_state(experiment, config, optimizer)
        check_programs(sampler, estimator, aggregation, update, recompute, shapes, prompts, prompts_per_step, shape)
        if length_penalty is not None:
            length_penalty(np.ones(1), max_length=experiment.max_response_length)  # an error now if it has one
        check_bindings_used()
        state = restore_or_start(checkpoints, experiment, optimizer, shapes)
        first = int(state.progress.step)
        is_first_process = jax.process_index() == 0
        if is_first_process:
            save_setup(Path(run_dir), experiment, tokenizer, first, checkpoint_dir)
        key = jax.random.key(seed)
        if first >= steps:
            logger.warning('nothing to do: %s is at step %d of %d', run_dir, first, steps)

        def evaluate_now() -> dict[str, float]:
            result = evaluate(greedy_sampler, state.params, held_out, grader, tokenizer, key, mesh=mesh)
            return {'eval/success': result.rewards.mean(), 'eval/response_length': result.lengths.mean()}

        with MetricsWriter(run_dir, resume_after=first, write=is_first_process) as metrics:
            if first == 0 and evaluate_every:
                metrics.write(0, evaluate_now())
            hide = None if is_first_process else True  # None: hidden if there is no terminal
            progress = tqdm(range(first, steps), initial=first, total=steps, unit='step', disable=hide)
            for step in progress:
                if step + 1 == profile_step:
                    jax.profiler.start_trace(Path(run_dir) / 'profile')
                times = {'start': time.perf_counter()}
                indices = batch_indices(len(prompts), prompts_per_step, seed=seed, step=step)
                key_of_step = jax.random.fold_in(key, step)
                rollout = sample_responses(sampler, state.params, prompts, indices, key_of_step, mesh=mesh)
                times['rollout'] = time.perf_counter()

                answers = [prompts.answers[i] for i in indices for _ in range(samples_per_prompt)]
                grades = grade(grader, decode_responses(rollout, tokenizer), answers)
                times['reward'] = time.perf_counter()

                penalties = np.zeros_like(grades.rewards)
                if length_penalty is not None:
                    penalties = length_penalty(rollout.response_lengths, max_length=experiment.max_response_length)
                groups = (grades.rewards + penalties).reshape(prompts_per_step, samples_per_prompt)
                advantages = jax.vmap(estimator)(groups)
                advantages = np.asarray(whiten(advantages) if whiten_advantages else advantages).reshape(-1)
                learnt = rollout.stopped | (not mask_truncated)
                batches = list(
                    minibatches(rollout, advantages, learnt, aggregation, minibatch_prompts * samples_per_prompt, shape)
                )
                padding = np.mean([padding_share(batch) for batch in batches])
                on_device = (place(batch, mesh, (None, 'batch')) for batch in batches)
                noise, logs = None, []
                if old_policy == 'recompute':  # for all of them, before the parameters change
                    on_device, noise = zip(*[recompute(state.params, batch) for batch in on_device], strict=True)
                for batch in on_device:
                    state, log = update(state, batch)
                    logs.append(log)
                metrics_of_updates = fetch([log.metrics for log in logs])
                times['update'] = time.perf_counter()
                if step + 1 == profile_step:
                    jax.profiler.stop_trace()

                state = state._replace(progress=state.progress._replace(step=state.progress.step + 1))
                row = summarise(rollout, grades, metrics_of_updates, times) | {'update/padding_share': padding}
                row['reward/length_penalty'] = penalties.mean()
                # Before the first update the policy is the one that sampled: what is left is the noise between the two.
                row['update/kl_noise'] = np.mean(noise) if noise else metrics_of_updates[0]['kl_mean']
                if old_policy == 'rollout':
                    warn_of_noise(row)
                del on_device, batch  # not to be kept while the next ones are sampled
                if table_every and (step + 1) % table_every == 0:
                    metrics.write_table(step + 1, token_table(logs, tokenizer))
                if row['update/skipped']:
                    logger.warning('step %d: an update was skipped, its gradient was not finite', step + 1)
                stopping = stop()
                if evaluate_every and (step + 1) % evaluate_every == 0 and not stopping:
                    row |= evaluate_now()
                metrics.write(step + 1, row)
                progress.set_postfix(success=f'{row["reward/mean"]:.3f}', kl=f'{row["update/kl_mean"]:.4f}')
                if (step + 1) % checkpoint_every == 0 or step + 1 == steps or stopping:
                    checkpoints.save(state)
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


def abstract_state(experiment, config, optimizer) -> TrainState:
    """Shapes and shardings of all that is trained."""
    _, params = decoders.abstract(config, experiment.mesh)
    replicated = jax.sharding.NamedSharding(experiment.mesh, jax.sharding.PartitionSpec())
    scalar = partial(jax.ShapeDtypeStruct, (), sharding=replicated)
    progress = Progress(step=scalar(jnp.int32), updates=scalar(jnp.int32), projected=scalar(jnp.float32))
    return TrainState(progress, params, state_shapes(optimizer, params))


def check_programs(
    sampler,
    estimator,
    aggregation,
    update,
    recompute,
    shapes: TrainState,
    prompts: PromptSet,
    prompts_per_step: int,
    shape: BatchShape,
) -> None:
    """Traces a step's programs on shapes alone: a setting that they refuse is an error before any weight is loaded."""
    some = jax.eval_shape(lambda: Prompts(prompts.tokens[:prompts_per_step], prompts.lengths[:prompts_per_step]))
    keys = jax.eval_shape(partial(jax.random.split, num=prompts_per_step), jax.random.key(0))
    rollout = sampler.shapes(shapes.params, some, keys)
    rewards = jax.ShapeDtypeStruct((prompts_per_step, len(rollout.tokens) // prompts_per_step), jnp.float32)
    jax.eval_shape(jax.vmap(estimator), rewards)
    jax.eval_shape(partial(aggregation, max_length=rollout.log_probs.shape[1]), rollout.response_lengths)
    batch = abstract_batch(shape, rollout.support.tokens.shape[-1])
    jax.eval_shape(update, shapes, batch)
    jax.eval_shape(recompute, shapes.params, batch)


def minibatches(
    rollout: Rollout,
    advantages: np.ndarray,
    learnt: np.ndarray,
    aggregation: Aggregation,
    responses: int,
    shape: BatchShape,
) -> Iterator[Batch]:
    """Packs each next `responses` of a rollout. The aggregation weighs those of that minibatch that are learnt from."""
    for start in range(0, len(advantages), responses):
        part = slice(start, start + responses)
        some = jax.tree.map(lambda x, part=part: x[part], rollout._replace(work=None))
        lengths = np.where(learnt[part], some.response_lengths, 0)
        weights = np.asarray(aggregation(lengths, max_length=rollout.log_probs.shape[1]))
        yield make_batch(some, advantages[part], np.where(learnt[part], weights, 0), shape)


def warn_of_noise(row: dict[str, float]) -> None:
    """A trust region means little if sampler and trainer, from the same parameters, differ by much of its size."""
    bound = row.get('update/bound_mean', np.inf)
    if row['update/kl_noise'] > bound / 10:
        logger.warning(
            'the KL between sampler and trainer is %.2g nats per token before any update, more than a tenth of the '
            'bound %.2g; set train.old_policy to "recompute", or Experiment.compute_dtype to "float32"',
            row['update/kl_noise'],
            bound,
        )


def restore_or_start(checkpoints, experiment, optimizer, shapes: TrainState) -> TrainState:
    """The latest checkpoint, or the model that the run starts from with a fresh optimizer."""
    if checkpoints.steps:
        logger.info('going on from step %d', checkpoints.steps[-1])
        return checkpoints.restore(shapes, checkpoints.steps[-1])
    _, params = load_pretrained(experiment.model, mesh=experiment.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    progress = place(jax.tree.map(lambda x: np.zeros((), x.dtype), shapes.progress), experiment.mesh, ())
    return TrainState(progress, params, opt_state)


def save_setup(run_dir: Path, experiment, tokenizer, first: int, checkpoint_dir: str | None) -> None:
    """Writes what evaluation and export need besides the parameters. A configuration that changed is kept.

    Raises:
      ValueError: a run that starts from nothing would overwrite one whose checkpoints lie elsewhere.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path, new = run_dir / 'config.gin', gin.config_str()
    old = path.read_text() if path.exists() else new
    elsewhere = re.search(r"^train\.checkpoint_dir = '(.*)'", old, re.MULTILINE)
    if not first and elsewhere and elsewhere[1] != checkpoint_dir:
        raise ValueError(
            f'{run_dir} has its checkpoints in {elsewhere[1]}, and train.checkpoint_dir is {checkpoint_dir!r}; bind it '
            'to go on, or choose another run_dir'
        )
    if first and old != new:
        (run_dir / f'config_until_{first}.gin').write_text(old)
        changed = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in '+-']
        logger.warning('going on from step %d with another configuration:\n%s', first, '\n'.join(changed))
    path.write_text(new)
    load_config(experiment.model).save_pretrained(run_dir / 'model')
    tokenizer.save_pretrained(run_dir / 'model')
    stop_tokens = list(experiment.stop_tokens(tokenizer))
    GenerationConfig(eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id).save_pretrained(run_dir / 'model')


def token_table(logs: list[UpdateLog], tokenizer, rows: int = 20) -> list[dict]:
    """The tokens that a step's updates projected or clipped most, and how often they saw them."""
    seen, held = (sum(counts) for counts in zip(*fetch([log[1:] for log in logs]), strict=True))
    most = np.argsort(-held, kind='stable')[:rows]
    return [
        {'token': int(i), 'text': tokenizer.decode([i]), 'held': int(held[i]), 'seen': int(seen[i])}
        for i in most
        if held[i]
    ]


def summarise(rollout, grades, logs, times) -> dict[str, float]:
    """One step's metrics. Those of its updates are averaged; a maximum stays one."""
    room = rollout.log_probs.shape[1]
    mask = np.arange(room) < rollout.response_lengths[:, None]
    tokens = int(rollout.response_lengths.sum())
    seconds = dict(zip(list(times)[1:], np.diff(list(times.values())), strict=True))
    over_updates = lambda name: (np.max if name.endswith('_max') else np.mean)([log[name] for log in logs])
    return {
        'reward/mean': grades.rewards.mean(),
        'reward/timeouts': grades.timeouts,
        'reward/crashes': grades.crashes,
        'reward/errors': grades.errors,
        'rollout/response_length': tokens / len(grades.rewards),
        'rollout/longest_response': rollout.response_lengths.max(),
        'rollout/decode_steps': rollout.work.steps,
        'rollout/slots_in_use': tokens / float(rollout.work.steps * rollout.work.slots),
        'rollout/truncated_share': 1 - rollout.stopped.mean(),
        'rollout/entropy': np.sum(rollout.entropy, where=mask) / tokens,
        'rollout/kept_tokens': np.sum(rollout.support.tokens >= 0, where=mask[:, :, None]) / tokens,
        'rollout/tokens_per_second': tokens / seconds['rollout'],
        'update/tokens_per_second': tokens / seconds['update'],
        **{f'update/{name}': over_updates(name) for name in logs[0]},
        **{f'seconds/{name}': value for name, value in seconds.items()},
        'seconds/prefill': rollout.work.prefill_seconds,
        'seconds/decode': rollout.work.decode_seconds,
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
    main()
