"""MeanFlow (arXiv 2505.13447) from data alone, on a mixture whose exact flow map is known.

    python examples/mean_flow.py

trains a network u(x, t, s) without a teacher for about half a minute on one core, and prints the root mean square
error of its samples at 1, 2 and 4 steps against the exact flow map. Euler's method on the exact velocity is printed
for comparison.
"""

import lightning as L
import torch
from extend_sampler import jumps
from torch import Tensor
from torch.utils.data import DataLoader

from decm_lightning import Batch, Distiller, euler, mean_flow
from decm_lightning.flows import GaussianMixture
from decm_lightning.networks import MLP
from decm_lightning.samplers import flow_map_of


def train(flow: GaussianMixture, steps: int, batch: int = 512) -> Distiller:
    """Return the trained module. Its `average` is the network to sample."""
    generator = torch.Generator().manual_seed(0)
    batches = [Batch(flow.sample(batch, generator).x_1, None) for _ in range(steps)]
    distiller = Distiller(
        teacher=None,  # the velocity of a path is x_1 - x_0
        student=MLP(dimensions=2, width=256),
        objective=mean_flow(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    )
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(distiller, DataLoader(batches, batch_size=None))
    return distiller


def error(samples: Tensor, exact: Tensor) -> float:
    """Return the root mean square distance of pairs of points, (b, 2)."""
    return (samples - exact).square().sum(1).mean().sqrt().item()


def main(steps: int = 2000) -> dict[int, tuple[float, float]]:
    """Return the errors of MeanFlow and of Euler's method by number of steps."""
    torch.manual_seed(0)
    flow = GaussianMixture.ring()
    network = train(flow, steps).average
    x_0 = torch.randn(2000, 2)
    exact = flow.flow_map(x_0, torch.zeros(2000), torch.ones(2000), tolerance=1e-5)
    errors = {}
    for n in (1, 2, 4):
        euler_samples = euler(flow_map_of(flow), x_0, None, n)
        errors[n] = error(jumps(network, x_0, None, n), exact), error(euler_samples, exact)
        print(f"{n} steps: MeanFlow {errors[n][0]:.3f}, Euler {errors[n][1]:.3f}")
    return errors


if __name__ == "__main__":
    main()
