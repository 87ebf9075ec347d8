"""Teachers from public LightningDiT checkpoints."""

import math
from typing import Literal

import torch
from torch import Tensor

from decm_lightning.networks import load_public
from decm_lightning.networks.checkpoint_files import Weights
from decm_lightning.networks.embedding import TimeEmbedding
from decm_lightning.teachers.prediction import refuse_other_prediction
from decm_lightning.teachers.teacher import Teacher


class LightningDiTTeacher(Teacher):
    """A LightningDiT, of its authors or of FACM: t = 0 noise, t = 1 data, velocity data minus noise, as in `path`.

    FACM's students without an auxiliary time embedder give the mean velocity from t to the data at t in [0, 1], and the
    velocity, which is what a teacher is asked for, at 2 - t. Its own teachers (stage 1) give the velocity at both, and
    LightningDiT's at t. A checkpoint with an auxiliary time (r_embedder) is a flow map already: its velocity is the
    mean velocity from t to t, and `student()` goes on with it as it is.

    Args:
        path: a .pt or .safetensors file; `networks.load_public` says what it may hold.
        weights: which of `ema` and `model` to read from it; None for `ema`, and where there is none for `model`.
        clock: the time at which the checkpoint gives the velocity at t.

    Raises:
        FileNotFoundError: if there is no file at `path`.
        ValueError: if the file is not a LightningDiT, predicts noise, or has an auxiliary time and a clock other than
            t.
    """

    def __init__(self, path: str, weights: Weights | None = None, clock: Literal["t", "2 - t"] = "t") -> None:
        if clock not in ("t", "2 - t"):
            raise ValueError(f"clock must be 't' or '2 - t': got {clock!r}")
        network = load_public(path, weights)
        if clock == "2 - t":
            if network.r_embedder is not None:
                raise ValueError(f"{path} has an auxiliary time, and so gives its velocity at t: leave out {clock=}")
            # In the weights, not around the network: the student and what is exported then run on t, too.
            mirror(network.t_embedder)
        refuse_other_prediction(network, "velocity", path)
        super().__init__(network)


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
