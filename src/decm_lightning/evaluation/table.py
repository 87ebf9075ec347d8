"""The quality table as files: quality.md, quality.json and samples.png."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.files import atomic
from decm_lightning.image_writer import save_named_grid
from decm_lightning.networks.record import QUALITY

FLOORS = "Floors: distances between two sets of images from the same distribution."


@dataclass(frozen=True)
class Row:
    """Samples and their measured values.

    Args:
        samples: the spec that generated them, or the file or folder of images that were generated elsewhere.
        nfe: network evaluations per sample (NFE); None if not known.
        values: the measured values, by column; the same columns in every row.
    """

    samples: SamplingSpec | Path
    nfe: float | None
    values: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the row by column, as in quality.json."""
        if isinstance(self.samples, Path):
            return {"samples": str(self.samples), **self.values}
        spec = self.samples
        options = {"options": dict(spec.options)} if spec.options else {}
        named = {"model": spec.model, "sampler": spec.sampler, "steps": spec.steps}
        return {**named, **options, "nfe": self.nfe, **self.values}

    def cells(self) -> dict[str, Any]:
        """Return the row by column, as in quality.md: the sampler with its options, and rounded values."""
        row = self.as_dict()
        if row.pop("options", None) and isinstance(self.samples, SamplingSpec):
            row["sampler"] += self.samples.query
        return row


@dataclass(frozen=True)
class Table:
    """The measured values and the settings of the measurement.

    Args:
        features: name of the feature network or networks.
        protocol: all settings that determine the values, by name.
        rows: one for each spec.
        columns: headings above the samples; empty for none.
        floors: distances between two sets of images from one distribution, the same columns in every row.
    """

    features: str
    protocol: Mapping[str, str | int]
    rows: Sequence[Row]
    columns: Sequence[str] = ()
    floors: Sequence[Mapping[str, Any]] = ()

    def markdown(self) -> str:
        """Return the table with its protocol as Markdown."""
        protocol = [f"- {name}: {value}" for name, value in self.protocol.items()]
        return "\n".join([self.heading, "", *protocol, "", self.values()])

    def values(self) -> str:
        """Return the values as Markdown tables."""
        floors = f"\n{FLOORS}\n\n{markdown_table(self.floors)}" if self.floors else ""
        return markdown_table([row.cells() for row in self.rows]) + floors

    @property
    def heading(self) -> str:
        """The heading in Markdown."""
        return f"# Fréchet distance on {self.features}"

    def json(self) -> str:
        """Return {"metric", "protocol", "rows"} as JSON, with values in full, and "floors" if they were measured.

        A row has "options" if its spec does.
        """
        rows = [row.as_dict() for row in self.rows]
        content = {"metric": f"Fréchet distance on {self.features}", "protocol": dict(self.protocol), "rows": rows}
        content |= {"floors": self.floors} if self.floors else {}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def write(self, file: Path, images: Tensor | None = None) -> list[Path]:
        """Write the table and the samples, and return the paths.

        Args:
            file: the path of the JSON table, `quality.json` or `NAME.quality.json` (`quality_file`). The Markdown table
                and `samples.png` or `NAME.samples.png` are next to it. The folder is created if it is missing.
            images: uint8 (rows, columns, c, h, w), the first samples of each row; None to write no samples.
        """
        files = [file.with_suffix(".md"), file]
        # Both files or neither, so that they never disagree.
        with atomic(files[0]) as markdown, atomic(files[1]) as content:
            markdown.write_text(self.markdown(), encoding="utf-8")
            content.write_text(self.json(), encoding="utf-8")
        if images is not None:
            files.append(file.with_name(f"{file.name.removesuffix(QUALITY)}samples.png"))
            save_named_grid(images, [str(row.samples) for row in self.rows], self.columns, files[-1])
        return files


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same columns as a Markdown table. Numbers are rounded to 4 digits, `kid` to 3."""
    first = rows[0] if rows else {}
    rule = "|".join("---:" if isinstance(value, int | float) else "---" for value in first.values())
    lines = [list(first), *([_cell(name, value) for name, value in row.items()] for row in rows)]
    head, *body = [f"| {' | '.join(line)} |\n" for line in lines]
    return f"{head}|{rule}|\n{''.join(body)}"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value).replace("|", "\\|")
    return f"{value:g}" if column == "nfe" else f"{value:.{3 if column == 'kid' else 4}g}"
