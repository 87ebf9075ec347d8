"""Measure images that were generated elsewhere, with the metrics of `Evaluation`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from decm_lightning.errors import check_at_least
from decm_lightning.evaluation.protocol import machine, measurement, networks
from decm_lightning.evaluation.table import Row, Table
from decm_lightning.even_split import split_evenly
from decm_lightning.metrics import InceptionFeatures
from decm_lightning.metrics.feature_metrics import FeatureMetrics, metrics_of
from decm_lightning.metrics.reference import Images, read
from decm_lightning.progress import Progress


def score(
    samples: str | Path,
    reference: str | Path,
    features: Sequence[nn.Module] | None = None,
    seed: int = 0,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> Table:
    """Return the table of generated images on disk.

    The values equal those of `Evaluation` for the same images in the same order; in a folder, the order of the names.

    Args:
        samples: a folder with at least 2 images of one size, or an .npz file with images `arr_0`, uint8 (n, h, w, 1 or
            3).
        reference: real images in one of these forms, or moments of features; see `metrics.reference.read`.
        features: one feature network or several; None for Inception, the network of the FID.
        seed: seed of metrics that use random subsets.
        batch_size: images read at once, at least 1.
        device: the device of the feature networks.

    Raises:
        FileNotFoundError: if the samples or the reference do not exist.
        ValueError: if the samples have no images, fewer than 2, or different sizes; or the reference does not fit the
            feature networks.
    """
    check_at_least(1, batch_size=batch_size)
    generated, real = read(samples), read(reference)
    if generated.images is None:
        raise ValueError(f"{samples} has no images arr_0: expected an .npz file of images, or a folder of images")
    if len(generated.images) < 2:
        raise ValueError(f"{samples} has 1 image: metrics need at least 2")
    # Inception is loaded, and downloaded once, only after the images have been found.
    features = [InceptionFeatures()] if features is None else features
    qualities = [quality.to(torch.device(device)) for quality in metrics_of(features, seed, real)]
    if real.images is not None and any(quality.needs_real for quality in qualities):
        _add(qualities, real.images, reference, True, batch_size)
    _add(qualities, generated.images, samples, False, batch_size)
    values = {name: value for quality in qualities for name, value in quality.compute().items()}
    protocol = {
        "samples": str(generated.path),
        "samples sha256": generated.sha256,
        **measurement(qualities, real, generated.images.shape, seed, batch_size),
        **machine(torch.device(device)),
    }
    return Table(networks(qualities), protocol, [Row(generated.path, None, values)])


def _add(qualities: Sequence[FeatureMetrics], images: Images, source: str | Path, real: bool, batch_size: int) -> None:
    name = "reference" if real else "samples"
    parts = split_evenly(len(images), batch_size, rank=0, world=1)
    with Progress(total=len(images), desc=name, unit="image") as bar:
        for batch in images.batches(parts):
            try:
                for quality in qualities:
                    quality.update(batch, real)
            except ValueError as error:
                error.add_note(f"they are the images of {source}")
                raise
            bar.update(len(batch))
