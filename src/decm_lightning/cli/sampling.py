"""What `decm sample` and `decm sample-prompts` share: a network with its sampler and decoder, folders that resume."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from decm_lightning.cli.targets import check_device, check_out
from decm_lightning.evaluation.sample_folder import SampleFolder
from decm_lightning.files import tensors_sha256
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import Network, load
from decm_lightning.samplers import generate, sampler
from decm_lightning.seeds import check_seed
from decm_lightning.types import Captions, Condition, Sample

TEACHER_STEPS = 50
DIGITS = 16
"""The length of a hash in settings.json."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageGenerator:
    """Generates images. Image i of a seed is the same in every batch and on every device, up to rounding.

    Args:
        network: the network, where it computes.
        decoder: turns its samples into images.
        sampler: the sampler, with its options, as `samplers.sampler` takes it.
        steps: network evaluations per image.
        seed: of all noise.
    """

    network: Network
    decoder: "Decoder"
    sampler: str
    steps: int
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.network.parameters()).device

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images."""
        height, width = self.network.sample_shape[1:]
        return width * self.decoder.factor, height * self.decoder.factor

    @torch.no_grad()
    def images(self, condition: Condition, rows: Sequence[int]) -> Tensor:
        """Return images number `rows`, uint8 (b, c, h, w) on the CPU; `condition` has a row for each."""
        samples = generate(
            self.network, sampler(self.sampler), condition, self.steps,
            shape=self.network.sample_shape, rows=rows, seed=self.seed, device=self.device,
        )  # fmt: skip
        return to_uint8(self.decoder.decode(samples)).cpu()

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return all that the images depend on, as JSON."""
        # Including the weights that a network shares with a pretrained model.
        tensors = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        own = {"weights": tensors_sha256(tensors)[:DIGITS], "sampler": self.sampler, "steps": self.steps}
        return {**own, **more, "seed": self.seed, "vae": self.decoder.identity}

    def fill(
        self,
        folder: SampleFolder,
        groups: Sequence[Sequence[str]],
        images: Callable[[int], Tensor],
        finish: Callable[[int], None] = lambda group: None,
        unfinished: Collection[int] = (),
    ) -> int:
        """Write the images that are missing in a folder.

        Args:
            folder: the folder, already checked.
            groups: the names of images that are always generated together, to be the same to the last bit.
            images: returns the images of a group.
            finish: called when a group has been written.
            unfinished: groups to generate even if all of their images exist.

        Returns:
            the number of images that were missing.
        """
        missing = {name for names in groups for name in folder.missing(names, self.size)}
        todo = [group for group, names in enumerate(groups) if group in unfinished or missing.intersection(names)]
        with progress(todo) as bar:
            for group in bar:
                generated = images(group)
                if group == todo[0]:
                    folder.begin()
                for name, image in zip(groups[group], generated, strict=True):
                    if name in missing:
                        folder.write(name, image)
                finish(group)
        return len(missing)

    def __str__(self) -> str:
        """Return such as "mix?s1=0.6, 2 steps"."""
        return f"{self.sampler}, {in_steps(self.steps)}"


def load_model(model: str, captions: bool, out: str, seed: int, device: str, trust: bool) -> tuple[Network, Path]:
    """Return a network that reads captions, or one of classes, and the path to write to; check the rest before.

    Raises:
        OSError: if there is no such network.
        ValueError: if a setting is out of range, `out` cannot be written, or the network reads something else.
    """
    check_seed(seed)
    check_device(device)
    target = check_out(out)
    network = load(model, device, trust)
    if reads_captions(network) != captions:
        reads, command = ("classes", "sample") if captions else ("captions", "sample-prompts")
        raise ValueError(f"{model} reads {reads}: use decm {command} {model}")
    return network, target


def image_generator(
    network: Network,
    name: str | None,
    steps: int | None,
    seed: int,
    vae: str | None,
    latents: str | None,
) -> ImageGenerator:
    """Return the generator of a network's images, with the requested sampler or the one that fits the network.

    That is mix with 2 steps for a student; and Euler with 50 steps for a network that does not read the end time, such
    as a teacher, whose large steps lead to the mean of each class.

    Raises:
        OSError: if there is no such VAE, or no statistics of latents.
        ValueError: if there is no such sampler or option, or the samples are not images or latents of this VAE.
    """
    student = network.reads_end_time
    name = name or ("mix" if student else "euler")
    sampler(name)
    if not student and name != "euler":
        log.warning(
            "the model does not read the end time of a step, as teachers do: %s blurs its samples; use "
            "--sampler euler --steps %d", name, TEACHER_STEPS,
        )  # fmt: skip
    if steps is None:
        steps = TEACHER_STEPS if name == "euler" else 2
    return ImageGenerator(network, Decoder.of(network, vae, latents), name, steps, seed)


def progress(groups: Sequence[int]) -> tqdm:
    """Return a progress bar on a terminal; as a context, because an error must not follow it on the same line."""
    return tqdm(groups, "sampling", leave=False, disable=None)


def in_steps(steps: int) -> str:
    """Return such as "2 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def reads_captions(network: Network) -> bool:
    """Return whether a network's condition is captions, rather than classes."""
    return isinstance(network.example(1)[3], Captions)


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
        channels, by_config = network.sample_shape[0], reads_captions(network)
        if vae and (latents or by_config):
            decoder, found = _decoder(vae, latents)
            if found != channels:
                raise ValueError(f"the model makes {channels} channels: latents of {vae} have {found}")
            return decoder
        if vae or latents:
            raise ValueError("give --vae and --latents together: the VAE, and the latents with their statistics")
        if channels not in (1, 3):
            needed = "--vae, the VAE that encoded them," if by_config else "--vae and --latents"
            raise ValueError(f"the model makes {channels} channels, latents: give {needed} to decode images")
        return cls(lambda samples: samples)


def _decoder(vae: str, latents: str | None) -> tuple[Decoder, int]:
    """Return the decoder of a VAE's latents, normalized by a folder's statistics or its config, and their channels."""
    # The data modules import Lightning, which takes seconds.
    from decm_lightning.autoencoders import load_autoencoder
    from decm_lightning.data.latents.latent_coder import LatentCoder

    coder = LatentCoder.read(vae, latents) if latents else LatentCoder(load_autoencoder(vae))
    own = coder.autoencoder
    return Decoder(coder.decode, own.downsampling, coder.identity), own.latent_channels
