"""A step's programs on shapes alone, so that what they refuse is an error at once."""

from functools import partial

import jax
import numpy as np

from troll_jax.collect import gather_responses
from troll_jax.data.prompts import PromptSet
from troll_jax.learn import Learner
from troll_jax.rewards.terms import weigh
from troll_jax.rollout import Sampler
from troll_jax.settings import Method, Sampling


def trace_programs(sampler: Sampler, learner: Learner, sampling: Sampling, method: Method, prompts: PromptSet) -> None:
    """Traces a step's programs on shapes alone: a setting that they refuse is an error before any weight is loaded."""
    batch = sampling.prompts_per_step
    some = jax.eval_shape(lambda: prompts[:batch])
    keys = jax.eval_shape(partial(jax.random.split, num=batch), jax.random.key(0))
    with jax.set_mesh(learner.rollout_mesh):
        rollout = sampler.shapes(learner.sampling_shapes, some, keys)
    learner.trace(rollout, batch)
    tokens, grades = np.zeros((2, 1), np.int32), np.zeros(2, np.float32)
    responses = gather_responses(prompts, np.arange(1), ['', ''], tokens, grades, rollout.log_probs.shape[1])
    weigh(method.rewards, responses)
