"""Caption accuracy: whether an image is told from its caption's neighbours by a probe that saw real images only."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchmetrics import Metric

from decm_lightning.metrics.feature_metrics import Counts, Part, Prompts
from decm_lightning.metrics.reference import Reference
from decm_lightning.types import Batch, Captions, Condition

BATCH = 256
AT_ONCE = 64
# The ridge penalties among which leave-one-out chooses, in the features' own units.
PENALTIES = tuple(10 ** (power / 2) for power in range(-2, 15))
# Captions are the same ones if their embeddings are, but for the rounding of a sum in another order.
SAME = 1 - 1e-4


class CaptionedRows(Protocol):
    """Images with captions, some of which may still have to be encoded."""

    def __len__(self) -> int:
        """Return their number."""

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""


class CaptionedData(Protocol):
    """A datamodule of pairs, such as data.Emoji and data.TextImagePairs."""

    train: CaptionedRows
    reference: CaptionedRows

    def condition(self, rows: Sequence[int], seed: int = 0) -> Condition:
        """Return held-out captions."""


class CaptionProbe(nn.Module):
    """Predicts captions from images by ridge regression; columns `caption_top1` and `caption_top5`.

    With image features x and caption embeddings y (the normalized mean of a caption's tokens) of real training pairs,
    W minimises sum |y - y_mean - W (x - x_mean)|^2 + a |W|^2, with the penalty a that has the least leave-one-out
    error. An image counts as its caption's in the top k if, among all captions that are held out, fewer than k others
    have a cosine at least as large: cos(W (x - x_mean), y - y_mean). Columns are shares of the samples, in [0, 1];
    chance is k / number of held-out captions, and what real images reach, which the protocol says, is what a perfect
    generator would.

    Args:
        features: one feature network with one output, such as metrics.EfficientNetLite0Features.
        pairs: fit at most so many training pairs, spread evenly over all, at least 2.

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
        self.features = features
        self.pairs = pairs
        self.name = f"caption accuracy by a ridge probe of {getattr(features, 'name', type(features).__name__)}"
        self.fitted = 0
        self.penalty = 0.0
        for name in ("weight", "x_mean", "y_mean", "candidates"):
            self.register_buffer(name, torch.empty(0))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of uint8 images (b, c, h, w)."""
        return self.features(images)

    def parts(self) -> list[Part]:
        """Return what is measured on it."""
        return [CaptionAccuracy(self)]

    @torch.no_grad()
    def prepare(self, data: CaptionedData, read: Callable[[Batch], Batch]) -> None:
        """Fit it to the training pairs of the datamodule, and take its held-out captions as candidates.

        Args:
            data: the datamodule.
            read: turns its batches into uint8 images and captions.

        Raises:
            ValueError: if the data are no pairs.
        """
        if not (hasattr(data, "condition") and hasattr(data, "train")):
            wanted = "give the trainer a datamodule of pairs, such as data.Emoji"
            raise ValueError(f"caption accuracy needs images with captions: {wanted}, not {type(data).__name__}")
        # Of several captions of an image the first: that is what the candidates are.
        rows = torch.linspace(0, len(data.train) - 1, min(len(data.train), self.pairs)).long().tolist()
        features, captions = [], []
        for part in _batches(rows):
            batch = read(data.train.__getitems__(part))
            features.append(torch.cat([self(images) for images in batch.x_1.to(self.weight.device).split(AT_ONCE)]))
            captions.append(embedding(batch.condition))
        candidates = [embedding(data.condition(part)) for part in _batches(range(len(data.reference)))]
        self.fit(torch.cat(features), torch.cat(captions), torch.cat(candidates))

    def fit(self, features: Float[Tensor, "n d"], captions: Float[Tensor, "n e"], held: Float[Tensor, "m e"]) -> None:
        """Fit it to features and caption embeddings of real images, and set the captions to tell apart."""
        device = self.weight.device
        x, y = features.double().cpu(), captions.double().cpu()
        self.x_mean, self.y_mean = x.mean(0).float().to(device), y.mean(0).float().to(device)
        weight, self.penalty = _ridge(x - x.mean(0), y - y.mean(0))
        self.weight = weight.float().to(device)
        self.candidates = normalize(held.unique(dim=0).to(device) - self.y_mean, dim=1)
        self.fitted = len(features)

    def ranks(self, features: Float[Tensor, "b d"], captions: Float[Tensor, "b e"]) -> Int[Tensor, " b"]:
        """Return how many other candidates are at least as near to an image as its own caption: 0 is right.

        Raises:
            ValueError: if a caption is none of the candidates.
        """
        likeness = normalize(captions.to(self.y_mean) - self.y_mean, dim=1) @ self.candidates.T
        nearest, own = likeness.max(1)
        if (nearest < SAME).any():
            row = int(nearest.argmin())
            raise ValueError(f"caption {row} of the batch is not held out: it is not among {len(self.candidates)}")
        scores = normalize((features - self.x_mean) @ self.weight.T, dim=1) @ self.candidates.T
        # Counted from the other side, so that a tie, or a feature that is NaN, is never in the image's favour.
        return len(self.candidates) - 1 - (scores < scores.gather(1, own[:, None])).sum(1)


class CaptionAccuracy(Part):
    """The shares of images whose caption is the probe's first guess, or among its first five."""

    wants_prompts = True

    def __init__(self, probe: CaptionProbe, top: Sequence[int] = (1, 5)) -> None:
        self.hits = Hits(top)
        super().__init__(tuple(f"caption_top{k}" for k in top), "features", self.hits)
        self.probe = probe

    @property
    def needs_images(self) -> bool:
        """Generated images are measured without real ones."""
        return False

    def refer(self, reference: Reference) -> str:
        """Need nothing: real images come with captions from the training data only."""
        return ""

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Take in a batch of features with their captions; real images of a reference file have none."""
        if real and prompts.condition is None:
            return
        self.hits.update(self.probe.ranks(views[self.view], embedding(prompts.condition)), real)

    def note(self, counts: Counts) -> str:
        """Say on what the probe was fitted, what chance gives, and what real images reach."""
        number = len(self.probe.candidates)
        real, _ = self.hits.compute()
        shares = [f"{k / number:.3g}" for k in self.hits.top], [f"{share:.3g}" for share in real.tolist()]
        chance, reached = (" and ".join(share) for share in shares)
        upper = "unknown, the reference has no captions" if real.isnan().any() else reached
        fit = f"ridge probe of {self.probe.fitted} real training pairs, penalty {self.probe.penalty:g}"
        return f"{fit}; {number} held-out captions, chance {chance}, real images {upper}"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the shares, in [0, 1]."""
        return dict(zip(self.columns, self.hits.compute()[1].tolist(), strict=True))


class Hits(Metric):
    """Shares of ranks below each k, of real images and of generated ones: (2, len(top)); NaN where there are none."""

    full_state_update = False
    hits: Tensor
    seen: Tensor

    def __init__(self, top: Sequence[int]) -> None:
        super().__init__()
        self.top = tuple(top)
        self.add_state("hits", torch.zeros(2, len(top), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(2, 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ranks: Int[Tensor, " b"], real: bool) -> None:
        """Take in the ranks of images, 0 for the best."""
        row = 0 if real else 1
        self.hits[row] += torch.stack([(ranks < k).sum() for k in self.top])
        self.seen[row] += len(ranks)

    def compute(self) -> Tensor:
        """Return the shares."""
        return self.hits.double() / self.seen

    def reset(self) -> None:
        """Forget the generated images and keep the real ones."""
        hits, seen = self.hits.clone(), self.seen.clone()
        super().reset()
        self.hits[0], self.seen[0] = hits[0], seen[0]


def embedding(condition: Condition) -> Float[Tensor, "b e"]:
    """Return the normalized mean of each caption's tokens; for MiniLM that is its sentence embedding.

    Raises:
        ValueError: if the condition is none of captions.
    """
    if not isinstance(condition, Captions):
        raise ValueError(f"caption accuracy needs captions: got {type(condition).__name__}")
    if condition.mask is None:
        return normalize(condition.tokens.float().mean(1), dim=1)
    kept = condition.mask[..., None].float()
    return normalize((condition.tokens.float() * kept).sum(1) / kept.sum(1).clamp(min=1), dim=1)


def _ridge(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> tuple[Float[Tensor, "e d"], float]:
    """Return W and the penalty a with the least leave-one-out error, of centred x and y.

    With x^T x = V diag(l) V^T and z = x V, W^T = V diag(1 / (l + a)) z^T y. Without row i, its residual would be
    1 / (1 - h_i) times as large, h_i = 1 / n + sum_k z_ik^2 / (l_k + a), where 1 / n is for the means.
    """
    values, vectors = torch.linalg.eigh(x.T @ x)
    z = x @ vectors
    projected = z.T @ y
    errors = []
    for penalty in PENALTIES:
        shrunk = 1 / (values.clamp(min=0) + penalty)
        leverage = 1 / len(x) + z.square() @ shrunk
        residual = y - z @ (shrunk[:, None] * projected)
        errors.append(float((residual / (1 - leverage)[:, None]).square().sum()))
    penalty = PENALTIES[errors.index(min(errors))]
    return (vectors @ (projected / (values.clamp(min=0) + penalty)[:, None])).T, penalty


def _batches(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
