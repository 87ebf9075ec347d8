"""The table and the plot of a study."""

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

STEPS = (1, 2, 4, 8, 50)
"""The numbers of sampling steps in the table."""


class Ranked(NamedTuple):
    """A method with its measured runs: learning rate, training steps, forward passes per step, a table per seed."""

    rate: float
    steps: int
    passes: float
    runs: list[dict[str, Any]]

    def distances(self, steps: int) -> list[float]:
        """Return the distance of each run with its best sampler; NaN where it was not measured."""
        return [by_steps(run).get(steps, (math.nan, ""))[0] for run in self.runs]


def by_steps(quality: dict[str, Any], model: str = "student") -> dict[int, tuple[float, str]]:
    """Return the smallest distance and its sampler for each number of steps."""
    best: dict[int, tuple[float, str]] = {}
    for row in quality["rows"]:
        if row["model"] == model and math.isfinite(row["fd"]):
            best[row["steps"]] = min(best.get(row["steps"], (math.inf, "")), (row["fd"], row["sampler"]))
    return best


def table(results: dict[str, Ranked]) -> str:
    """Return the Markdown table: a row for each method, with the mean and spread over seeds of the best sampler."""
    lines = [
        f"| method | rate | passes per step | steps | {' | '.join(map(str, STEPS))} |",
        "|---" * (len(STEPS) + 4) + "|",
    ]
    if teacher := _teacher(results):
        lines.append(f"| teacher, guided | | | | {' | '.join(f'{teacher[n][0]:.3f}' for n in STEPS)} |")
    for method, found in results.items():
        cells = []
        for n in STEPS:
            values = found.distances(n)
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            sampler = by_steps(found.runs[0]).get(n, (math.nan, ""))[1]
            cells.append(f"{mean(values):.3f}{spread} ({sampler})")
        lines.append(f"| {method} | {found.rate:g} | {found.passes:.2f} | {found.steps:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Ranked], file: Path) -> None:
    """Write a PNG with a panel for each method: distance over sampling steps, every seed, all others in gray."""
    columns = min(5, len(results))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(2.1 * columns, 2.0 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    teacher = _teacher(results)
    for panel, method in zip(panels, results, strict=False):
        for other in results.values():
            panel.loglog(STEPS, [mean(other.distances(n)) for n in STEPS], color="#d5d5d5", linewidth=0.8)
        if teacher:
            panel.loglog(STEPS, [teacher[n][0] for n in STEPS], "k--", linewidth=1)
        for seed in range(len(results[method].runs)):
            panel.loglog(STEPS, [results[method].distances(n)[seed] for n in STEPS], color="#c0392b", linewidth=1.2)
        panel.set_title(method, fontsize=8)
        panel.set_xticks(STEPS, [str(n) for n in STEPS], fontsize=7)
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.tick_params(axis="y", labelsize=7)
        if teacher:
            # A method that fails at some numbers of steps leaves its panel, and does not flatten the others.
            panel.set_ylim(top=1.5 * max(fd for fd, _ in teacher.values()))
    for panel in panels[len(results) :]:
        panel.set_axis_off()
    figure.supxlabel("sampling steps", fontsize=8)
    figure.supylabel("Fréchet distance (dashed: the guided teacher)", fontsize=8)
    figure.savefig(file, dpi=110)


def _teacher(results: dict[str, Ranked]) -> dict[int, tuple[float, str]]:
    """Return the teacher's distances, which only the first run of the first method measures."""
    return by_steps(next(iter(results.values())).runs[0], "teacher")
