"""The comparison of many short runs: on a tiny model, and its tables by hand."""

import subprocess
import sys

import numpy as np
import pytest

from experiments.plumbing.claims import claimed
from experiments.plumbing.gin_text import to_bindings
from experiments.studies import compare
from experiments.studies.compare_report import best_bound, by_seed, estimate, less, ranking, table
from experiments.studies.compare_suites import BOUNDS, SUITES, Suite, bounds_of, read
from troll_jax.settings import Method


def row(method='clip', bound='', staleness=2, seed=0, success=0.5, **more) -> dict:
    found = {'method': method, 'bound': bound, 'learning_rate': 1e-3, 'staleness': staleness, 'lag': 0}
    return found | {'precision': None, 'seed': seed, 'success': success} | more


@pytest.fixture
def task(tmp_path, model) -> str:
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
    return str(task)


def test_runs_differ_in_their_setting_alone(tmp_path, task):
    """Guards a learning rate that is compiled in and stays that of the first run, a state that one run leaves to the
    next, runs that are made twice, and what a crash left of a line."""
    suite = Suite(task, ['PPO/TROLL'], 4, learning_rates=(0.0, 0.1), staleness=(2,), model=None)
    path = tmp_path / 'results/results.jsonl'
    compare.run_all(suite, path.parent, suite.methods, seeds=1)
    still, hot = compare.read_results(path)
    assert (still['learning_rate'], hot['learning_rate']) == (0.0, 0.1)
    assert still['rewards'][0] == hot['rewards'][0] and len(hot['rewards']) == 2
    assert still['kl_mean'] < 1e-9 < 1e-4 < hot['kl_mean']
    assert {'success', 'entropy', 'constrained_share', 'explained_variance'} <= set(hot)
    written = path.read_text()
    compare.run_all(suite._replace(learning_rates=(0.1, 0.0)), path.parent, suite.methods, seeds=1)
    assert path.read_text() == written
    path.write_text(written[:-9])
    assert [x.learning_rate for x in compare.missing(suite, suite.methods, 1, compare.read_results(path))] == [0.1]
    compare.add_result(path, hot)
    assert compare.read_results(path) == [still, hot]


@pytest.mark.slow
def test_two_processes_share_the_runs(tmp_path, task):
    """Guards a run that both make, and a choice of bounds before the other process has made its part of them."""
    axes = {'learning_rates': (0.1,), 'staleness': (2,), 'precisions': (None, 'int8'), 'lags': (0, 1)}
    suite = Suite(task, ['clip'], 4, **axes, choosing=1, model=None)
    compare.run_all(suite, tmp_path / 'results', suite.methods, seeds=1, processes=2)
    rows = compare.read_results(tmp_path / 'results/results.jsonl')
    assert len(compare.finished(rows)) == len(rows) and not compare.missing(suite, suite.methods, 1, rows)
    assert [x['seed'] for x in rows][:16] == [0] * 16 and {x['seed'] for x in rows[16:]} == {1}


def test_a_claim_ends_with_its_process(tmp_path):
    """Guards runs that two processes make at once, and one that nobody makes since a process died over it."""
    code = (
        'import sys; from experiments.plumbing.claims import claimed\n'
        "with claimed(open(sys.argv[1], 'w'), 'one', wait=True): print(flush=True); sys.stdin.read()"
    )
    path = tmp_path / 'lock'
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    with subprocess.Popen([sys.executable, '-c', code, str(path)], **pipes) as other, path.open('w') as locks:
        other.stdout.readline()
        with claimed(locks, 'one', wait=False) as mine, claimed(locks, 'two', wait=False) as another:
            assert (mine, another) == (False, True)
        other.kill()
        with claimed(locks, 'one', wait=True) as mine:
            assert mine


def test_intervals_are_over_complete_seeds():
    """Guards intervals over runs of one seed at several settings, which are not independent of each other; means over
    other cells than those of other seeds; and pairs of two seeds."""
    suite = Suite('', ['clip', 'troll'], 4, (1e-3,), staleness=(2, 8))
    rows = [row(seed=s, staleness=n, success=x) for s, n, x in [(0, 2, 0.1), (0, 8, 0.3), (1, 2, 0.5), (1, 8, 0.7)]]
    rows.append(row(seed=2, success=0.9))
    of = lambda rows, cells, **fixed: by_seed(rows, cells, range(3), method='clip', **fixed)
    interval = estimate(of(rows, suite.cells()))
    np.testing.assert_allclose(interval.mean, 0.4, rtol=1e-6)
    np.testing.assert_allclose(interval.high - 0.4, 12.706 * np.std([0.2, 0.6], ddof=1) / 2**0.5, rtol=1e-4)
    wide = [x | {'low': x['success'] - 3.0, 'high': x['success'] + 4.0} for x in rows]
    both = estimate(of(wide, suite.cells()))
    np.testing.assert_allclose([0.4 - both.low, both.high - 0.4], np.hypot(interval.high - 0.4, [3.0, 4.0]), rtol=1e-6)
    np.testing.assert_allclose(estimate(of(rows, suite.cells()[:1])).mean, 0.5)
    assert of(rows, suite.cells(), bound='other') == {}
    assert '| clip | 0.500 ± 0.994 | 2 of 3 seeds | 2 of 3 seeds |' in table(suite, rows, ['clip'], 3)
    shifted = {0: {'success': 0.3}, 1: {'success': 0.7}, 2: {'success': 9.0}}
    np.testing.assert_allclose(less(shifted, of(rows, suite.cells())), 0.1, rtol=1e-6)


def test_bounds_are_chosen_by_other_seeds_than_those_reported():
    """Guards a method that looks good since its bound was chosen for the very seeds that are shown."""
    suite = Suite('', ['clip', 'troll'], 4, (1e-3,), (2,), choosing=1)
    tight, loose = bounds_of('troll')[1:3]
    chances = {('clip', ''): (0.5, 0.4), ('troll', ''): (0.3, 0.6), ('troll', tight): (0.7, 0.2)}
    rows = [row(*name, seed=seed, success=x) for name, found in chances.items() for seed, x in enumerate(found)]
    rows += [row('troll', loose, seed=seed, success=0.9) for seed in (1, 2)]
    assert best_bound(suite, rows, 'troll') == tight
    found = ranking(suite, rows, suite.methods, 1)
    assert f'| troll | 0.600 | +0.200 |  |  | `{tight}` | 0.200 | -0.200 |' in found
    assert found.index('| clip |') < found.index('| troll |')  # by the chosen bounds
    assert 'Incomplete: clip (1 of 2 seeds), troll (1 of 2 seeds).' in ranking(suite, rows, suite.methods, 2)


@pytest.mark.parametrize('method', BOUNDS)
def test_every_bound_is_another(method):
    """Guards a value that is not read, or is the file's own: a choice among fewer than other methods have."""
    found = [to_bindings(read('configs/quickstart.gin', method, x).build(Method)) for x in bounds_of(method)]
    assert len({str(sorted(x.items())) for x in found}) == (4 if BOUNDS[method] else 1)


def test_every_method_has_the_settings_of_its_name():
    """Guards a row of the table that is another method: what is bound last must win over the objective's file."""
    suite = SUITES['quickstart']
    bound = {method: to_bindings(read(suite.task, method).build(Method)) for method in suite.methods}
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
