"""Teachers from folders and checkpoints of this package, or from public LightningDiT, SiT and DiT checkpoints."""

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from decm_lightning.networks import Network, load
from decm_lightning.networks.checkpoint_files import Weights
from decm_lightning.networks.dit import DiT
from decm_lightning.networks.embedding import TimeEmbedding
from decm_lightning.networks.weightless import is_weightless, on_meta, without_weights
from decm_lightning.teachers.noise_prediction import NoisePrediction
from decm_lightning.teachers.prediction import Prediction, prediction_of
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Condition, Sample, Time

log = logging.getLogger(__name__)


class PretrainedTeacher(Teacher):
    """A teacher from any network that `networks.load` reads.

    Networks of this package, LightningDiT (arXiv 2501.01423), FACM (2507.03738) and SiT (2401.08740) predict the
    velocity of this package's path. SiT checkpoints do not record their path and prediction type: those with another
    path (GVP, VP) or prediction are not supported and cannot be detected. DiT (2212.09748), for example
    DiT-XL-2-256x256.pt, has tensors of the same names but predicts DDPM's noise, which `NoisePrediction` converts;
    `prediction_of` distinguishes them. DiT embeds its steps with the frequencies 10000^(-i / 128); the diffusers
    version divides by 127 and is loaded by `DiffusersTeacher`.

    A network with an end time is already a flow map: its velocity is u(x_t, t, t), and `student()` continues its
    training. Samples are in the space that the network was trained on: for the published SiT and DiT, latents
    (4, 32, 32) of Stable Diffusion's VAE times 0.18215. Guidance applies to all channels, not to the first three as in
    their code.

    Args:
        path: a folder, a checkpoint, a public .pt or .safetensors file, or user/name on the hub, as in `networks.load`.
        weights: whether to read `ema` or `model`; None for `ema` if it exists, otherwise `model`.
        heads: attention heads of a public network; None to infer them from its tensors or its published size.
        prediction: what the network predicts; None to infer it, for which every process must read the weights.
        time_convention: "standard" if the network returns the velocity at time t. "facm" if it returns it at 2 - t, as
            FACM's students without an end time do; at t those return the mean velocity from t to the data. LightningDiT
            is "standard", and FACM's teachers (stage 1) support both.
        student_time: the student reads the "end" time, or has FACM's clock ("facm", see `networks.DiT`), whose stage 1
            is a teacher with the time convention "facm".
        noise: the schedule of a network that predicts noise.
        trust: import the module of a network class from outside this package, which runs its code.

    Raises:
        OSError: if nothing exists at `path`, or it may not be read.
        ValueError: if `load` cannot read the network, it clearly predicts something other than `prediction`, or it has
            an end time but predicts noise or has the time convention "facm".
    """

    def __init__(
        self,
        path: str,
        weights: Weights | None = None,
        heads: int | None = None,
        prediction: Prediction | None = None,
        time_convention: Literal["standard", "facm"] = "standard",
        student_time: Literal["end", "facm"] = "end",
        noise: NoisePrediction = NoisePrediction(),  # noqa: B008 - frozen
        trust: bool = False,
    ) -> None:
        if time_convention not in ("standard", "facm"):
            raise ValueError(f"time_convention must be 'standard' or 'facm': got {time_convention!r}")
        network = load(path, "cpu", trust, weights, heads)
        is_silent = isinstance(network, DiT) and network.prediction is None
        if is_silent and is_weightless() and prediction is None:
            # Only the weights show it, and all processes must agree.
            with without_weights(enabled=False):
                network = load(path, "cpu", trust, weights, heads)
        if time_convention == "facm":
            # Changing the weights rather than wrapping the network also converts the student and exported networks.
            mirror(_without_end_time(network, path, "time_convention='facm'").t_embedder)
        self.prediction: Prediction = prediction or "velocity"
        if isinstance(network, DiT) and not (is_silent and next(network.parameters()).is_meta):
            self.prediction = _checked_prediction(network, prediction, path)
        if self.prediction == "noise":
            _without_end_time(network, path, "prediction='noise'").config["prediction"] = "noise"
            if time_convention == "facm":
                raise ValueError(f"{path} predicts noise, not velocity: remove time_convention='facm'")
        if student_time == "facm" and time_convention != "facm":
            raise ValueError("student_time='facm' needs a teacher with time_convention='facm'")
        self.student_time = student_time
        self.name, self.noise = path, noise
        super().__init__(network.to("meta") if is_weightless() else network)

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t), for t in [0, 1].

        Raises:
            ValueError: if the condition does not match the network.
        """
        if self.prediction == "velocity":
            return super().velocity(x_t, t, condition)
        return self.noise.velocity(lambda z, step: self.network(z, step, step, condition), x_t, t)

    def student(self) -> Network:
        """Return a trainable flow map that initially equals the teacher for every end time.

        Raises:
            ValueError: if the network predicts noise, which is not a mean velocity.
        """
        if self.prediction == "noise":
            remedy = "pass Distiller(student=...), such as networks.DiT"
            raise ValueError(f"a network that predicts noise cannot initialize a student: {remedy}")
        student = super().student()
        if self.student_time == "end":
            return student
        # FACM's clock is that of the file: at 2 - t the velocity, at t the mean velocity to the data.
        assert isinstance(self.network, DiT)
        config = self.network.config | {"end_time": "facm"}
        if is_weightless():
            return on_meta(DiT, **config).train()
        own = DiT(**config)
        own.load_state_dict(self.network.state_dict())
        mirror(own.t_embedder)
        return own.to(self.network.pos_embed).train()


def _without_end_time(network: Network, path: str, option: str) -> DiT:
    if not isinstance(network, DiT) or network.r_embedder is not None:
        raise ValueError(f"{option} needs a public network without an end time (r_embedder): got {path}")
    return network


def _checked_prediction(network: DiT, expected: Prediction | None, path: str) -> Prediction:
    found = network.prediction or prediction_of(network)
    if found is None:
        if expected is None:
            log.warning("%s: cannot tell whether the network predicts velocity or noise; assuming velocity", path)
        return expected or "velocity"
    if expected not in (None, found):
        raise ValueError(f"{path} predicts {found}, not {expected}: remove prediction={expected!r}")
    return found


@torch.no_grad()
def mirror(embedder: TimeEmbedding) -> None:
    """Change the first layer in place, so that the embedding of t becomes the previous embedding of 2 - t.

    For a frequency f, cos((2 - t) f) = cos 2f cos tf + sin 2f sin tf and sin((2 - t) f) = sin 2f cos tf - cos 2f sin tf
    are linear in the sinusoids of t.
    """
    weight = embedder.mlp[0].weight
    assert isinstance(weight, Tensor)
    cosines, sines = weight.double().chunk(2, dim=1)
    half = embedder.sinusoids // 2
    twice = 2 * torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64, device=weight.device) / half)
    cos, sin = twice.cos(), twice.sin()
    weight.copy_(torch.cat([cosines * cos + sines * sin, cosines * sin - sines * cos], 1))
