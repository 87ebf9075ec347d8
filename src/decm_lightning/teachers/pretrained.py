"""A teacher from a folder or checkpoint of this package, or from a public LightningDiT, SiT or DiT."""

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from decm_lightning.networks import Network, load
from decm_lightning.networks.checkpoint_files import Weights
from decm_lightning.networks.dit import DiT
from decm_lightning.networks.embedding import TimeEmbedding
from decm_lightning.networks.weightless import is_weightless, without_weights
from decm_lightning.teachers.noise_prediction import NoisePrediction
from decm_lightning.teachers.prediction import Prediction, prediction_of
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Condition, Sample, Time

log = logging.getLogger(__name__)


class PretrainedTeacher(Teacher):
    """Anything that `networks.load` reads, as a teacher of velocities.

    Networks of this package, LightningDiT (arXiv 2501.01423; FACM's, 2507.03738) and SiT (2401.08740) predict the
    velocity of this package's path. SiT's other paths (GVP, VP) and predictions leave no trace in a checkpoint: do not
    give those. A DiT (2212.09748), such as DiT-XL-2-256x256.pt, has tensors of the same names, and predicts DDPM's
    noise, which `NoisePrediction` converts; `prediction_of` finds which it is. DiT embeds its steps with the
    frequencies 10000^(-i / 128). diffusers' conversion of it divides by 127, and is for `DiffusersTeacher`.

    A network with an end time is a flow map already: its velocity is the mean velocity from t to t, and `student()`
    continues to train it. Samples are what the network was trained on: for the published SiT and DiT latents
    (4, 32, 32) of Stable Diffusion's VAE times 0.18215. Guidance is on all channels, theirs on the first three.

    Args:
        path: a folder, a checkpoint, a public .pt or .safetensors file, or user/name on the hub, as in `networks.load`.
        weights: which of `ema` and `model` to read; None for `ema`, and where there is none for `model`.
        heads: attention heads of a public network; None for those that its tensors or its published size tell.
        prediction: what the network predicts; None to find out, for which every process must read the weights.
        time_convention: where the network gives the velocity at t: at t, or, as FACM's students without an end time do,
            at 2 - t; at t those give the mean velocity from t to the data. FACM's own teachers (stage 1) give the
            velocity at both, and LightningDiT's at t.
        noise: the schedule of a network that predicts noise.
        trust: import the module of a network class from outside this package, which runs its code.

    Raises:
        OSError: if there is nothing at `path`, or it may not be read.
        ValueError: if it is not a network that `load` reads, clearly predicts something other than `prediction`, or
            predicts noise or has time convention "facm" although it has an end time.
    """

    def __init__(
        self,
        path: str,
        weights: Weights | None = None,
        heads: int | None = None,
        prediction: Prediction | None = None,
        time_convention: Literal["standard", "facm"] = "standard",
        noise: NoisePrediction = NoisePrediction(),  # noqa: B008 - frozen
        trust: bool = False,
    ) -> None:
        if time_convention not in ("standard", "facm"):
            raise ValueError(f"time_convention must be 'standard' or 'facm': got {time_convention!r}")
        network = load(path, "cpu", trust, weights, heads)
        is_silent = isinstance(network, DiT) and network.prediction is None
        if is_silent and is_weightless() and prediction is None:
            # Only the weights tell, and all processes must find the same.
            with without_weights(enabled=False):
                network = load(path, "cpu", trust, weights, heads)
        if time_convention == "facm":
            # In the weights, not around the network: the student and what is exported then run on t, too.
            mirror(_without_end_time(network, path, "time_convention='facm'").t_embedder)
        self.prediction = prediction or "velocity"
        if is_silent and not next(network.parameters()).is_meta:
            self.prediction = _checked_prediction(network, prediction, path)
        if self.prediction == "noise":
            _without_end_time(network, path, "prediction='noise'")
            if time_convention == "facm":
                raise ValueError(f"{path} predicts noise, not velocity: leave out time_convention='facm'")
        self.noise = noise
        super().__init__(network.to("meta") if is_weightless() else network)

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t), for t in [0, 1].

        Raises:
            ValueError: if the condition is not one for the network.
        """
        if self.prediction == "velocity":
            return super().velocity(x_t, t, condition)
        return self.noise.velocity(lambda z, step: self.network(z, step, step, condition), x_t, t)

    def student(self) -> Network:
        """Return a trainable flow map that equals the teacher for every end time.

        Raises:
            ValueError: if the network predicts noise at the steps of DDPM, which is not a mean velocity.
        """
        if self.prediction == "noise":
            remedy = "give Distiller(student=...), such as networks.DiT"
            raise ValueError(f"a network that predicts noise cannot start a student: {remedy}")
        return super().student()


def _without_end_time(network: Network, path: str, option: str) -> DiT:
    if not isinstance(network, DiT) or network.r_embedder is not None:
        raise ValueError(f"{option} is for a public network without an end time (r_embedder), which {path} is not")
    return network


def _checked_prediction(network: Network, expected: Prediction | None, path: str) -> Prediction:
    found = prediction_of(network)
    if found is None:
        if expected is None:
            log.warning("%s does not tell whether it predicts velocity or noise: it is taken for a velocity", path)
        return expected or "velocity"
    if expected not in (None, found):
        raise ValueError(f"{path} predicts {found}, not {expected}: leave out prediction={expected!r}")
    return found


@torch.no_grad()
def mirror(embedder: TimeEmbedding) -> None:
    """Change the first layer in place so that the embedding of t is what that of 2 - t was.

    With the frequency f, cos((2 - t) f) = cos 2f cos tf + sin 2f sin tf, and sin((2 - t) f) = sin 2f cos tf - cos 2f
    sin tf: linear in the sinusoids of t.
    """
    weight = embedder.mlp[0].weight
    assert isinstance(weight, Tensor)
    cosines, sines = weight.double().chunk(2, dim=1)
    half = embedder.sinusoids // 2
    twice = 2 * torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64, device=weight.device) / half)
    cos, sin = twice.cos(), twice.sin()
    weight.copy_(torch.cat([cosines * cos + sines * sin, cosines * sin - sines * cos], 1))
