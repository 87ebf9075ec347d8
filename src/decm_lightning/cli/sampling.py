"""Code shared by `decm sample` and `decm sample-prompts`: load a model, generate its images, fill a folder."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decm_lightning.autoencoders import LatentCoder, load_autoencoder
from decm_lightning.cli.targets import check_device, check_out
from decm_lightning.evaluation.sample_folder import SampleFolder
from decm_lightning.files import tensors_sha256
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import Network, load
from decm_lightning.networks.generation import flow_map
from decm_lightning.networks.record import check_recorded, latent_coder
from decm_lightning.progress import Progress
from decm_lightning.samplers import generate, sampler
from decm_lightning.seeds import check_seed
from decm_lightning.types import Captions, Condition, FlowMapNetwork, Sample

TEACHER_STEPS = 50
DIGITS = 16
"""The length of a hash in settings.json."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageGenerator:
    """Generates images. Image i of a seed depends on neither batch nor device, up to rounding.

    Args:
        network: the network, on its device.
        decoder: converts samples to images.
        sampler: name and options of the sampler, as for `samplers.sampler`.
        steps: network evaluations per image.
        seed: seed of all noise.
    """

    network: Network
    decoder: "Decoder"
    sampler: str
    steps: int
    seed: int

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @cached_property
    def flow_map(self) -> FlowMapNetwork:
        """The network as a flow map."""
        return flow_map(self.network)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images."""
        height, width = self.network.sample_shape[1:]
        return width * self.decoder.factor, height * self.decoder.factor

    def at(self, steps: int, sampler: str | None = None, seed: int = 0) -> "ImageGenerator":
        """Return a generator with another number of steps, by default with the sampler recommended for that number."""
        name, steps = self.network.sampling(sampler, steps)
        return replace(self, steps=steps, sampler=str(name), seed=seed)

    @torch.no_grad()
    def images(self, condition: Condition, rows: Sequence[int]) -> Tensor:
        """Return images `rows` of the seed, uint8 (b, c, h, w) on the CPU; `condition` has one row per image."""
        samples = generate(
            self.flow_map, sampler(self.sampler), condition, self.steps,
            shape=self.network.sample_shape, rows=rows, seed=self.seed, device=self.device,
        )  # fmt: skip
        return to_uint8(self.decoder.decode(samples)).cpu()

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return all settings that determine the images, as JSON values."""
        # A state_dict may lack weights that the network shares with a pretrained model.
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
        """Generate and write a folder's missing images.

        Args:
            folder: the folder, already checked.
            groups: names of images that are always generated in one batch, so that they are bit-identical.
            images: returns the images of a group, by its index.
            finish: called with the index of each group that was written.
            unfinished: groups to generate even if all of their images exist.

        Returns:
            the number of images that were missing.
        """
        missing = {name for names in groups for name in folder.missing(names, self.size)}
        todo = [group for group, names in enumerate(groups) if group in unfinished or missing.intersection(names)]
        with Progress(todo, desc="sampling", unit="batch") as bar:
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
        """Return the sampler and its steps, such as "mix?s1=0.6, 2 steps"."""
        return f"{self.sampler}, {in_steps(self.steps)}"


def load_model(model: str, captions: bool, out: str, seed: int, device: str, trust: bool) -> tuple[Network, Path]:
    """Check the settings, load a network that reads captions or classes, and return it with the output path.

    Raises:
        OSError: if the network does not exist.
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
    """Return the image generator of a network, with the requested sampler and steps or the recommended ones.

    Raises:
        OSError: if the VAE or the statistics of the latents do not exist.
        ValueError: if the sampler or an option does not exist, or the samples are not images or latents of this VAE.
    """
    chosen, steps = network.sampling(name, steps)
    name = str(chosen)
    sampler(name)
    if not network.reads_end_time and name.partition("?")[0] != "euler":
        log.warning(
            "the model ignores the end time of a step, as a teacher does, and %s blurs its samples: use "
            "--sampler euler --steps %d", name, TEACHER_STEPS,
        )  # fmt: skip
    return ImageGenerator(network, Decoder.of(network, vae, latents), name, steps, seed)


def in_steps(steps: int) -> str:
    """Return a number of steps as text.

    Example:
        >>> in_steps(1), in_steps(2)
        ('1 step', '2 steps')
    """
    return f"{steps} step{'s' * (steps > 1)}"


def reads_captions(network: Network) -> bool:
    """Return whether a network is conditioned on captions rather than classes."""
    return isinstance(network.example(1)[3], Captions)


@dataclass(frozen=True)
class Decoder:
    """Converts the samples of a network to images in [-1, 1].

    Args:
        decode: the function that converts samples to images.
        factor: image size divided by sample size; 1 if the samples are images.
        identity: identifies the VAE and the scaling of latents; None if the samples are images.
    """

    decode: Callable[[Sample], Sample]
    factor: int = 1
    identity: str | None = None

    @classmethod
    def of(cls, network: Network, vae: str | None, latents: str | None) -> "Decoder":
        """Return the decoder for a network.

        Raises:
            OSError: if the VAE or the statistics of the latents do not exist.
            ValueError: if the network's samples are not images or latents of this VAE.
        """
        if len(network.sample_shape) != 3:
            raise ValueError(f"samples must be images (c, h, w): the model generates shape {network.sample_shape}")
        channels, by_config = network.sample_shape[0], reads_captions(network)
        if not latents and (coder := latent_coder(network, vae)) is not None:
            return cls(coder.decode, coder.autoencoder.downsampling, coder.identity)
        recorded = network.record.vae if network.record else None
        vae = vae or (recorded.name if recorded and latents else None)
        if vae and (latents or by_config):
            coder = _coder(vae, latents)
            check_recorded("VAE", vae, coder.autoencoder.identity, recorded)
            if (found := coder.autoencoder.latent_channels) != channels:
                raise ValueError(f"the model generates {channels} channels, but latents of {vae} have {found}")
            return cls(coder.decode, coder.autoencoder.downsampling, coder.identity)
        if vae or latents:
            raise ValueError("give --vae and --latents together: the VAE and the folder with its latents' statistics")
        if channels not in (1, 3):
            needed = "--vae, the VAE that encoded them," if by_config else "--vae and --latents"
            raise ValueError(f"the model generates latents with {channels} channels: give {needed} to decode them")
        return cls(lambda samples: samples)


def _coder(vae: str, latents: str | None) -> LatentCoder:
    """Return a VAE with the scaling of its latents by a folder's statistics, or by its own config."""
    if latents is None:
        return LatentCoder(load_autoencoder(vae))
    # The data modules import Lightning, which takes seconds.
    from decm_lightning.data.latents.provenance import read_coder

    return read_coder(vae, latents)
