"""python -m benchmarks.corrector: does FreeFlow's corrector help a network that is too small for the flow map?

On the ring of eight Gaussians a small MLP learns the one-step map from the exact velocity by FreeFlow's predictor
(arXiv 2511.19428), with and without its corrector. The predictor copies the teacher's trajectory of each noise, which
the network is too small to do. The corrector instead compares distributions: it moves the samples along
v(x_r, r) - v_fake(x_r, r), where x_r are samples with noise and v_fake is the velocity of the student's own samples.
"""

from collections.abc import Iterator
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn

from decm_lightning.derivatives import Tangent, dual
from decm_lightning.flows import GaussianMixture
from decm_lightning.networks import MLP
from decm_lightning.time_laws import LogitNormal

FLOW = GaussianMixture.ring()
ROWS = 1024


class Method(NamedTuple):
    """A variant of the corrector.

    Args:
        fraction: fraction of the rows for the corrector; 0 for the predictor alone.
        reserved: learn v_fake with the student's own network, at s = -1, which its flow map does not use.
        start: step from which the corrector acts, as a fraction of the run.
        length: number of steps relative to the other methods.
    """

    fraction: float = 0.0
    reserved: bool = False
    start: float = 0.0
    length: int = 1


METHODS = {
    "predictor": Method(),
    "predictor, twice the steps": Method(length=2),
    "predictor and corrector": Method(0.25),
    "the same, from half of the run": Method(0.25, start=0.5),
    "fake velocity at a reserved s": Method(0.25, reserved=True),
    "corrector alone": Method(1.0),
}


def train(method: Method, width: int, steps: int, seed: int) -> nn.Module:
    """Return the average of a student after `steps` training steps."""
    torch.manual_seed(seed)
    steps *= method.length
    student, fake = MLP(width=width), MLP(width=4 * width)
    average = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fake_optimizer = torch.optim.Adam(fake.parameters(), lr=3e-3)
    toward_noise, generator = LogitNormal(-0.8, 1.0), torch.Generator().manual_seed(seed)
    zero, one = torch.zeros(ROWS), torch.ones(ROWS)
    for step in range(steps):
        rows = round(method.fraction * ROWS) if step >= method.start * steps else 0
        noise = torch.randn(ROWS, 2)
        predicted, corrected = noise[rows:], noise[:rows]
        losses, size = [], torch.tensor(1.0)
        if len(predicted):
            g, u = predictor_residual(student, predicted)
            size = g.abs().mean()
            normalized = g / (g.square().mean(1, keepdim=True) + 1e-3)
            losses.append((u - (u - normalized).detach()).square().sum() / ROWS)
        if rows:
            u = student(corrected, zero[:rows], one[:rows], None)
            samples = (corrected + u).detach()
            r, fresh = toward_noise.draw(rows, generator), torch.randn(rows, 2)
            x_r = (1 - r)[:, None] * fresh + r[:, None] * samples
            network, s = (student, -one[:rows]) if method.reserved else (fake, r)
            v_fake = network(x_r, r, s, None)
            fake_loss = (v_fake - (samples - fresh)).square().sum(1).mean()
            if method.reserved:
                losses.append(fake_loss * rows / ROWS)
            else:
                fake_optimizer.zero_grad()
                fake_loss.backward()
                fake_optimizer.step()
            g = v_fake.detach() - FLOW(x_r, r)
            g = g * size / g.abs().mean()
            normalized = g / (size**2 + 1e-3)
            losses.append((u - (u - normalized).detach()).square().sum() / ROWS)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(student)
    return average.module


def predictor_residual(student: nn.Module, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return u + s du/ds - v(f(x_0, 0, s), s), without a graph, and u(x_0, 0, s), with one."""
    zero, s = torch.zeros(len(noise)), torch.rand(len(noise))
    result = dual(student, noise, zero, s, None, Tangent(torch.zeros_like(noise), zero, torch.ones_like(s)))
    end = (noise + s[:, None] * result.u).detach()
    return (result.u + s[:, None] * result.jvp).detach() - FLOW(end, s), result.u


@torch.no_grad()
def distances(student: nn.Module, count: int = 4000) -> Iterator[float]:
    """Yield the energy distance to the mixture and the RMSE to the exact flow map, both of one-step samples."""
    generator = torch.Generator().manual_seed(1)
    noise, zero, one = torch.randn(count, 2, generator=generator), torch.zeros(count), torch.ones(count)
    samples = noise + student(noise, zero, one, None)
    yield energy_distance(samples, FLOW.sample(count, generator).x_1)
    yield (samples - FLOW.flow_map(noise, zero, one, tolerance=1e-4)).square().sum(1).mean().sqrt().item()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'|, without bias: 0 on average for equal distributions."""
    count = len(x)
    within = sum(torch.cdist(each, each).sum() for each in (x, y)) / (count * (count - 1))
    return (2 * torch.cdist(x, y).mean() - within).item()


def main(width: int = 16, steps: int = 4000, seeds: int = 3) -> None:
    """Print a table: mean and standard deviation over seeds."""
    torch.set_num_threads(1)
    print("| method | energy distance | RMSE to the exact map |\n|---|---|---|")
    for name, method in METHODS.items():
        rows = [list(distances(train(method, width, steps, seed))) for seed in range(seeds)]
        cells = [f"{mean(column):.4f} ± {stdev(column):.4f}" for column in zip(*rows, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
