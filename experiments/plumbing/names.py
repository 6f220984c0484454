"""The functions and classes that gin files know by name. Others are imported, or named with their file."""

import functools
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from troll_jax.critic import Critic
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.data.tasks.eurus_code import EurusCode
from troll_jax.data.tasks.gsm8k import GSM8K
from troll_jax.data.tasks.math_problems import BENCHMARKS, DAPOMath, EurusMath, MathEval, MathProblems
from troll_jax.data.tasks.problems import ScoredProblems
from troll_jax.data.tasks.reasoning_gym import ReasoningGym
from troll_jax.experiment import Experiment
from troll_jax.finetune import Finetuning
from troll_jax.hub import what_is_there
from troll_jax.models.lora import Lora
from troll_jax.ops import (
    advantages,
    aggregation,
    categorical,
    importance,
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
        *(masked_losses.trm, masked_losses.opsm, masked_losses.vaco, masked_losses.erc, masked_losses.shuffled),
        *(categorical.total_variation, projection.kl_divergence),
        *(support.default_tail, support.bucket_tail, schedules.linear_bound, schedules.adaptive_bound),
        schedules.linear_level,
        *(advantages.group_normalised, advantages.mean_centred, advantages.leave_one_out, advantages.no_baseline),
        *(advantages.greedy_baseline, advantages.gae),
        *(aggregation.token_mean, aggregation.sequence_mean, aggregation.sequence_sum, aggregation.constant_length),
        *(regularisers.entropy_bonus, regularisers.trust_region_entropy, regularisers.kl_to_old),
        *(regularisers.kl_to_reference, regularisers.k1, regularisers.k2, regularisers.k3),
        *(importance.truncated_importance, importance.masked_importance),
        *(terms.task_reward, terms.soft_overlong, terms.answer_format, terms.trl_reward),
        *(adamw, Critic, Lora),
        *(Arithmetic, EurusCode, GSM8K, MathProblems, DAPOMath, EurusMath, MathEval, ReasoningGym, ScoredProblems),
        *(sandbox.Bubblewrap, sandbox.SandboxFusion, sandbox.Unisolated),
    )
}
# @AMC() is MathEval of this benchmark, with all bindings of MathEval that AMC has none of its own for.
NAMES |= {name.replace('-', '_'): functools.partial(MathEval, benchmark=name) for name in BENCHMARKS}

FILES: dict[str, ModuleType] = {}  # modules that were named with their file


def load_file(file: Path) -> ModuleType:
    """Imports a Python file as the module of its name, from its folder, where grading workers find it, too.

    Raises:
      ValueError: no such file, an error while it is imported, or a name that no module can have or another one has.
    """
    if not file.is_file():
        raise ValueError(f'there is no Python file {str(file)!r}: {what_is_there(file.parent)}')
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(file.stem)
    except Exception as error:  # whatever the file does
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f'{str(file)!r} cannot be imported ({type(error).__name__}: {error}, at {at.filename}:{at.lineno}); mend '
            'it, or rename it if its name is that of no module'
        ) from error
    if Path(getattr(module, '__file__', None) or '').resolve() != file:
        raise ValueError(f'{str(file)!r} has the name of another module, {module}; rename it')
    FILES[file.stem] = module
    return module
