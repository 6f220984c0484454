"""The command `troll`: its commands, shipped configurations by name, what it says of mistakes, its help, the wheel."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import __main__
from experiments.plumbing.command import read_command_line
from experiments.plumbing.gin_files import FILES, ROOT, Config, find_file, settable
from experiments.plumbing.names import NAMES, SETTINGS
from experiments.plumbing.settings_help import describe, documented

REPOSITORY = Path(__file__).parent.parent


def troll(monkeypatch, capsys, *arguments: str) -> str:
    """What the command prints before it ends."""
    monkeypatch.setattr(sys, 'argv', ['troll', *arguments])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    try:
        __main__.main()
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, str) else ''.join(capsys.readouterr())
    return capsys.readouterr().out


def test_commands_are_listed_with_what_they_do(monkeypatch, capsys):
    """Guards a command that nobody finds, and a help that is that of another program."""
    listed = troll(monkeypatch, capsys)
    assert listed == troll(monkeypatch, capsys, '--help')
    assert re.search(r'^  evaluate +Evaluates a run, one of its checkpoints, or a model', listed, re.MULTILINE)
    assert "no command 'trian'. Did you mean 'train'?" in troll(monkeypatch, capsys, 'trian', 'gsm8k')
    assert troll(monkeypatch, capsys, 'export', '--help').startswith('usage: troll export ')


def test_shipped_configurations_have_names(tmp_path, monkeypatch):
    """Guards names that depend on the working folder, or that a file of a user's takes over unasked."""
    monkeypatch.chdir(tmp_path)
    for name in ('troll', 'troll.gin'):
        Path(name).write_text('Run.steps = 3')
    shipped = ROOT / 'configs/objectives/troll.gin'
    assert find_file('troll') == find_file('objectives/troll') == find_file('configs/objectives/troll.gin') == shipped
    assert find_file('troll.gin').read_text() == 'Run.steps = 3'
    for file in FILES:
        assert find_file(file.relative_to(ROOT / 'configs').with_suffix('')) == file


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('dapo', "several configurations are called 'dapo'; write data/dapo or objectives/dapo"),
        ('qwen3_06b', "no configuration is called 'qwen3_06b'. Did you mean 'qwen3_0_6b'?"),
        ('own', "Did you mean 'own.gin'? Files of your own end with .gin."),
        ('owm.gin', "no configuration file 'owm.gin', in "),
    ],
)
def test_a_name_that_is_of_none_or_several(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('own.gin').touch()
    with pytest.raises(ValueError, match=re.escape(message)):
        find_file(name)


def test_files_and_bindings_are_told_apart(monkeypatch):
    """Guards a name that is read as a binding, and the other way round, in any order."""
    words = ['adamw.b1=0.5', 'gsm8k', 'qwen3_0_6b', 'import math', 'troll', "Experiment.model='x=y'"]
    monkeypatch.setattr(sys, 'argv', ['troll train', *words])
    config = read_command_line('')
    assert config.get('Run.folder') == 'runs/gsm8k_qwen3_0_6b_troll' and config.get('Experiment.model') == 'x=y'


def test_files_are_included_from_beside_the_file(tmp_path, monkeypatch):
    """Guards files that can only be read in the folder that they are in."""
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/base.gin').write_text("include 'quickstart'\nRun.steps = 7\n")
    (tmp_path / 'a/mine.gin').write_text("include 'base.gin'\n")
    monkeypatch.chdir(tmp_path)
    assert Config(['a/mine.gin']).get('Run.steps') == 7


@pytest.mark.parametrize(
    ('words', 'form'),
    [
        (['--Method.minibatch_prompts=3'], 'write Method.minibatch_prompts=3'),
        (['--learning-rate', '1e-6'], 'write adamw.learning_rate=…'),
        (['Run.folder=runs/x'], """write "Run.folder = 'runs/x'\""""),
        (['Experiment.model = Qwen/Qwen3-0.6B'], """write "Experiment.model = 'Qwen/Qwen3-0.6B'\""""),
        (['Run.keep_best=true'], 'write "Run.keep_best = True"'),
        (['Compute.slots=null'], 'write "Compute.slots = None"'),
        (['Method.objective=troll'], 'write "Method.objective = @troll"'),
        (['bare.gin'], "bare.gin: not a value; write Run.folder = 'runs/x' in line 2"),
    ],
)
def test_what_is_written_as_elsewhere_is_told_its_form(words, form, tmp_path, monkeypatch, capsys):
    """Guards those who come from other programs against errors that only say that it is wrong."""
    (tmp_path / 'bare.gin').write_text('Run.steps = 3\nRun.folder = runs/x  # mine\n')
    monkeypatch.chdir(tmp_path)
    assert form in troll(monkeypatch, capsys, 'train', 'quickstart', *words)


def test_a_misspelt_reference_names_a_few():
    with pytest.raises(ValueError) as error:
        Config([], ['Method.aggregation = @tokn_mean'])
    assert "Did you mean 'token_mean' or" in str(error.value) and 'GSM8K' not in str(error.value)


def test_help_has_every_setting(monkeypatch, capsys):
    """Guards settings that nobody finds, or without a word of what they are."""
    text = troll(monkeypatch, capsys, 'train', '--help')
    assert '\n  Run.evaluate_every = 10 (int): steps between evaluations of' in text
    for kind in SETTINGS:
        assert describe(kind.__name__, kind) in text and set(settable(kind)) <= documented(kind).keys()
    assert '  AMC.source = None (str | None): see `MathProblems`' in troll(
        monkeypatch, capsys, 'train', '--help', 'AMC'
    )
    assert "Did you mean 'adamw'?" in troll(monkeypatch, capsys, 'train', '--help', 'adam')
    for name, target in NAMES.items():
        assert describe(name, target).startswith(f'{name}: '), name


def test_the_wheel_has_every_package():
    """Guards an installation that lacks a new folder."""
    listed = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['tool']['setuptools']['packages']
    folders = {path.parent for top in ('troll_jax', 'experiments') for path in (REPOSITORY / top).rglob('__init__.py')}
    packages = {'.'.join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert sorted(listed) == sorted(packages | {'experiments.configs'})
