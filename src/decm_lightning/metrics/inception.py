"""The Inception network of the FID, and its metrics."""

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from decm_lightning.files import file_sha256
from decm_lightning.metrics.features import FeatureNetwork, as_rgb
from decm_lightning.metrics.inception_network import CLASSES, SIDE, SPATIAL_CHANNELS, Inception
from decm_lightning.metrics.metric import KID, FeatureMetric, Frechet, InceptionScore, PrecisionRecall
from decm_lightning.networks.checkpoint_files import few, naming, read_file

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
DIGEST = "6726825d"
"""The first digits of the SHA-256 of the file, which are part of its name."""


class InceptionFeatures(FeatureNetwork):
    """The FID's network: FID, sFID, Inception Score, improved precision and recall, and KID.

    Columns: `fid` (arXiv 1706.08500), `sfid` (arXiv 2103.03841), `inception_score`, `precision`, `recall`, `kid`.
    The values are comparable with published ones if measured on 50,000 images, the default of a test.

    Args:
        weights: path of weights-inception-2015-12-05-6726825d.pth (also known as pt_inception-2015-12-05-6726825d.pth);
            None to download it once.

    Raises:
        OSError: if the file does not exist, may not be read, or cannot be downloaded.
        ValueError: if the file is damaged or contains other weights.
    """

    num_features = 2048
    samples = 50_000

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.network = Inception()
        path = _downloaded() if weights is None else Path(weights)
        state = _read(path)
        with naming(path):
            self.network.load_state_dict(state)
        digest = file_sha256(path)[: len(DIGEST)]
        self.name = "the FID's Inception" if digest == DIGEST else f"Inception with other weights ({digest})"
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return pool (b, 2048), spatial (b, 2023) and logits (b, 1008), float32, of uint8 images (b, 1 or 3, h, w).

        Raises:
            ValueError: if the number of channels is not 1 or 3.
        """
        x = (resize(as_rgb(images, "Inception"), SIDE) - 128) / 128
        cudnn = torch.backends.cudnn
        # TF32, the default of convolutions, changes the fourth digit.
        with cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, allow_tf32=False):
            return self.network.views(x)

    def metrics(self) -> list[FeatureMetric]:
        """Return the metrics in the order of the columns above."""
        spatial = SPATIAL_CHANNELS * 17 * 17
        return [
            Frechet("fid", "pool", self.num_features, moments="pool"),
            Frechet("sfid", "spatial", spatial, moments="spatial", in_validation=False),
            InceptionScore("inception_score", "logits", CLASSES),
            PrecisionRecall("pool"),
            KID("kid", "pool", self.num_features),
        ]


def resize(images: Tensor, side: int) -> Tensor:
    """Return images (b, c, side, side), resized bilinearly as in TensorFlow 1: pixel i is read at position i n / side.

    Unlike torch's interpolation, it neither adds half a pixel nor antialiases. It is part of the definition of the FID.
    """
    for dim in (3, 2):
        size = images.shape[dim]
        position = torch.arange(side, device=images.device, dtype=images.dtype) * (size / side)
        low = position.long()
        fraction = (position - low).view(-1, *[1] * (3 - dim))
        first = images.index_select(dim, low)
        images = first + (images.index_select(dim, (low + 1).clamp(max=size - 1)) - first) * fraction
    return images


def _downloaded() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if not path.is_file():
        try:
            torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            raise OSError(
                f"Inception's weights cannot be downloaded ({error}): download {URL} elsewhere and copy it to {path}, "
                "or pass its path as the argument `weights` of InceptionFeatures"
            ) from error
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = read_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no Inception weights at {path}: download {URL}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must contain a dict of tensors: the weights of the FID are {URL}")
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(f"{path} has NaN or infinite weights: {few(broken)}: download the file again")
    return state
