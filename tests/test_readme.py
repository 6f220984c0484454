"""The README and the documents are true of the repository."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from documents import blocks

import experiments.train
from experiments.__main__ import FILES as COMMANDS
from experiments.plumbing.gin_files import Config, find_file
from troll_jax.experiment import Experiment
from troll_jax.settings import Compute, Method, Run, Sampling

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / 'README.md').read_text()
DOCUMENTS = [
    REPOSITORY / 'README.md',
    REPOSITORY / 'configs/README.md',
    REPOSITORY / 'CONTRIBUTING.md',
    *sorted((REPOSITORY / 'docs').rglob('*.md')),
]
named = lambda path: str(path.relative_to(REPOSITORY))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', document.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading).lower().replace(' ', '-') for heading in headings}


def test_the_readme_is_short():
    """Guards against a first page that nobody reads to its end."""
    assert len(README.splitlines()) <= 130


def test_the_table_of_methods_is_complete():
    """Guards against a method that nobody finds, and against one that is gone."""
    text = (REPOSITORY / 'configs/README.md').read_text()
    table = re.search(r'\| file \| objective \|.*?\n\n', text, re.DOTALL)[0]
    listed = {name for row in table.splitlines() for name in re.findall(r'`(\w+)`', row[2:].partition('|')[0])}
    assert listed == {file.stem for file in (REPOSITORY / 'configs/objectives').glob('*.gin')}


def test_the_index_has_every_document():
    """Guards against a document that nobody finds."""
    index = (REPOSITORY / 'docs/README.md').read_text()
    for document in (REPOSITORY / 'docs').glob('*.md'):
        assert document.name == 'README.md' or f']({document.name}' in index, document.name


@pytest.mark.parametrize('document', DOCUMENTS, ids=named)
def test_links_lead_somewhere(document):
    """Guards against files and headings that have moved on without the links to them."""
    for link in re.findall(r'\]\(([^)]+)\)', document.read_text()):
        if link.startswith('https://'):
            continue
        path, _, anchor = link.partition('#')
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('document', DOCUMENTS, ids=named)
def test_what_is_named_exists(document):
    """Guards against commands, configurations, files, tests and targets that do not exist."""
    text = document.read_text()
    for module in re.findall(r'python -m ((?:experiments|tests)(?:\.\w+)+)', text):
        assert (REPOSITORY / (module.replace('.', '/') + '.py')).is_file(), module
    for command, words in re.findall(r'(?:^ *|`|/)troll (\w+)((?: [\w/.-]+)*)', text, re.MULTILINE):
        assert command in COMMANDS, command
        names = words.partition(' -')[0].split() if command in ('train', 'evaluate', 'plan') else []
        for name in names[command == 'evaluate' :]:
            assert name.endswith('.gin') or name.isupper() or find_file(name), name
    for path in re.findall(r'\b(?:configs|experiments|troll_jax|tests|docs|notebooks)/[\w./-]+\.\w+', text):
        assert (REPOSITORY / path).exists(), path
    for path, test in re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', text):
        assert re.search(rf'^def {test}\(', (REPOSITORY / path).read_text(), re.MULTILINE), test
    makefile = (REPOSITORY / 'Makefile').read_text()
    for target in re.findall(r'^make (\w+)', text, re.MULTILINE) + re.findall(r'`make (\w+)`', text):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


class Understood(Exception):
    """A command has read its arguments."""


@pytest.mark.parametrize('document', DOCUMENTS, ids=named)
def test_commands_are_understood(document, monkeypatch):
    """Guards examples with options, configurations or settings that are no longer there."""

    def understood(parse):
        def wrapped(*args):
            raise Understood(parse(*args))

        return wrapped

    for name in ('parse_args', 'parse_intermixed_args'):
        monkeypatch.setattr(argparse.ArgumentParser, name, understood(getattr(argparse.ArgumentParser, name)))
    for line in '\n'.join(blocks(document.read_text(), 'sh')).replace('\\\n', ' ').splitlines():
        command = re.match(r'(?:troll |python -m experiments\.)([\w.]+)(.*)', line)
        if command is None or ' --help' in line:
            continue
        name, arguments = f'experiments.{command[1]}', shlex.split(command[2], comments=True)
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, 'argv', [name, *arguments])
        with pytest.raises(Understood):  # and not SystemExit
            module.main()
        commands = [getattr(module, x) for x in ('evaluation', 'warm_start') if hasattr(module, x)]
        Config([], [word for word in arguments if ' = ' in word], commands)


@pytest.mark.parametrize('document', DOCUMENTS, ids=named)
def test_examples_of_gin_files_are_read(document, tmp_path, own_files):
    """Guards against bindings that are renamed, and examples that are no longer valid."""
    found = [block for block in blocks(document.read_text()) if re.search(r'^[\w/]+\.\w+ = ', block, re.MULTILINE)]
    assert found or document not in DOCUMENTS[:2]
    for i, block in enumerate(found):
        (tmp_path / f'{i}.gin').write_text(block)
        Config([tmp_path / f'{i}.gin'])


@pytest.mark.parametrize('document', DOCUMENTS, ids=named)
def test_bindings_in_the_text_exist(document):
    """Guards against names of settings that are no longer there."""
    kinds = {kind.__name__: kind for kind in (Experiment, Sampling, Method, Compute, Run)}
    for kind, name in re.findall(rf'\b({"|".join(kinds)})\.(\w+)', document.read_text()):
        assert hasattr(kinds[kind], name) or name in kinds[kind].__dataclass_fields__, f'{kind}.{name}'


def test_the_projection_of_the_readme():
    """Guards against a first example that is no longer so."""
    code = blocks(README, 'python')[0]
    log_probs, old = (jax.nn.log_softmax(jnp.array(x)) for x in ([0.0, 3.0, 1.0], [1.0, 0.0, 2.0]))
    names = {'log_probs': log_probs, 'old_log_probs': old}
    exec(code, names)
    assert 0.049 < names['projection'].kl <= 0.05


def test_the_script_of_the_readme_trains(monkeypatch):
    """Guards against a setting of the example that is renamed, or needs another. `train` has tests of its own."""
    calls = []
    monkeypatch.setattr(experiments.train, 'train', lambda *settings: calls.append(settings))
    exec(blocks(README, 'python')[1], {})
    assert [tuple(map(type, settings)) for settings in calls] == [(Experiment, Sampling, Method, Compute, Run)]


def test_continuous_integration_runs_the_readmes_test_command():
    """Guards against tests that pass for the machine that checks and not for those who read the README."""
    assert 'make test' in README
    assert re.search(r'^make test$', (REPOSITORY / '.ci/run').read_text(), re.MULTILINE)
