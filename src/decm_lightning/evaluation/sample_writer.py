"""Write samples to a folder in `decm predict`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from decm_lightning.errors import check_at_least
from decm_lightning.evaluation.generator import LabelLaw, SampleGenerator, progress
from decm_lightning.evaluation.protocol import origin
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.even_split import split_evenly
from decm_lightning.sample_folder import SampleFolder, sample_name


class SampleWriter(L.Callback):
    """Writes samples 0 to `samples` - 1 as one PNG each, on all devices.

    `Evaluation` with the same seed measures the same samples. The folder gets a settings.json. A folder with samples of
    other settings, weights, labels or captions is refused. The datamodule's predict_dataloader must have a batch, or
    Lightning skips predict; the content of the batch is not used.

    Args:
        folder: the folder to write; it is created if it does not exist.
        samples: number of samples over all processes, at least 1.
        spec: the samples, "model/sampler/steps", such as "student/mix/2".
        batch_size: samples generated at once on each device, at least 1.
        seed: seed of noise and labels.
        labels: "balanced" or "uniform", as in `Evaluation`.

    Raises:
        ValueError: if the spec is invalid or a number is too small.
    """

    def __init__(
        self,
        folder: str,
        samples: int,
        spec: str = "student/mix/1",
        batch_size: int = 500,
        seed: int = 0,
        labels: LabelLaw = "balanced",
    ) -> None:
        self.folder = Path(folder)
        self.samples = samples
        self.spec = SamplingSpec.parse(spec)
        self.batch_size = batch_size
        self.seed = seed
        self.labels = labels
        check_at_least(1, samples=samples, batch_size=batch_size)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the samples can be generated."""
        if stage == "predict":
            data = trainer.datamodule  # type: ignore[attr-defined]
            self.generator = SampleGenerator(pl_module, data, self.labels, self.seed)
            self.generator.check([self.spec])
            self.has_written = False

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate and write this process's samples."""
        folder = SampleFolder(self.folder, self._settings(trainer))
        folder.begin()
        parts = split_evenly(self.samples, self.batch_size, trainer.global_rank, trainer.world_size)
        with progress(trainer, sum(map(len, parts))) as bar:
            for rows in parts:
                images = self.generator.generate(self.spec, rows)
                condition = self.generator.prompts(rows).condition
                labels = (
                    condition.tolist() if isinstance(condition, Tensor) and condition.ndim == 1 else [None] * len(rows)
                )
                for row, label, image in zip(rows, labels, images, strict=True):
                    folder.write(sample_name(row, label), image)
                bar.update(len(rows))

        self.has_written = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise an error if nothing was written, because Lightning skips an empty loader without its hooks."""
        if stage == "predict" and not self.has_written:
            raise ValueError(
                f"no samples were written to {self.folder}: predict_dataloader must have at least one batch"
            )

    def _settings(self, trainer: L.Trainer) -> dict[str, Any]:
        texts = json.dumps(list(self.generator.data.texts))
        source = self.generator.source
        return {
            "spec": str(self.spec),
            "seed": self.seed,
            "labels": self.generator.describe_labels(),
            "captions": hashlib.sha256(texts.encode()).hexdigest(),
            "weights": source.average.identity(),
            "teacher": source.teacher.identity() if source.teacher else None,
            **origin(trainer, self.generator),
        }
