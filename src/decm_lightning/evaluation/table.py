"""The quality table as files: quality.md, quality.json and samples.png."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.files import atomic
from decm_lightning.image_writer import save_named_grid
from decm_lightning.networks.record_files import quality_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One spec and its measured values.

    Args:
        spec: model, sampler, steps and options.
        nfe: network evaluations per sample (NFE); None if not known.
        values: the measured values, by column; the same columns in every row.
    """

    spec: SamplingSpec
    nfe: float | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """The measured values and the settings of the measurement.

    Args:
        features: name of the feature network or networks.
        protocol: all settings that determine the values, by name.
        rows: one for each spec.
        columns: headings above the samples; empty for none.
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
            spec, nfe = row.spec, "-" if row.nfe is None else f"{row.nfe:g}"
            values = " | ".join(f"{value:.{3 if name == 'kid' else 4}g}" for name, value in row.values.items())
            lines.append(f"| {spec.model} | {spec.sampler}{spec.query} | {spec.steps} | {nfe} | {values} |")
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        """Return {"metric", "protocol", "rows"} as JSON, with values in full; a row has "options" if its spec does."""
        rows = [
            {
                "model": row.spec.model,
                "sampler": row.spec.sampler,
                "steps": row.spec.steps,
                **({"options": dict(row.spec.options)} if row.spec.options else {}),
                "nfe": row.nfe,
                **row.values,
            }
            for row in self.rows
        ]
        content = {"metric": f"Fréchet distance on {self.features}", "protocol": dict(self.protocol), "rows": rows}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def store(self, checkpoint: str | Path | None) -> list[Path]:
        """Write quality.json next to a checkpoint or into an exported folder, where `load` reads it.

        Returns:
            the file, or nothing without a checkpoint or if its folder cannot be written.
        """
        if checkpoint is None:
            return []
        file = quality_file(checkpoint)
        try:
            with atomic(file) as content:
                content.write_text(self.json(), encoding="utf-8")
        except OSError as error:
            log.warning("the table is not stored with the checkpoint: %s", error)
            return []
        return [file]

    def write(self, folder: Path, images: Tensor) -> list[Path]:
        """Write the three files and return their paths.

        Args:
            folder: created if it is missing.
            images: uint8 (rows, columns, c, h, w), the first samples of each row.
        """
        files = [folder / "quality.md", folder / "quality.json", folder / "samples.png"]
        # Both files or neither, so that they never disagree.
        with atomic(files[0]) as markdown, atomic(files[1]) as content:
            markdown.write_text(self.markdown(), encoding="utf-8")
            content.write_text(self.json(), encoding="utf-8")
        save_named_grid(images, [str(row.spec) for row in self.rows], self.columns, files[2])
        return files
