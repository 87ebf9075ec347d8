"""How `decm sample` makes images: the sampler that fits the network, and the decoder of its latents."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decm_lightning.files import tensors_sha256
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import Network
from decm_lightning.networks.lora import LoRANetwork
from decm_lightning.samplers import SamplerName
from decm_lightning.samplers import generate as generate_samples
from decm_lightning.samplers import sampler as make_sampler
from decm_lightning.types import Captions, Condition, Sample

TEACHER_STEPS = 50
DIGITS = 16
"""The length of a hash in settings.json."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoder:
    """Turns the samples of a network into images in [-1, 1].

    Args:
        decode: the function.
        factor: pixels of an image along the side of one latent; 1 for images.
        identity: the VAE and the scaling of latents, None for images.
    """

    decode: Callable[[Sample], Sample]
    factor: int = 1
    identity: str | None = None

    @classmethod
    def of(cls, network: Network, vae: str | None, latents: str | None) -> "Decoder":
        """Return the decoder for a network.

        Raises:
            OSError: if there is no such VAE, or no statistics of latents.
            ValueError: if the network's samples are not images or latents of this VAE.
        """
        if len(network.sample_shape) != 3:
            raise ValueError(f"the model makes samples of shape {network.sample_shape}, not images (c, h, w)")
        channels, reads_captions = network.sample_shape[0], isinstance(network.example(1)[3], Captions)
        if vae and not latents and reads_captions:
            decoder = _by_config(vae)
        elif vae and latents:
            decoder = _by_statistics(vae, latents)
        elif vae or latents:
            raise ValueError("give --vae and --latents together: the VAE, and the latents with their statistics")
        elif channels not in (1, 3):
            needed = "--vae, what encoded them," if reads_captions else "--vae and --latents"
            raise ValueError(f"the model makes {channels} channels, latents: give {needed} to see images")
        else:
            return cls(lambda samples: samples)
        own, decoded = decoder
        if own.latent_channels != channels:
            raise ValueError(f"the model makes {channels} channels: latents of {vae} have {own.latent_channels}")
        return decoded

    def size(self, network: Network) -> tuple[int, int]:
        """Return (width, height) of the images."""
        height, width = network.sample_shape[1:]
        return width * self.factor, height * self.factor


@dataclass(frozen=True)
class SamplerChoice:
    """A sampler and its number of steps.

    Args:
        name: the sampler.
        steps: network evaluations per image; several for a grid of prompts.
        s1: the end time of mix's first step, in (0, 1); None for its own choice.
    """

    name: SamplerName
    steps: int | list[int]
    s1: float | None

    @classmethod
    def of(
        cls, network: Network, name: SamplerName | None, steps: int | list[int] | None, s1: float | None
    ) -> "SamplerChoice":
        """Return the sampler that was requested, or the one that fits the network.

        That is mix with 1 step for a student; and Euler with 50 steps for a network that does not read the end time,
        such as a teacher, whose large steps lead to the mean of each class.

        Raises:
            ValueError: if s1 is given for a sampler without it.
        """
        student = reads_end_time(network)
        name = name or ("mix" if student else "euler")
        if s1 is not None and name != "mix":
            raise ValueError(f"s1 is for the sampler mix: got it with {name}")
        if not student and name != "euler":
            log.warning(
                "the model does not read the end time of a step, as teachers do: %s blurs its samples; use "
                "--sampler euler --steps %d",
                name,
                TEACHER_STEPS,
            )
        if steps is None:
            steps = TEACHER_STEPS if name == "euler" else 1
        return cls(name, steps, s1)

    @property
    def one(self) -> int:
        """The number of steps.

        Raises:
            ValueError: if there are several.
        """
        if not isinstance(self.steps, int):
            raise ValueError(f"several numbers of steps are for prompts in one .png file: give one, not {self.steps}")
        return self.steps

    def settings(self) -> dict[str, Any]:
        """Return what images depend on, as JSON."""
        return {"sampler": self.name, "steps": self.one, "s1": self.s1}

    def __str__(self) -> str:
        """Return such as "mix, 1 step, s1 0.6"."""
        steps = self.steps if isinstance(self.steps, list) else [self.steps]
        named = f"{self.name}, {', '.join(map(str, steps))} step{'s' * (steps != [1])}"
        return named if self.s1 is None else f"{named}, s1 {self.s1:g}"


@torch.no_grad()
def generate(
    network: Network,
    decoder: Decoder,
    choice: SamplerChoice,
    condition: Condition,
    steps: int,
    seed: int,
    rows: Sequence[int],
) -> Tensor:
    """Return samples as uint8 images (b, c, h, w) on the CPU.

    Args:
        network: the network, where `condition` is.
        decoder: turns its samples into images.
        choice: the sampler.
        condition: one row for each sample.
        steps: network evaluations per image.
        seed: of all noise.
        rows: the numbers of the samples.
    """
    options = {} if choice.s1 is None else {"s1": choice.s1}
    device = next(network.parameters()).device
    sampler = make_sampler(choice.name, **options)
    samples = generate_samples(
        network, sampler, condition, steps, shape=network.sample_shape, rows=rows, seed=seed, device=device
    )
    return to_uint8(decoder.decode(samples)).cpu()


def reads_end_time(network: Network) -> bool:
    """Return whether a network is a flow map u(x_t, t, s), rather than a velocity for every s."""
    if isinstance(network, LoRANetwork):
        return bool(network.added)
    return bool(network.config.get("end_time", True))


def weights_sha256(network: Network) -> str:
    """Return the hash of all weights, including those that the network shares with a pretrained model."""
    return tensors_sha256(dict(network.named_parameters()) | dict(network.named_buffers()))[:DIGITS]


def _by_config(vae: str) -> tuple[Any, Decoder]:
    # Imported here: the data modules import Lightning, which takes seconds.
    from decm_lightning.autoencoders import load_autoencoder
    from decm_lightning.data.latents.latent_coder import LatentCoder

    coder = LatentCoder(load_autoencoder(vae))
    return coder.autoencoder, Decoder(coder.decode, coder.autoencoder.downsampling, coder.identity)


def _by_statistics(vae: str, latents: str) -> tuple[Any, Decoder]:
    from decm_lightning.data.latents.latent_coder import LatentCoder

    coder = LatentCoder.read(vae, latents)
    return coder.autoencoder, Decoder(coder.decode, coder.autoencoder.downsampling, coder.identity)
