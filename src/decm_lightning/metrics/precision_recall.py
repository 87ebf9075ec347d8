"""Improved precision and recall: the fraction of each set of features that lies within the other's manifold."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from decm_lightning.errors import check_at_least


class ImprovedPrecisionRecall(Metric):
    """Improved precision and recall (arXiv 1904.06991): two values in [0, 1].

    A set's manifold is the union of balls, one around each of its points, whose radius is the distance to the point's
    k-th nearest neighbor within the set. Precision is the fraction of generated points inside the manifold of the real
    ones, recall the fraction of real points inside that of the generated ones. ADM uses k = 3.

    Memory on each process: all features of both sets (n x d values), and `rows` x n distances.

    Args:
        neighbors: k, at least 1.
        rows: points whose distances to all others are computed at once, at least 1.

    Raises:
        ValueError: if a number is below 1.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    real_features: list[Tensor]
    fake_features: list[Tensor]

    def __init__(self, neighbors: int = 3, rows: int = 1000) -> None:
        super().__init__()
        check_at_least(1, neighbors=neighbors, rows=rows)
        self.neighbors = neighbors
        self.rows = rows
        self.add_state("real_features", [], dist_reduce_fx=None)
        self.add_state("fake_features", [], dist_reduce_fx=None)

    def update(self, features: Tensor, real: bool) -> None:
        """Add features (b, d)."""
        (self.real_features if real else self.fake_features).append(features)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return precision and recall.

        Raises:
            ValueError: if a set has k points or fewer.
        """
        real, generated = dim_zero_cat(self.real_features), dim_zero_cat(self.fake_features)
        if min(len(real), len(generated)) <= self.neighbors:
            found = f"{len(real)} real and {len(generated)} generated"
            raise ValueError(f"precision and recall need more than {self.neighbors} images of each kind: got {found}")
        return self._inside(generated, real), self._inside(real, generated)

    def reset(self) -> None:
        """Discard the generated features but not the real ones."""
        real = list(self.real_features)
        super().reset()
        self.real_features = real

    def _inside(self, points: Tensor, manifold: Tensor) -> Tensor:
        # A point is its own nearest neighbor.
        nearest = self.neighbors + 1
        radii = torch.cat([part.kthvalue(nearest, dim=1).values for part in self._squares(manifold, manifold)])
        inside = torch.cat([(part <= radii).any(1) for part in self._squares(points, manifold)])
        return inside.double().mean()

    def _squares(self, points: Tensor, others: Tensor) -> Iterator[Tensor]:
        # |x|^2 - 2 x y + |y|^2, as in ADM: one matrix product, and no array of size rows x n x d.
        norms = others.square().sum(1)
        for part in points.split(self.rows):
            yield (part.square().sum(1, keepdim=True) - 2 * part @ others.T + norms).clamp(min=0)
