"""The whole loop, as a user starts it, on models that are made here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gin
import jax
import numpy as np
import pytest
from faults.runs import everything
from tiny import save_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.config import parse, register
from experiments.evaluate import evaluation
from experiments.export import export
from experiments.replay import replay
from experiments.train import train
from experiments.warm_start import warm_start
from troll_jax.checkpoint import Checkpoints
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.metrics import read_metrics
from troll_jax.models import decoder as decoders
from troll_jax.models.families import decoder_config
from troll_jax.models.hf_weights import load_config
from troll_jax.sharding import make_mesh

REPOSITORY = Path(__file__).parent.parent

SMALL = [
    'Experiment.max_prompt_length = 4',
    'Experiment.max_response_length = 3',
    'train.steps = 4',
    'train.prompts_per_step = 16',
    'train.samples_per_prompt = 4',
    'train.minibatch_prompts = 8',
    'train.evaluate_every = 2',
    'train.checkpoint_every = 2',
    'train.head_chunk = 40',
]


METHODS = sorted(file.stem for file in (REPOSITORY / 'configs/objectives').glob('*.gin'))

ARITHMETIC = ['Arithmetic.operands = 2', 'Arithmetic.train_size = 60', 'Arithmetic.test_size = 10']


@register
class StartsWithHash(Arithmetic):
    """Rewards a response that begins with '#': something that a policy without any knowledge can find out."""

    def grade(self, response: str, answer: str) -> float:
        return float(response.startswith('#'))


HASH = [
    'Experiment.task = @StartsWithHash()',
    *(binding.replace('Arithmetic', 'StartsWithHash') for binding in ARITHMETIC),
    'train.evaluate_every = 0',
    'adamw.learning_rate = 1e-2',
]


@pytest.fixture(autouse=True)
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope='session')
def model(tmp_path_factory) -> str:
    """A model of the quickstart's kind, after two steps of its warm start."""
    folder = str(tmp_path_factory.mktemp('model'))
    task = Arithmetic(operands=2, train_size=60, test_size=16)
    sizes = {'width': 16, 'layers': 2, 'heads': 2, 'kv_heads': 1, 'head_dim': 8, 'mlp_width': 24, 'batch': 8}
    warm_start(folder, task, **sizes, accuracy=0.0, mixed_steps=2)
    return folder


def run(folder, model: str, *bindings: str, method: str = 'troll', task=tuple(ARITHMETIC)) -> list[dict]:
    """Trains on the quickstart's task by one of the methods and returns the metrics."""
    gin.clear_config()
    names = [f"train.run_dir = '{folder}'", f"Experiment.model = '{model}'"]
    files = [REPOSITORY / 'configs/quickstart.gin', REPOSITORY / f'configs/objectives/{method}.gin']
    parse(files, [*SMALL, *task, *names, *bindings])
    train()
    return read_metrics(Path(folder) / 'metrics.jsonl')


def saved(folder, step: int):
    """The parameters of a checkpoint."""
    config = decoder_config(load_config(str(Path(folder) / 'model')))
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_params(decoders.abstract(config, make_mesh())[1], step)


def without_times(rows: list[dict]) -> list[dict]:
    timed = ('seconds/', 'rollout/tokens_per_second', 'update/tokens_per_second')
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# All that a state can hold: a critic, a reference model that is replaced after the resume, draws that are not steps.
STATEFUL = [
    'train.regularisers = [@kl_to_reference]',
    'kl_to_reference.coefficient = 0.01',
    'train.refresh_reference_every = 3',
    'train.max_draws = 2',
    'train.keep_best = True',
]


@pytest.mark.parametrize(('method', 'bindings'), [('troll', []), ('troll_ppo', STATEFUL)])
def test_resuming_equals_not_stopping(tmp_path, model, method, bindings):
    """Guards against skipped data, keys or optimizer state that start anew, and doubled metrics after a resume.

    And against a best checkpoint that is chosen by another number than the log's.
    """
    settings = {'method': method, 'task': [*HASH, 'train.evaluate_every = 2']}
    whole = run(tmp_path / 'whole', model, *bindings, **settings)
    assert all(row['update/gradient_norm'] > 1e-6 for row in whole[1:]), 'every step was meant to teach something'
    run(tmp_path / 'parts', model, *bindings, 'train.steps = 2', **settings)
    parts = run(tmp_path / 'parts', model, *bindings, **settings)
    assert [row['step'] for row in parts] == [0, 1, 2, 3, 4]
    assert without_times(parts) == without_times(whole)
    states = [everything(tmp_path / name, 4) for name in ('parts', 'whole')]
    assert states[0].keys() == {'progress', 'params', 'opt_state', *(('critic', 'reference') if bindings else ())}
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
    'train.tail_rule = @bucket_tail',
    'train.max_tokens = 8',
    'train.table_every = 1',
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
    tables = [(tmp_path / name / 'held_tokens.jsonl').read_text() for name in ('crashed', 'whole')]
    assert tables[0] == tables[1] and tables[0].count('\n') == 4


@pytest.mark.parametrize('mesh', ['make_mesh.fsdp = 8', 'make_mesh.data = 2\nmake_mesh.fsdp = 2\nmake_mesh.tensor = 2'])
def test_one_update_does_not_depend_on_the_mesh(tmp_path, model, mesh):
    """Guards against sums over devices that count a token twice or not at all."""
    tied = ['train.steps = 1', 'train.minibatch_prompts = 16', 'train.evaluate_every = 0']
    if 'tensor' in mesh:
        model = two_kv_heads(tmp_path / 'model')
        tied += ['Experiment.max_prompt_length = 4']
    reference = run(tmp_path / 'reference', model, *tied, 'make_mesh.data = 8', 'make_mesh.fsdp = 1')
    rows = run(tmp_path / 'other', model, *tied, *mesh.split('\n'))
    for name, value in without_times(reference)[0].items():
        assert rows[0][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


def two_kv_heads(folder) -> str:
    """A model that a mesh with tensor = 2 divides: a vocabulary of even size and two key-value heads."""
    tokenizer = character_tokenizer('0123456789+-*=#?')
    return save_qwen3(folder, tokenizer, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize('method', ['troll', 'clip'])
def test_a_rewarded_response_is_learnt(tmp_path, model, method):
    """Guards against everything that makes a run go through without learning: signs, shifts by one, lost gradients."""
    rows = run(tmp_path, model, 'train.steps = 20', method=method, task=HASH)
    assert rows[0]['reward/mean'] < 0.5 < 0.9 < rows[-1]['reward/mean']


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains(tmp_path, model, method):
    """Guards files of methods that parse and do not run, or run and learn nothing."""
    rows = run(tmp_path, model, 'train.steps = 2', method=method, task=HASH)
    assert len(rows) == 2
    for row in rows:
        assert (
            np.isfinite(list(row.values())).all() and row['update/gradient_norm'] > 1e-6 and not row['update/skipped']
        )


OPTIONS = [
    ['train.regularisers = [@entropy_bonus]', 'entropy_bonus.coefficient = 1.0'],
    ['train.whiten_advantages = True'],
    ["train.rewards = [('task', 1.0, @task_reward), ('overlong', 1.0, @soft_overlong)]", 'soft_overlong.share = 1.0'],
    ['train.mask_truncated = True'],
]


def test_options_of_the_loop_change_what_is_learnt(tmp_path, model):
    """Guards options that the loop takes and forgets. The only update sees the same data with each of them."""
    settings = ['train.steps = 1', 'train.minibatch_prompts = 16', 'train.table_every = 0']
    plain = run(tmp_path / 'plain', model, *settings, task=HASH)[0]
    assert plain['rollout/truncated_share'] > 0.1 and plain['reward/mean'] == plain['reward/task']
    for i, option in enumerate(OPTIONS):
        row = run(tmp_path / str(i), model, *settings, *option, task=HASH)[0]
        assert row['reward/task'] == plain['reward/task']
        assert abs(row['update/gradient_norm'] / plain['update/gradient_norm'] - 1) > 0.01, option
        assert (row.get('reward/overlong', 0) < -0.1) == ('overlong' in option[0])


def test_without_learning_the_sampler_is_the_trainer(tmp_path, model):
    """Guards against the sampler's and the trainer's log-probabilities drifting apart, which no error would show."""
    rows = run(tmp_path, model, 'adamw.learning_rate = 0.0', 'train.evaluate_every = 0')
    for row in rows:
        assert row['update/kl_max'] < 1e-5
        assert row['update/ratio_max'] == pytest.approx(1, abs=1e-3)
        assert row['update/projected_share'] == 0 and row['update/weight_p01'] == 1


def test_few_slots_change_nothing_but_how_full_they_are(tmp_path, model):
    """Guards a knob that nothing reads, and slots that change what is learnt; and the trace of one step."""
    whole = run(tmp_path / 'whole', model, 'train.steps = 2')
    few = run(tmp_path / 'few', model, 'train.steps = 2', 'train.slots = 16', 'train.profile_step = 2')
    of_slots = ('rollout/slots_in_use', 'rollout/decode_steps')
    others = lambda row: {name: value for name, value in row.items() if name not in of_slots}
    assert whole[1]['rollout/decode_steps'] <= 3 < 9 < few[1]['rollout/decode_steps'] <= 12
    assert all(0.5 < row['rollout/slots_in_use'] <= 1 for row in few[1:])
    for one, other in zip(without_times(few), without_times(whole), strict=True):
        assert others(one) == pytest.approx(others(other), rel=1e-3, abs=1e-6)
    assert few[1]['rollout/response_length'] <= few[1]['rollout/longest_response'] <= 3
    (trace,) = (tmp_path / 'few/profile').rglob('*.xplane.pb')
    assert trace.stat().st_size > 1000


def test_the_tokens_that_are_held_back_are_listed(tmp_path, model):
    """Guards a table with ids in place of text, in the wrong order, of other steps, or that counts more than there is.

    Every token of a response is counted once per rollout batch, and once projected at most.
    """
    rows = run(tmp_path, model, 'train.table_every = 2', 'troll.bound = 1e-3', task=HASH)
    tables = [json.loads(line) for line in (tmp_path / 'held_tokens.jsonl').read_text().splitlines()]
    assert [table['step'] for table in tables] == [2, 4]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'model')
    for table in tables:
        entries = table['tokens']
        counts = [entry['held'] for entry in entries]
        assert 0 < len(entries) <= 20 and counts == sorted(counts, reverse=True)
        assert all(0 < entry['held'] <= entry['seen'] for entry in entries)
        assert all(entry['text'] == tokenizer.decode([entry['token']]) for entry in entries)
        assert any(entry['text'] == '#' for entry in entries), 'what is learnt was meant to be held back'
        length = rows[table['step'] - 1]['rollout/response_length']
        assert sum(entry['seen'] for entry in entries) <= length * 64 + 1e-3
        assert sum(counts) > 0 and rows[table['step'] - 1]['update/projected_share'] > 0


def test_nothing_compiles_after_the_first_step(tmp_path, model):
    """Guards against shapes or types that change between steps, each of which would compile the model again."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None
    )
    run(tmp_path / 'short', model, 'train.steps = 2', 'train.evaluate_every = 1')
    two = len(compiled)
    run(tmp_path / 'long', model, 'train.steps = 5', 'train.evaluate_every = 1')
    assert two > 0
    assert len(compiled) - two <= two


def test_a_run_folder_is_all_that_evaluation_and_export_need(tmp_path, model):
    """Guards against evaluation that wants the original command line, and exports that transformers cannot open."""
    start = shutil.copytree(model, tmp_path / 'start')
    run(tmp_path / 'run', str(start))
    shutil.rmtree(start)
    gin.clear_config()
    parse([tmp_path / 'run/config.gin'], ['evaluation.samples_per_prompt = 4', 'evaluation.slots = 16'])
    summary = evaluation(str(tmp_path / 'run'))['test']
    assert summary['step'] == 4 and summary['problems'] == 10
    assert summary['success']['low'] <= summary['success']['mean'] <= summary['success']['high']
    assert summary['pass@4']['mean'] >= summary['pass@1']['mean'] == pytest.approx(summary['success']['mean'])
    rows = [json.loads(line) for line in (tmp_path / 'run/responses_4_test_4.jsonl').read_text().splitlines()]
    assert len(rows) == 10 and all(len(row['responses']) == 4 for row in rows)
    task = Arithmetic(operands=2, train_size=60, test_size=10)
    for row in rows:
        assert row['rewards'] == [task.grade(response, row['answer']) for response in row['responses']]

    export(str(tmp_path / 'run'), str(tmp_path / 'exported'))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / 'exported')
    embedding = np.asarray(saved(tmp_path / 'run', 4)['embedding'])
    np.testing.assert_array_equal(exported.model.embed_tokens.weight.detach().numpy(), embedding)
    assert AutoTokenizer.from_pretrained(tmp_path / 'exported').decode([13, 3]) == '-1'


@pytest.mark.parametrize(
    ('binding', 'message'),
    [
        ('train.minibatch_prompts = 5', 'prompts_per_step = 16 .* minibatch_prompts = 5'),
        ('train.slots = 12', 'slots = 12 .* devices .* = 8'),
        ('train.slots = 0', 'slots = 0'),
        ('train.row_tokens = 6', 'row_tokens = 6 .* 7 tokens'),
        ('train.micro_batch_tokens = 6', 'micro_batch_tokens = 6 .* one row of 7'),
        ('train.old_policy = "sampler"', "one of .*'recompute'.*'sampler'"),
        ('train.samples_per_prompt = 1', 'at least two'),
        ('train.samples_per_prompt = 0', 'at least 1; got 0'),
        ('train.importance_limit = 2.0', "importance_limit = 2.0 .* old_policy to 'recompute'"),
        ('train.prompts_per_step = 64', '64 and there are 60 prompts'),
        ('train.max_tokens = 18', 'vocabulary size 17; got 18'),
        ('train.mass = 1.5', 'mass .* got 1.5'),
        ('troll.bound = -0.1', 'bound .* got -0.1'),
        ('make_mesh.data = 3', '8 \\(cpu\\)'),
        ('Experiment.max_prompt_length = 3', '60 of 60 prompts'),
        ('Experiment.max_response_length = 5', '9 tokens, but .* 8'),
        ("Experiment.model = '/nowhere'", '/nowhere'),
        ('Experiment.compute_dtype = "float64"', 'float64'),
        ('train.temperature = 0.0', 'temperature must be above 0'),
        ('train.checkpoint_every = 0', 'checkpoint_every must be above 0'),
        ('train.profile_step = 0', 'profile_step must be above 0'),
        ('train.table_every = -1', 'table_every must be at least 0'),
        ('train.evaluate_every = -1', 'evaluate_every must be at least 0'),
        ('train.max_skipped = 1', 'max_skipped must be at least 2, or 0'),
        ('train.evaluate_every = 0\ntrain.keep_best = True', 'keep_best .* evaluate_every = 0'),
    ],
)
def test_bad_sizes_are_errors_before_anything_starts(tmp_path, model, binding, message):
    """Guards against sizes that are silently rounded, and against errors that come after an hour."""
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / 'run', model, binding)
    assert not (tmp_path / 'run/metrics.jsonl').exists() and not (tmp_path / 'run/config.gin').exists()


def test_a_setting_that_no_program_takes_is_an_error_before_the_weights(tmp_path, model, monkeypatch):
    """Guards against loading a model for minutes only to find that the objective refuses a number."""
    monkeypatch.setattr(
        'experiments.run_folder.load_pretrained', lambda *_, **__: pytest.fail('the weights were loaded')
    )
    with pytest.raises(ValueError, match=r'dual must be more than'):
        run(tmp_path / 'run', model, 'ppo_clip.dual = 1.1', method='clip')


def test_a_binding_that_nothing_reads_is_an_error(tmp_path, model):
    """Guards against an experiment whose one change changes nothing. An estimator, read late, counts as read."""
    with pytest.raises(ValueError, match=r"nothing .* reads 'ppo_clip.lower'"):
        run(tmp_path / 'run', model, 'ppo_clip.lower = 0.1')
    run(tmp_path / 'run', model, 'group_normalised.epsilon = 1e-4', 'train.steps = 1')


def test_a_warm_start_that_does_not_learn_is_an_error(tmp_path):
    """Guards against a model that cannot work, from which reinforcement learning finds nothing."""
    task = Arithmetic(operands=2, train_size=60, test_size=16)
    with pytest.raises(RuntimeError, match=r'after 2 steps .* expected 95%'):
        warm_start(
            str(tmp_path / 'model'), task, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, batch=8, max_steps=2
        )
    assert not (tmp_path / 'model').exists()


def test_another_model_in_the_run_folder_is_an_error(tmp_path, model):
    """Guards against a run that goes on from the checkpoint of another model, even if it is told to go on."""
    run(tmp_path / 'run', model, 'train.steps = 2')
    other = two_kv_heads(tmp_path / 'other')
    with pytest.raises(ValueError, match=r'(?s)Experiment.model: .*\ntokenizer: '):
        run(tmp_path / 'run', other)
    with pytest.raises(ValueError, match=r'another model or optimizer: .*embedding is \(17, 16\), expected \(18, 16\)'):
        run(tmp_path / 'run', other, 'train.on_change = "go on"')
    assert load_config(tmp_path / 'run/model').vocab_size == 17


def test_a_change_stops_a_run_unless_it_is_told_to_go_on(tmp_path, model, caplog):
    """Guards against a run that changes its method or its data half way unseen, whose first half has lost its
    configuration, or that is stopped by what changes nothing, such as its length."""
    run(tmp_path, model, 'train.steps = 2')
    changed = ['troll.bound = 0.5', 'Arithmetic.train_size = 61']
    with pytest.raises(ValueError, match=r'to step 2 .*\nArithmetic.train_size: 60 → 61\n') as error:
        run(tmp_path, model, 'train.steps = 3', *changed)
    assert re.search(r'\ntrain data: \w+ → \w+\ntroll.bound: 0.05 → 0.5\n', str(error.value))
    assert 'train.steps' not in str(error.value) and 'bound = 0.05' in (tmp_path / 'config.gin').read_text()
    assert [row['step'] for row in run(tmp_path, model, 'train.steps = 3', 'train.slots = 16')] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="'go on'.*got 'goon'"):
        run(tmp_path, model, 'train.on_change = "goon"')
    rows = run(tmp_path, model, 'train.steps = 4', 'train.on_change = "go on"', *changed)
    assert [row['step'] for row in rows] == [0, 1, 2, 3, 4]
    assert 'bound = 0.05' in (tmp_path / 'config_until_3.gin').read_text()
    assert 'bound = 0.5\n' in (tmp_path / 'config.gin').read_text()
    assert 'troll.bound: 0.05 → 0.5' in caplog.text
    run(tmp_path, model, 'train.steps = 4', *changed)  # what it was changed to is now its setup


INFINITE = ['train.regularisers = [@entropy_bonus]', 'entropy_bonus.coefficient = 1e39']  # in float32


def test_gradients_that_stay_infinite_end_the_run(tmp_path, model):
    """Guards against a run that learns nothing for days, and a failure of which nothing is left to be looked into."""
    settings = [*INFINITE, 'train.max_skipped = 3', 'train.checkpoint_every = 4', 'train.evaluate_every = 0']
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


def test_the_first_nan_ends_a_run_that_looks_for_it(tmp_path, model):
    """Guards a binding that nothing reads."""
    with pytest.raises(FloatingPointError, match='nan'):
        run(tmp_path, model, *INFINITE, 'train.debug_nans = True')
    assert not jax.config.jax_debug_nans


CHAT_TEMPLATE = (
    '{% for message in messages %}{{ message.content }}{% endfor %}'
    '{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}={% endif %}'
)


@pytest.mark.parametrize('method', ['troll', 'clip'])
def test_the_papers_configs_run_with_small_stand_ins(tmp_path, method):
    """Guards against configuration files that rot: both run as they are, but for a model and data that fit in here."""
    tokenizer = character_tokenizer(''.join(sorted(set('What is plus?0123456789#boxed{}\\ =\n'))))
    tokenizer.chat_template = CHAT_TEMPLATE
    save_qwen3(tmp_path / 'model', tokenizer)
    for split in ('train', 'test'):
        rows = [{'question': f'What is {i} plus {i}?', 'answer': f'It is {2 * i}\n#### {2 * i}'} for i in range(40)]
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
    parse(
        [REPOSITORY / f'configs/qwen3_0_6b_gsm8k_{method}.gin'],
        [
            f"Experiment.model = '{tmp_path}/model'",
            f"GSM8K.source = '{tmp_path}'",
            'GSM8K.instruction = None',
            'Experiment.max_prompt_length = 40',
            'Experiment.max_response_length = 16',
            f"train.run_dir = '{tmp_path}/run'",
            'train.steps = 2',
            'train.prompts_per_step = 16',
            'train.samples_per_prompt = 4',
            'train.minibatch_prompts = 8',
            'train.slots = 8',
            'train.row_tokens = 100',
            'train.micro_batch_tokens = 100',
            'train.max_tokens = 16',
            'train.evaluate_every = 1',
        ],
    )
    train()
    rows = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert [row['step'] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[-1]['reward/timeouts'] == rows[-1]['reward/crashes'] == rows[-1]['reward/errors'] == 0
    assert (tmp_path / 'run/checkpoints/2').is_dir()


def test_checkpoints_may_lie_elsewhere(tmp_path, model):
    """Guards a bucket for checkpoints: resuming, evaluation and export look for them where the run put them."""
    elsewhere = f"train.checkpoint_dir = '{tmp_path / 'bucket'}'"
    run(tmp_path / 'run', model, elsewhere, 'train.steps = 1', 'train.checkpoint_every = 1')
    rows = run(tmp_path / 'run', model, elsewhere, 'train.steps = 2')
    assert [row['step'] for row in rows] == [0, 1, 2]
    assert not (tmp_path / 'run/checkpoints').exists() and (tmp_path / 'bucket/checkpoints/2').is_dir()
    gin.clear_config()
    parse([tmp_path / 'run/config.gin'])
    assert export(str(tmp_path / 'run'), str(tmp_path / 'exported')) == 2
    assert evaluation(str(tmp_path / 'run'))['test']['step'] == 2


def test_ctrl_c_saves_and_the_next_start_goes_on(tmp_path, model):
    """Guards against losing what was learnt since the last checkpoint to Ctrl-C, with the command that users type."""
    bindings = [
        *SMALL,
        *ARITHMETIC,
        f"train.run_dir = '{tmp_path}'",
        f"Experiment.model = '{model}'",
        'train.checkpoint_every = 1000',
    ]
    command = [sys.executable, '-m', 'experiments.train', 'configs/quickstart_troll.gin', *bindings]
    process = subprocess.Popen([*command, 'train.steps = 100000'], cwd=REPOSITORY, env=dict(os.environ))
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
    rows = run(tmp_path, model, f'train.steps = {last + 1}')
    assert [row['step'] for row in rows] == list(range(last + 2))
