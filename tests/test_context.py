"""Rows that are split along their length, in a whole step of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from updates import CONFIG, KEPT, MASS, PROMPT, RESPONSE, ROWS, SGD, assert_same, nearby_params, policy_params, rollout

from experiments.train import training_step
from troll_jax.collect import Experience
from troll_jax.critic import Critic
from troll_jax.learn import Learner
from troll_jax.ops.advantages import gae
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.importance import truncated_importance
from troll_jax.ops.losses import ppo_clip, troll
from troll_jax.ops.regularisers import kl_to_reference
from troll_jax.ops.support import bucket_tail, default_tail
from troll_jax.settings import Compute, Method, Sampling


@pytest.mark.parametrize(('objective', 'tail_rule'), [(troll, default_tail), (ppo_clip, bucket_tail)])
def test_a_step_is_that_of_one_device(objective, tail_rule):
    """Guards hidden states that cross from one device to the next, sequences that lie on two of them, and sums that
    leave one out: in the losses of policy and critic, and in the forward passes of old policy, reference and critic."""

    start, moved, data = policy_params(), nearby_params(), rollout()
    rewards = np.array([[1, 0], [1, 1], [0, 0.5], [-1, 2]], np.float32)

    def step(compute: Compute):
        method = Method(
            objective=objective,
            advantages=functools.partial(gae, gamma=0.9, lam=0.7),
            aggregation=token_mean,
            tail_rule=tail_rule,
            optimizer=lambda: SGD,
            minibatch_prompts=2,
            critic=Critic(optimizer=lambda: SGD),
            old_policy='recompute',
            importance=functools.partial(truncated_importance, limit=1.01),
            regularisers=[functools.partial(kl_to_reference, coefficient=0.1)],
        )
        sampling = Sampling(prompts_per_step=4, samples_per_prompt=ROWS // 4, support_size=KEPT, support_mass=MASS)
        bench = Learner(CONFIG, sampling, method, compute, max_prompt_length=PROMPT, max_response_length=RESPONSE)
        with jax.set_mesh(bench.mesh):
            shardings = jax.tree.map(lambda x: x.sharding, bench.shapes.params)
            put = lambda params: jax.device_put(jax.tree.map(jnp.copy, params), shardings)
            state = bench.init(put(start))._replace(params=put(moved))
            state, metrics, _ = training_step(bench, state, Experience(data, rewards, None, 1, {}))
        params = jax.tree.map(np.asarray, (state.params, state.critic.params))
        return params, {name: metrics[name] for name in ('update/loss', 'update/gradient_norm', 'critic/loss')}

    sizes = {'row_tokens': 14, 'micro_batch_tokens': 14, 'head_chunk': 5, 'dtype': 'float32'}
    params, metrics = step(Compute(data=2, context=2, fsdp=1, tensor=2, **sizes))
    expected, expected_metrics = step(Compute(devices=jax.devices()[:1], **sizes))
    assert_same(params, expected, atol=1e-5 * expected_metrics['update/gradient_norm'])
    assert_same(metrics, expected_metrics, atol=1e-5)
