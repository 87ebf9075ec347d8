"""The baselines of a quality table: the teacher's converged ODE, and the floors of the distances."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from decm_lightning.evaluation.floors import Floor
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.paired import Paired, PairedDistance
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.types import Sample

Views = Mapping[FeatureMetrics, Mapping[str, Tensor]]
"""The outputs of each feature network on a batch of images."""


class Baselines:
    """Measure the baselines of a test from the images that the test reads and generates.

    Without `paired`, or without a model "teacher", the paired columns are omitted.
    """

    def __init__(
        self,
        generator: SampleGenerator,
        qualities: Sequence[FeatureMetrics],
        specs: Sequence[SamplingSpec],
        paired: Paired | None,
        floors: bool,
    ) -> None:
        self.generator = generator
        self.distances = [quality for quality in qualities if quality.has_distance]
        first = next(iter(self.distances), None)
        has_teacher = "teacher" in generator.source.models()
        self.paired = PairedDistance(generator, paired, first) if paired and has_teacher else None
        self.real, self.teacher = [Floor(self.distances) if floors and first else None for _ in range(2)]
        teachers = [spec for spec in specs if spec.model == "teacher"]
        self.spec = max(teachers, key=lambda spec: spec.steps, default=None)
        self.rows: list[dict[str, Any]] = []

    def prepare(self, samples: int, batch_size: int, rank: int, world: int) -> None:
        """Generate the samples of the teacher's converged ODE."""
        if self.paired:
            self.paired.prepare(samples, batch_size, rank, world)

    def add_real(self, views: Views) -> None:
        """Add a batch of real images."""
        if self.real:
            self.real.split({quality: views[quality] for quality in self.distances})

    def add(self, spec: SamplingSpec, rows: range, x: Sample, views: Views) -> None:
        """Add the samples of a spec, x before decoding."""
        if self.paired:
            self.paired.update(rows, x, views)
        if self.teacher and spec == self.spec:
            self.teacher.update({quality: views[quality] for quality in self.distances}, is_first=True)

    def columns(self) -> dict[str, float]:
        """Return the paired columns of the spec that was added last."""
        return self.paired.compute() if self.paired else {}

    def measure_floors(self, samples: int, parts: Sequence[range]) -> None:
        """Measure the floors, with the teacher's samples from number `samples` on."""
        floors = [(self.real, "halves of the real images")]
        columns: dict[str, Any] = {}
        if self.teacher and self.spec:
            for rows in parts:
                x = self.generator.samples(self.spec, [row + samples for row in rows] or range(1))
                images = self.generator.images(x)[: len(rows)]
                views = {quality: quality.outputs(images) for quality in self.distances}
                self.teacher.update(views, is_first=False)
                if self.paired:
                    self.paired.update(rows, x, views)
            columns = self.columns()
            floors.append((self.teacher, f"{self.spec} and the same with other noise"))
        found = [row for floor, between in floors if floor and (row := floor.compute(between))]
        self.rows = [row | (columns if row is found[-1] else dict.fromkeys(columns)) for row in found]

    def protocol(self) -> dict[str, str]:
        """Return the settings that determine the paired columns."""
        return {"paired": self.paired.description} if self.paired else {}

    def to(self, device: torch.device) -> None:
        """Move the statistics."""
        for part in (self.paired, self.real, self.teacher):
            if part:
                part.to(device)
