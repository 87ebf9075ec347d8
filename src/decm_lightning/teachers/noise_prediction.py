"""Convert a DDPM noise prediction to a velocity of our path."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from decm_lightning.path import expand
from decm_lightning.types import Sample, Time


@dataclass(frozen=True)
class NoisePrediction:
    """The linear beta schedule of DDPM, and the velocity that follows from its noise prediction.

    The network of DDPM (arXiv 2006.11239) reads z = a x_1 + b x_0 with a^2 = prod(1 - beta) up to step k, and
    b^2 = 1 - a^2. At the step with the same signal-to-noise ratio, a / b = t / (1 - t), it is z = x_t / |(t, 1 - t)|,
    and the velocity is

        v = x_1 - x_0 = (x_t - noise) / t = (data - x_t) / (1 - t),  data = (z - b noise) / a.

    Fractional steps are found by interpolating log a^2. Outside the range of the schedule, one prediction is held
    constant: the data before the noisiest step (t < 0.0063 with the default betas), and the score -noise / b after the
    cleanest step (t > 0.9900).

    Args:
        beta_start: the first beta, in (0, 1).
        beta_end: the last beta, in (0, 1).
        steps: number of steps, at least 2.

    Raises:
        ValueError: if an argument is outside its range.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.beta_start < 1 and 0 < self.beta_end < 1 and self.steps >= 2):
            raise ValueError(f"betas must be in (0, 1), and steps at least 2: got {self}")
        # Computed now: the first use may be on the meta device.
        _ = self.ends

    @cached_property
    def log_signals(self) -> Tensor:
        """The decreasing log a^2 of each step, (steps,) in float64."""
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64, device="cpu")
        return torch.log1p(-betas).cumsum(0)

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The times t of the noisiest and of the cleanest step."""
        ratios = torch.expm1(-self.log_signals[[-1, 0]]).sqrt()
        earliest, latest = (1 / (1 + ratios)).tolist()
        return earliest, latest

    def velocity(self, predict: Callable[[Sample, Time], Sample], x_t: Sample, t: Time) -> Sample:
        """Return v(x_t, t), for t in [0, 1], given a function that predicts the noise in z at a step."""
        # Clamped before any division, so that the derivative outside the range is 0 rather than 0 times infinity.
        held = t.clamp(*self.ends)
        log_signal = -torch.log1p(((1 - held) / held) ** 2)
        a, b = (log_signal / 2).exp(), (-torch.expm1(log_signal)).sqrt()
        length = (t**2 + (1 - t) ** 2).sqrt()
        z = x_t / expand(length, x_t)
        noise = predict(z, self.step(log_signal))
        # Two forms of the same velocity, each used where its divisor is not small.
        data = (z - expand(b, x_t) * noise) / expand(a, x_t)
        by_data = (data - x_t) / expand((1 - t).clamp(min=0.5), x_t)
        by_noise = (x_t - expand((1 - t) / length / b, x_t) * noise) / expand(t.clamp(min=0.5), x_t)
        return torch.where(expand(t, x_t) < 0.5, by_data, by_noise)

    def step(self, log_signal: Time) -> Time:
        """Return the fractional step, from 0 to steps - 1, at which log a^2 is `log_signal`."""
        falling = self._falling(log_signal.device, log_signal.dtype)
        after = torch.searchsorted(-falling, -log_signal).clamp(1, len(falling) - 1)
        step = after - (log_signal - falling[after]) / (falling[after - 1] - falling[after])
        return step.clamp(0, len(falling) - 1)

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def _falling(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # Copied once: every copy to a GPU synchronizes with it.
        if (device, dtype) not in self._placed:
            self._placed[device, dtype] = self.log_signals.to(device, dtype)
        return self._placed[device, dtype]
