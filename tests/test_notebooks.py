"""The notebooks run from top to bottom, and their .py and .ipynb files are equal."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

SHORT = {
    "03-your-own-images": """
assert len(data.train) == 272 and data.class_names == ("clocks", "flags")
assert distance["teacher, 25 steps"] == 0 < min(value for name, value in distance.items() if "25" not in name)
""",
    "04-samplers": """
assert schedule("mix", 2, s1=0.6) == [(0, pytest.approx(0.6)), (pytest.approx(0.6), 1)]
assert quality["student/mix/1"] == quality["student/consistency/1"] < 0.45 < 1 < quality["student/euler/1"] / 5
assert quality["student/consistency/4"] < 0.28
assert min(by_end, key=by_end.get) in ("student/mix/2?s1=0.7", "student/mix/2?s1=0.8")
assert min(by_schedule, key=by_schedule.get) == specs["default"]
assert len(frames) == 9 and sum("hidden" not in frame for frame in frames) == 1
""",
    "05-text-to-image": """
red, green, blue = (numpy.asarray(in_all_colours("square")[colours.index(name)]).mean((0, 1)) for name in
                    ("red", "green", "blue"))
assert (red.argmax(), green.argmax(), blue.argmax()) == (0, 1, 2)
assert by_scale[1.0] != by_scale[2.5] != by_scale[5.0]
assert set(first) == {"loss/consistency", "loss/flow_matching", "loss/noise_to_noisy", "loss/total"}
assert 0.3 < first["loss/total"] < 3
""",
    "06-imagenet-checkpoint": """
assert difference == start == 0 and same and teacher.prediction == "velocity"
assert max(curves["this file"]) < 0.5 < 1 < min(map(max, (curves["time reversed"], curves["latents times 3"])))
assert measured["fd/teacher/euler/50"] < 0.5 < measured["fd/teacher/euler/4"] < 0.2 * measured["fd/teacher/euler/1"]
""",
    "07-compare": """
products = [float(row.split("|")[4]) for row in sections["Cost"].splitlines() if row.startswith(("| de", "| mean"))]
assert len(products) == 2 and max(products) < 1.5 * min(products)
assert {"Quality: fd", "Gradient norms", "Samples", "Error on the triangle"} < sections.keys()
assert "not measured" not in Path("report.md").read_text()
""",
}
"""Statements on the variables of a notebook that was run with few training steps, by its name."""


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


@named(NOTEBOOKS)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DECM_NOTEBOOK_STEPS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    checks = "import numpy, pytest\n" + SHORT.get(path.stem, "")
    notebook.cells.append(nbformat.v4.new_code_cell(checks))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
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


def test_they_are_small_together():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_600_000


def stored(stem):
    """Return the stored text of a notebook's outputs."""
    cells = nbformat.read(FOLDER / f"{stem}.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.data.get("text/markdown", "") for output in outputs)


def test_the_student_of_your_own_images_needs_one_step():
    """After the whole training, it is much closer to the teacher at 25 steps than the teacher at 1 step."""
    rows = re.findall(r"(\w+), (\d+) steps? +RMS difference from 25 steps +([\d.]+)", stored("03-your-own-images"))
    distance = {(name, int(steps)): float(value) for name, steps, value in rows}
    assert distance["student", 1] < 0.75 * distance["teacher", 1]


def test_the_compared_students_are_better_than_the_teacher_at_few_steps():
    rows = re.findall(r"\| (\w+/\w+/\d+) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", stored("07-compare"))
    values = {spec: (float(de_cm), float(mean_flow)) for spec, de_cm, mean_flow in rows}
    assert max(values["student/mix/1"]) < 0.7 * min(values["teacher/euler/1"])
    assert min(values["student/mix/2"]) < 0.7 * min(values["teacher/euler/2"])
