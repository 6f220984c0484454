"""The notebooks run as they are, from the folders that one would start them in, and keep their outputs."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parent.parent
NOTEBOOKS = {'projection': 7, 'train': 1, 'run': 1, 'replay': 1}  # and their figures
# A notebook's code is tested on a model that has not learnt to work problems, with two steps and fewer objectives.
SHORTER = {
    r'(warm_start\(.*)\)': r'\1, width=16, layers=2, batch=8, accuracy=0.0, mixed_steps=2)',
    r'(\bsteps ?= ?)\d+': r'\g<1>2',
    r"(_every ?= ?|'lag': )\d+": r'\g<1>1',
    r"'clip', 'dppo', 'spo', ": '',
}


def read(name: str):
    return nbformat.read(REPOSITORY / f'notebooks/{name}.ipynb', as_version=4)


def run(notebook, folder: Path) -> None:
    """In a kernel of its own: a notebook may switch JAX to float64. A cell that raises is a CellExecutionError."""
    NotebookClient(
        notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(folder)}}
    ).execute()


def figures(notebook) -> int:
    return sum('image/png' in output.get('data', {}) for cell in notebook.cells for output in cell.get('outputs', ()))


@pytest.mark.parametrize(
    'name', ['projection', *(pytest.param(x, marks=pytest.mark.slow) for x in ('train', 'run', 'replay'))]
)
def test_every_cell_runs_and_draws(name, monkeypatch):
    """Guards against a library that moved on without its notebooks, whose own assertions run here too."""
    monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1'))
    notebook = read(name)
    for cell in notebook.cells:
        for pattern, shorter in SHORTER.items():
            cell.source = re.sub(pattern, shorter, cell.source)
    run(notebook, REPOSITORY / 'notebooks')
    assert figures(notebook) == NOTEBOOKS[name]


def test_imports_from_the_root():
    """Guards against a notebook that finds the library from its own folder alone."""
    notebook = read('projection')
    first = next(i for i, cell in enumerate(notebook.cells) if 'from troll_jax' in cell.source)
    notebook.cells = notebook.cells[: first + 1]
    run(notebook, REPOSITORY)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_outputs_are_kept(name):
    """Guards notebooks that show nothing where they are only read, or show an error or the machine they were run on."""
    notebook = read(name)
    assert figures(notebook) == NOTEBOOKS[name]
    for cell in notebook.cells:
        for output in cell.get('outputs', ()):
            assert output.output_type != 'error' and output.get('name') != 'stderr'
    assert str(Path.home()) not in nbformat.writes(notebook)
