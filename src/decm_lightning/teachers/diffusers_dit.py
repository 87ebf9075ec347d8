"""diffusers' DiT as a teacher: a prediction of DDPM's noise, turned into a velocity of our path."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, full_like, nn

from decm_lightning.files import tensors_sha256
from decm_lightning.networks import Network
from decm_lightning.teachers.diffusers_network import read
from decm_lightning.teachers.diffusers_noise import NoisePrediction
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Condition, Sample, Time


class DiffusersDiTTeacher(Teacher):
    """A DiTTransformer2DModel of diffusers, such as facebook/DiT-XL-2-256: by class, predicting noise, linear betas.

    `NoisePrediction` says how its noise becomes a velocity; DiT embeds a step as a real number.

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
        self.noise = NoisePrediction(beta_start, beta_end, steps)
        loaded: Any = read("DiTTransformer2DModel", model) if isinstance(model, str) else model
        # In training mode it would drop labels by itself.
        self.model = loaded.eval().requires_grad_(False)
        self.num_classes: int = loaded.config.num_embeds_ada_norm

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t), for t in [0, 1].

        Raises:
            ValueError: if there are no labels; the null class is `null(labels)`.
        """
        if not isinstance(condition, Tensor):
            raise ValueError("a diffusers DiT needs class labels: use teacher.null(labels) for unconditional rows")
        return self.noise.velocity(lambda z, step: self._noise(z, step, condition), x_t, t)

    def step(self, log_signal: Time) -> Time:
        """Return the step, from 0 to steps - 1 and between the integers too, at which log a^2 is this."""
        return self.noise.step(log_signal)

    def null(self, condition: Condition) -> Condition:
        """Return as many null classes as there are labels."""
        return full_like(condition, self.num_classes) if isinstance(condition, Tensor) else None

    def identity(self) -> str:
        """Return a hash of all weights."""
        return tensors_sha256(self.model.state_dict())[:16]

    def networks(self) -> list[Network]:
        """Return none: the model is no Network, and is neither compiled nor sharded."""
        return []

    def evaluated_modules(self) -> list[nn.Module]:
        """Return the model."""
        return [self.model]

    def student(self) -> Network:
        """Refuse: the model has no embedding of an end time, and predicts no velocity.

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
