"""The settings of a run, besides `troll_jax.experiment.Experiment`: four frozen dataclasses that check themselves.

Experiment, Sampling and Method decide what is learnt. Compute and Run never do, so they may change when a run resumes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import jax
import optax
from jax.sharding import Mesh

from troll_jax.critic import Critic
from troll_jax.data.tasks import Task
from troll_jax.models.attention import IMPLEMENTATIONS
from troll_jax.models.layers import COMPUTE_DTYPES, REMAT_POLICIES
from troll_jax.models.lora import Lora
from troll_jax.models.paged_attention import IMPLEMENTATIONS as PAGED_IMPLEMENTATIONS
from troll_jax.models.quantization import PRECISIONS
from troll_jax.ops.importance import Importance
from troll_jax.ops.losses import Objective
from troll_jax.ops.needs import needs
from troll_jax.ops.ranges import check_range
from troll_jax.ops.regularisers import Regulariser
from troll_jax.optimizer import Offloaded, Optimizer
from troll_jax.packing import BatchShape, batch_shape
from troll_jax.rewards.pool import Grader
from troll_jax.rewards.terms import RewardTerm, check_names, task_reward
from troll_jax.score import Scoring, TailRule
from troll_jax.sharding import axis_size, make_mesh, split_devices
from troll_jax.typechecks import check_fields

Advantages = Annotated[Callable[[jax.Array], jax.Array], 'greedy_reward', 'values']
Aggregation = Callable[[jax.Array, int], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rollout batch: how many responses are sampled, and what is recorded of them.

    Args:
      prompts_per_step: B, prompts in a rollout batch.
      samples_per_prompt: G, responses to each prompt.
      temperature: sampling temperature.
      support_size: K, the most tokens that a recorded distribution lists, see `troll_jax.sparsify`.
      support_mass: 1 − δ, the probability that these tokens are to hold, in (0, 1].
      max_draws: dynamic sampling, if more than 1: zero-variance groups are replaced by those of up to so many batches
        of prompts in all (DAPO), see `troll_jax.collect`.
      lag: k: a rollout batch is sampled by the policy of k steps before, the first k by the start model, as an
        asynchronous system would with k steps between its sampler and its trainer. Exact and reproducible, on GPUs
        with `--xla_gpu_deterministic_ops=true` in XLA_FLAGS.
      precision: of the sampler's weights and KV cache, as noise to be studied: None, the trainer's; 'bfloat16'; 'int8'
        or 'fp8', which are simulated, see `troll_jax.models.quantization`.
      seed: seed of data order and sampling.
      level: curriculum: function of the number of batches of prompts before (as many as steps, unless `max_draws` is
        above 1) to the highest level of the next one, such as `ops.schedules.linear_level`. The task's rows have a
        column `level`. None: prompts of all levels.

    Raises:
      ValueError: a value of another type or out of its range.
    """

    prompts_per_step: int
    samples_per_prompt: int
    temperature: float = 1.0
    support_size: int = 64
    support_mass: float = 1 - 1e-5
    max_draws: int = 1
    lag: int = 0
    precision: Literal[None, *PRECISIONS] = None
    seed: int = 0
    level: Callable[[int], float] | None = None

    def __post_init__(self):
        check_fields(self)
        _check_above_zero(
            self, 'prompts_per_step', 'samples_per_prompt', 'temperature', 'support_size', 'support_mass', 'max_draws'
        )
        _check_not_negative(self, 'lag', 'seed')
        check_range('support_mass', self.support_mass, lambda x: x <= 1, 'a probability, in (0, 1]')
        if self.max_draws > 1 and self.samples_per_prompt < 2:
            raise ValueError(
                f'max_draws = {self.max_draws} replaces groups whose rewards are all equal, and with '
                'samples_per_prompt = 1 all are; raise samples_per_prompt, or set max_draws = 1'
            )


@dataclass(frozen=True, kw_only=True)
class Method:
    """The algorithm: rewards, advantages, loss and optimizer.

    A function with settings is given as `functools.partial(troll, bound=0.1)`.

    Args:
      objective: policy loss, such as `troll` or `ppo_clip`; see `troll_jax.ops.losses` and the files that it names.
      advantages: estimator from the rewards [G] of a prompt's samples, such as `group_normalised`; with a
        critic from the rewards and values [T] of a response's tokens, `gae`. See `troll_jax.ops.advantages`.
      aggregation: mean over token losses, such as `token_mean`, see `troll_jax.ops.aggregation`.
      tail_rule: treatment of tokens that a sparse distribution leaves out, `default_tail` or `bucket_tail`.
      optimizer: function without arguments that builds an optimizer of optax, such as `partial(adamw,
        learning_rate=1e-6)`.
      minibatch_prompts: prompts per optimizer update. A rollout batch gives prompts_per_step / minibatch_prompts
        updates; all but the first are off-policy.
      old_policy: source of π_old: 'rollout', the sampler's record, or 'recompute', a forward pass of training over all
        responses before the first update, as in the paper.
      importance: with 'recompute', weights of the advantages from the ratio of π_old to the sampler, such as
        `truncated_importance`, see `troll_jax.ops.importance`; None does not weight.
      rewards: name, weight and function of each reward term, see `troll_jax.rewards.terms`; logged one by one.
      whiten_advantages: normalises advantages over the rollout batch, with a critic over all tokens; see `whiten`.
      mask_truncated: sets the loss weight of responses that the length limit cut to zero. Their rewards still count for
        the advantages of the other samples.
      regularisers: losses that are added to the objective, such as `entropy_bonus`, see `troll_jax.ops.regularisers`.
        One with a parameter `reference` brings a reference model: the model that the run starts from.
      reward_penalty: regulariser with a reference model that is taken off the reward at every token.
      refresh_reference_every: steps after which the policy becomes the reference model; 0 keeps the first.
      critic: settings of the critic that `gae` needs, see `troll_jax.critic`.
      lora: settings of adapters that are trained instead of the parameters, see `troll_jax.models.lora`; None: all
        parameters are trained.

    Raises:
      ValueError: a value of another type or out of its range, or settings that contradict each other.
    """

    objective: Objective
    advantages: Advantages
    aggregation: Aggregation
    tail_rule: TailRule
    optimizer: Optimizer
    minibatch_prompts: int
    old_policy: Literal['rollout', 'recompute'] = 'rollout'
    importance: Importance | None = None
    rewards: Sequence[tuple[str, float, RewardTerm]] = (('task', 1.0, task_reward),)
    whiten_advantages: bool = False
    mask_truncated: bool = False
    regularisers: Sequence[Regulariser] = ()
    reward_penalty: Regulariser | None = None
    refresh_reference_every: int = 0
    critic: Critic | None = None
    lora: Lora | None = None

    def __post_init__(self):
        check_fields(self)
        _check_above_zero(self, 'minibatch_prompts')
        _check_not_negative(self, 'refresh_reference_every')
        check_names(self.rewards)
        if self.importance is not None and self.old_policy != 'recompute':
            raise ValueError(
                'importance compares the sampler with what the trainer recomputes; set old_policy to '
                f"'recompute', or leave it out; got {self.old_policy!r}"
            )
        if needs(self.advantages, 'values') and self.critic is None:
            raise ValueError('these advantages take the values of a critic, and there is none; set Method.critic')
        if self.critic is not None and not needs(self.advantages, 'values'):
            raise ValueError('critic is set but unused; set Method.advantages to gae, or leave the critic out')
        if self.critic is not None and self.lora is not None:
            raise ValueError(
                'Method.critic trains all parameters of a second model, which Method.lora is to avoid; leave one out'
            )
        if self.reward_penalty is not None and not needs(self.reward_penalty, 'reference'):
            raise ValueError('reward_penalty must compare with a reference model, such as kl_to_reference')
        if self.reward_penalty is not None and self.mask_truncated:
            raise ValueError(
                'reward_penalty and mask_truncated do not go together: of masked responses no penalty is known, and '
                'their rewards count for the others; choose one, or put the pull into Method.regularisers'
            )
        if self.refresh_reference_every and not self.has_reference:
            raise ValueError(
                f'refresh_reference_every = {self.refresh_reference_every} without a reference model; expected 0, or '
                'kl_to_reference among regularisers or as reward_penalty'
            )

    @property
    def loss_needs_reference(self) -> bool:
        """True if the objective or a regulariser compares with a reference model."""
        return any(needs(function, 'reference') for function in (self.objective, *self.regularisers))

    @property
    def has_reference(self) -> bool:
        """True if a reference model is kept."""
        return self.loss_needs_reference or self.reward_penalty is not None

    @property
    def needs_greedy_reward(self) -> bool:
        """True if advantages compare with the greedy response to the same prompt."""
        return needs(self.advantages, 'greedy_reward')

    @property
    def critic_warmup_steps(self) -> int:
        """Steps from which only the critic learns."""
        return 0 if self.critic is None else self.critic.warmup_steps


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Devices, kernels and memory. No setting changes what is learnt, beyond rounding.

    Args:
      data, fsdp, tensor: sizes of the mesh axes: copies of the model, shards of parameters and batch, shards of every
        layer. One of them may be −1, all devices that are left.
      context: size of a fourth: shards of the length of every row in training, for long responses; also of the
        parameters, as `fsdp`. The sampler spreads its slots over it.
      dtype: compute dtype of activations and products, 'bfloat16' or 'float32'. Parameters and probabilities are
        float32.
      attention: kernel for whole sequences: 'xla', 'cudnn' or 'splash'; None is the best on these devices.
      decode_attention: kernel for decoding: 'xla', 'triton' or 'ragged'; None is the best on these devices.
      remat: rematerialisation in the backward pass, to save memory. A layer keeps for it all (None), products with
        weights and attention's outputs ('dots'), 'attention' alone, or nothing but its input ('full').
      slots: decode slots, responses that are decoded at a time, at most, on all devices together, a matter of speed.
        None: 512 for each shard of the batch. Fewer responses take the next power of two.
      cache_gb: memory of the sampler's KV cache on each device; requests wait if it is full. None: all that is free.
      gather_weights: gathers the weights for decoding once per rollout, see `Sampler`.
      row_tokens: S, tokens of the rows into which responses are packed, at least as many as a prompt and its response
        may have. None: as many, or more where these are few, see `troll_jax.packing.batch_shape`.
      micro_batch_tokens: gradient accumulation: token budget of a micro-batch on each device, at least one row (with
        `context` its part of one). None is 8,192, or one row. All are equal, with padding (`update/padding_share`).
      head_chunk: tokens whose logits are in memory at a time in an update, on each device.
      grading_workers: processes that grade; None: one for each CPU.
      grading_memory: address space of each of them, GB.
      offload_optimizer: keeps the moments of the optimizers in the host's memory between updates.
      overlap: samples a step ahead, and grades while the update before it runs; for `Sampling.lag` of at least 1. With
        `rollout_devices` it also samples while that update runs.
      rollout_devices: n; the last n devices sample, and the others train and evaluate. None: all do both. Of several
        processes the last n / processes of each sample.
      devices: devices of the mesh; None is all of them.

    Raises:
      ValueError: a value of another type or out of its range.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    dtype: Literal[*COMPUTE_DTYPES] = 'bfloat16'
    attention: Literal[None, *IMPLEMENTATIONS] = None
    decode_attention: Literal[None, *PAGED_IMPLEMENTATIONS] = None
    remat: Literal[None, *REMAT_POLICIES] = 'dots'
    slots: int | None = None
    cache_gb: float | None = None
    gather_weights: bool = True
    row_tokens: int | None = None
    micro_batch_tokens: int | None = None
    head_chunk: int = 1024
    grading_workers: int | None = None
    grading_memory: float = 4.0
    offload_optimizer: bool = False
    overlap: bool = False
    rollout_devices: int | None = None
    devices: Sequence[jax.Device] | None = None

    def __post_init__(self):
        check_fields(self)
        _check_above_zero(
            self,
            'slots',
            'cache_gb',
            'row_tokens',
            'micro_batch_tokens',
            'head_chunk',
            'grading_workers',
            'grading_memory',
            'rollout_devices',
        )

    @cached_property
    def mesh(self) -> Mesh:
        """The device mesh, of the devices that train. Raises a ValueError if the sizes do not fit those there are."""
        return make_mesh(
            self.data,
            self.fsdp,
            self.tensor,
            self._devices[0],
            context=self.context,
            in_order=self.rollout_devices is not None,
        )

    @cached_property
    def rollout_mesh(self) -> Mesh:
        """The mesh of the devices that sample. With `rollout_devices` all that `tensor` leaves is for `fsdp`."""
        if self.rollout_devices is None:
            return self.mesh
        return make_mesh(tensor=self.mesh.shape['tensor'], devices=self._devices[1], in_order=True)

    @cached_property
    def _devices(self) -> tuple[list[jax.Device], list[jax.Device]]:
        """Those that train, and those that sample."""
        devices = jax.devices() if self.devices is None else list(self.devices)
        return (devices, devices) if self.rollout_devices is None else split_devices(devices, self.rollout_devices)

    def place_optimizer(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimizer with its moments in the host's memory, if that is set."""
        return Offloaded(*optimizer) if self.offload_optimizer else optimizer

    def grader(self, task: Task) -> Grader:
        """The grader of a task; to be used as a context manager."""
        memory = self.grading_memory
        return Grader(task.grade, deadline=task.deadline, workers=self.grading_workers, memory_limit_gb=memory)

    def batch_shape(self, sequences: int, max_length: int) -> BatchShape:
        """See `troll_jax.packing.batch_shape`."""
        return batch_shape(
            sequences,
            max_length,
            row_tokens=self.row_tokens,
            micro_batch_tokens=self.micro_batch_tokens,
            devices=axis_size('rows', self.mesh),
            context=axis_size('length', self.mesh),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Length, folder and logging of a run. No setting changes what is learnt.

    Args:
      folder: folder of the run.
      steps: rollout batches to train on.
      evaluate_every: steps between evaluations of `Experiment.validation`; the model before the first step and that
        after the last are evaluated too. 0 turns them off.
      table_every: steps between tables of the tokens that are projected or clipped most; 0 turns them off. With
        `sequence_region` all tokens of a response count that is outside.
      checkpoint_every: steps between checkpoints. The last step is saved in any case.
      checkpoint_folder: another folder or bucket (gs://…) for the checkpoints; None is `folder`.
      keep_checkpoints: how many of the latest checkpoints are kept.
      keep_best: also keeps the checkpoint with the highest `eval/success`, of those steps that are evaluated.
      on_change: what a run does that would resume with another experiment, sampling, method, tokenizer or data: 'stop'
        or 'resume'.
      save_rollout_every: steps between rollouts that are saved to be replayed, a multiple of
        `checkpoint_every`, as `rollouts/<step>.npz` with the step of the checkpoint before it. These checkpoints
        are kept, besides the latest. 0 turns it off.
      save_samples_every: steps between those of which some responses are saved with their rewards and their constrained
        tokens, in `samples.jsonl`; the first and the last step are among them. 0 turns it off.
      save_samples_prompts: prompts whose responses are saved, spread over the minibatches.
      trackers: where numbers and samples are shown besides the run's files: 'tensorboard', 'wandb', 'trackio',
        'mlflow'. These have to be installed, the first one is.
      profile_step: step of which a trace is written into `profile`, for TensorBoard or Perfetto.
      max_skipped: steps in a row with a skipped update (its gradient was not finite) after which the run ends with an
        error. The last of them can be replayed: its rollout and the checkpoint before it are saved. At least 2; 0
        never ends it.
      debug_nans: ends the run where the first NaN appears (`jax_debug_nans`); slow.

    Raises:
      ValueError: a value of another type or out of its range, or settings that contradict each other.
    """

    folder: str | os.PathLike
    steps: int
    evaluate_every: int = 10
    table_every: int = 10
    checkpoint_every: int = 10
    checkpoint_folder: str | os.PathLike | None = None
    keep_checkpoints: int = 2
    keep_best: bool = False
    on_change: Literal['stop', 'resume'] = 'stop'
    save_rollout_every: int = 0
    save_samples_every: int = 10
    save_samples_prompts: int = 4
    trackers: Sequence[Literal['tensorboard', 'wandb', 'trackio', 'mlflow']] = ('tensorboard',)
    profile_step: int | None = None
    max_skipped: int = 8
    debug_nans: bool = False

    def __post_init__(self):
        check_fields(self)
        for name in ('folder', 'checkpoint_folder'):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.fspath(path))
        _check_above_zero(self, 'steps', 'checkpoint_every', 'keep_checkpoints', 'save_samples_prompts', 'profile_step')
        _check_not_negative(
            self, 'evaluate_every', 'table_every', 'save_rollout_every', 'save_samples_every', 'max_skipped'
        )
        if '://' in self.folder:
            raise ValueError(
                f'Run.folder must be a folder, got {self.folder!r}; set Run.checkpoint_folder to a bucket instead'
            )
        if self.profile_step is not None and self.profile_step > self.steps:
            raise ValueError(f'profile_step = {self.profile_step} is past the last of {self.steps} steps; lower it')
        if self.max_skipped == 1:
            raise ValueError('max_skipped must be at least 2, or 0 to continue whatever happens; got 1')
        if self.keep_best and not self.evaluate_every:
            raise ValueError('keep_best goes by eval/success, and evaluate_every = 0 turns evaluations off; raise it')
        if self.save_rollout_every % self.checkpoint_every:
            raise ValueError(
                f'save_rollout_every = {self.save_rollout_every} must be a multiple of checkpoint_every = '
                f'{self.checkpoint_every}, so that there are parameters to replay a rollout from'
            )

    @property
    def checkpoints_in(self) -> str:
        """Folder or bucket of the checkpoints."""
        return self.checkpoint_folder or self.folder


def scoring(sampling: Sampling, method: Method, compute: Compute) -> Scoring:
    """Log-probabilities as the responses were sampled."""
    return Scoring(
        sampling.temperature, method.tail_rule, sampling.support_size, sampling.support_mass, compute.head_chunk
    )


def minibatch_shape(sampling: Sampling, method: Method, compute: Compute, max_length: int) -> BatchShape:
    """Shape of a minibatch's arrays, for prompts with responses of at most `max_length` tokens.

    Raises:
      ValueError: a row does not hold the longest of them, or a micro-batch not one row.
    """
    return compute.batch_shape(method.minibatch_prompts * sampling.samples_per_prompt, max_length)


def check_together(sampling: Sampling, method: Method, compute: Compute, max_length: int) -> None:
    """Raises a ValueError with both numbers if settings contradict each other. Asks JAX for its devices."""
    of, sampling_devices = 'data × fsdp × context devices of the mesh', axis_size('batch', compute.rollout_mesh)
    checked = [
        ('prompts_per_step', sampling.prompts_per_step, 'minibatch_prompts', method.minibatch_prompts),
        ('prompts_per_step', sampling.prompts_per_step, of, sampling_devices),
    ]
    if compute.slots is not None:  # of rollouts, and of validation
        of_meshes = axis_size('batch', compute.mesh), sampling_devices
        checked += [('slots', compute.slots, of, devices) for devices in of_meshes]
    for name, size, divisor_name, divisor in checked:
        if size % divisor:
            raise ValueError(f'{name} = {size} must be a multiple of {divisor_name} = {divisor}')
    minibatch_shape(sampling, method, compute, max_length)
    if compute.overlap and (sampling.lag < 1 or sampling.max_draws > 1):
        raise ValueError(
            f'overlap samples before update and grades; got Sampling.lag = {sampling.lag}, expected at least 1, '
            f'and Sampling.max_draws = {sampling.max_draws}, expected 1; change these, or set Compute.overlap = False'
        )
    if compute.overlap and compute.rollout_devices and jax.process_count() > 1 and jax.default_backend() == 'cpu':
        train, sample = len(compute.mesh.local_devices), len(compute.rollout_mesh.local_devices)
        if min(train, sample) > 1:
            raise ValueError(
                f'overlap on CPUs, of which {train} train and {sample} sample in each process: it runs one program of '
                "several CPUs at a time, so one process would wait for another's rollout, and that for its update. "
                'Have one CPU of each train, or one sample, or set Compute.overlap = False'
            )


def _check_above_zero(settings, *names: str) -> None:
    """Fields that are None are not checked."""
    for name in names:
        check_range(f'{type(settings).__name__}.{name}', getattr(settings, name), lambda x: x > 0, 'above 0')


def _check_not_negative(settings, *names: str) -> None:
    for name in names:
        check_range(f'{type(settings).__name__}.{name}', getattr(settings, name), lambda x: x >= 0, 'at least 0')
