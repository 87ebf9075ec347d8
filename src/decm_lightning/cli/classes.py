"""Images of classes, as one grid or as a folder that resumes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from decm_lightning.cli.sampling import Decoder, SamplerChoice, generate, weights_sha256
from decm_lightning.evaluation.sample_folder import SampleFolder, sample_name
from decm_lightning.image_writer import save_grid
from decm_lightning.networks import Network

BATCH = 256


@dataclass(frozen=True)
class ClassSamples:
    """Samples of classes. The k-th of class c is sample number k * num_classes + c, as in `decm test`.

    Args:
        network: a network of classes.
        decoder: turns its samples into images.
        choice: the sampler.
        classes: the classes.
        per_class: samples of each, one class after the other.
        seed: of all noise.
        device: where to compute.
    """

    network: Network
    decoder: Decoder
    choice: SamplerChoice
    classes: list[int]
    per_class: int
    seed: int
    device: str

    @property
    def labels(self) -> list[int]:
        """The label of each sample."""
        return [label for label in self.classes for _ in range(self.per_class)]

    @property
    def rows(self) -> list[int]:
        """The number of each sample."""
        return [k * self.network.num_classes + label for label in self.classes for k in range(self.per_class)]

    def generate(self, numbers: range) -> Tensor:
        """Return samples as uint8 images (b, c, h, w)."""
        labels = torch.tensor(self.labels[numbers.start : numbers.stop], device=self.device)
        rows = self.rows[numbers.start : numbers.stop]
        return generate(self.network, self.decoder, self.choice, labels, self.choice.one, self.seed, rows)

    def batches(self) -> list[range]:
        """Return the numbers of the samples that are computed together, whether they exist already or not."""
        total = len(self.classes) * self.per_class
        return [range(first, min(first + BATCH, total)) for first in range(0, total, BATCH)]

    def write_grid(self, scale: int, file: Path) -> None:
        """Generate all samples and write one PNG, a row for each class, each image enlarged `scale` times."""
        images = [self.generate(numbers) for numbers in tqdm(self.batches(), "sampling")]
        save_grid(torch.cat(images), self.per_class, scale, file)

    def write_folder(self, folder: Path) -> int:
        """Generate what is missing in a folder, one PNG each, and return how many samples that were.

        Raises:
            ValueError: if the folder holds samples of other settings, or other images.
        """
        names = [sample_name(row, label) for row, label in zip(self.rows, self.labels, strict=True)]
        settings = {"weights": weights_sha256(self.network), **self.choice.settings(), "classes": self.classes}
        settings |= {"per_class": self.per_class, "seed": self.seed, "vae": self.decoder.identity}
        samples = SampleFolder(folder, settings, names)
        samples.check()
        missing = set(samples.missing(names, self.decoder.size(self.network)))
        todo = [numbers for numbers in self.batches() if any(names[number] in missing for number in numbers)]
        for numbers in tqdm(todo, "sampling"):
            images = self.generate(numbers)
            if numbers is todo[0]:
                samples.begin()
            for number, image in zip(numbers, images, strict=True):
                if names[number] in missing:
                    samples.write(names[number], image)
        return len(missing)
