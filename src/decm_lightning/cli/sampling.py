"""Code shared by `decm sample` and `decm sample-prompts`: load a model, generate its images, fill a folder."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decm_lightning.autoencoders import LatentCoder
from decm_lightning.autoencoders.of_network import coder_of
from decm_lightning.cli.targets import check_device, check_out
from decm_lightning.files import tensors_sha256
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import Network, load
from decm_lightning.networks.generation import flow_map
from decm_lightning.progress import Progress
from decm_lightning.sample_folder import SampleFolder
from decm_lightning.samplers import generate, sampler
from decm_lightning.seeds import check_seed
from decm_lightning.types import Condition, FlowMapNetwork

TEACHER_STEPS = 50
DIGITS = 16
"""The length of a hash in settings.json."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageGenerator:
    """Generates images. Image i of a seed depends on neither batch nor device, up to rounding.

    Args:
        network: the network, on its device.
        coder: decodes the samples into images; None if they are images.
        sampler: name and options of the sampler, as for `samplers.sampler`.
        steps: network evaluations per image.
        seed: seed of all noise.
    """

    network: Network
    coder: LatentCoder | None
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
        factor = self.coder.autoencoder.downsampling if self.coder else 1
        return width * factor, height * factor

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
        return to_uint8(self.coder.decode(samples) if self.coder else samples).cpu()

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return all settings that determine the images, as JSON values."""
        # A state_dict may lack weights that the network shares with a pretrained model.
        tensors = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        own = {"weights": tensors_sha256(tensors)[:DIGITS], "sampler": self.sampler, "steps": self.steps}
        return {**own, **more, "seed": self.seed, "vae": self.coder.identity if self.coder else None}

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
    """Check the settings, load a network that reads captions or classes, and return it with the output path."""
    check_seed(seed)
    check_device(device)
    target = check_out(out)
    network = load(model, device, trust)
    if network.reads_captions != captions:
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
    """Return the image generator of a network, with the requested sampler and steps or the recommended ones."""
    chosen, steps = network.sampling(name, steps)
    name = str(chosen)
    sampler(name)
    if not network.reads_end_time and name.partition("?")[0] != "euler":
        log.warning(
            "the model ignores the end time of a step, as a teacher does, and %s blurs its samples: use "
            "--sampler euler --steps %d", name, TEACHER_STEPS,
        )  # fmt: skip
    if len(network.sample_shape) != 3:
        raise ValueError(f"samples must be images (c, h, w): the model generates shape {network.sample_shape}")
    return ImageGenerator(network, coder_of(network, vae, latents), name, steps, seed)


def in_steps(steps: int) -> str:
    """Return a number of steps as text.

    Example:
        >>> in_steps(1), in_steps(2)
        ('1 step', '2 steps')
    """
    return f"{steps} step{'s' * (steps > 1)}"
