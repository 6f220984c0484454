"""Runs that stop, are changed or go wrong, and resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from faults.runs import everything
from loop import ARITHMETIC, HASH, REPOSITORY, SMALL, assert_same, run, saved, two_kv_heads, without_times

from experiments.evaluate import evaluation
from experiments.export import export
from experiments.plumbing.gin_files import Config
from experiments.replay import replay
from troll_jax.checkpoint import Checkpoints
from troll_jax.metrics import read_metrics
from troll_jax.models.hf_weights import load_config

# All that a state can hold: a critic, a reference model that is replaced after the resume, draws that are not steps,
# policies that are still to sample.
STATEFUL = [
    'Method.regularisers = [@kl_to_reference]',
    'kl_to_reference.coefficient = 0.01',
    'Method.refresh_reference_every = 3',
    'Sampling.max_draws = 2',
    'Sampling.lag = 3',
    'Run.keep_best = True',
]


@pytest.mark.parametrize(('method', 'bindings'), [('troll', []), ('troll_ppo', STATEFUL)])
def test_resuming_equals_not_stopping(tmp_path, model, method, bindings):
    """Guards against skipped data, keys or optimizer state that start anew, and doubled metrics after a resume.

    And against a best checkpoint that is chosen by another number than the log's.
    """
    settings = {'method': method, 'task': [*HASH, 'Run.evaluate_every = 2'], 'devices': 2 if bindings else 1}
    whole = run(tmp_path / 'whole', model, *bindings, **settings)
    assert all(row['update/gradient_norm'] > 1e-6 for row in whole[1:]), 'every step was meant to teach something'
    run(tmp_path / 'parts', model, *bindings, 'Run.steps = 2', **settings)
    parts = run(tmp_path / 'parts', model, *bindings, **settings)
    assert [row['step'] for row in parts] == [0, 1, 2, 3, 4]
    assert without_times(parts) == without_times(whole)
    states = [everything(tmp_path / name, 4) for name in ('parts', 'whole')]
    assert states[0].keys() == {
        'progress',
        'params',
        'opt_state',
        *(('critic', 'reference', 'past') if bindings else ()),
    }
    assert_same(*states)
    if bindings:
        assert states[0]['progress']['draws'] > 4 == states[0]['progress']['step']
        score = json.loads((tmp_path / 'parts/checkpoints/4/metrics/metrics').read_text())
        assert score == {'score': parts[-1]['eval/success']}


ADAPTIVE = [
    'troll.bound = @adaptive_bound',
    'adaptive_bound.start = 1e-3',
    'adaptive_bound.target = 0.1',
    'adaptive_bound.gain = 5.0',
    'troll.region = @sequence_region',
    'Method.tail_rule = @bucket_tail',
    'Sampling.support_size = 8',
    'Run.table_every = 1',
]


def test_a_lost_checkpoint_repeats_its_steps(tmp_path, model):
    """Guards against metrics of steps that a crash lost staying in the file beside those of their repetition.

    With every option whose result depends on more than parameters and optimizer: the bound follows what was projected.
    """
    whole = run(tmp_path / 'whole', model, *ADAPTIVE, task=HASH)
    projected = [row['update/projected_share'] for row in whole]
    assert max(projected) > 0.1 and len(set(projected)) > 1, 'the bound was meant to matter'
    shutil.copytree(tmp_path / 'whole', tmp_path / 'crashed')
    shutil.rmtree(tmp_path / 'crashed/checkpoints/4')
    again = run(tmp_path / 'crashed', model, *ADAPTIVE, task=HASH)
    assert without_times(again) == without_times(whole)
    assert_same(saved(tmp_path / 'crashed', 4), saved(tmp_path / 'whole', 4))
    tables = [(tmp_path / name / 'constrained_tokens.jsonl').read_text() for name in ('crashed', 'whole')]
    assert tables[0] == tables[1] and tables[0].count('\n') == 4


def test_another_model_in_the_run_folder_is_an_error(tmp_path, model):
    """Guards against a run that goes on from the checkpoint of another model, even if it is told to go on."""
    run(tmp_path / 'run', model, 'Run.steps = 2')
    other = two_kv_heads(tmp_path / 'other')
    with pytest.raises(ValueError, match=r'(?s)Experiment.model: .*\ntokenizer: '):
        run(tmp_path / 'run', other)
    with pytest.raises(ValueError, match=r'another model or optimizer: .*embedding is \(17, 16\), expected \(18, 16\)'):
        run(tmp_path / 'run', other, 'Run.on_change = "resume"')
    assert load_config(tmp_path / 'run/model').vocab_size == 17


def test_a_change_stops_a_run_unless_it_is_told_to_go_on(tmp_path, model, caplog):
    """Guards against a run that changes its method or its data half way unseen, whose first half has lost its
    configuration, or that is stopped by what changes nothing, such as its length."""
    start = 'troll.bound = 0.04'
    run(tmp_path, model, 'Run.steps = 2', start)
    changed = ['troll.bound = 0.5', 'Arithmetic.train_size = 61']
    with pytest.raises(ValueError, match=r'to step 2 .*\nArithmetic.train_size: 60 → 61\n') as error:
        run(tmp_path, model, 'Run.steps = 3', *changed)
    assert re.search(r'\ntrain data: \w+ → \w+\ntroll.bound: 0.04 → 0.5\n', str(error.value))
    assert 'Run.steps' not in str(error.value) and 'bound = 0.04' in (tmp_path / 'config.gin').read_text()
    assert [row['step'] for row in run(tmp_path, model, 'Run.steps = 3', 'Compute.slots = 16', start)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="is 'goon'; expected one of .*'resume'"):
        run(tmp_path, model, 'Run.on_change = "goon"', start)
    rows = run(tmp_path, model, 'Run.steps = 4', 'Run.on_change = "resume"', *changed)
    assert [row['step'] for row in rows] == [0, 1, 2, 3, 4]
    assert 'bound = 0.04' in (tmp_path / 'config_until_3.gin').read_text()
    assert 'bound = 0.5\n' in (tmp_path / 'config.gin').read_text()
    assert 'troll.bound: 0.04 → 0.5' in caplog.text
    run(tmp_path, model, 'Run.steps = 4', *changed)  # what it was changed to is now its setup


INFINITE = ['Method.regularisers = [@entropy_bonus]', 'entropy_bonus.coefficient = 1e39']  # in float32


def test_gradients_that_stay_infinite_end_the_run(tmp_path, model):
    """Guards against a run that learns nothing for days, and a failure of which nothing is left to be looked into."""
    settings = [*INFINITE, 'Run.max_skipped = 3', 'Run.checkpoint_every = 4', 'Run.evaluate_every = 0']
    with pytest.raises(FloatingPointError, match=r'step 3: .* 3 steps in a row .* as of step 2.*rollouts/2.npz'):
        run(tmp_path, model, *settings)
    assert [row['update/skipped'] for row in read_metrics(tmp_path / 'metrics.jsonl')] == [1, 1, 1]
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [2]
    rollout = tmp_path / 'rollouts/2.npz'
    assert [file.name for file in rollout.parent.iterdir()] == ['2.npz']
    result = replay(tmp_path, batch=rollout, objectives=['importance_weighted'])
    assert result['step'] == result['checkpoint'] == 2 and result['skipped_updates'] == 1
    finite = {name: row['finite'] for name, row in result['objectives'].items()}
    assert finite == {'importance_weighted': True, 'run': False}
    assert result['length_of_equal_step'] is None  # the run's own step has none
    after = {
        name: (row['kl_mean_after'], row['kl_mean_after_equal_step']) for name, row in result['objectives'].items()
    }
    assert after['importance_weighted'][0] >= 0
    assert after['run'] == (None, None) and after['importance_weighted'][1] is None


@pytest.mark.slow
def test_the_first_nan_ends_a_run_that_looks_for_it(tmp_path, model):
    """Guards a binding that nothing reads."""
    with pytest.raises(FloatingPointError, match='nan'):
        run(tmp_path, model, *INFINITE, 'Run.debug_nans = True', method='clip')  # of fewer operations
    assert not jax.config.jax_debug_nans


def test_checkpoints_may_lie_elsewhere(tmp_path, model):
    """Guards a bucket for checkpoints: resuming, evaluation and export look for them where the run put them."""
    elsewhere = f"Run.checkpoint_folder = '{tmp_path / 'bucket'}'"
    run(tmp_path / 'run', model, elsewhere, 'Run.steps = 1', 'Run.checkpoint_every = 1')
    rows = run(tmp_path / 'run', model, elsewhere, 'Run.steps = 2')
    assert [row['step'] for row in rows] == [0, 1, 2]
    assert not (tmp_path / 'run/checkpoints').exists() and (tmp_path / 'bucket/checkpoints/2').is_dir()
    assert export(str(tmp_path / 'run'), str(tmp_path / 'exported')) == 2
    assert evaluation(str(tmp_path / 'run'), Config([tmp_path / 'run/config.gin']))['test']['step'] == 2


@pytest.mark.slow
def test_ctrl_c_saves_and_the_next_start_goes_on(tmp_path, model):
    """Guards against losing what was learnt since the last checkpoint to Ctrl-C, with the command that users type."""
    bindings = [
        *SMALL,
        *ARITHMETIC,
        f"Run.folder = '{tmp_path}'",
        f"Experiment.model = '{model}'",
        'Run.checkpoint_every = 1000',
    ]
    command = [sys.executable, '-m', 'experiments.train', 'quickstart', 'troll', *bindings]
    process = subprocess.Popen([*command, 'Run.steps = 100000'], cwd=REPOSITORY, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 300
        path = tmp_path / 'metrics.jsonl'
        while not (path.exists() and len(read_metrics(path)) > 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    last = read_metrics(path)[-1]['step']
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [last]
    rows = run(tmp_path, model, f'Run.steps = {last + 1}')
    assert [row['step'] for row in rows] == list(range(last + 2))
