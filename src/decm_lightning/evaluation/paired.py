"""Compare each sample with the converged ODE of the teacher from the same noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torchdiffeq import odeint
from torchmetrics.aggregation import SumMetric

from decm_lightning.errors import check_at_least
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.even_split import split_evenly
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.metrics.metric import Frechet
from decm_lightning.path import DATA, NOISE, time_dtype
from decm_lightning.samplers import Generators
from decm_lightning.types import Condition, FlowMapNetwork, Sample

RUNGE_KUTTA = f"{__name__}.runge_kutta"


@dataclass(frozen=True)
class Paired:
    """Settings of the comparison with the teacher's converged ODE.

    Args:
        samples: number of samples that are compared, at most as many as are generated; at least 1.
        steps: Runge-Kutta steps of 4 evaluations each, at least 1. On digits, 20 and 40 steps differ by an RMSE of
            0.0007, where students have 0.08 to 0.1.

    Raises:
        ValueError: if a number is below 1.
    """

    samples: int = 1000
    steps: int = 25

    def __post_init__(self) -> None:
        check_at_least(1, samples=self.samples, steps=self.steps)


class PairedDistance:
    """Two columns: distances of a sample to the teacher's sample of the same number, with the same noise x_0.

        paired_rmse = sqrt(mean |x - y|^2 / d),    paired_features = sqrt(mean |f(x) - f(y)|^2)

    y is the end of the guided teacher's ODE from x_0, x and y are samples before decoding, d is their number of values,
    and f are the features of the first network with a Fréchet distance. Both columns are 0 for the exact flow map. For
    deterministic samplers they are the error of the map. Samplers that add noise, such as consistency with more than 1
    step, start from x_0 but do not follow the ODE: their columns also contain the distance that the added noise makes,
    so compare them only with one another.
    Without `quality`, the metrics of the feature network, the column paired_features is left out.
    """

    def __init__(self, generator: SampleGenerator, settings: Paired, quality: FeatureMetrics | None) -> None:
        self.generator = generator
        self.settings = settings
        self.quality = quality
        self.view = "" if quality is None else frechet_view(quality)
        self.spec = SamplingSpec("teacher", RUNGE_KUTTA, settings.steps)
        self.targets: dict[int, tuple[Sample, Tensor]] = {}
        self.sums = {name: SumMetric().set_dtype(torch.float64) for name in ("count", "samples", "features")}
        self._reset()

    @property
    def description(self) -> str:
        """The settings that determine the values, for the protocol."""
        return f"the guided teacher's ODE by {self.settings.steps} Runge-Kutta steps, samples 0 to {self.count - 1}"

    def prepare(self, samples: int, batch_size: int, rank: int, world: int) -> None:
        """Generate the teacher's samples of this process, as `Evaluation` splits `samples` over processes."""
        self.count = min(self.settings.samples, samples)
        # All processes run a sharded teacher equally often.
        rounds = sum(part.start < self.count for part in split_evenly(samples, batch_size, 0, world))
        for rows in split_evenly(samples, batch_size, rank, world)[:rounds]:
            own = self._compared(rows)
            x = self.generator.samples(self.spec, own or range(1))[: len(own)]
            self.targets[rows.start] = x, self._features(x)

    def update(self, rows: range, x: Sample, views: Mapping[FeatureMetrics, Mapping[str, Tensor]]) -> None:
        """Add samples before decoding, with the outputs of the feature networks on their images."""
        if rows.start not in self.targets or not len(own := self._compared(rows)):
            return
        y, features = self.targets[rows.start]
        self.sums["count"].update(len(own))
        self.sums["samples"].update((x[: len(own)] - y).double().square().flatten(1).mean(1).sum())
        if self.quality and self.view:
            self.sums["features"].update(
                (views[self.quality][self.view][: len(own)] - features).double().square().sum()
            )

    def compute(self) -> dict[str, float]:
        """Return the two columns over all processes, and forget the samples that were added."""
        totals = {name: float(cast(Tensor, metric.compute())) for name, metric in self.sums.items()}
        self._reset()
        values = {"paired_rmse": (totals["samples"] / totals["count"]) ** 0.5}
        if self.view:
            values["paired_features"] = (totals["features"] / totals["count"]) ** 0.5
        return values

    def to(self, device: torch.device) -> "PairedDistance":
        """Move the sums."""
        for metric in self.sums.values():
            metric.to(device)
        return self

    def _reset(self) -> None:
        for metric in self.sums.values():
            metric.reset()
            # A process may have no samples.
            metric.update(0)

    def _compared(self, rows: range) -> range:
        return rows[: max(self.count - rows.start, 0)]

    def _features(self, x: Sample) -> Float[Tensor, "b d"]:
        if self.quality is None or not self.view or not len(x):
            return torch.empty(0)
        return self.quality.outputs(self.generator.images(x))[self.view]


def frechet_view(quality: FeatureMetrics) -> str:
    """Return the output of the network that a Fréchet distance reads, "" without one."""
    return next((metric.view for metric in quality.metrics if isinstance(metric, Frechet)), "")


@torch.no_grad()
def runge_kutta(
    student: FlowMapNetwork, x_0: Sample, condition: Condition, steps: int, generator: Generators | None = None
) -> Sample:
    """Generate samples by the classical Runge-Kutta method of order 4 for dx/dt = u(x, t, t), 4 evaluations a step."""

    def velocity(t: Tensor, x: Sample) -> Sample:
        return student(x, t.expand(len(x)), t.expand(len(x)), condition)

    times = torch.tensor([NOISE, DATA], dtype=time_dtype(x_0), device=x_0.device)
    return odeint(velocity, x_0, times, method="rk4", options={"step_size": (DATA - NOISE) / steps})[-1]
