"""Write one report on several runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tqdm.auto import tqdm

from decm_lightning.compare import measure
from decm_lightning.compare.page import heat_map, html, line_plot, table
from decm_lightning.compare.runs import Run, differences, read_runs, shared_protocol
from decm_lightning.files import atomic

DISTANCES = ("fid", "sfid", "fd", "fd_dinov2", "kid")
"""Columns in which the smallest value is the best; in others it is the largest."""
NAMES = ("model", "sampler", "steps", "options", "nfe")
"""Columns of a table that are not measured."""
TRIANGLE = (
    "Root mean square of u(x_t, t, s) minus the mean velocity of the teacher's ODE from t to s. Upper edge: data edge, "
    "s = 1. Left edge: noise edge, t = 0. Diagonal: s = t."
)


class Report:
    """A report on runs that were measured with the same protocol.

    Args:
        runs: at least two.
        stem: the name of the report, with which the names of its figures begin.

    Attributes:
        lines: paragraphs of Markdown.
        figures: SVG and PNG files by name.

    Raises:
        ValueError: if the protocols differ.
    """

    def __init__(self, runs: Sequence[Run], stem: str) -> None:
        self.protocol = [{"setting": name, "value": value} for name, value in shared_protocol(runs).items()]
        self.runs, self.stem = runs, stem
        self.lines = [f"# Comparison of {', '.join(run.name for run in runs)}"]
        self.figures: dict[str, bytes] = {}

    def add_quality(self) -> None:
        """Add the table and the curves of each metric."""
        specs = {spec: row for run in self.runs for spec, row in run.rows.items()}
        for metric in dict.fromkeys(name for row in specs.values() for name in row if name not in NAMES):
            plot = line_plot(_curves(self.runs, metric), "network evaluations per sample (NFE)", metric, log_x=True)
            values = {spec: {run.name: run.rows.get(spec, {}).get(metric) for run in self.runs} for spec in specs}
            rows = [{"samples": spec, "NFE": row["nfe"], **values[spec]} for spec, row in specs.items()]
            text = "The curves show the best sampler at each number of evaluations."
            self.lines += [f"## Quality: {metric}", text, self._figure(f"{metric}.svg", plot), table(rows)]

    def add_measured(self, triangle: bool) -> None:
        """Add what is measured now, or the reason if it cannot be measured; `triangle` is the slowest part."""
        parts = {"gradient norms": measure.gradient_norms, "cost": measure.cost, "samples": measure.samples}
        parts |= {"error on the triangle": measure.triangle_error} if triangle else {}
        with tqdm(total=len(parts) * len(self.runs), leave=False, disable=None) as bar:
            for title, function in parts.items():
                self.lines.append(f"## {title.capitalize()}")
                results: dict[str, Any] = {}
                for run in self.runs:
                    bar.set_description(f"{run.name}: {title}")
                    try:
                        results[run.name] = function(run)
                    except measure.NOT_MEASURED as error:
                        self.lines.append(f"{run.name}: not measured, because {' '.join(str(error).split())}")
                    bar.update()
                if results:
                    getattr(self, f"_{function.__name__}")(results)

    def write(self, out: Path) -> list[Path]:
        """Add the settings, write the report as HTML, or as Markdown with its figures next to it; return the files."""
        self.lines += ["## Protocol of all runs", table(self.protocol), "## Differences"]
        self.lines += [table(rows)] if (rows := differences(self.runs)) else ["None."]
        markdown = "\n\n".join(self.lines) + "\n"
        files = {out.name: html(markdown, self.figures).encode()}
        if out.suffix == ".md":
            files = {out.name: markdown.encode(), **self.figures}
        for name, content in files.items():
            with atomic(out.with_name(name)) as partial:
                partial.write_bytes(content)
        return [out.with_name(name) for name in files]

    def _figure(self, name: str, content: bytes) -> str:
        file = re.sub(r"[^\w.]+", "-", f"{self.stem}-{name}")
        self.figures[file] = content
        return f"![{name}]({file})"

    def _gradient_norms(self, results: Mapping[str, list[tuple[float, float]]]) -> None:
        norms = {run: [norm for _, norm in points] for run, points in results.items()}
        self.lines.append(self._figure("norms.svg", line_plot(results, "training step", "norm", log_x=False)))
        self.lines.append(
            table([{"run": n, "median": median(each), "largest": max(each)} for n, each in norms.items()])
        )

    def _cost(self, results: Mapping[str, dict[str, float]]) -> None:
        text = "Forward passes per sample and step, where a backward pass counts 2, times steps."
        self.lines += [text, table([{"run": name, **each} for name, each in results.items()])]

    def _samples(self, results: Mapping[str, bytes]) -> None:
        grids = {run: self._figure(f"{run}-samples.png", grid) for run, grid in results.items()}
        text = f"Rows: {', '.join(map(str, measure.STEPS))} steps. The noise and conditions of all runs are the same."
        self.lines += [text, table([grids])]

    def _triangle_error(self, results: Mapping[str, dict[tuple[float, float], float]]) -> None:
        values = [error for errors in results.values() for error in errors.values() if error > 0]
        maps = {run: heat_map(errors, min(values), max(values)) for run, errors in results.items()}
        figures = {run: self._figure(f"{run}-triangle.svg", content) for run, content in maps.items()}
        rows = []
        for run, errors in results.items():
            regions = {
                "data edge": [error for (_, s), error in errors.items() if s == 1],
                "noise edge": [error for (t, _), error in errors.items() if t == 0],
                "diagonal": [error for (t, s), error in errors.items() if s == t],
                "all": list(errors.values()),
            }
            rows.append({"run": run, **{name: fmean(e * e for e in each) ** 0.5 for name, each in regions.items()}})
        self.lines += [TRIANGLE, table([figures]), table(rows)]


def compare(folders: Sequence[str], out: Path, triangle: bool, device: str, trust: bool) -> list[Path]:
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
    if out.suffix not in (".html", ".md"):
        raise ValueError(f"out must end with .html or .md: got {out}")
    report = Report(read_runs(folders, device, trust), out.stem)
    report.add_quality()
    report.add_measured(triangle)
    return report.write(out)


def _curves(runs: Sequence[Run], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Return the curve of each run, and that of the teacher, or of each teacher if they differ."""
    teachers = {repr(run.model["teacher"]) for run in runs if run.model.get("teacher")}
    best = min if metric in DISTANCES else max
    series: dict[str, dict[float, float]] = {}
    for run in runs:
        teacher = "teacher" if len(teachers) == 1 else f"teacher of {run.name}"
        for row in run.rows.values():
            if row.get(metric) is not None:
                name = teacher if row["model"] == "teacher" and run.model.get("teacher") else run.name
                points, nfe = series.setdefault(name, {}), row["nfe"] or row["steps"]
                points[nfe] = best(row[metric], points.get(nfe, row[metric]))
    return {name: sorted(points.items()) for name, points in series.items()}
