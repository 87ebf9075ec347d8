"""The protocol of a measurement: every setting that its figures depend on, by name."""

from collections.abc import Sequence
from typing import Any

from decm_lightning.callbacks.drawing import Drawing
from decm_lightning.metrics import Quality, Reference


def protocol(
    drawing: Drawing, qualities: Sequence[Quality], reference: Reference | None, samples: int, batch_size: int
) -> dict[str, str | int]:
    """Return what was done, for people and for the file; for all processes, since they count together."""
    counts = qualities[0].counts()
    lines: dict[str, str | int] = {"checkpoint": str(drawing.module.trainer.ckpt_path or "none: weights in memory")}
    if vae := getattr(drawing.data, "vae", None):
        lines["VAE"] = str(vae)
    lines["feature network"] = ", ".join(quality.name for quality in qualities)
    lines["reference"] = "images of the loader" if reference is None else str(reference.path)
    if reference is not None:
        lines["reference sha256"] = reference.sha256
    lines |= {
        "real images": counts.real or "none: mean and covariance only",
        "generated images": samples,
        "labels": _labels(drawing),
        "pixels": "round(127.5 (x + 1)) clamped to 0..255",
        "guidance": _guidance(drawing.module),
        "seed": drawing.seed,
        "batch size": batch_size,
    }
    for quality in qualities:
        lines |= quality.notes()
        lines |= {column: f"not measured: {reason}" for column, reason in quality.left_out.items()}
    lines["evaluations"] = "passes of a network for one sample, guidance included"
    return lines


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
