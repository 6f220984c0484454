"""What the README says of the repository is so."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / 'README.md').read_text()


def test_the_file_tree_is_complete_and_true():
    """Guards against files that a newcomer is not told of, and against a tree that lists what has moved."""
    tree = re.search(r'```\n(experiments/\n.*?)```', README, re.DOTALL)[1]
    listed, folder = set(), ''
    for line in tree.splitlines():
        name, _, comment = line.strip().partition(' ')
        if not line.startswith(' '):
            folder = inner = name
        elif name.endswith('/'):
            inner = folder + name
            listed.update(inner + file for file in re.findall(r'[\w.]+\.py', comment))
        else:
            listed.add((inner if line.startswith('    ') else folder) + name)
    files = {
        str(path.relative_to(REPOSITORY))
        for folder, pattern in [('experiments', '*.py'), ('configs', '*.gin'), ('troll_jax', '*.py')]
        for path in (REPOSITORY / folder).rglob(pattern)
        if path.name != '__init__.py'
    }
    # Files of data, models and ablations are named by the table of the paper's experiments: test_paper_configs.py.
    folders = ('data', 'models', 'ablations', 'objectives')
    in_tables = {file for file in files if file.startswith(tuple(f'configs/{folder}/' for folder in folders))}
    assert listed == files - in_tables and in_tables


def test_the_table_of_methods_is_complete():
    """Guards against a method that nobody finds, and against one that is gone."""
    table = re.search(r'\| file \| objective \|.*?\n\n', README, re.DOTALL)[0]
    listed = {name for row in table.splitlines() for name in re.findall(r'`(\w+)`', row[2:].partition('|')[0])}
    assert listed == {file.stem for file in (REPOSITORY / 'configs/objectives').glob('*.gin')}


def test_links_and_commands_lead_somewhere():
    """Guards against dead links, and against commands of modules, configurations or targets that do not exist."""
    links = re.findall(r'\]\(([^)#]+)\)', README)
    assert links
    for link in links:
        assert link.startswith('https://') or (REPOSITORY / link).exists(), link
    modules = re.findall(r'python -m (experiments(?:\.\w+)+)', README)
    configs = re.findall(r'configs/[\w/]+\.gin', README)
    targets = re.findall(r'^make (\w+)', README, re.MULTILINE)
    assert modules and configs and targets
    for module in modules:
        assert (REPOSITORY / (module.replace('.', '/') + '.py')).is_file(), module
    for config in configs:
        assert (REPOSITORY / config).is_file(), config
    makefile = (REPOSITORY / 'Makefile').read_text()
    for target in targets:
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


def test_continuous_integration_runs_the_readmes_test_command():
    """Guards against tests that pass for the machine that checks and not for those who read the README."""
    assert 'make test' in README
    assert re.search(r'^make test$', (REPOSITORY / '.ci/run').read_text(), re.MULTILINE)
