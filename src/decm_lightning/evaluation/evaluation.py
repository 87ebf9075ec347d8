"""Measure samples against real images during training, and write the quality table in tests."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from decm_lightning.conditions import select
from decm_lightning.errors import check_at_least
from decm_lightning.evaluation.baselines import Baselines
from decm_lightning.evaluation.generator import LabelLaw, SampleGenerator, progress
from decm_lightning.evaluation.measured import Measured, measure
from decm_lightning.evaluation.paired import Paired
from decm_lightning.evaluation.protocol import measurement, networks, protocol, table_file
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.evaluation.table import Row, Table
from decm_lightning.even_split import count_own, split_evenly
from decm_lightning.files import check_writable, shown
from decm_lightning.image_writer import check_plots
from decm_lightning.metrics import FeatureMetrics, reference
from decm_lightning.metrics.feature_metrics import metrics_of
from decm_lightning.metrics.features import as_feature_network
from decm_lightning.metrics.metric import Prompts
from decm_lightning.types import Batch

COLUMNS = 10
log = logging.getLogger(__name__)


class Evaluation(L.Callback):
    """Measures the quality of every spec "model/sampler/steps" with one or several feature networks.

    Validation logs `<column>/<spec>`, such as `fd/student/mix/2`, for the cheap columns: Fréchet distance and kernel
    distance. Testing logs `test/<column>/<spec>` for all columns, and writes last.quality.md, last.quality.json and
    last.samples.png next to last.ckpt, or without a checkpoint to the log folder. The sanity check measures nothing.

    The feature networks define the columns: fd and kid, or fid, sfid, inception_score, precision, recall and kid with
    metrics.InceptionFeatures. Other networks compare samples with their captions: demo.CaptionProbe, metrics.CLIPScore
    and metrics.BLIPScore.

    The real images come from the validation or test loader, or from `reference`, and are read once. Sample i has the
    same label and noise for every spec and in every validation. It is generated once, and used for the metrics, the
    number of function evaluations (NFE) and samples.png. Distances are only comparable for equal numbers of images.

    Args:
        features: one feature network or several, such as demo.DigitsFeatures or metrics.InceptionFeatures; any
            nn.Module with `num_features` (metrics.FeatureNetwork).
        specs: the samples that validation measures, at least one spec.
        test_specs: the samples that testing measures, at least one spec; None for `specs`.
        samples: samples of each spec in validation, over all processes, at least 2.
        test_samples: the same in testing; None for the number that the feature network recommends (50,000 with
            Inception), otherwise `samples`.
        batch_size: samples generated at once on each device, at least 1.
        seed: seed of noise and labels, and of metrics that use random subsets.
        reference: an .npz file or a folder of real images (metrics.reference.read); None for the loader's images.
        labels: "balanced": sample i has the label i mod num_classes; "uniform": random labels, from the seed. Data with
            a method `condition(rows, seed)` choose their conditions.
        paired: adds columns to tests that compare each sample with the teacher's converged ODE from the same noise
            (`PairedDistance`), if there is a teacher; None for no columns.
        floors: adds a table to tests with the distances between halves of the real images, and between the teacher's
            samples and as many with other noise (`Floor`).

    Attributes:
        table_file: the JSON table that testing writes; None for the default.

    Raises:
        ValueError: if the specs are empty, a spec is invalid, or a number is too small.
    """

    def __init__(
        self,
        features: nn.Module | list[nn.Module],
        specs: list[str],
        test_specs: list[str] | None = None,
        samples: int = 2000,
        test_samples: int | None = None,
        batch_size: int = 500,
        seed: int = 0,
        reference: str | None = None,
        labels: LabelLaw = "balanced",
        paired: Paired | None = None,
        floors: bool = False,
    ) -> None:
        networks = features if isinstance(features, list) else [features]
        self.features = [as_feature_network(network) for network in networks]
        self.specs = [SamplingSpec.parse(text) for text in specs]
        self.test_specs = self.specs if test_specs is None else [SamplingSpec.parse(text) for text in test_specs]
        self.samples = samples
        recommended = max((network.samples for network in self.features), default=0)
        self.test_samples = (recommended or samples) if test_samples is None else test_samples
        self.batch_size = batch_size
        self.seed = seed
        self.reference = reference
        self.labels = labels
        self.table_file: Path | None = None
        self.paired = paired
        self.floors = floors
        self.qualities: list[FeatureMetrics] = []
        if not self.features:
            raise ValueError("features must be at least one network: got none")
        if not (self.specs and self.test_specs):
            raise ValueError("specs and test_specs must name at least one model/sampler/steps each: got none")
        if labels not in get_args(LabelLaw):
            raise ValueError(f"labels must be balanced or uniform: got {labels!r}")
        check_at_least(2, samples=self.samples, test_samples=self.test_samples)
        check_at_least(1, batch_size=batch_size)

    def restrict(self, models: Collection[str], default: Sequence[str]) -> None:
        """Leave out the specs of models that cannot be sampled.

        Args:
            models: names of the models that can be sampled.
            default: the specs to measure if none remains.
        """
        others = [spec for spec in self.test_specs if spec.model not in models]
        if others:
            log.info("not measured, because the model is not available: %s", ", ".join(map(str, others)))
        self.specs, self.test_specs = (
            [spec for spec in specs if spec.model in models] or [SamplingSpec.parse(text) for text in default]
            for specs in (self.specs, self.test_specs)
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the specs can be generated and that the reference fits the feature networks.

        Raises:
            FileNotFoundError: if the reference does not exist.
            ImportError: if a test will write samples.png and matplotlib is not installed.
            ValueError: if the datamodule has no conditions, the module lacks a spec's model, the reference does not fit
                the feature networks, or two feature networks have a column of the same name.
        """
        if stage == "predict":
            return
        if stage == "test":
            check_plots()
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.generator = SampleGenerator(pl_module, data, self.labels, self.seed)
        self.generator.check([*self.specs, *self.test_specs])
        self.real = None if self.reference is None else reference.read(self.reference)
        self.qualities = metrics_of(self.features, self.seed, self.real, validation=stage != "test")
        measured = (self.paired, self.floors) if stage == "test" else (None, False)
        self.baselines = Baselines(self.generator, self.qualities, self.test_specs, *measured)
        self.has_real = False
        self.has_measured = False
        self.rows_seen = 0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise an error if nothing was measured, because Lightning skips an empty loader without its hooks."""
        if stage in ("validate", "test") and not self.has_measured:
            raise ValueError("nothing was measured: the validation or test loader is empty (latents need a VAE)")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the metrics to the module's device, and read the reference once."""
        if trainer.testing:
            check_writable(table_file(trainer, self.table_file).parent)
        self._to(self.generator.source.device)
        if trainer.sanity_checking:
            return
        for quality in self.qualities:
            quality.prepare(self.generator.datamodule, self.generator.read)
        if self.real is None or self.has_real:
            return
        self.has_real = True
        images = self.real.images
        if images is None or not any(quality.needs_real for quality in self.qualities):
            return
        parts = split_evenly(len(images), self.batch_size, trainer.global_rank, trainer.world_size)
        with progress(trainer, sum(map(len, parts))) as bar:
            bar.set_description("reference", refresh=False)
            for batch in images.batches(parts):
                self._add_real(batch, Prompts())
                bar.update(len(batch))

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch's real images in the first pass, without rows that repeat those of other processes.

        Raises:
            ValueError: if the data have another shape than the model.
        """
        if self.has_real or trainer.sanity_checking:
            return
        x_1, condition = batch[0], batch[1]
        if (shape := self.generator.source.average.sample_shape) != (found := tuple(x_1.shape[1:])):
            raise ValueError(
                f"the data must have the model's shape {shape}: got {found}, use the config of its training"
            )
        # Lightning refuses several loaders, because validation_step has no dataloader_idx.
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loader = CombinedLoader(loaders, "sequential").flattened[0]
        sampler = loader.sampler if isinstance(loader, DataLoader) else None
        own = slice(count_own(sampler, batch_idx, self.rows_seen, len(x_1)))
        self.rows_seen += len(x_1)
        self._add_real(self.generator.images(x_1)[own], Prompts(select(condition, own)))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the cheap columns of every spec."""
        if trainer.sanity_checking:
            return
        for spec, measured in self._measure(trainer, self.specs, self.samples).items():
            for name, value in measured.values.items():
                pl_module.log(f"{name}/{spec}", value, sync_dist=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log all columns of every spec, print the values, and write the table and the samples."""
        results = self._measure(trainer, self.test_specs, self.test_samples)
        for spec, measured in results.items():
            for name, value in measured.values.items():
                pl_module.log(f"test/{name}/{spec}", value, sync_dist=True)
        # The image counts and log_dir are collective, so all processes compute them.
        costs = {spec: measured.cost for spec, measured in results.items()}
        size = next(iter(results.values())).first.shape[1:]
        measured_on = measurement(self.qualities, self.real, size, self.seed, self.batch_size)
        measured_on |= self.baselines.protocol()
        settings = protocol(trainer, self.generator, costs, measured_on)
        images = torch.stack(
            [trainer.strategy.reduce(measured.first, reduce_op="sum") for measured in results.values()]
        )
        file = table_file(trainer, self.table_file)
        if trainer.is_global_zero:
            rows = [Row(spec, costs[spec].nfe, measured.values) for spec, measured in results.items()]
            headings = self.generator.headings(range(images.shape[1]))
            table = Table(networks(self.qualities), settings, rows, headings, self.baselines.rows)
            # Printed first, because the disk may be full.
            print(f"{table.heading}\n\n{table.values()}")
            names = ", ".join(each.name for each in table.write(file, images))
            print(f"wrote {names} to {shown(file.parent)}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move feature networks, statistics and the decoder off the accelerator."""
        if self.qualities:
            self._to(torch.device("cpu"))
            self.generator.data.release()

    on_test_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Move everything off the accelerator."""
        self.on_validation_end(trainer, pl_module)

    def _to(self, device: torch.device) -> None:
        self.baselines.to(device)
        for quality in self.qualities:
            quality.to(device)

    def _add_real(self, images: Tensor, prompts: Prompts) -> None:
        views = {quality: quality.update(images, real=True, prompts=prompts) for quality in self.qualities}
        self.baselines.add_real(views)

    def _measure(self, trainer: L.Trainer, specs: Sequence[SamplingSpec], samples: int) -> dict[SamplingSpec, Measured]:
        self.has_real = self.has_measured = True
        parts = split_evenly(samples, self.batch_size, trainer.global_rank, trainer.world_size)
        columns = min(self.generator.columns(COLUMNS), samples)
        self.baselines.prepare(samples, self.batch_size, trainer.global_rank, trainer.world_size)
        measured = {}
        with progress(trainer, len(specs) * sum(map(len, parts))) as bar:
            for spec in specs:
                bar.set_description(str(spec), refresh=False)
                measured[spec] = measure(self.generator, self.qualities, self.baselines, spec, parts, columns, bar)
        self.baselines.measure_floors(samples, parts)
        return measured
