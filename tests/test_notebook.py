"""The notebook runs as it is, from both folders that one would start it in."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def notebook():
    return nbformat.read(REPOSITORY / 'notebooks/projection.ipynb', as_version=4)


def run(notebook, folder: Path) -> None:
    """In a kernel of its own: the notebook switches JAX to float64. A cell that raises is a CellExecutionError."""
    NotebookClient(
        notebook, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(folder)}}
    ).execute()


def test_every_cell_runs_and_draws(notebook):
    """Guards against a library that moved on without its notebook, whose own assertions run here too.

    They hold the text to what it says: the solver in numpy takes the library's way, the projection silences what
    moved in one direction, the bucket never overestimates.
    """
    run(notebook, REPOSITORY / 'notebooks')
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code' and 'plt.show()' in cell.source]
    assert len(cells) == 7
    for cell in cells:
        assert [output for output in cell.outputs if 'image/png' in output.get('data', {})], cell.source[:200]


def test_imports_from_the_root(notebook):
    """Guards against a notebook that finds the library from its own folder alone."""
    first = next(i for i, cell in enumerate(notebook.cells) if 'from troll_jax' in cell.source)
    notebook.cells = notebook.cells[: first + 1]
    run(notebook, REPOSITORY)


def test_no_outputs_are_stored(notebook):
    """Guards against figures in the history of the repository that are no longer what the code draws."""
    for cell in notebook.cells:
        assert not cell.get('outputs') and cell.get('execution_count') is None
