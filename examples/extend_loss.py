"""A loss of your own: short steps, learned from the start of each step.

    python examples/extend_loss.py

A loss is a region of the triangle of times, a weight for each identity of the exact flow map, and a normalization of
its residual. `Window` below is a region that the package does not have: steps of at most a fixed length. Its loss is
added to consistency and flow matching. Every part can be named in a config by its path, here `extend_loss.Window` and
`extend_loss.objective`, if this file is in the working directory or next to the config:

    decm fit --config configs/digits/decm.yaml --model.init_args.objective extend_loss.objective
"""

from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from decm_lightning import Batch, Distiller, Objective
from decm_lightning.flows import GaussianMixture
from decm_lightning.losses import FlowMapLoss
from decm_lightning.networks import MLP
from decm_lightning.teachers import ExactTeacher
from decm_lightning.triangle import DataEdge, Diagonal, Edge, Times


@dataclass(frozen=True)
class Window(Edge):
    """Steps from the batch's times t to at most t + length. A dataclass, so that resumed runs can compare settings.

    Args:
        length: the longest step, above 0.
    """

    length: float = 0.25

    def draw(self, t: Tensor, step: int, generator: torch.Generator) -> Times:
        """Return (t, s) with s uniform over [t, t + length], cut off at 1."""
        lengths = self.length * torch.rand(len(t), generator=generator).to(t)
        return Times(t, (t + lengths).clamp(max=1))


def soft_sign(g: Tensor) -> Tensor:
    """Return N(g) = g / (1 + |g|), element by element: large residuals are bounded, small ones are unchanged."""
    return g / (1 + g.abs())


def objective(length: float = 0.25, window_weight: float = 1.0) -> Objective:
    """Consistency, flow matching, and steps inside a window.

    Args:
        length: the longest step inside the window, above 0.
        window_weight: factor of the window's loss, above 0.
    """
    losses = {
        "consistency": FlowMapLoss(DataEdge()),
        "flow_matching": FlowMapLoss(Diagonal()),
        "window": FlowMapLoss(Window(length), start_weight=1.0, weight=window_weight),
    }
    return Objective(losses, normalization=soft_sign)


def main(steps: int = 500) -> Distiller:
    """Train a student of an exact mixture, and print its error at one step: the root mean square over 1,000 points."""
    torch.manual_seed(0)
    flow, generator = GaussianMixture.ring(), torch.Generator().manual_seed(0)
    batches = [Batch(flow.sample(256, generator).x_1, None) for _ in range(steps)]
    distiller = Distiller(ExactTeacher(flow), MLP(2), objective(), optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(distiller, DataLoader(batches, batch_size=None))
    x_0 = torch.randn(1000, 2, generator=generator)
    exact = flow.flow_map(x_0, torch.zeros(1000), torch.ones(1000), tolerance=1e-5)
    with torch.no_grad():
        found = x_0 + distiller.average(x_0, torch.zeros(1000), torch.ones(1000), None)
    print(f"error at one step: {(found - exact).square().sum(1).mean().sqrt():.3f}")
    return distiller


if __name__ == "__main__":
    main()
