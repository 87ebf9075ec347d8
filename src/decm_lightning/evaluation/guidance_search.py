"""Find the guidance of a teacher with the smallest distance, on a grid of scale, limit and interval."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import numpy as np
from tqdm.auto import tqdm

from decm_lightning.evaluation.evaluation import Evaluation
from decm_lightning.evaluation.pretrained import PretrainedModel
from decm_lightning.evaluation.protocol import describe_guidance, machine, networks, origin
from decm_lightning.evaluation.table import markdown_table
from decm_lightning.files import atomic, write_json
from decm_lightning.guidance import Guidance
from decm_lightning.image_writer import check_plots
from decm_lightning.sample_folder import read_settings, refuse_others

Cell = dict[str, Any]
"""A measured guidance: scale, limit, interval, nfe, the columns, and the seconds that it took."""
NAME = "guidance"
"""The name of the files."""


def grid(
    scales: Iterable[float], limits: Iterable[float | None], intervals: Iterable[tuple[float, float]]
) -> list[Guidance]:
    """Return each combination once. Scale 1 disables guidance, so it has no limit or interval.

    >>> [guidance.limit for guidance in grid([1, 2], [None, 0.5], [(0, 1)])]
    [None, None, 0.5]
    """
    cells = [Guidance(*cell) if cell[0] != 1 else Guidance() for cell in product(scales, limits, intervals)]
    return list(dict.fromkeys(cells))


class GuidanceSearch(Evaluation):
    """Measures a `PretrainedModel` with each guidance of a grid, in validation.

    It writes guidance.json after each cell, and guidance.md and guidance.png at the end. Cells in guidance.json are not
    measured again, so an interrupted search resumes, and a search with more cells extends it. The distance is that of
    the first feature network that has one.

    Args:
        evaluation: the feature networks, reference, batch size, seed and labels to measure with.
        cells: the grid.
        spec: the samples, such as "teacher/euler/20".
        samples: samples of each cell, at least 2.
        folder: the folder for the files.

    Raises:
        ValueError: if a number is too small, or no feature network has a distance.
    """

    def __init__(
        self, evaluation: Evaluation, cells: Sequence[Guidance], spec: str, samples: int, folder: Path
    ) -> None:
        super().__init__(
            list(evaluation.features), [spec], samples=samples, batch_size=evaluation.batch_size,
            seed=evaluation.seed, reference=evaluation.reference, labels=evaluation.labels,
        )  # fmt: skip
        self.cells = list(cells)
        self.folder = folder
        self.file = folder / f"{NAME}.json"
        if not self.cells:
            raise ValueError("the grid of guidance has no cells: give at least one scale, limit and interval")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the measured cells."""
        check_plots()
        super().setup(trainer, pl_module, stage)
        distances = [quality.columns[0] for quality in self.qualities if quality.has_distance]
        if not distances:
            raise ValueError("guidance is tuned by a Fréchet distance: none of the feature networks has one")
        self.distance = distances[0]
        self.settings = self._settings(trainer)
        saved = read_settings(self.file) or {"settings": self.settings}
        refuse_others(self.file, saved.get("settings", {}), self.settings)
        self.measured: list[Cell] = saved.get("cells", [])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the missing cells, write the files and print the best."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, PretrainedModel)
        for number, guidance in enumerate(self.cells, 1):
            done = f"{number} of {len(self.cells)}: {describe_guidance(guidance)}"
            if (cell := self._find(guidance)) is None:
                pl_module.guidance = guidance
                cell = self._measured(trainer, guidance)
                self.measured.append(cell)
                if trainer.is_global_zero:
                    write_json(self.file, {"settings": self.settings, "cells": self.measured})
                done += f", {cell['seconds']:.1f} s"
            if trainer.is_global_zero:
                tqdm.write(f"{done}, {self.distance} {cell[self.distance]:.4g}")
        best = min(self.measured, key=lambda cell: cell[self.distance])
        pl_module.log(f"{self.distance}/best", best[self.distance], sync_dist=True)
        if trainer.is_global_zero:
            self._write(best)

    def _measured(self, trainer: L.Trainer, guidance: Guidance) -> Cell:
        begun = monotonic()
        (measured,) = self._measure(trainer, self.specs, self.samples).values()
        seconds = round(monotonic() - begun, 2)
        return _key(guidance) | {"nfe": measured.cost.nfe, **measured.values, "seconds": seconds}

    def _find(self, guidance: Guidance) -> Cell | None:
        return next((cell for cell in self.measured if _key(guidance).items() <= cell.items()), None)

    def _settings(self, trainer: L.Trainer) -> dict[str, Any]:
        source = self.generator.source
        sampled = {key: value for key, value in origin(trainer, self.generator).items() if key != "guidance"}
        return {
            "weights": source.average.identity(),
            "spec": str(self.specs[0]),
            "samples": self.samples,
            "seed": self.seed,
            "labels": self.generator.describe_labels(),
            **sampled,
            "feature network": networks(self.qualities),
            "reference": "images of the loader" if self.real is None else self.real.sha256,
        }

    def _write(self, best: Cell) -> None:
        cells = sorted(self.measured, key=lambda cell: (cell["interval"], cell["limit"] or inf, cell["scale"]))
        table = markdown_table([cell | {"interval": _interval(cell)} for cell in cells])
        guidance = {key: best[key] for key in _key(Guidance())}
        line = "guidance: " + json.dumps(guidance).replace('"', "")
        settings = self.settings | machine(self.generator.source.device)
        text = [f"# Guidance by {self.distance} on {networks(self.qualities)}", ""]
        text += [f"- {name}: {value}" for name, value in settings.items()]
        text += ["", table, f"The smallest {self.distance} has `{line}`.", ""]
        files = [self.folder / f"{NAME}.{suffix}" for suffix in ("md", "png", "json")]
        with atomic(files[0]) as partial:
            partial.write_text("\n".join(text), encoding="utf-8")
        heat_map(cells, self.distance, files[1])
        print(f"\n{table}\nwrote {', '.join(map(str, files))}")
        print(
            f"best: {describe_guidance(Guidance(**guidance))}, {self.distance} {best[self.distance]:.4g}; in a config:"
        )
        print(line)


def heat_map(cells: Sequence[Mapping[str, Any]], column: str, file: Path) -> None:
    """Write a PNG with a value per scale (columns), limit and interval (rows). The smallest value is framed."""
    check_plots()
    # Without pyplot no window opens, and the backend of a notebook does not change.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    scales = sorted({cell["scale"] for cell in cells})
    rows = list(dict.fromkeys(_row(cell) for cell in cells if cell["scale"] != 1)) or [_row(cells[0])]
    values = np.array([[_value(cells, scale, row, column) for scale in scales] for row in rows])
    figure = Figure(figsize=(2.5 + 0.9 * len(scales), 1.5 + 0.45 * len(rows)))
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis_r"), label=column)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (y, x), value in np.ndenumerate(values):
        if value == value:
            color = "black" if value <= middle else "white"
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", color=color)
    y, x = np.unravel_index(np.nanargmin(values), values.shape)
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("scale")
    with atomic(file) as partial:
        figure.savefig(partial, dpi=120, bbox_inches="tight", format="png")


def _key(guidance: Guidance) -> Cell:
    values = asdict(guidance)
    return values | {"scale": float(values["scale"]), "interval": [float(time) for time in values["interval"]]}


def _interval(cell: Mapping[str, Any]) -> str:
    first, last = cell["interval"]
    return f"{first:g} to {last:g}"


def _row(cell: Mapping[str, Any]) -> str:
    limit = "no limit" if cell["limit"] is None else f"limit {cell['limit']:g}"
    return f"{limit}, t {_interval(cell)}"


def _value(cells: Sequence[Mapping[str, Any]], scale: float, row: str, column: str) -> float:
    """Return the value of a cell, NaN if it was not measured. Without guidance, all rows have the same value."""
    found = [cell for cell in cells if cell["scale"] == scale and (scale == 1 or _row(cell) == row)]
    return found[0][column] if found else float("nan")
