"""The protocol of a measurement: all settings that determine its values."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import lightning as L
import torch

from decm_lightning.evaluation.cost import SamplingCost
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.source import SampleSource
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.metrics import FeatureMetrics, Reference
from decm_lightning.networks.record import WEIGHTS_HASH

PACKAGES = ("decm-lightning", "torch", "lightning", "torchmetrics")


def protocol(
    trainer: L.Trainer,
    generator: SampleGenerator,
    qualities: Sequence[FeatureMetrics],
    reference: Reference | None,
    samples: int,
    batch_size: int,
    costs: Mapping[SamplingSpec, SamplingCost],
) -> dict[str, str | int]:
    """Return the protocol by name. All processes must call this, because counting images is collective."""
    counts = qualities[0].counts()
    lines: dict[str, str | int] = {"checkpoint": str(trainer.ckpt_path or "none: weights in memory")}
    lines["weights"] = _weights(generator.source, costs)
    lines[WEIGHTS_HASH] = generator.source.average.identity()
    lines |= origin(trainer, generator)
    lines["times (t -> s)"] = "; ".join(f"{spec}: {c.steps}" for spec, c in costs.items() if c.steps) or "none"
    lines["feature network"] = ", ".join(quality.name for quality in qualities)
    lines["reference"] = "images of the loader" if reference is None else str(reference.path)
    if reference is not None:
        lines["reference sha256"] = reference.sha256
    lines |= {
        "real images": counts.real or "none: mean and covariance only",
        "generated images": samples,
        "labels": generator.describe_labels(),
        "pixels": "round(127.5 (x + 1)) clamped to 0..255",
        "seed": generator.seed,
        "batch size": batch_size,
    }
    for quality in qualities:
        lines |= quality.describe()
        lines |= {column: f"not measured: {reason}" for column, reason in quality.unavailable.items()}
    lines["nfe"] = "network evaluations per sample, guidance included"
    return lines | _machine(trainer, generator.source.device)


def origin(trainer: L.Trainer, generator: SampleGenerator) -> dict[str, str]:
    """Return the settings of data, guidance and precision that determine the samples."""
    return {
        **generator.data.identity(),
        "guidance": _guidance(generator.source),
        "precision": str(trainer.precision),
    }


def _weights(source: SampleSource, costs: Mapping[SamplingSpec, SamplingCost]) -> str:
    # The average is sampled instead of the network in training. A distillation uses its teacher as loaded.
    averaged = {spec.model: bool(cost.times) for spec, cost in costs.items()}
    average = f"exponential moving average (decay {source.ema_decay:g})"
    return "; ".join(f"{model}: {average if is_average else 'as loaded'}" for model, is_average in averaged.items())


def _machine(trainer: L.Trainer, device: torch.device) -> dict[str, str | int]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return {
        "device": f"{device.type} ({name})",
        "processes": trainer.world_size,
        "versions": f"{versions}, Python {platform.python_version()}",
    }


def _guidance(source: SampleSource) -> str:
    guidance = source.guidance
    if guidance.scale == 1:
        return "none"
    limit = "no limit" if guidance.limit is None else f"limit {guidance.limit:g}"
    first, last = guidance.interval
    return f"teacher: scale {guidance.scale:g}, {limit}, t in [{first:g}, {last:g}]"
