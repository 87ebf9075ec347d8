"""The protocol of a measurement: every setting that its values depend on, by name."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

from decm_lightning.evaluation.generator import Drawing
from decm_lightning.evaluation.spec import Cell
from decm_lightning.evaluation.usage import Usage
from decm_lightning.metrics import FeatureMetrics, Reference

PACKAGES = ("decm-lightning", "torch", "lightning", "torchmetrics")


def protocol(
    drawing: Drawing,
    qualities: Sequence[FeatureMetrics],
    reference: Reference | None,
    samples: int,
    batch_size: int,
    usages: Mapping[Cell, Usage],
) -> dict[str, str | int]:
    """Return what was done, for people and for the file; for all processes, since they count together."""
    counts = qualities[0].counts()
    lines: dict[str, str | int] = {"checkpoint": str(drawing.module.trainer.ckpt_path or "none: weights in memory")}
    lines["weights"] = _weights(drawing.module, usages)
    lines |= origin(drawing.module, drawing.data)
    options = {str(cell): usage.options(cell) for cell, usage in usages.items()}
    lines["sampler options"] = "; ".join(f"{cell}: {text}" for cell, text in options.items() if text) or "none"
    lines["feature network"] = ", ".join(quality.name for quality in qualities)
    lines["reference"] = "images of the loader" if reference is None else str(reference.path)
    if reference is not None:
        lines["reference sha256"] = reference.sha256
    lines |= {
        "real images": counts.real or "none: mean and covariance only",
        "generated images": samples,
        "labels": _labels(drawing),
        "pixels": "round(127.5 (x + 1)) clamped to 0..255",
        "seed": drawing.seed,
        "batch size": batch_size,
    }
    for quality in qualities:
        lines |= quality.describe()
        lines |= {column: f"not measured: {reason}" for column, reason in quality.unavailable.items()}
    lines["nfe"] = "passes of a network for one sample, guidance included"
    return lines | _machine(drawing.module)


def origin(module: Any, data: Any) -> dict[str, str]:
    """Return what made the samples of a given sampler, apart from weights, noise, conditions and machine."""
    vae = {"VAE": _vae(data)} if getattr(data, "vae", None) else {}
    return vae | {"guidance": _guidance(module), "precision": str(module.trainer.precision)}


def _vae(data: Any) -> str:
    # By content if it is loaded: the same path may hold another VAE later.
    coder = getattr(data, "decoder", None) or getattr(data, "coder", None)
    return str(data.vae if coder is None else coder.autoencoder.identity)


def _weights(module: Any, usages: Mapping[Cell, Usage]) -> str:
    # Only the average is sampled, never the network in training; a teacher of a distillation is as it was loaded.
    averaged = {cell.model: bool(usage.times) for cell, usage in usages.items()}
    averaging = getattr(module, "averaging", None)
    average = f"exponential moving average (decay {averaging.decay:g})" if averaging else "average"
    return "; ".join(f"{model}: {average if is_average else 'as loaded'}" for model, is_average in averaged.items())


def _machine(module: Any) -> dict[str, str | int]:
    device = module.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return {
        "device": f"{device.type} ({name})",
        "processes": module.trainer.world_size,
        "versions": f"{versions}, Python {platform.python_version()}",
    }


def _labels(drawing: Drawing) -> str:
    if hasattr(drawing.data, "condition"):
        return "sample i has the i-th condition of the data"
    if drawing.labels == "balanced":
        return f"sample i has the label i mod {drawing.data.num_classes}"
    return f"uniform over {drawing.data.num_classes} classes, by the seed"


def _guidance(module: Any) -> str:
    guidance = getattr(getattr(module, "velocity", module), "guidance", None)
    if guidance is None or guidance.scale == 1:
        return "none"
    limit = "no limit" if guidance.limit is None else f"limit {guidance.limit:g}"
    first, last = guidance.interval
    return f"teacher: scale {guidance.scale:g}, {limit}, t in [{first:g}, {last:g}]"
