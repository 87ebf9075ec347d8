"""Caption accuracy: how often a ridge regression fitted to real images identifies the caption of a generated image."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchmetrics import Metric

from decm_lightning.errors import needs
from decm_lightning.metrics.features import FeatureNetwork, as_feature_network
from decm_lightning.metrics.metric import Counts, FeatureMetric, Prompts
from decm_lightning.types import Batch, Captions, Condition

BATCH = 256
AT_ONCE = 64
PENALTIES = tuple(10 ** (power / 2) for power in range(-2, 15))
"""Candidates for the ridge penalty."""
SAME = 1 - 1e-4
"""The cosine of embeddings above which captions are equal, apart from the rounding of sums in another order."""


class CaptionedRows(Protocol):
    """Images with captions, which may not be encoded yet."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""


@runtime_checkable
class CaptionedData(Protocol):
    """A data module of text-image pairs, such as demo.Emoji and data.TextImagePairs."""

    train: CaptionedRows
    reference: CaptionedRows

    def condition(self, rows: Sequence[int], seed: int = 0) -> Condition:
        """Return held-out captions."""


class CaptionProbe(FeatureNetwork):
    """Predict captions from images by ridge regression; columns `caption_top1` and `caption_top5`.

    With image features x and caption embeddings y (the normalized mean of a caption's tokens) of real training pairs,
    W minimizes sum |y - y_mean - W (x - x_mean)|^2 + a |W|^2, with the penalty a that has the smallest leave-one-out
    error. The caption of an image is in the top k if fewer than k other held-out captions have a cosine
    cos(W (x - x_mean), y - y_mean) at least as large. Columns are fractions of the samples, in [0, 1]. The protocol
    states the values of chance, k / number of held-out captions, and of the real images.

    Args:
        features: a feature network with one output, such as demo.EfficientNetLite0Features.
        pairs: maximum number of training pairs to fit, spread evenly over all, at least 2.

    Raises:
        ValueError: if pairs is below 2.
    """

    weight: Tensor
    x_mean: Tensor
    y_mean: Tensor
    candidates: Tensor

    def __init__(self, features: nn.Module, pairs: int = 5000) -> None:
        super().__init__()
        if pairs < 2:
            raise ValueError(f"pairs must be at least 2: got {pairs}")
        self.features = as_feature_network(features)
        self.pairs = pairs
        self.name = f"caption accuracy by a ridge probe of {self.features.name}"
        self.fitted = 0
        self.penalty = 0.0
        for name in ("weight", "x_mean", "y_mean", "candidates"):
            self.register_buffer(name, torch.empty(0))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of uint8 images (b, c, h, w)."""
        return self.features(images)

    def metrics(self) -> list[FeatureMetric]:
        """Return the caption accuracy."""
        return [CaptionAccuracy(self)]

    @torch.no_grad()
    def prepare(self, data: CaptionedData, read: Callable[[Batch], Batch]) -> None:
        """Fit the probe to training pairs of the data module, with its held-out captions as candidates.

        Args:
            data: the data module.
            read: turns its batches into uint8 images and captions.

        Raises:
            ImportError: if scikit-learn is not installed.
            ValueError: if the data have no captions.
        """
        if not isinstance(data, CaptionedData):
            remedy = "use a data module of pairs, such as demo.Emoji"
            raise ValueError(f"caption accuracy needs images with captions: got {type(data).__name__}, {remedy}")
        # If an image has several captions, these items and the candidates use the first one.
        rows = torch.linspace(0, len(data.train) - 1, min(len(data.train), self.pairs)).long().tolist()
        features, captions = [], []
        for part in _batches(rows):
            batch = read(data.train.__getitems__(part))
            features.append(torch.cat([self(images) for images in batch.x_1.to(self.weight.device).split(AT_ONCE)]))
            captions.append(embedding(batch.condition))
        candidates = [embedding(data.condition(part)) for part in _batches(range(len(data.reference)))]
        self.fit(torch.cat(features), torch.cat(captions), torch.cat(candidates))

    def fit(self, features: Float[Tensor, "n d"], captions: Float[Tensor, "n e"], held: Float[Tensor, "m e"]) -> None:
        """Fit the probe to features and caption embeddings of real images, with held-out captions as candidates."""
        with needs("CaptionProbe", "scikit-learn", "demo"):
            from sklearn.linear_model import RidgeCV
        device = self.weight.device
        x, y = features.double().cpu().numpy(), captions.double().cpu().numpy()
        ridge = RidgeCV(PENALTIES).fit(x, y)
        self.penalty = float(ridge.alpha_)
        self.weight = torch.from_numpy(ridge.coef_).float().to(device)
        self.x_mean, self.y_mean = (torch.from_numpy(part.mean(0)).float().to(device) for part in (x, y))
        self.candidates = normalize(held.unique(dim=0).to(device) - self.y_mean, dim=1)
        self.fitted = len(features)

    def ranks(self, features: Float[Tensor, "b d"], captions: Float[Tensor, "b e"]) -> Int[Tensor, " b"]:
        """Return the number of other candidates that match an image at least as well as its caption; 0 is correct.

        Raises:
            ValueError: if a caption is not among the candidates.
        """
        similarity = normalize(captions.to(self.y_mean) - self.y_mean, dim=1) @ self.candidates.T
        nearest, own = similarity.max(1)
        if (nearest < SAME).any():
            row = int(nearest.argmin())
            raise ValueError(f"caption {row} of the batch is not among the {len(self.candidates)} held-out captions")
        scores = normalize((features - self.x_mean) @ self.weight.T, dim=1) @ self.candidates.T
        # Counting the worse candidates makes ties and NaN count as errors.
        return len(self.candidates) - 1 - (scores < scores.gather(1, own[:, None])).sum(1)


class CaptionAccuracy(FeatureMetric):
    """The fractions of images whose caption is among the first k guesses of the probe."""

    needs_real = False
    needs_prompts = True

    def __init__(self, probe: CaptionProbe, top: Sequence[int] = (1, 5)) -> None:
        self.hits = Hits(top)
        super().__init__(tuple(f"caption_top{k}" for k in top), "features", self.hits)
        self.probe = probe

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Add a batch of features with their captions. Real images without captions are ignored."""
        if real and prompts.condition is None:
            return
        self.hits.update(self.probe.ranks(views[self.view], embedding(prompts.condition)), real)

    def describe(self, counts: Counts) -> str:
        """Return the settings of the fit, and the values of chance and of real images."""
        number = len(self.probe.candidates)
        real, _ = self.hits.compute()
        chance = " and ".join(f"{k / number:.3g}" for k in self.hits.top)
        reached = " and ".join(f"{fraction:.3g}" for fraction in real.tolist())
        upper = "unknown, the reference has no captions" if real.isnan().any() else reached
        fit = f"ridge probe of {self.probe.fitted} real training pairs, penalty {self.probe.penalty:g}"
        return f"{fit}; {number} held-out captions, chance {chance}, real images {upper}"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the fractions, in [0, 1]."""
        return dict(zip(self.columns, self.hits.compute()[1].tolist(), strict=True))


class Hits(Metric):
    """Fractions of ranks below each k for real and generated images, (2, len(top)); NaN without images."""

    full_state_update = False
    hits: Tensor
    seen: Tensor

    def __init__(self, top: Sequence[int]) -> None:
        super().__init__()
        self.top = tuple(top)
        self.add_state("hits", torch.zeros(2, len(top), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(2, 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ranks: Int[Tensor, " b"], real: bool) -> None:
        """Add the ranks of images, 0 for the best."""
        row = 0 if real else 1
        self.hits[row] += torch.stack([(ranks < k).sum() for k in self.top])
        self.seen[row] += len(ranks)

    def compute(self) -> Tensor:
        """Return the fractions."""
        return self.hits.double() / self.seen

    def reset(self) -> None:
        """Discard the generated images but not the real ones."""
        hits, seen = self.hits.clone(), self.seen.clone()
        super().reset()
        self.hits[0], self.seen[0] = hits[0], seen[0]


def embedding(condition: Condition) -> Float[Tensor, "b e"]:
    """Return the normalized mean of each caption's tokens, which for MiniLM is the sentence embedding.

    Raises:
        ValueError: if the condition is not Captions.
    """
    if not isinstance(condition, Captions):
        raise ValueError(f"caption accuracy needs captions: got {type(condition).__name__}")
    if condition.mask is None:
        return normalize(condition.tokens.float().mean(1), dim=1)
    mask = condition.mask[..., None].float()
    return normalize((condition.tokens.float() * mask).sum(1) / mask.sum(1).clamp(min=1), dim=1)


def _batches(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
