"""The notebooks run from top to bottom, and their .py and .ipynb files are equal."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@named(NOTEBOOKS)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DECM_NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()


def test_each_has_both_forms():
    assert NOTEBOOKS
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.py"))


@named(NOTEBOOKS)
def test_its_two_forms_have_the_same_cells(path):
    script, notebook = jupytext.read(path.with_suffix(".py")), jupytext.read(path)
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ], f"{path.name} and its .py differ: run jupytext --sync {path}"


def test_a_custom_method_takes_25_lines():
    """Counts all code, including imports, except the setup in the first cell and the figures."""
    cells = [cell.source for cell in jupytext.read(FOLDER / "02-your-own-method.py").cells if cell.cell_type == "code"]
    method = [source for source in cells[1:] if "plt." not in source]
    lines = [line for source in method for line in source.splitlines() if line.strip() and not line.startswith("#")]
    assert len(method) == 2
    assert len(lines) <= 25


@named(NOTEBOOKS)
def test_it_is_small_and_was_run_without_an_error(path):
    assert path.stat().st_size < 1_000_000
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
