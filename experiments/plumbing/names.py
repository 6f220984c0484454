"""The functions and classes that gin files know by name. Others are imported, by a line `import my_module`."""

import functools
from collections.abc import Callable

from troll_jax.critic import Critic
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.data.tasks.eurus_code import EurusCode
from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.data.tasks.math_problems import BENCHMARKS, DAPOMath, EurusMath, MathEval, MathProblems
from troll_jax.data.tasks.reasoning_gym import ReasoningGym
from troll_jax.experiment import Experiment
from troll_jax.finetune import Finetuning
from troll_jax.ops import (
    advantages,
    aggregation,
    categorical,
    losses,
    masked_losses,
    minibatch_losses,
    projection,
    regions,
    regularisers,
    schedules,
    smooth_losses,
    support,
)
from troll_jax.optimizer import adamw
from troll_jax.rewards import sandbox, terms
from troll_jax.settings import Compute, Method, Run, Sampling

SETTINGS = (Experiment, Sampling, Method, Compute, Run)
OBJECTIVES = (
    *(losses.troll, losses.ppo_clip, losses.cispo, losses.importance_weighted, masked_losses.masked),
    *(smooth_losses.drpo, smooth_losses.spo, smooth_losses.sapo, smooth_losses.vespo, smooth_losses.gmpo),
    *(minibatch_losses.m2po, minibatch_losses.kl_cov),
)
REGIONS = (
    *(regions.token_region, regions.sequence_region, regions.entropy_region, regions.total_variation_region),
    *(regions.chi_squared_region, regions.detached_region),
)
NAMES: dict[str, Callable] = {
    target.__name__: target
    for target in (
        *(*SETTINGS, Finetuning),
        *(*OBJECTIVES, *REGIONS),
        *(losses.token_ratio, losses.sequence_ratio, losses.capped_ratio),
        *(masked_losses.dppo, masked_losses.dppo_binary, masked_losses.ipo, masked_losses.icepop, masked_losses.kpop),
        *(masked_losses.trm, masked_losses.opsm, masked_losses.vaco, masked_losses.erc),
        *(categorical.total_variation, projection.kl_divergence),
        *(support.default_tail, support.bucket_tail, schedules.linear_bound, schedules.adaptive_bound),
        schedules.linear_level,
        *(advantages.group_normalised, advantages.mean_centred, advantages.leave_one_out, advantages.no_baseline),
        *(advantages.greedy_baseline, advantages.gae),
        *(aggregation.token_mean, aggregation.sequence_mean, aggregation.sequence_sum, aggregation.constant_length),
        *(
            regularisers.entropy_bonus,
            regularisers.trust_region_entropy,
            regularisers.kl_to_old,
            regularisers.kl_to_reference,
        ),
        *(regularisers.k1, regularisers.k2, regularisers.k3),
        *(terms.task_reward, terms.soft_overlong, terms.answer_format),
        *(adamw, Critic, Arithmetic, EurusCode, GSM8K, MathProblems, DAPOMath, EurusMath, MathEval, ReasoningGym),
        *(sandbox.Bubblewrap, sandbox.SandboxFusion, sandbox.Unisolated),
    )
}
# @AMC() is MathEval of this benchmark, with all bindings of MathEval that AMC has none of its own for.
NAMES |= {name.replace('-', '_'): functools.partial(MathEval, benchmark=name) for name in BENCHMARKS}
