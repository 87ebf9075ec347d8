"""decm score: measure images that were generated elsewhere, with the metrics and the table of decm test."""

from pathlib import Path

from decm_lightning.cli.targets import check_device
from decm_lightning.evaluation.scoring import score as table_of
from decm_lightning.metrics import FeatureNetwork
from decm_lightning.networks.record import QUALITY


def score(
    samples: str,
    reference: str,
    features: FeatureNetwork | list[FeatureNetwork] | None = None,
    out: str | None = None,
    seed: int = 0,
    batch_size: int = 500,
    device: str = "cpu",
) -> None:
    """Measure generated images and write the quality table.

    Args:
        samples: a folder of images of one size, or an .npz file with images arr_0, uint8 (n, h, w, 1 or 3).
        reference: real images in one of these forms, or an .npz file with the moments mu and sigma of Inception.
        features: one feature network or several, such as decm_lightning.demo.DigitsFeatures; by default
            InceptionFeatures, the network of the FID, whose weights are downloaded once.
        out: the folder to write quality.md and quality.json to; by default SAMPLES-quality.
        seed: seed of metrics that use random subsets.
        batch_size: images read at once, at least 1.
        device: the device, such as cpu or cuda.
    """
    check_device(device)
    networks = [features] if isinstance(features, FeatureNetwork) else features
    table = table_of(samples, reference, networks, seed, batch_size, device)
    path = Path(samples).absolute()
    folder = Path(out) if out else path.with_name(f"{path.name.removesuffix('.npz')}-quality")
    files = table.write(folder / QUALITY)
    print(f"{table.heading}\n\n{table.values()}\nwrote {', '.join(map(str, files))}")
