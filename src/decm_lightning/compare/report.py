"""The report: an HTML page that needs no other file, or Markdown with its images next to it."""

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from tqdm.auto import tqdm

from decm_lightning.compare import measure
from decm_lightning.compare.measure import NOT_MEASURED, Student
from decm_lightning.compare.page import Section, as_html, as_markdown
from decm_lightning.compare.plots import Point, heat_map, line_plot
from decm_lightning.compare.runs import NAMES, Run, differences, read_runs, shared_protocol
from decm_lightning.files import atomic

DISTANCES = ("fid", "sfid", "fd", "fd_dinov2", "kid")
"""Columns in which the smallest value is the best; in others it is the largest."""
FORMATS = {".html": as_html, ".md": as_markdown}


def compare(
    folders: Sequence[str], out: Path, triangle: bool = True, device: str = "cpu", trust: bool = False
) -> list[Path]:
    """Write a report on runs that were measured with the same protocol, and return its files.

    Args:
        folders: at least two folders: of `decm fit` and `decm test`, or exported with a record.
        out: an .html or .md file.
        triangle: whether to integrate the teacher and measure the error on the triangle of times.
        device: the device of the networks.
        trust: import classes from outside this package that a folder names, which runs their code.

    Raises:
        OSError: if a folder does not exist, or the report cannot be written.
        ValueError: if `out` has another suffix, a folder is not a tested run, or the protocols differ.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"out must end with {' or '.join(FORMATS)}: got {out}")
    runs = read_runs(folders)
    protocol = [{"setting": name, "value": value} for name, value in shared_protocol(runs).items()]
    students = [Student(run, device, trust) for run in runs]
    parts = [_gradients, _cost, _samples, *([_triangle] if triangle else [])]
    with tqdm(total=len(parts) * len(runs), leave=False, disable=None) as bar:
        sections = [*_quality(runs), *(part(students, bar) for part in parts)]
    sections += [Section("Protocol of all runs", table=protocol), _differences(runs)]
    title = f"Comparison of {', '.join(run.name for run in runs)}"
    files = FORMATS[out.suffix](title, sections, out)
    for file, content in files.items():
        with atomic(file) as partial:
            partial.write_bytes(content)
    return list(files)


def _measured(students: Sequence[Student], function: Callable[[Student], Any], section: Section, bar: tqdm) -> dict:
    """Return the results by run, and add the reason to the section if there is none."""
    results = {}
    for student in students:
        bar.set_description(f"{student.run.name}: {section.title.lower()}")
        try:
            results[student.run.name] = function(student)
        except NOT_MEASURED as error:
            section.text.append(f"{student.run.name}: not measured, because {' '.join(str(error).split())}")
        bar.update()
    return results


def _quality(runs: Sequence[Run]) -> list[Section]:
    columns = dict.fromkeys(name for run in runs for row in run.rows.values() for name in row if name not in NAMES)
    metric = next((name for name in columns if name in DISTANCES), next(iter(columns)))
    first = Section(f"Quality: {runs[0].quality['metric']}")
    first.text.append(f"{metric} of the best sampler at each number of network evaluations per sample (NFE).")
    if series := _curves(runs, metric):
        first.figures["quality", ""] = line_plot(series, "NFE", metric, log_x=True)
    sections = [first, *(Section(name) for name in columns if name != metric)]
    for name, section in zip(sorted(columns, key=lambda name: name != metric), sections, strict=True):
        specs = {spec: row for run in reversed(runs) for spec, row in reversed(run.rows.items())}
        for spec, row in reversed(specs.items()):
            values = {run.name: run.rows.get(spec, {}).get(name) for run in runs}
            section.table.append({"model/sampler/steps": spec, "NFE": row["nfe"], **values})
    return sections


def _curves(runs: Sequence[Run], metric: str) -> dict[str, list[Point]]:
    """Return the curve of each run, and that of the teacher, or of each teacher if they differ."""
    curves = {(run.name, model): _curve(run, model, metric) for run in runs for model in ("student", "teacher")}
    curves = {key: curve for key, curve in curves.items() if curve}
    teachers = [curve for (_, model), curve in curves.items() if model == "teacher"]
    is_shared = all(curve == teachers[0] for curve in teachers)
    names = {"student": "{}", "teacher": "teacher" if is_shared else "teacher of {}"}
    return {names[model].format(run): curve for (run, model), curve in curves.items()}


def _curve(run: Run, model: str, metric: str) -> list[Point]:
    sign = 1 if metric in DISTANCES else -1
    best: dict[float, Point] = {}
    for spec, row in run.rows.items():
        x, y = row["nfe"] or row["steps"], row.get(metric) or 0
        # A logarithmic axis has no place for other values.
        if row["model"] == model and y > 0 and sign * y < sign * best.get(x, (x, sign * inf, ""))[1]:
            best[x] = (x, y, f"{spec}, {metric} {y:.4g}")
    return [best[x] for x in sorted(best)]


def _gradients(students: Sequence[Student], bar: tqdm) -> Section:
    section = Section("Gradient norms", ["Norm of the gradient of all losses before clipping."])
    series = _measured(students, lambda student: measure.gradient_norms(student.run), section, bar)
    for name, points in series.items():
        norms = [point[1] for point in points]
        section.table.append({"run": name, "median": median(norms), "largest": max(norms)})
    positive = {name: [(x, y, f"step {x:g}, {y:.3g}") for x, y in each if y > 0] for name, each in series.items()}
    if any(positive.values()):
        section.figures["gradients", ""] = line_plot(positive, "training step", "gradient norm", log_x=False)
    return section


def _cost(students: Sequence[Student], bar: tqdm) -> Section:
    section = Section("Cost", ["Forward passes per sample; a backward pass counts 2. Product: passes times steps."])
    costs = _measured(students, lambda each: (measure.cost_of(each), measure.steps_of(each.run)), section, bar)
    for name, (passes, steps) in costs.items():
        section.table.append({"run": name, "passes per step": passes, "steps": steps, "product": passes * steps})
    return section


def _samples(students: Sequence[Student], bar: tqdm) -> Section:
    section = Section(
        "Samples", [f"Rows: {', '.join(map(str, measure.STEPS))} steps. The noise and conditions are equal."]
    )
    grids = _measured(students, measure.samples, section, bar)
    section.figures |= {("samples", name): png for name, png in grids.items()}
    return section


def _triangle(students: Sequence[Student], bar: tqdm) -> Section:
    section = Section("Error on the triangle")
    section.text.append(
        "Root mean square of u(x_t, t, s) minus the mean velocity of the teacher's ODE from t to s. Upper edge: data "
        "edge, s = 1. Left edge: noise edge, t = 0. Diagonal: s = t."
    )
    errors = _measured(students, measure.triangle_error, section, bar)
    values = [value for each in errors.values() for value in each.values() if value > 0]
    for name, each in errors.items():
        section.figures["triangle", name] = heat_map(each, min(values), max(values))
        regions = {
            "data edge": [e for (t, s), e in each.items() if s == 1],
            "noise edge": [e for (t, s), e in each.items() if t == 0],
            "diagonal": [e for (t, s), e in each.items() if s == t],
            "all": list(each.values()),
        }
        means = {region: (sum(e * e for e in some) / len(some)) ** 0.5 for region, some in regions.items()}
        section.table.append({"run": name, **means})
    return section


def _differences(runs: Sequence[Run]) -> Section:
    names = [run.name for run in runs]
    rows = [{"setting": name, **dict(zip(names, each, strict=True))} for name, each in differences(runs).items()]
    return Section("Differences between the runs", table=rows)
