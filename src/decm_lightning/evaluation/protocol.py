"""The protocol of a measurement: all settings that determine its values."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import lightning as L
import torch

from decm_lightning.evaluation.cost import SamplingCost
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.pretrained import PretrainedModel
from decm_lightning.evaluation.source import SampleSource
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.guidance import Guidance
from decm_lightning.metrics import FeatureMetrics, Reference
from decm_lightning.networks.record import QUALITY, WEIGHTS_HASH, quality_file

PACKAGES = ("decm-lightning", "torch", "lightning", "torchmetrics")


def protocol(
    trainer: L.Trainer,
    generator: SampleGenerator,
    costs: Mapping[SamplingSpec, SamplingCost],
    measured: Mapping[str, str | int],
) -> dict[str, str | int]:
    """Return the settings of sampling and measurement (`measurement`) by name."""
    source = generator.source
    loaded = source.path if isinstance(source, PretrainedModel) else "none: weights in memory"
    return {
        "checkpoint": str(trainer.ckpt_path or loaded),
        "weights": _weights(source, costs),
        WEIGHTS_HASH: source.average.identity(),
        **origin(trainer, generator),
        "times (t -> s)": "; ".join(f"{spec}: {c.steps}" for spec, c in costs.items() if c.steps) or "none",
        "labels": generator.describe_labels(),
        "pixels": "round(127.5 (x + 1)) clamped to 0..255",
        "nfe": "network evaluations per sample, guidance included",
        **measured,
        **machine(source.device, trainer.world_size),
    }


def measurement(
    qualities: Sequence[FeatureMetrics],
    reference: Reference | None,
    size: Sequence[int],
    seed: int,
    batch_size: int,
) -> dict[str, str | int]:
    """Return the settings of a measurement by name. All processes must call this: counting images is collective.

    `size` is the (c, h, w) of the generated images. Without a reference, the real images are those of the loader.
    """
    counts = qualities[0].counts()
    lines: dict[str, str | int] = {"feature network": ", ".join(quality.name for quality in qualities)}
    lines["reference"] = "images of the loader" if reference is None else str(reference.path)
    if reference is not None:
        lines["reference sha256"] = reference.sha256
        if reference.images is not None:
            lines["reference size"] = describe_size(reference.images.shape)
    lines |= {
        "real images": counts.real or "none: mean and covariance only",
        "generated images": counts.generated,
        "generated size": describe_size(size),
        "seed": seed,
        "batch size": batch_size,
    }
    for quality in qualities:
        lines |= quality.describe()
        lines |= {column: f"not measured: {reason}" for column, reason in quality.unavailable.items()}
    return lines


def table_file(trainer: L.Trainer, requested: Path | None) -> Path:
    """Return the JSON table of a test: by default next to its checkpoint, or without one in the log folder.

    All processes must call this, because log_dir is collective.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    return requested or (quality_file(trainer.ckpt_path) if trainer.ckpt_path else folder / QUALITY)


def networks(qualities: Sequence[FeatureMetrics]) -> str:
    """Return the names of the feature networks for a heading; those with a distance come first."""
    return " and ".join(quality.name for quality in sorted(qualities, key=lambda quality: -quality.has_distance))


def describe_size(size: Sequence[int]) -> str:
    """Return a size (c, h, w) as text, such as "8 x 8, gray"."""
    channels, height, width = size
    return f"{width} x {height}, {'gray' if channels == 1 else 'RGB'}"


def origin(trainer: L.Trainer, generator: SampleGenerator) -> dict[str, str]:
    """Return the settings of data, guidance and precision that determine the samples."""
    guidance = generator.source.guidance
    return {
        **generator.data.identity(),
        "guidance": "none" if guidance.scale == 1 else f"teacher: {describe_guidance(guidance)}",
        "precision": str(trainer.precision),
    }


def _weights(source: SampleSource, costs: Mapping[SamplingSpec, SamplingCost]) -> str:
    # The average is sampled instead of the network in training. A distillation uses its teacher as loaded.
    averaged = {spec.model: bool(cost.times) for spec, cost in costs.items()}
    decay = source.ema_decay
    average = "as loaded" if decay is None else f"exponential moving average (decay {decay:g})"
    return "; ".join(f"{model}: {average if is_average else 'as loaded'}" for model, is_average in averaged.items())


def machine(device: torch.device, processes: int = 1) -> dict[str, str | int]:
    """Return the device, the number of processes and the versions of packages."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return {
        "device": f"{device.type} ({name})",
        "processes": processes,
        "versions": f"{versions}, Python {platform.python_version()}",
    }


def describe_guidance(guidance: Guidance) -> str:
    """Return guidance as text, such as "scale 1.25, no limit, t in [0, 1]"."""
    if guidance.scale == 1:
        return "no guidance"
    limit = "no limit" if guidance.limit is None else f"limit {guidance.limit:g}"
    first, last = guidance.interval
    return f"scale {guidance.scale:g}, {limit}, t in [{first:g}, {last:g}]"
