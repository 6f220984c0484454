"""Bad input: whatever is wrong with a configuration or a command is a ValueError that names it.

Cases are drawn by hypothesis, always the same ones. Nothing is written.
"""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from bad_input import REPOSITORY, cases, save_model
from hypothesis import assume, example, given
from hypothesis import strategies as st

from experiments.__main__ import FILES
from experiments.evaluate import evaluation
from experiments.plumbing.command import run_command
from experiments.plumbing.gin_files import Config, settable
from experiments.plumbing.names import NAMES, SETTINGS
from experiments.plumbing.run import nothing_left_behind
from experiments.train import train
from experiments.warm_start import warm_start
from troll_jax.data.tasks.arithmetic import Arithmetic

CONFIG = ['quickstart', 'troll']


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp('model'))


# Bindings.

COMMANDS = (evaluation, warm_start)
TARGETS = NAMES | {command.__name__: command for command in COMMANDS}
PARAMETERS = {
    f'{name}.{parameter}': inspect.signature(target).parameters[parameter].annotation
    for name, target in sorted(TARGETS.items())
    for parameter in settable(target)
}


def read_settings(files, bindings=()) -> list:
    config = Config(files, bindings)
    settings = [config.build(kind) for kind in SETTINGS]
    config.check_used()
    return settings


WRONG = {
    'int': ["'a'", '1.5', 'True', '[1]', '{}', '@adamw()', '@troll', str(2**31), '1e999'],
    'float': ["'a'", 'True', '[1.0]', '{}', '@adamw()', '1e999', '-1e999', str(10**30)],
    'str': ['1', '0.5', 'True', "['a']", '{}', '@adamw()', '@troll'],
    'bool': ['1', "'True'", 'None', '[]', '@troll'],
}
OBJECTS = ['1', "'a'", '{1: 2}', '@Unisolated', '[3]', '@mean_centred()']  # wrong for all else


@cases(150)
@given(st.data())
def test_a_value_of_another_type_is_an_error_that_names_the_parameter(data):
    """Guards types that gin passes on to where they fail as something else, or, such as True for 1, do not fail."""
    name = data.draw(st.sampled_from(list(PARAMETERS)))
    annotation = PARAMETERS[name]
    words = (annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)).split(' | ')
    value = data.draw(st.sampled_from(WRONG.get(words[0], OBJECTS)))
    assume(not (value == '{1: 2}' and words[0].startswith('dict')) and annotation is not inspect.Parameter.empty)
    with pytest.raises(ValueError) as error:
        Config(CONFIG, [f'{name} = {value}'], COMMANDS)
    assert name in str(error.value) and ('expected' in str(error.value) or 'needs' in str(error.value))


@pytest.mark.parametrize('value', ['nan', 'many', '10 ** 3', '[1', '__import__("os").getcwd()', '%macro', '@', ''])
def test_a_value_that_gin_cannot_read_is_an_error(value):
    """Guards what is no literal: none of it is evaluated."""
    with pytest.raises(ValueError):
        Config(CONFIG, [f'Run.steps = {value}'])


@cases(25)
@example('AMC.source', 0, 'x')
@given(st.sampled_from(list(PARAMETERS)), st.integers(0, 40), st.sampled_from(['x', '_', 'q']))
def test_a_misspelt_parameter_is_an_error_that_names_it(name, position, letter):
    owner, parameter = name.split('.')
    position %= len(parameter) + 1
    wrong = parameter[:position] + letter + parameter[position:]
    with pytest.raises(ValueError, match=f"'{wrong}'[\\s\\S]*Did you mean"):
        Config(CONFIG, [f'{owner}.{wrong} = 1'], COMMANDS)


@pytest.mark.parametrize(
    'bindings, message',
    [
        (['Method.regularisers = [@entropy_bonus]'], 'entropy_bonus.coefficient'),
        (['troll.bound = @linear_bound', 'linear_bound.start = 0.1'], 'linear_bound.end, linear_bound.steps'),
        (['Experiment.task = @MathProblems()'], 'MathProblems.source'),
        (
            ['Method.optimizer = @adamw()'],
            r'Method.optimizer is .*expected a function of nothing.*Did you mean @adamw\?',
        ),
        (['Method.objective = @troll()'], '@troll.* calls troll, which takes row, advantages; expected @troll'),
        (['Method.objective = @entropy_bonus'], 'expected a function of LossInputs, Array, Progress'),
        (['Method.regularisers = [@troll]'], r'is \[troll\]; expected a list of a function of LossInputs'),
        (['Method.rewards = [("task", 1.0)]'], r'expected a list of \(a string, a finite number, a function'),
        (['Experiment.task = @Bubblewrap()'], 'expected a Task'),
        (['Experiment.task = @GSM8K'], r'expected a Task, with .*\. Did you mean @GSM8K\(\)\?'),
        (['token_region.bound = 0.3'], "'token_region' has no parameter 'bound'"),
        (['troll.row = 3'], "'troll' has no parameter 'row'"),
        (['steps = "many"', 'Run.steps = %steps'], "Run.steps is 'many'; expected a whole number"),
    ],
)
def test_a_reference_that_is_incomplete_or_does_not_fit_is_an_error(bindings, message):
    """Guards gin's TypeErrors, which come when a program is traced, or after minutes of loading."""
    with pytest.raises(ValueError, match=message):
        Config(CONFIG, bindings)


def bare(row, advantages, progress=None, *, x=1): ...


def wide(row: object, advantages: jax.typing.ArrayLike, *rest) -> Any: ...


def any_task():
    return Arithmetic()


def test_functions_of_ones_own_may_be_annotated_otherwise_or_not_at_all():
    """Guards against a check that takes what it does not know for wrong: `Any` is a class."""
    for binding in ('Method.objective = @bare', 'Method.objective = @wide', 'Experiment.task = @any_task()'):
        config = Config(CONFIG, ['import test_bad_input', binding])
        assert config.get(binding.split(' = ')[0])


SMALL = [
    'Sampling.prompts_per_step = 16',
    'Sampling.samples_per_prompt = 4',
    'Arithmetic.operands = 2',
    'Arithmetic.train_size = 60',
    'Arithmetic.test_size = 10',
    'Experiment.max_prompt_length = 4',
    'Experiment.max_response_length = 4',
]
BELOW = {
    **{f'Sampling.{name}': 0 for name in ('prompts_per_step', 'samples_per_prompt', 'temperature', 'support_size')},
    **{f'Sampling.{name}': 0 for name in ('support_mass', 'max_draws')},
    **{f'Compute.{name}': 0 for name in ('slots', 'cache_gb', 'row_tokens', 'micro_batch_tokens', 'head_chunk')},
    **{f'Compute.{name}': 0 for name in ('data', 'fsdp', 'context', 'tensor')},
    **{f'Run.{name}': 0 for name in ('steps', 'checkpoint_every', 'keep_checkpoints')},
    **{f'Run.{name}': -1 for name in ('evaluate_every', 'table_every', 'save_rollout_every', 'profile_step')},
    **{f'Experiment.{name}': 0 for name in ('max_prompt_length', 'max_response_length')},
    **{f'adamw.{name}': -1 for name in ('learning_rate', 'warmup_updates', 'b1', 'b2', 'weight_decay')},
    **{f'Arithmetic.{name}': 0 for name in ('operands', 'train_size', 'test_size')},
    **{'Method.minibatch_prompts': 0, 'Method.refresh_reference_every': -1, 'Sampling.seed': -1, 'adamw.clip_norm': 0},
}


@cases(60)
@given(st.sampled_from(sorted(BELOW)), st.integers(0, 10**6))
@example('Sampling.support_mass', 0)
@example('Sampling.seed', 3)
def test_a_number_out_of_its_range_is_an_error_before_anything_is_written(tmp_path, model, name, further):
    """Guards numbers that JAX clamps, wraps or turns into a run that learns nothing."""
    folder = tmp_path / 'runs' / 'run'
    is_mesh = name in ('Compute.data', 'Compute.fsdp', 'Compute.context', 'Compute.tensor')
    value = BELOW[name] - further - (2 if is_mesh and further else 0)  # −1 is what is left
    bindings = [*SMALL, f"Experiment.model = '{model}'", f"Run.folder = '{folder}'", f'{name} = {value}']
    with pytest.raises(ValueError, match=name.split('.')[1]):
        train(*read_settings(CONFIG, bindings))
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    'binding, message',
    [
        ('troll.alpha = -0.1', 'alpha must be at least 0; got -0.1'),
        ('troll.bound = 0', 'bound'),
        ("Compute.dtype = 'float16'", "Compute.dtype is 'float16'; expected one of"),
        ('dppo.bound = 0.1', "reads 'dppo.bound'"),
        (
            "Method.old_policy = 'recompute'\nMethod.importance = @truncated_importance\n"
            'truncated_importance.limit = 0.5',
            'limit of the importance .* at least 1; got 0.5',
        ),
        ('default_tail.probability = -1.0', 'probability of the default tail must be between 0 and 1; got -1.0'),
        ('group_normalised.epsilon = 0', 'epsilon of group_normalised must be positive; got 0'),
    ],
)
def test_what_only_a_traced_program_refuses_comes_before_anything_is_written(tmp_path, model, binding, message):
    """Guards against a run's folder that a run which never began leaves behind."""
    folder = tmp_path / 'runs' / 'run'
    bindings = [*SMALL, f"Experiment.model = '{model}'", f"Run.folder = '{folder}'", binding]
    with pytest.raises(ValueError, match=message):
        train(*read_settings(CONFIG, bindings))
    assert not folder.parent.exists()


def test_a_model_without_weights_leaves_no_folder(tmp_path, model):
    """Guards the one error that comes when the checkpoints are open: what was already there stays."""
    shutil.copytree(model, tmp_path / 'model')
    (tmp_path / 'model/model.safetensors').rename(tmp_path / 'model/pytorch_model.bin')
    (tmp_path / 'runs').mkdir()
    folder = tmp_path / 'runs' / 'of' / 'mine'
    settings = read_settings(CONFIG, [*SMALL, f"Experiment.model = '{tmp_path}/model'", f"Run.folder = '{folder}'"])
    with pytest.raises(FileNotFoundError, match='only safetensors are read'):
        train(*settings)
    assert not (tmp_path / 'runs/of').exists() and (tmp_path / 'runs').exists()


def test_folders_that_are_empty_go(tmp_path):
    """Guards a run that ends before its folder has one for checkpoints."""
    with pytest.raises(KeyError), nothing_left_behind(str(tmp_path / 'runs/run')):
        (tmp_path / 'runs/run').mkdir(parents=True)
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_stays(tmp_path):
    """Guards a run that is continued against the clean-up of one that never began."""
    with pytest.raises(KeyError), nothing_left_behind(str(tmp_path / 'run')):
        (tmp_path / 'run').mkdir()
        (tmp_path / 'run/metrics.jsonl').touch()
        raise KeyError
    assert (tmp_path / 'run/metrics.jsonl').exists()


# Commands.


def raise_deeply(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize('error', [ValueError('got 3,\n  expected 4'), FileNotFoundError('no file')])
def test_an_error_of_the_user_is_one_line(error, capsys, monkeypatch):
    # An OSError with words is its user's wherever it is raised, a ValueError only where this code raises it.
    monkeypatch.setattr('experiments.plumbing.command._OURS', (Path(__file__).parent,))
    with pytest.raises(SystemExit) as exit:
        run_command(raise_deeply(error))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith('error: ') and message.count('\n') == 1
    monkeypatch.setenv('TROLL_TRACEBACK', '1')
    with pytest.raises(type(error)):
        run_command(raise_deeply(error))


@pytest.mark.parametrize(
    'main',
    [lambda: int('x'), lambda: json.loads(''), raise_deeply(KeyError('x'))]
    + [lambda: os.fstat(-1), raise_deeply(TimeoutError())],  # 'Bad file descriptor' and nothing: of what?
)
def test_a_bug_keeps_its_traceback(main, monkeypatch):
    """Guards against a mistake of ours that looks like one of the user: none is raised on purpose, by this code."""
    monkeypatch.setattr('experiments.plumbing.command._OURS', (Path(__file__).parent,))
    with pytest.raises((ValueError, KeyError, OSError)):
        run_command(main)


def test_every_command_is_run_with_care():
    """Guards a command that is added and shows tracebacks."""
    for name, file in FILES.items():
        assert file.read_text().endswith("if __name__ == '__main__':\n    run_command(main)\n"), name


OTHER = [*CONFIG, *SMALL, "Experiment.model = 'model'", "Run.folder = 'new'"]


@pytest.mark.parametrize(
    'command, arguments, message',
    [
        ('train', ['none.gin'], "no configuration file 'none.gin'"),
        ('train', ['bytes.gin'], 'bytes.gin: cannot be read .*expected name.parameter = value'),
        ('train', ['includes.gin'], 'includes.gin: .*none.gin'),
        ('train', ['cycle.gin'], 'the macro %a stands for itself'),
        ('train', [*OTHER, "Run.folder = ''"], "got '' for a folder"),
        ('train', [*OTHER, "Run.folder = 'file/run'"], "files are to be written there.*another folder: 'file/run'"),
        ('train', [*OTHER, "Run.checkpoint_folder = 'file'"], "files are to be written there.*another folder: 'file'"),
        ('train', [*OTHER, "Run.folder = 'gs://a/b'"], 'set Run.checkpoint_folder to a bucket'),
        ('train', [*OTHER, "Experiment.model = 'a/b/c'"], "'a/b/c' is not a folder.*Expected the folder of a model"),
        (
            'train',
            [*OTHER, "Experiment.model = 'empty'"],
            "tokenizer of 'empty' cannot be read.*expected tokenizer.json",
        ),
        (
            'train',
            [*OTHER, 'Method.advantages = @token_mean'],
            'Method.advantages is token_mean, which needs .*max_length',
        ),
        (
            'train',
            [*OTHER, 'troll.region = @token_ratio'],
            'troll.region is token_ratio; expected a function of SparseLogProbs',
        ),
        ('train', [*OTHER, 'Experiment.validation = []'], 'expected at least one'),
        ('train', [*OTHER, 'Method.rewards = []'], 'expected at least one'),
        ('evaluate', ['empty'], 'neither a run .*nor a model'),
        (
            'evaluate',
            ['model', 'part.gin'],
            'Experiment needs Experiment.max_prompt_length, .* bind each, or add a gin file',
        ),
        ('evaluate', ['run'], "'run/model' is not a folder"),
        ('evaluate', ['model', OTHER[0], *OTHER[4:-2], "evaluation.folder = 'file'"], "another folder: 'file'"),
        ('evaluate', ['model', OTHER[0], *OTHER[4:-2], '--step', '5'], 'has no checkpoint of step 5; leave --step out'),
        ('export', ['none', 'new'], "'none' is not the folder of a run"),
        ('replay', ['run'], 'run has no saved rollout.*save_rollout_every'),
        ('plot', ['run'], 'run/metrics.jsonl has no whole line'),
        ('plot', ['empty'], 'empty/metrics.jsonl'),
        ('show', ['empty'], 'empty/samples.jsonl has no samples; expected .*save_samples_every'),
        ('show', ['run', '--step', '1', '2', '3'], 'got 3 steps; expected at most two'),
        ('compare_evaluations', ['run', 'run'], 'responses_1_test_1.jsonl is damaged'),
        ('compare_evaluations', ['empty', 'empty'], "no responses in 'empty'"),
        ('compare', ['--methods', 'none'], r"no method \['none'\]; expected some of"),
        ('compare', ['--only-draw', '--folder', 'empty'], 'no runs in empty'),
        ('warm_start', ['arithmetic_model', "warm_start.folder = 'file'"], "another folder: 'file'"),
        ('warm_start', ['arithmetic_model', 'warm_start.accuracy = 2.0'], 'accuracy must be a share'),
    ],
)
def test_a_command_ends_with_one_line_and_status_2(command, arguments, message, model, tmp_path, monkeypatch, capsys):
    """Guards tracebacks, and what fails only once it has run: a file where the folder of an evaluation is to be."""
    shutil.copytree(model, tmp_path / 'model')
    for folder in ('empty', 'run'):
        (tmp_path / folder).mkdir()
    texts = {'run/config.gin': "include 'quickstart'\ninclude 'troll'\n", 'run/metrics.jsonl': '{"step": 1, "rew'}
    texts |= {'cycle.gin': 'a = %b\nb = %a\nRun.steps = %a\n', 'includes.gin': "include 'none.gin'\n", 'file': ''}
    texts |= {'part.gin': 'Experiment.task = @Arithmetic()\n'}
    texts |= {'run/responses_1_test_1.jsonl': '{"answer": "3"}\n'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'bytes.gin').write_bytes(b'\xff\xfe')
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [command, *arguments])
    with pytest.raises(SystemExit) as exit:
        run_command(importlib.import_module(f'experiments.{command}').main)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert exit.value.code == 2 and len(errors) == 1 and re.search(message, errors[0]), errors
    assert sorted(tmp_path.rglob('*')) == before


def test_a_command_that_fails_writes_one_line(tmp_path):
    """Guards what no test within this process sees: that the module is run with care, and its status."""
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.train', *CONFIG, 'Run.steps = "many"'],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]  # before it libraries may warn
    assert done.returncode == 2 and last.startswith("error: Run.steps is 'many'; expected a whole number")
    assert 'Traceback' not in done.stderr and not done.stdout and not list(tmp_path.iterdir())
