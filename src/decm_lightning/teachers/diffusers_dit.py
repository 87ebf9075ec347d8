"""diffusers' DiT as a teacher: a prediction of DDPM's noise, turned into a velocity of our path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.networks import Network
from decm_lightning.path import expand
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Condition, Sample, Time


class DiffusersDiTTeacher(Teacher):
    """A DiTTransformer2DModel of diffusers, such as facebook/DiT-XL-2-256: by class, predicting noise, linear betas.

    DDPM (arXiv 2006.11239) moves z = a x_1 + b x_0 with a^2 = prod(1 - beta) up to step k, and b^2 = 1 - a^2. Where the
    ratios of signal to noise agree, a / b = t / (1 - t), that is x_t / |(t, 1 - t)|, and the predicted noise gives

        v = x_1 - x_0 = (x_t - noise) / t = (data - x_t) / (1 - t),  data = (z - b noise) / a.

    Steps between the integers are found by interpolating log a^2; DiT embeds a step as a real number. Before the
    noisiest step, t < 0.0063 with the default betas, the predicted data are those it predicts there; after the
    cleanest, t > 0.9900, the score -noise / b is.

    Samples are what the model was trained on: for facebook's, latents of its VAE times 0.18215.

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of the model alone; or the model itself.
        beta_start: the first beta, in (0, 1), as in the pipeline's scheduler_config.json.
        beta_end: the last beta, in (0, 1).
        steps: how many there are, at least 2.

    Raises:
        OSError: if there is no such folder or name.
        ValueError: if tensors of the model are missing or left over, or the betas are outside their range.
    """

    def __init__(
        self, model: str | nn.Module, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000
    ) -> None:
        if not (0 < beta_start < 1 and 0 < beta_end < 1 and steps >= 2):
            raise ValueError(
                f"betas must be in (0, 1), and steps at least 2: got {beta_start=}, {beta_end=} and {steps=}"
            )
        loaded: Any = _read(model) if isinstance(model, str) else model
        # In training mode it would drop labels by itself.
        self.model = loaded.eval().requires_grad_(False)
        self.num_classes: int = loaded.config.num_embeds_ada_norm
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        self.log_signals = torch.log1p(-betas).cumsum(0)
        """log a^2 at each step, falling; (steps,)."""

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t), for t in [0, 1].

        Raises:
            ValueError: if there is no condition; the null class is `null(labels)`.
        """
        if condition is None:
            raise ValueError("a diffusers DiT needs class labels: use teacher.null(labels) for unconditional rows")
        log_signal = -torch.log1p(((1 - t) / t.clamp(min=0)) ** 2)
        log_signal = log_signal.clamp(self.log_signals[-1].item(), self.log_signals[0].item())
        a, b = (log_signal / 2).exp(), (-torch.expm1(log_signal)).sqrt()
        length = torch.hypot(t, 1 - t)
        z = x_t / expand(length, x_t)
        noise = self._noise(z, self.step(log_signal), condition)
        # Two forms of one thing, each where nothing small is divided by.
        data = (z - expand(b, x_t) * noise) / expand(a, x_t)
        by_data = (data - x_t) / expand((1 - t).clamp(min=0.5), x_t)
        by_noise = (x_t - expand((1 - t) / length / b, x_t) * noise) / expand(t.clamp(min=0.5), x_t)
        return torch.where(expand(t < 0.5, x_t), by_data, by_noise)

    def step(self, log_signal: Time) -> Time:
        """Return the step, from 0 to steps - 1 and between the integers too, at which log a^2 is this."""
        falling = self.log_signals.to(log_signal)
        after = torch.searchsorted(-falling, -log_signal).clamp(1, len(falling) - 1)
        return after - (log_signal - falling[after]) / (falling[after - 1] - falling[after])

    def null(self, condition: Condition) -> Condition:
        """Return as many null classes as there are labels."""
        return None if condition is None else torch.full_like(condition, self.num_classes)

    def networks(self) -> list[Network]:
        """Return none: the model is no Network, and is neither compiled nor sharded."""
        return []

    def student(self) -> Network:
        """Refuse: the model has no embedding of a landing time, and predicts no velocity.

        Raises:
            ValueError: always.
        """
        raise ValueError("a diffusers DiT is no start for a student: give Distiller(student=...), such as networks.DiT")

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the model along with the module that holds the teacher."""
        return self.model._apply(function, recurse)

    def _noise(self, z: Sample, step: Time, condition: Condition) -> Sample:
        parameter = next(self.model.parameters(), z)
        predicted = self.model(z.to(parameter.dtype), timestep=step, class_labels=condition).sample
        # The other channels, if any, are its prediction of the variance.
        return predicted[:, : z.shape[1]].to(z.dtype)


def _read(path: str) -> nn.Module:
    # Imported here: nothing else in the method needs diffusers, and it takes seconds.
    from diffusers import DiTTransformer2DModel

    subfolder = None if (Path(path) / "config.json").is_file() else "transformer"
    model, report = DiTTransformer2DModel.from_pretrained(path, subfolder=subfolder, output_loading_info=True)
    # It would go on with random weights.
    faults = [f"{kind}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    if faults:
        raise ValueError(f"the tensors in {path} are not those of the model its config.json describes: {faults[0]}")
    return model
