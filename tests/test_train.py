"""The whole loop, as a user starts it, on models that are made here."""

import dataclasses
import json
import re
import shutil
from functools import partial

import jax
import loop
import numpy as np
import pytest
from loop import HASH, REPOSITORY, run, saved, settings, two_kv_heads, without_times
from tiny import save_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.evaluate import evaluation
from experiments.export import export
from experiments.plumbing.gin_files import Config
from experiments.train import train
from experiments.warm_start import warm_start
from troll_jax.data.tasks.arithmetic import Arithmetic
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.experiment import Experiment
from troll_jax.metrics import read_metrics
from troll_jax.ops.advantages import group_normalised
from troll_jax.ops.aggregation import token_mean
from troll_jax.ops.losses import troll
from troll_jax.ops.support import default_tail
from troll_jax.optimizer import adamw
from troll_jax.settings import Compute, Method, Run, Sampling

METHODS = sorted(file.stem for file in (REPOSITORY / 'configs/objectives').glob('*.gin'))


@pytest.mark.parametrize('mesh', ['Compute.fsdp = 8', 'Compute.data = 2\nCompute.fsdp = 2\nCompute.tensor = 2'])
def test_one_update_does_not_depend_on_the_mesh(tmp_path, model, mesh):
    """Guards against sums over devices that count a token twice or not at all."""
    tied = ['Run.steps = 1', 'Method.minibatch_prompts = 16', 'Run.evaluate_every = 0']
    if 'tensor' in mesh:
        model = two_kv_heads(tmp_path / 'model')
        tied += ['Experiment.max_prompt_length = 4']
    reference = run(tmp_path / 'reference', model, *tied, 'Compute.data = 8', 'Compute.fsdp = 1', devices=8)
    rows = run(tmp_path / 'other', model, *tied, *mesh.split('\n'), devices=8)
    for name, value in without_times(reference)[0].items():
        assert rows[0][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name


@pytest.mark.parametrize('method', ['troll', 'clip'])
def test_a_rewarded_response_is_learnt(tmp_path, model, method):
    """Guards against everything that makes a run go through without learning: signs, shifts by one, lost gradients."""
    rows = run(tmp_path, model, 'Run.steps = 20', method=method, task=HASH)
    assert rows[0]['reward/mean'] < 0.5 < 0.9 < rows[-1]['reward/mean']


def test_training_from_python_is_the_same(tmp_path, model):
    """Guards a notebook: five values that were built by hand train as those of gin files do, to the last bit, and
    their run directory is evaluated like any other."""
    by_gin = run(tmp_path / 'gin', model, 'Run.steps = 2', task=HASH)
    task = loop.StartsWithHash(operands=2, train_size=60, test_size=10)
    experiment = Experiment(model=model, task=task, max_prompt_length=4, max_response_length=3)
    train(
        experiment,
        Sampling(prompts_per_step=16, samples_per_prompt=4, support_size=16),
        Method(
            objective=troll,
            advantages=group_normalised,
            aggregation=token_mean,
            tail_rule=default_tail,
            optimizer=partial(adamw, learning_rate=1e-2, b2=0.99),
            minibatch_prompts=8,
        ),
        Compute(dtype='float32', remat=None, head_chunk=40, devices=jax.devices()[:1]),
        Run(folder=str(tmp_path / 'python'), steps=2, evaluate_every=0, checkpoint_every=2),
    )
    assert without_times(read_metrics(tmp_path / 'python/metrics.jsonl')) == without_times(by_gin)
    config = Config([tmp_path / 'python/config.gin'])
    assert evaluation(str(tmp_path / 'python'), config)['test']['step'] == 2
    assert config.build(Experiment) == experiment


def test_the_algorithm_is_one_page():
    """Guards train.py against plumbing that creeps back in, and the library against gin."""
    assert len((REPOSITORY / 'experiments/train.py').read_text().splitlines()) <= 150
    for file in (REPOSITORY / 'troll_jax').rglob('*.py'):
        assert not re.search(r'\bgin\b|\bexperiments[./]', file.read_text()), file


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains(tmp_path, model, method):
    """Guards files of methods that parse and do not run, or run and learn nothing."""
    rows = run(tmp_path, model, 'Run.steps = 2', method=method, task=HASH)
    assert len(rows) == 2
    for row in rows:
        assert (
            np.isfinite(list(row.values())).all() and row['update/gradient_norm'] > 1e-6 and not row['update/skipped']
        )


OPTIONS = [
    ['Method.regularisers = [@entropy_bonus]', 'entropy_bonus.coefficient = 1.0'],
    ['Method.whiten_advantages = True'],
    ["Method.rewards = [('task', 1.0, @task_reward), ('overlong', 1.0, @soft_overlong)]", 'soft_overlong.share = 1.0'],
    ['Method.mask_truncated = True'],
]


def test_options_of_the_loop_change_what_is_learnt(tmp_path, model):
    """Guards options that the loop takes and forgets. The only update sees the same data with each of them."""
    settings = ['Run.steps = 1', 'Method.minibatch_prompts = 16', 'Run.table_every = 0']
    plain = run(tmp_path / 'plain', model, *settings, task=HASH)[0]
    assert plain['rollout/truncated_share'] > 0.1 and plain['reward/mean'] == plain['reward/task']
    for i, option in enumerate(OPTIONS):
        row = run(tmp_path / str(i), model, *settings, *option, task=HASH)[0]
        assert row['reward/task'] == plain['reward/task']
        assert abs(row['update/gradient_norm'] / plain['update/gradient_norm'] - 1) > 0.01, option
        assert (row.get('reward/overlong', 0) < -0.1) == ('overlong' in option[0])


def test_without_learning_the_sampler_is_the_trainer(tmp_path, model):
    """Guards against the sampler's and the trainer's log-probabilities drifting apart, which no error would show."""
    rows = run(tmp_path, model, 'adamw.learning_rate = 0.0', 'Run.evaluate_every = 0')
    for row in rows:
        assert row['update/kl_max'] < 1e-5
        assert row['update/ratio_max'] == pytest.approx(1, abs=1e-3)
        assert row['update/projected_share'] == 0 and row['update/weight_p01'] == 1


def test_few_slots_change_nothing_but_how_full_they_are(tmp_path, model):
    """Guards a knob that nothing reads, and slots that change what is learnt; and the trace of one step."""
    whole = run(tmp_path / 'whole', model, 'Run.steps = 2', devices=8)
    few = run(tmp_path / 'few', model, 'Run.steps = 2', 'Compute.slots = 16', 'Run.profile_step = 2', devices=8)
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
    rows = run(tmp_path, model, 'Run.table_every = 2', 'troll.bound = 1e-3', task=HASH)
    tables = [json.loads(line) for line in (tmp_path / 'constrained_tokens.jsonl').read_text().splitlines()]
    assert [table['step'] for table in tables] == [2, 4]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'model')
    for table in tables:
        entries = table['tokens']
        counts = [entry['constrained'] for entry in entries]
        assert 0 < len(entries) <= 20 and counts == sorted(counts, reverse=True)
        assert all(0 < entry['constrained'] <= entry['seen'] for entry in entries)
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
    run(tmp_path / 'short', model, 'Run.steps = 2', 'Run.evaluate_every = 1', devices=2)
    two = len(compiled)
    run(tmp_path / 'long', model, 'Run.steps = 5', 'Run.evaluate_every = 1', devices=2)
    assert two > 0
    assert len(compiled) - two <= two


def test_a_run_folder_is_all_that_evaluation_and_export_need(tmp_path, model):
    """Guards against evaluation that wants the original command line, and exports that transformers cannot open."""
    start = shutil.copytree(model, tmp_path / 'start')
    rows = run(tmp_path / 'run', str(start), 'Run.evaluate_every = 3')
    assert [row['step'] for row in rows if 'eval/success' in row] == [0, 3, 4], 'the last step is evaluated too'
    shutil.rmtree(start)
    config = Config(
        [tmp_path / 'run/config.gin'], ['evaluation.samples_per_prompt = 4', 'evaluation.slots = 16'], [evaluation]
    )
    summary = config.function(evaluation, str(tmp_path / 'run'), config)()['test']
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
        ('Method.minibatch_prompts = 5', 'prompts_per_step = 16 .* minibatch_prompts = 5'),
        ('Compute.slots = 12', 'slots = 12 .* devices .* = 8'),
        ('Compute.slots = 0', 'slots must be above 0; got 0'),
        ('Compute.row_tokens = 6', 'row_tokens = 6 .* 7 tokens'),
        ('Compute.micro_batch_tokens = 6', 'micro_batch_tokens = 6 .* one row of 7'),
        ('Method.old_policy = "sampler"', "is 'sampler'; expected one of .*'recompute'"),
        ('Sampling.samples_per_prompt = 1', 'at least two'),
        ('Sampling.samples_per_prompt = 0', 'samples_per_prompt must be above 0; got 0'),
        ('Method.importance = @truncated_importance', "importance .* old_policy to 'recompute'"),
        ('Sampling.prompts_per_step = 64', '64 and there are 60 prompts'),
        ('Sampling.support_size = 18', 'vocabulary size 17; got 18'),
        ('Sampling.support_mass = 1.5', 'mass .* got 1.5'),
        ('troll.bound = -0.1', 'bound .* got -0.1'),
        ('Compute.data = 3', '8 \\(cpu\\)'),
        ('Experiment.max_prompt_length = 3', '60 of 60 prompts'),
        ('Experiment.max_response_length = 5', '9 tokens, but .* 8'),
        ("Experiment.model = '/nowhere'", '/nowhere'),
        ('Compute.dtype = "float64"', 'float64'),
        ('Sampling.temperature = 0.0', 'temperature must be above 0'),
        ('Run.checkpoint_every = 0', 'checkpoint_every must be above 0'),
        ('Run.profile_step = 0', 'profile_step must be above 0'),
        ('Run.table_every = -1', 'table_every must be at least 0'),
        ('Run.evaluate_every = -1', 'evaluate_every must be at least 0'),
        ('Run.max_skipped = 1', 'max_skipped must be at least 2, or 0'),
        ('Run.evaluate_every = 0\nRun.keep_best = True', 'keep_best .* evaluate_every = 0'),
    ],
)
def test_bad_sizes_are_errors_before_anything_starts(tmp_path, model, binding, message):
    """Guards against sizes that are silently rounded, and against errors that come after an hour."""
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / 'run', model, binding, devices=8)
    assert not (tmp_path / 'run/metrics.jsonl').exists() and not (tmp_path / 'run/config.gin').exists()


def test_a_setting_that_no_program_takes_is_an_error_before_the_weights(tmp_path, model, monkeypatch):
    """Guards against loading a model for minutes only to find that the objective refuses a number."""
    monkeypatch.setattr('troll_jax.experiment.load_pretrained', lambda *_, **__: pytest.fail('the weights were loaded'))
    with pytest.raises(ValueError, match=r'dual must be more than'):
        run(tmp_path / 'run', model, 'ppo_clip.dual = 1.1', method='clip')


def test_a_binding_that_nothing_reads_is_an_error(tmp_path, model):
    """Guards against an experiment whose one change changes nothing. An estimator, read late, counts as read."""
    with pytest.raises(ValueError, match=r"nothing .* reads 'ppo_clip.lower'"):
        run(tmp_path / 'run', model, 'ppo_clip.lower = 0.1')
    run(tmp_path / 'run', model, 'group_normalised.epsilon = 1e-4', 'Run.steps = 1')


def test_a_warm_start_that_does_not_learn_is_an_error(tmp_path):
    """Guards against a model that cannot work, from which reinforcement learning finds nothing."""
    task = Arithmetic(operands=2, train_size=60, test_size=16)
    with pytest.raises(RuntimeError, match=r'after 2 steps .* expected 95%'):
        warm_start(
            str(tmp_path / 'model'), task, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, batch=8, max_steps=2
        )
    assert not (tmp_path / 'model').exists()


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
    for split, numbers in (('train', range(40)), ('test', range(40, 80))):
        rows = [{'question': f'What is {i} plus {i}?', 'answer': f'It is {2 * i}\n#### {2 * i}'} for i in numbers]
        (tmp_path / f'{split}.jsonl').write_text('\n'.join(json.dumps(row) for row in rows))
    built = settings(
        [REPOSITORY / f'configs/qwen3_0_6b_gsm8k_{method}.gin'],
        [
            f"Experiment.model = '{tmp_path}/model'",
            f"GSM8K.source = '{tmp_path}'",
            'GSM8K.instruction = None',
            'Experiment.max_prompt_length = 40',
            'Experiment.max_response_length = 16',
            f"Run.folder = '{tmp_path}/run'",
            'Run.steps = 2',
            'Sampling.prompts_per_step = 16',
            'Sampling.samples_per_prompt = 4',
            'Method.minibatch_prompts = 8',
            'Compute.slots = 8',
            'Compute.row_tokens = 100',
            'Compute.micro_batch_tokens = 100',
            'Sampling.support_size = 16',
            'Run.evaluate_every = 1',
        ],
    )
    built[3] = dataclasses.replace(built[3], devices=jax.devices()[:1])
    train(*built)
    rows = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert [row['step'] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[-1]['reward/timeouts'] == rows[-1]['reward/crashes'] == rows[-1]['reward/errors'] == 0
    assert (tmp_path / 'run/checkpoints/2').is_dir()
