"""Lag: rollout batches that are sampled by the policy of some steps before."""

import time

import jax
import numpy as np
import pytest
from loop import HASH, StartsWithHash, assert_same, run, saved, without_times
from test_learn import copy, experience, method
from updates import CONFIG, PROMPT, RESPONSE, policy_params

from experiments.train import training_step
from troll_jax.learn import Learner
from troll_jax.models.decoder import cast_weights
from troll_jax.settings import Compute, Sampling


def test_the_policy_of_k_steps_before_samples():
    """Guards the count of steps, and copies that an update consumes or that are the policy itself."""
    lag = 2
    bench = Learner(
        CONFIG,
        Sampling(prompts_per_step=4, samples_per_prompt=2, support_size=5, lag=lag),
        method(),
        Compute(row_tokens=13, devices=jax.devices()[:1], dtype='float32'),
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
    )
    state, policies, sampled = bench.init(copy(policy_params())), [], []
    for _ in range(5):
        policies.append(jax.tree.map(np.array, cast_weights(state.params, CONFIG.compute_dtype)))
        sampled.append(jax.tree.map(np.array, bench.sampling_params(state)))
        state, *_ = training_step(bench, state, experience())
    assert np.abs(policies[1]['embedding'] - policies[0]['embedding']).max() > 0
    for step, params in enumerate(sampled):
        jax.tree.map(np.testing.assert_array_equal, params, policies[max(step - lag, 0)])


def test_a_lagging_run(tmp_path, model):
    """Guards a loop that samples with something else: until the start model's successor samples, all is as if nothing
    were learnt. And a distance to an older policy that is logged as noise of the sampler."""
    alike = lambda rows: [{name: x for name, x in row.items() if name.startswith('rollout/')} for row in rows]
    strip = lambda rows: [{name: x for name, x in row.items() if 'second' not in name} for row in alike(rows)]
    settings = dict(task=[*HASH, 'Sampling.lag = 1'])
    rows = run(tmp_path / 'learns', model, **settings)
    still = run(tmp_path / 'still', model, 'adamw.learning_rate = 0.0', **settings)
    assert strip(rows)[:2] == strip(still)[:2] and strip(rows)[2] != strip(still)[2]
    assert all('update/kl_noise' not in row for row in rows)
    assert rows[0]['update/kl_lag'] < 1e-5 < 1e-3 < rows[1]['update/kl_lag'] and still[3]['update/kl_lag'] < 1e-5


class Slow(StartsWithHash):
    """Takes its time to grade."""

    def grade(self, response: str, answer: str) -> float:
        time.sleep(0.002)
        return super().grade(response, answer)


SLOW = [binding.replace('loop', 'test_lag').replace('StartsWithHash', 'Slow') for binding in HASH]


@pytest.mark.parametrize(('lag', 'devices'), [(1, 1), (3, 2)])
def test_overlap_changes_nothing_but_the_time(tmp_path, model, lag, devices):
    """Guards against rollouts of parameters that are not those of the lag, and grades that are waited for."""
    settings = dict(task=[*SLOW, f'Sampling.lag = {lag}', 'Run.evaluate_every = 2'], devices=devices)
    plain = run(tmp_path / 'plain', model, **settings)
    run(tmp_path / 'overlap', model, 'Compute.overlap = True', 'Run.steps = 2', **settings)  # and goes on from there
    overlap = run(tmp_path / 'overlap', model, 'Compute.overlap = True', **settings)
    assert without_times(overlap) == without_times(plain)
    assert_same(*(saved(tmp_path / name, 4) for name in ('plain', 'overlap')))
    assert plain[-1]['seconds/reward'] > 0.128 > overlap[-1]['seconds/reward'], 'of 64 responses'


def test_overlap_without_lag_is_an_error(tmp_path, model):
    """Guards a run that would be off-policy unasked."""
    with pytest.raises(ValueError, match=r'Sampling.lag = 0, expected at least 1'):
        run(tmp_path, model, 'Compute.overlap = True', task=HASH)
