"""The table of quality as files: quality.md, quality.json and samples.png."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from decm_lightning.evaluation.spec import Cell
from decm_lightning.files import atomic
from decm_lightning.image_writer import save_named_grid


@dataclass(frozen=True)
class Row:
    """One cell and how far its samples are from real images.

    Args:
        cell: model, sampler and steps.
        nfe: network evaluations per sample (NFE); None if not known.
        values: what was measured, by column; the same columns in every row.
    """

    cell: Cell
    nfe: float | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """What was measured, and how.

    Args:
        features: name of the feature network or networks.
        protocol: every setting that the figures depend on, by name.
        rows: the cells.
        columns: what stands above the samples that are shown; none for nothing.
    """

    features: str
    protocol: Mapping[str, str | int]
    rows: Sequence[Row]
    columns: Sequence[str] = ()

    def markdown(self) -> str:
        """Return the table with its protocol as Markdown."""
        columns = list(self.rows[0].values) if self.rows else []
        lines = [
            f"# Fréchet distance on {self.features}",
            "",
            *(f"- {name}: {value}" for name, value in self.protocol.items()),
            "",
            f"| model | sampler | steps | nfe | {' | '.join(columns)} |",
            f"|---|---|---:|{'---:|' * (1 + len(columns))}",
        ]
        for row in self.rows:
            cell, cost = row.cell, "-" if row.nfe is None else f"{row.nfe:g}"
            values = " | ".join(f"{value:.{3 if name == 'kid' else 4}g}" for name, value in row.values.items())
            lines.append(f"| {cell.model} | {cell.sampler} | {cell.steps} | {cost} | {values} |")
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        """Return {"metric", "protocol", "rows"} as JSON, with figures in full."""
        rows = [
            {
                "model": row.cell.model,
                "sampler": row.cell.sampler,
                "steps": row.cell.steps,
                "nfe": row.nfe,
                **row.values,
            }
            for row in self.rows
        ]
        content = {"metric": f"Fréchet distance on {self.features}", "protocol": dict(self.protocol), "rows": rows}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def write(self, folder: Path, images: Tensor) -> list[Path]:
        """Write the three files into `folder`, made if need be, and return where they are.

        Args:
            folder: where to.
            images: uint8 (rows, columns, c, h, w), the samples to show of each row.
        """
        files = [folder / "quality.md", folder / "quality.json", folder / "samples.png"]
        # Both or neither: a table that says one thing and a JSON that says another is worse than none.
        with atomic(files[0]) as markdown, atomic(files[1]) as content:
            markdown.write_text(self.markdown(), encoding="utf-8")
            content.write_text(self.json(), encoding="utf-8")
        save_named_grid(images, [str(row.cell) for row in self.rows], self.columns, files[2])
        return files
