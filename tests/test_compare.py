"""The comparison of many short runs: on a tiny model, and its tables by hand."""

import numpy as np

from experiments.plumbing.gin_text import to_bindings
from experiments.studies import compare
from troll_jax.settings import Method


def row(method='GRPO/Clip', learning_rate=2e-4, staleness=2, lag=0, seed=0, success=0.5) -> dict:
    names = ('method', 'learning_rate', 'staleness', 'lag', 'seed', 'success')
    return dict(zip(names, (method, learning_rate, staleness, lag, seed, success), strict=True))


def test_runs_differ_in_their_setting_alone(tmp_path, model):
    """Guards a learning rate that is compiled in and stays that of the first run, a state that one run leaves to the
    next, and runs that are made twice."""
    task = tmp_path / 'task.gin'
    task.write_text(
        f"""
        import loop
        include 'configs/quickstart.gin'
        Experiment.model = '{model}'
        Experiment.max_prompt_length = 4
        Experiment.max_response_length = 3
        Experiment.task = @StartsWithHash()
        StartsWithHash.operands = 2
        StartsWithHash.train_size = 60
        StartsWithHash.test_size = 10
        Sampling.samples_per_prompt = 4
        Method.minibatch_prompts = 8
        Compute.head_chunk = 40
        """
    )
    suite = compare.Suite(str(task), ['PPO/TROLL'], 4, learning_rates=(0.0, 0.1), staleness=(2,), samples=4)
    compare.run_all(suite, tmp_path / 'results', suite.methods, seeds=1)
    still, hot = compare.read_results(tmp_path / 'results/results.jsonl')
    assert (still['learning_rate'], hot['learning_rate']) == (0.0, 0.1)
    assert still['rewards'][0] == hot['rewards'][0] and len(hot['rewards']) == 2
    assert still['kl_mean'] < 1e-9 < 1e-4 < hot['kl_mean']
    assert {'success', 'entropy', 'constrained_share', 'explained_variance'} <= set(hot)
    written = (tmp_path / 'results/results.jsonl').read_text()
    compare.run_all(suite._replace(learning_rates=(0.1, 0.0)), tmp_path / 'results', suite.methods, seeds=1)
    assert (tmp_path / 'results/results.jsonl').read_text() == written


def test_intervals_are_over_seeds():
    """Guards intervals over runs of one seed at several settings, which are not independent of each other."""
    rows = [row(seed=s, staleness=n, success=x) for s, n, x in [(0, 2, 0.1), (0, 8, 0.3), (1, 2, 0.5), (1, 8, 0.7)]]
    interval = compare.success_of(rows, method='GRPO/Clip')
    np.testing.assert_allclose(interval.mean, 0.4, rtol=1e-6)
    np.testing.assert_allclose(interval.high - 0.4, 12.706 * np.std([0.2, 0.6], ddof=1) / 2**0.5, rtol=1e-4)
    wide = [x | {'low': x['success'] - 3.0, 'high': x['success'] + 4.0} for x in rows]
    both = compare.success_of(wide, method='GRPO/Clip')
    np.testing.assert_allclose([0.4 - both.low, both.high - 0.4], np.hypot(interval.high - 0.4, [3.0, 4.0]), rtol=1e-6)
    assert compare.success_of(rows, method='GRPO/Clip', staleness=8, seed=1) is not None
    assert compare.success_of(rows, method='PPO/Clip') is None
    interrupted = [*rows, row(seed=2, staleness=2, success=0.9)]
    assert compare.success_of(interrupted, method='GRPO/Clip') == interval
    assert compare.success_of(interrupted, method='GRPO/Clip', staleness=2).mean == np.mean([0.1, 0.5, 0.9])
    assert '| GRPO, Clip | 0.300 ± ' in compare.table(rows)


def test_every_method_has_the_settings_of_its_name():
    """Guards a row of the table that is another method: what is bound last must win over the objective's file."""
    suite = compare.SUITES['quickstart']
    bound = {method: to_bindings(compare.read(suite.task, method).build(Method)) for method in suite.methods}
    assert len(bound) == 16
    assert {m for m, b in bound.items() if b['Method.advantages'] == '@gae'} == {
        m for m in bound if m.startswith('PPO')
    }
    assert {m for m, b in bound.items() if b['Method.aggregation'] == '@constant_length'} == {
        m for m in bound if m.startswith('Dr.GRPO')
    }
    for method, bindings in bound.items():
        assert (bindings['Method.objective'] == '@troll') == ('TROLL' in method)
        assert ('Method.regularisers' in bindings) == ('KL' in method)
        if 'TROLL' in method:
            assert (float(bindings.get('troll.alpha', 1)) == 0) == ('α' in method)
            assert (bindings.get('troll.ratio') == '@sequence_ratio') == ('GSPO' in method)
        else:
            assert (float(bindings.get('ppo_clip.lower', 0.2)) < 0.1) == ('GSPO' in method)
