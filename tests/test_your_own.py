"""Data, rewards, tasks and objectives of one's own, as docs/your_own.md shows them."""

import json
import sys

import numpy as np
import pytest
from documents import YOUR_OWN, blocks
from loop import REPOSITORY, SMALL, settings
from tiny import save_qwen3

from experiments.plumbing.gin_files import Config
from experiments.plumbing.gin_text import to_gin
from experiments.plumbing.validation import make_validation
from experiments.train import train
from troll_jax.data.tokenizer import character_tokenizer
from troll_jax.experiment import Experiment
from troll_jax.metrics import read_metrics
from troll_jax.rewards.pool import Grader
from troll_jax.settings import Compute, Method

DATA, SCORE, REWARDS, TASK, OBJECTIVE = blocks(YOUR_OWN)
BRIEF = ['MathProblems.instruction = None', 'MathProblems.places = ("last number",)']
EXPERIMENT = ["Experiment.model = 'm'", 'Experiment.max_prompt_length = 20', 'Experiment.max_response_length = 3']


@pytest.fixture
def problems(own_files, monkeypatch):
    """The working folder of a user."""
    rows = [{'question': f'{i} + 1?', 'answer': i + 1, 'topic': str(i % 10)} for i in range(40)]
    (own_files / 'problems.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    monkeypatch.chdir(own_files)
    return own_files


def test_the_examples_train_and_are_evaluated_from_anywhere(problems, tmp_path_factory, monkeypatch):
    """Guards files that are looked for elsewhere than beside the gin file, and a run that does not say where."""
    tokenizer = character_tokenizer(''.join(map(chr, [10, *range(32, 127)])))
    model = save_qwen3(problems / 'model', tokenizer)
    (problems / 'own.gin').write_text('\n'.join([OBJECTIVE, DATA, REWARDS]))
    small = [*SMALL, *BRIEF, 'Experiment.max_prompt_length = 20', 'Run.evaluate_every = 1', 'Run.steps = 1']
    own = settings([problems / 'own.gin'], [*small, f"Experiment.model = '{model}'", "Run.folder = 'run'"])
    train(*own)
    (row,) = (row for row in read_metrics(problems / 'run/metrics.jsonl') if 'reward/mean' in row)
    terms = [row[f'reward/{name}'] for name in ('task', 'brief', 'topic')]
    assert row['reward/mean'] == pytest.approx(np.dot([1, 0.5, 0.2], terms), rel=1e-5) and terms[1] == 0 < terms[2]
    versions = json.loads((problems / 'run/setup.json').read_text())['versions']
    assert {'code of my_losses', 'code of my_rewards'} <= versions.keys()

    monkeypatch.chdir(tmp_path_factory.mktemp('elsewhere'))
    again = Config([problems / 'run/config.gin']).build(Experiment)
    assert again == own[0]
    (problems / 'my_losses.py').unlink()
    with pytest.raises(ValueError, match='there is no Python file .*my_losses.py.*has'):
        Config([problems / 'run/config.gin'])


def test_code_in_the_folder_of_a_run_is_not_run(problems, monkeypatch):
    """Guards against code that came with a run of somebody else's, however its configuration names it."""
    (problems / 'run/more').mkdir(parents=True)
    (problems / 'run/evil.py').write_text('1 / 0\n')
    monkeypatch.syspath_prepend(problems)  # as commands do with the working folder
    monkeypatch.syspath_prepend(problems / 'run')
    paths = ('evil.py', '../my_score.py', str(problems / 'run/evil.py'))
    for line in [*(f"include '{path}'" for path in paths), 'import run.evil', 'import evil']:
        (problems / 'run/config.gin').write_text(line)
        with pytest.raises(ValueError, match='came with the run .*, so it is not run'):
            Config([problems / 'run/config.gin'])
    (problems / 'run/config.gin').rename(problems / 'run/more/config.gin')
    (problems / 'run/config.gin').symlink_to('more/config.gin')
    (problems / 'run/more/config.gin').write_text("include 'evil.py'")
    with pytest.raises(ValueError, match='came with the run'):
        Config([problems / 'run/config.gin'])
    (problems / 'run/config.gin').write_text(f"include '{problems}/my_score.py'\n")
    Config([problems / 'run/config.gin'])


@pytest.mark.parametrize(
    'text',
    [
        "import os\nRun.folder = @os.system()\nos.system.command = 'touch ran'",
        "import subprocess\nRun.folder = @subprocess.Popen()\nsubprocess.Popen.args = ('touch', 'ran')",
        "Run.folder = 'more.py:system'",
    ],
)
def test_gin_files_call_nothing_of_python(tmp_path, monkeypatch, text):
    """Guards against a configuration of somebody else's that starts programs when it is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'more.py').write_text('from os import system\n')
    monkeypatch.setattr(sys, 'path', [*sys.path])
    (tmp_path / 'own.gin').write_text(text)
    with pytest.raises(ValueError, match='is part of Python'):
        Config(['own.gin'])
    assert not (tmp_path / 'ran').exists()


def test_a_task_of_ones_own_and_verls_compute_score(problems):
    """Guards a class that workers cannot import, and a function that is given something else than verl gives it."""
    for name, text in [('scored', SCORE), ('reversed', TASK)]:
        (problems / f'{name}.gin').write_text(text)
    (scored,) = settings_of('scored.gin')
    rows = scored.task.load('train')
    assert rows[3]['messages'] == [{'role': 'user', 'content': '3 + 1?'}]
    truth = json.loads(rows[3]['answer'])
    assert truth == {'ground_truth': 4, 'data_source': 'problems.jsonl', 'extra_info': {}}
    with Grader(scored.task.grade, deadline=scored.task.deadline, workers=1) as grader:
        assert grader(['it is 4', 'it is 5', ''], [rows[3]['answer']] * 3).rewards.tolist() == [1, 0, 0]
    (reverse,) = settings_of('reversed.gin', ['Experiment.held_out = 3'])
    assert len(reverse.task.load('test')) == 10 and reverse.task.grade('21', '21') == 1
    text = to_gin(reverse)
    assert f"include '{problems}/my_task.py'" in text and 'my_task.Reversed.digits = 2' in text


def settings_of(file, bindings=()):
    return [Config([file], [*EXPERIMENT, *bindings]).build(Experiment)]


@pytest.mark.parametrize(
    ('binding', 'said'),
    [
        ("Experiment.task = 'my_tasks.py:Reversed'", r"there is no Python file .*my_tasks.py'.*has \[.*'my_losses.py'"),
        (
            "Experiment.task = 'my_task.py:Revers'",
            r"no function or class 'Revers'.\s*Did you mean 'Reversed'\? It has: ",
        ),
        ("Experiment.task = 'my_rewards.py:brief'", 'is brief; expected a Task, with deadline, grade, load'),
        ("Method.objective = 'my_rewards.py:on_topic'", 'which needs on_topic.completions|on_topic'),
        ("Experiment.task = 'broken.py:Task'", r"broken.py' cannot be imported \(ZeroDivisionError: .*broken.py:2\)"),
        ("Experiment.task = 'json.py:Task'", "json.py' has the name of another module"),
    ],
)
def test_a_reference_to_a_file_that_is_wrong_is_an_error(problems, binding, said):
    """Guards a run that ends in the middle on a mistyped name, and the wrong module of two."""
    (problems / 'broken.py').write_text('x = 0\n1 / x\n')
    (problems / 'json.py').write_text('')
    with pytest.raises(ValueError, match=said):
        Config([], [binding])


def test_a_file_of_ones_own_is_not_trained_on_and_evaluated_alike(problems):
    """Guards a success that is that of memorised answers: a file is both splits, unless rows of it are held out."""
    tokenizer = character_tokenizer(''.join(map(chr, [10, *range(32, 127)])))
    (problems / 'data.gin').write_text(DATA)
    for share, trained in [(0.1, 36), (7, 33), (0, 40)]:
        (experiment,) = settings_of('data.gin', [*BRIEF, f'Experiment.held_out = {share}'])
        prompts = experiment.load_prompts('train', tokenizer)
        assert len(prompts) == trained
        build = lambda experiment=experiment, prompts=prompts: make_validation(
            experiment, tokenizer, int, compute=Compute(), trained_on=prompts
        )
        if share:
            build()
    with pytest.raises(ValueError, match="evaluation set 'test' is what the run trains on; set Experiment.held_out"):
        build()
    (few,) = settings_of('data.gin', [*BRIEF, 'Experiment.max_rows = 3'])
    assert [len(few.load_prompts(split, tokenizer)) for split in ('train', 'test')] == [3, 4]


def test_what_has_no_name_of_its_own_is_saved_by_that_in_its_file(problems):
    """Guards closures, as TRL's factories return them, and plain classes, which a run could not be evaluated with."""
    (problems / 'my_more.py').write_text(
        'from my_task import Reversed\n\n\ndef longer_than(n):\n    return lambda responses: responses.lengths > n\n'
        'longer = longer_than(3)\n\n\nclass Plain:\n    deadline, load, grade = None, Reversed.load, Reversed.grade\n'
    )
    bindings = ["Experiment.task = 'my_more.py:Plain'", "Method.rewards = [('longer', 1.0, 'my_more.py:longer')]"]
    files = ['configs/quickstart.gin', 'configs/objectives/troll.gin']
    config = Config([REPOSITORY / file for file in files], [*EXPERIMENT, *bindings])
    text = to_gin(config.build(Experiment), config.build(Method))
    assert '\nExperiment.task = @my_more.Plain()\n' in text
    assert "\nMethod.rewards = (('longer', 1.0, @my_more.longer),)\n" in text
    (problems / 'again.gin').write_text(text)
    again = Config([problems / 'again.gin'])
    assert to_gin(again.build(Experiment), again.build(Method)) == text
