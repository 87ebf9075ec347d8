"""The protocol of a measurement: every setting that its values depend on, by name."""

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
    """Return what was done, for people and for the file; for all processes, since they count together."""
    counts = qualities[0].counts()
    lines: dict[str, str | int] = {"checkpoint": str(trainer.ckpt_path or "none: weights in memory")}
    lines["weights"] = _weights(generator.source, costs)
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
    lines["nfe"] = "passes of a network for one sample, guidance included"
    return lines | _machine(trainer, generator.source.device)


def origin(trainer: L.Trainer, generator: SampleGenerator) -> dict[str, str]:
    """Return what made the samples of a spec, apart from weights, noise, conditions and machine."""
    return {
        **generator.data.identity(),
        "guidance": _guidance(generator.source),
        "precision": str(trainer.precision),
    }


def _weights(source: SampleSource, costs: Mapping[SamplingSpec, SamplingCost]) -> str:
    # Only the average is sampled, never the network in training; a teacher of a distillation is as it was loaded.
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
