"""Write one report on several runs."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from decm_lightning.compare import measure
from decm_lightning.compare.page import html, line_plot
from decm_lightning.compare.runs import Run, compared, read_runs
from decm_lightning.evaluation.table import FLOORS
from decm_lightning.evaluation.table import markdown_table as table
from decm_lightning.files import atomic
from decm_lightning.progress import Progress

DISTANCES = ("fid", "sfid", "fd", "fd_dinov2", "kid", "paired_rmse", "paired_features")
"""Columns in which the smallest value is the best; in others it is the largest."""
NAMES = ("model", "sampler", "steps", "options", "nfe")
"""Columns of a table that are not measured."""
TEXTS: dict[Callable[[Run], Any], str] = {
    measure.cost: "Forward passes per sample and step, where a backward pass counts 2, times steps.",
    measure.samples: "Rows: 1, 2 and 4 steps. The noise and conditions of all runs are the same.",
    measure.error_on_the_triangle: "Root mean square of u(x_t, t, s) minus the mean velocity of the teacher's ODE from "
    "t to s. Upper edge: data edge, s = 1. Left edge: noise edge, t = 0. Diagonal: s = t.",
}


class Report:
    """The paragraphs of a report in Markdown, and its figures, SVG and PNG files by name.

    Args:
        runs: at least two.
        stem: the name of the report, with which the names of its figures begin.
    """

    def __init__(self, runs: Sequence[Run], stem: str) -> None:
        self.runs, self.stem = runs, stem
        self.lines = [f"# Comparison of {', '.join(run.name for run in runs)}"]
        self.figures: dict[str, bytes] = {}

    def add_quality(self) -> None:
        """Add the table and the curves of each metric."""
        specs = {spec: row for run in self.runs for spec, row in run.rows.items()}
        for metric in dict.fromkeys(name for row in specs.values() for name in row if name not in NAMES):
            values = {spec: {run.name: run.rows.get(spec, {}).get(metric) for run in self.runs} for spec in specs}
            rows = [{"samples": spec, "NFE": row["nfe"], **values[spec]} for spec, row in specs.items()]
            self.lines += [f"## Quality: {metric}", table(rows)]
            if curves := _curves(self.runs, metric):
                plot = line_plot(curves, "network evaluations per sample (NFE), best sampler", metric, log_x=True)
                self.lines.insert(-1, self.figure(f"{metric}.svg", plot))
        floors = [{"run": run.name, **row} for run in self.runs for row in run.quality.get("floors", ())]
        if floors:
            names = dict.fromkeys(name for row in floors for name in row)
            self.lines += [f"## Floors\n\n{FLOORS}", table([{name: row.get(name) for name in names} for row in floors])]

    def add_measured(self, function: Callable[[Run], Any]) -> None:
        """Add what a function of `measure` returns, and the reason for each run that cannot be measured."""
        title = function.__name__.replace("_", " ")
        self.lines.append(f"## {title.capitalize()}")
        results: dict[str, Any] = {}
        for run in Progress(self.runs, desc=title, unit="run"):
            try:
                results[run.name] = function(run)
            except measure.NOT_MEASURED as error:
                self.lines.append(f"{run.name}: not measured, because {' '.join(str(error).split())}")
        if function is measure.gradient_norms and results:
            self.lines.append(self.figure("norms.svg", line_plot(results, "training step", title, log_x=False)))
            norms = {run: [norm for _, norm in points] for run, points in results.items()}
            results = {run: (b"", {"median": median(each), "largest": max(each)}) for run, each in norms.items()}
        kind = "png" if function is measure.samples else "svg"
        figures = {run: self.figure(f"{run}-{title}.{kind}", figure) for run, (figure, _) in results.items() if figure}
        rows = [{"run": run, **values} for run, (_, values) in results.items() if values]
        self.lines += [TEXTS.get(function, ""), *(table(each) for each in ([figures], rows) if any(each))]

    def figure(self, name: str, content: bytes) -> str:
        """Add a figure, and return the Markdown that shows it."""
        file = re.sub(r"[^\w.]+", "-", f"{self.stem}-{name}")
        self.figures[file] = content
        return f"![{name}]({file})"


def compare(folders: Sequence[str], out: Path, triangle: bool, device: str, trust: bool) -> list[Path]:
    """Write a report on runs that were measured with the same protocol, and return its files.

    Args:
        folders: at least two folders: of `decm fit` and `decm test`, or exported with a record.
        out: an .html or .md file.
        triangle: whether to integrate the teacher and measure the error on the triangle of times.
        device: the device of the networks.
        trust: import classes from outside this package that a folder names, which runs their code.

    Raises:
        OSError: if a folder cannot be read, or the report cannot be written.
        ValueError: if `out` has another suffix, a folder is not a tested run, or the protocols differ.
    """
    if out.suffix not in (".html", ".md"):
        raise ValueError(f"out must end with .html or .md: got {out}")
    runs = read_runs(folders, device, trust)
    protocol, differences = compared(runs)
    report = Report(runs, out.stem)
    report.add_quality()
    for function in (
        measure.gradient_norms,
        measure.cost,
        measure.samples,
        *[measure.error_on_the_triangle] * triangle,
    ):
        report.add_measured(function)
    report.lines += ["## Protocol of all runs", table(protocol)]
    report.lines += ["## Differences", table(differences)] if differences else []
    markdown = "\n\n".join(report.lines) + "\n"
    files = {out.name: markdown.encode(), **report.figures}
    if out.suffix == ".html":
        files = {out.name: html(markdown, report.figures)}
    for name, content in files.items():
        with atomic(out.with_name(name)) as partial:
            partial.write_bytes(content)
    return [out.with_name(name) for name in files]


def _curves(runs: Sequence[Run], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Return the curve of each run, and then that of the teacher, or of each teacher if they differ."""
    teachers = {repr(run.model["teacher"]) for run in runs if run.model.get("teacher")}
    best = min if metric in DISTANCES else max
    series: dict[str, dict[float, float]] = {run.name: {} for run in runs}
    for run in runs:
        teacher = "teacher" if len(teachers) == 1 else f"teacher of {run.name}"
        for row in run.rows.values():
            # A logarithmic axis has no place for other values.
            if (row.get(metric) or 0) > 0:
                name = teacher if row["model"] == "teacher" and run.model.get("teacher") else run.name
                points, nfe = series.setdefault(name, {}), row["nfe"] or row["steps"]
                points[nfe] = best(row[metric], points.get(nfe, row[metric]))
    return {name: sorted(points.items()) for name, points in series.items() if points}
