"""The notebooks run as they are, from the folders that one would start them in, and keep their outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parent.parent
NOTEBOOKS = {'projection': 7, 'train': 1, 'run': 1, 'replay': 1}  # and their figures
FEWER = "'clip', 'dppo', 'spo', "  # objectives that the test of the notebook leaves out: each takes half a minute


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
def test_every_cell_runs_and_draws(name):
    """Guards against a library that moved on without its notebooks, whose own assertions run here too."""
    notebook = read(name)
    for cell in notebook.cells:
        cell.source = cell.source.replace(FEWER, '')
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
