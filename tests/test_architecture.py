"""docs/architecture.md names every file, and imports point in the directions that it says."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DOCUMENT = (REPOSITORY / 'docs/architecture.md').read_text()
BLOCKS = re.findall(r'^```\n((?:experiments|tests)/\n.*?)^```$', DOCUMENT, re.DOTALL | re.MULTILINE)

# Their files are in the tables of configs/README.md: test_paper_configs.py and test_readme.py.
IN_TABLES = tuple(f'configs/{folder}/' for folder in ('data', 'models', 'hardware', 'ablations', 'objectives'))


def listed_files() -> list[str]:
    """Paths in the order of the document."""
    found, folder = [], ''
    for line in ''.join(BLOCKS).splitlines():
        if line and not line.startswith(' '):
            folder = line
        elif entry := re.fullmatch(r'  (\S+) +\S.*', line):
            found.append(folder + entry[1])
        else:
            assert not line, f'no entry: {line!r}'
    return found


LISTED = listed_files()


def test_every_file_is_listed_and_nothing_else():
    """Guards against files that a newcomer is not told of, and against a list with what has moved."""
    files = {
        str(path.relative_to(REPOSITORY))
        for folder, pattern in [('experiments', '*.py'), ('configs', '*.gin'), ('troll_jax', '*.py'), ('tests', '*.py')]
        for path in (REPOSITORY / folder).rglob(pattern)
        if path.name != '__init__.py'
    }
    modules = {path.stem for folder in ('experiments', 'troll_jax') for path in (REPOSITORY / folder).rglob('*.py')}
    in_tables = {file for file in files if file.startswith(IN_TABLES)}
    of_a_module = {
        file for file in files if re.fullmatch(r'tests/test_(\w+)\.py', file) and Path(file).stem[5:] in modules
    }
    listed = {entry for entry in LISTED if not entry.endswith('/')}
    assert len(listed) == len(LISTED) - sum(entry.endswith('/') for entry in LISTED), 'an entry is listed twice'
    assert listed - files == set(), 'these are gone'
    assert files - in_tables - of_a_module - listed == set(), 'these are missing'
    assert in_tables and of_a_module


def test_every_folder_is_listed():
    """Guards against a package without its line in the table, and a line of one that is gone."""
    table = set(re.findall(r'^\| \[([\w/]+)/\]', DOCUMENT, re.MULTILINE))
    folders = {entry.rpartition('/')[0] for entry in LISTED if not entry.endswith('/')} | {'notebooks', 'docs'}
    assert table == folders - {'troll_jax/data/tasks', 'tests/faults'}
    for entry in LISTED:
        assert (REPOSITORY / entry).exists(), entry


def imports(file: str) -> set[str]:
    """Paths of the files of this repository that a file imports, and 'gin' if it does; also within functions."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f'{node.module}.{name.name}' for name in node.names)}
        elif isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    paths = {f'{name.replace(".", "/")}.py' for name in names}
    return {path for path in paths if (REPOSITORY / path).is_file()} | (
        {'gin'} & {name.split('.')[0] for name in names}
    )


CODE = [file for file in LISTED if file.startswith(('experiments/', 'troll_jax/')) and file.endswith('.py')]


def order(file: str) -> tuple[int, int]:
    """The place of a file of troll_jax: that of its folder in the list of troll_jax, and its own in its folder."""
    top = 'troll_jax/' + file.split('/')[1] + ('/' if file.count('/') > 1 else '')
    return LISTED.index(top), LISTED.index(file)


@pytest.mark.parametrize('file', CODE)
def test_imports_point_downwards(file):
    """Guards the mathematics against models, models against settings, and the library against gin and commands."""
    found = imports(file)
    assert 'gin' not in found or file == 'experiments/plumbing/gin_files.py'
    for other in found - {'gin'}:
        if file.startswith('troll_jax/'):
            assert other.startswith('troll_jax/'), other
            assert order(other) > order(file), f'{other} stands above {file} in docs/architecture.md'
        if file.startswith('experiments/plumbing/'):
            assert not re.fullmatch(r'experiments/\w+\.py', other), other
            assert not other.startswith(('experiments/studies/', 'experiments/benchmarks/')), other
        if file.startswith('troll_jax/ops/'):
            assert other.startswith('troll_jax/ops/') or other == 'troll_jax/types.py', other
        if file.startswith('troll_jax/models/'):
            known = ('models/', 'ops/', 'hub', 'sharding', 'types', 'typechecks')
            assert other.startswith(tuple(f'troll_jax/{name}' for name in known)), other
