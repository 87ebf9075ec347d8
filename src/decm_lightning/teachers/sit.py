"""Teachers from public SiT checkpoints."""

from decm_lightning.networks import load_public
from decm_lightning.networks.checkpoint_files import Weights
from decm_lightning.teachers.prediction import refuse_other_prediction
from decm_lightning.teachers.teacher import Teacher


class SiTTeacher(Teacher):
    """A SiT (arXiv 2401.08740): t = 0 noise, t = 1 data, velocity data minus noise, as in `path`.

    This is what SiT trains by default, and what its published XL/2 is: the linear path, a prediction of velocity. Its
    other paths (GVP, VP) and predictions (noise, score) leave no trace in a checkpoint: do not give those. A network
    that clearly predicts noise, such as a DiT, is refused: `prediction_of` says how that is found.

    Samples are what the network was trained on: for the published one latents (4, 32, 32) of Stable Diffusion's VAE,
    times 0.18215. Guidance is on all channels; SiT's own samples are guided on the first three.

    Args:
        path: a .pt or .safetensors file; `networks.load_public` says what it may hold.
        weights: which of `ema` and `model` to read from it; None for `ema`, and where there is none for `model`.
        heads: attention heads; None for those of the published sizes S, B, L and XL, known by their width.

    Raises:
        OSError: if there is no file at `path`, or it may not be read.
        ValueError: if the file is not a SiT, predicts noise, or is of another width and `heads` is not given.
    """

    def __init__(self, path: str, weights: Weights | None = None, heads: int | None = None) -> None:
        network = load_public(path, weights, heads)
        refuse_other_prediction(network, "velocity", path)
        super().__init__(network)
