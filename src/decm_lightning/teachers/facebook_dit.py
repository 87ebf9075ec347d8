"""facebookresearch/DiT's own checkpoints as a teacher: a prediction of DDPM's noise, turned into a velocity."""

from torch import Tensor

from decm_lightning.networks import Network, load_public
from decm_lightning.networks.checkpoint_files import Weights
from decm_lightning.teachers.diffusers_noise import NoisePrediction
from decm_lightning.teachers.prediction import refuse_other_prediction
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Condition, Sample, Time


class FacebookDiTTeacher(Teacher):
    """A DiT (arXiv 2212.09748) as its authors publish it, such as DiT-XL-2-256x256.pt: by class, linear betas.

    `NoisePrediction` says how its noise becomes a velocity. Its tensors are named as SiT's, but its times are the steps
    0 to 999. They are embedded with the frequencies 10000^(-i / 128): diffusers' conversion of the same model divides
    by 127, and is `DiffusersDiTTeacher`.

    Samples are what the network was trained on: for the published ones latents of Stable Diffusion's VAE times 0.18215.
    Guidance is on all channels; DiT's own samples are guided on the first three.

    Args:
        path: a .pt or .safetensors file; `networks.load_public` says what it may hold.
        weights: which of `ema` and `model` to read from it; None for `ema`, and where there is none for `model`.
        heads: attention heads; None for those of the published sizes S, B, L and XL, known by their width.
        beta_start: the first beta, in (0, 1).
        beta_end: the last beta, in (0, 1).
        steps: how many there are, at least 2.

    Raises:
        OSError: if there is no file at `path`, or it may not be read.
        ValueError: if the file is not a DiT, predicts a velocity as SiT's do, or is of another width and `heads` is not
            given; or the betas are outside their range.
    """

    def __init__(
        self,
        path: str,
        weights: Weights | None = None,
        heads: int | None = None,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        steps: int = 1000,
    ) -> None:
        self.noise = NoisePrediction(beta_start, beta_end, steps)
        network = load_public(path, weights, heads)
        if network.r_embedder is not None:
            raise ValueError(f"{path} is not a DiT: its r_embedder reads an end time, load it as LightningDiTTeacher")
        refuse_other_prediction(network, "noise", path)
        super().__init__(network)

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t), for t in [0, 1].

        Raises:
            ValueError: if there are no labels; the null class is `null(labels)`.
        """
        if not isinstance(condition, Tensor):
            raise ValueError("a DiT needs class labels: use teacher.null(labels) for unconditional rows")

        def predict(z: Sample, step: Time) -> Sample:
            return self.network(z, step, step, condition)

        return self.noise.velocity(predict, x_t, t)

    def student(self) -> Network:
        """Refuse: the network predicts noise at the steps of DDPM, not a mean velocity.

        Raises:
            ValueError: always.
        """
        remedy = "give Distiller(student=...), such as networks.DiT"
        raise ValueError(f"a DiT predicts noise, and cannot start a student: {remedy}")
