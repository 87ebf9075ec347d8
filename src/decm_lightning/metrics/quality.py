"""How far generated images are from real ones: the Fréchet and the kernel distance on one feature network."""

import warnings
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


class Quality:
    """Distances between the features of real and of generated images, in float64.

        fd  = |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2))                     (arXiv 1706.08500)
        kid = unbiased MMD^2 with k(x, y) = (x . y / num_features + 1)^3               (arXiv 1801.01401)

    `fd` is a Fréchet distance on the given feature network, and an FID only if that is Inception. `kid` is the mean
    over 100 subsets of min(1000, n) images, n the fewer of real and generated; it is not multiplied by 1,000. Both are
    torchmetrics' own, fed with features, so that the network sees each image once; among several processes they are
    summed over all. It is no nn.Module: inside a LightningModule its network would land in every checkpoint.

    Args:
        features: frozen; uint8 images (b, c, h, w) to (b, num_features).
        seed: seed of KID's subsets.
    """

    def __init__(self, features: nn.Module, seed: int = 0) -> None:
        self.features = features
        self.seed = seed
        passed_on = _PassedOn(cast(int, features.num_features))
        self.frechet = FrechetInceptionDistance(passed_on, reset_real_features=False)
        with warnings.catch_warnings():
            # It warns that features are kept, which is how the kernel distance works.
            warnings.simplefilter("ignore", UserWarning)
            self.kernel = KernelInceptionDistance(passed_on, subsets=KID_SUBSETS, reset_real_features=False)

    @property
    def name(self) -> str:
        """The name of the feature network."""
        return str(getattr(self.features, "name", type(self.features).__name__))

    def to(self, device: torch.device) -> "Quality":
        """Move the network and the statistics."""
        self.features.to(device)
        self.frechet.to(device)
        self.kernel.to(device)
        return self

    def real(self, images: Tensor) -> None:
        """Take in real images, uint8 (b, c, h, w).

        Raises:
            ValueError: if the images are not uint8.
        """
        self._update(images, real=True)

    def generated(self, images: Tensor) -> None:
        """Take in generated images, uint8 (b, c, h, w).

        Raises:
            ValueError: if the images are not uint8.
        """
        self._update(images, real=False)

    def reset_generated(self) -> None:
        """Forget the generated images and keep the real ones."""
        self.frechet.reset()
        self.kernel.reset()

    def counts(self) -> tuple[int, int]:
        """Return the numbers of real and of generated images, over all processes."""
        with self.frechet.sync_context():
            return int(self.frechet.real_features_num_samples), int(self.frechet.fake_features_num_samples)

    def compute(self) -> dict[str, float]:
        """Return {"fd": ..., "kid": ...}, both 0 for equal distributions up to sampling error; kid may be negative.

        The state of torch's global generators is left as it was.

        Raises:
            ValueError: if there are fewer than two real or two generated images.
        """
        counts = self.counts()
        if min(counts) < 2:
            raise ValueError(f"a distance needs at least 2 images of each kind: got {counts[0]} real, {counts[1]} made")
        self.kernel.subset_size = min(KID_SUBSET_SIZE, *counts)
        # Subsets that hold all images are all the same.
        self.kernel.subsets = KID_SUBSETS if max(counts) > self.kernel.subset_size else 1
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the accelerators, whose state is not forked here.
            torch.default_generator.manual_seed(self.seed)
            kid, _ = self.kernel.compute()
        return {"fd": self.frechet.compute().item(), "kid": kid.item()}

    @torch.no_grad()
    def _update(self, images: Tensor, real: bool) -> None:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, see to_uint8: got {images.dtype}")
        features = self.features(images).double()
        self.frechet.update(features, real=real)
        self.kernel.update(features, real=real)


class _PassedOn(nn.Identity):
    """Stands where torchmetrics expects the feature network: what comes in are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
