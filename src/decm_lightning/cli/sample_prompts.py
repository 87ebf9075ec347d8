"""decm sample-prompts: generate images from a file of prompts, as one grid or in the layout of GenEval's scorer."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.cli.sampling import DIGITS, ImageGenerator, image_generator, in_steps, load_model
from decm_lightning.cli.targets import is_grid
from decm_lightning.conditions import select
from decm_lightning.errors import check_at_least
from decm_lightning.files import atomic
from decm_lightning.image_writer import check_plots, save_named_grid, short
from decm_lightning.progress import Progress
from decm_lightning.sample_folder import SampleFolder
from decm_lightning.text import CaptionEncoder
from decm_lightning.text.prompts import Prompt, read_prompts

METADATA = "metadata.jsonl"
BATCH = 64


def sample_prompts(
    model: str,
    prompts: str,
    encoder: str | None = None,
    out: str = "samples.png",
    sampler: str | None = None,
    steps: int | list[int] | None = None,
    per_prompt: int = 4,
    seed: int = 0,
    device: str = "cpu",
    vae: str | None = None,
    latents: str | None = None,
    trust: bool = False,
) -> None:
    """Generate images from prompts and save them.

    Args:
        model: a .ckpt file, a folder with config.json and model.safetensors, or a name on the Hugging Face hub. Its
            record has the defaults of the other options.
        prompts: a file with one prompt per line, or a .jsonl file with one {"prompt": "..."} per line.
        encoder: the text encoder that the model was trained with: minilm, a folder or a name on the Hugging Face hub,
            or the folder of a diffusers pipeline; by default the recorded encoder. Another one is refused.
        out: a .png file for a grid with one row per prompt, or a folder for one PNG per image, in the layout that
            GenEval's scorer reads. A folder holds images of one set of settings. The same command resumes it; other
            settings are refused.
        sampler: euler, consistency, flow_map, mix, or a path such as my_module.heun. Options follow a question mark:
            mix?s1=0.6. By default the recommended one for the number of steps, which for a teacher is euler.
        steps: network evaluations per image, at least 1; by default 2, or 50 for a teacher. A grid can show several
            numbers side by side, such as [1, 4].
        per_prompt: images per prompt, at least 1.
        seed: from 0 to 2**63 - 1. Of P prompts, image k of prompt i is sample k * P + i of the seed, as in decm test.
        device: the device, such as cpu or cuda.
        vae: the VAE of the latents: a folder, a name on the Hugging Face hub, or a file such as VA-VAE's. By default
            the recorded one; another one is refused.
        latents: the folder of latents that the model was trained on, if its latents_stats.pt scales them instead of the
            VAE's config.
        trust: allow a network class from outside this package; importing its module runs its code.
    """
    check_at_least(1, per_prompt=per_prompt)
    all_steps = steps if isinstance(steps, list) else [steps]
    if not all_steps:
        raise ValueError("steps must be at least one number: got none")
    if len(all_steps) > 1 and not is_grid(Path(out)):
        raise ValueError(f"several numbers of steps need a .png file for a grid: got steps {steps} and out {out}")
    read = read_prompts(Path(prompts))
    network, target = load_model(model, True, out, seed, device, trust)
    generator = image_generator(network, sampler, all_steps[0], seed, vae, latents)
    text_encoder = network.caption_encoder(encoder)
    outputs = PromptOutputs(generator, read, text_encoder, per_prompt)
    if is_grid(target):
        chosen = [network.sampling(sampler, number) for number in all_steps]
        columns = [replace(generator, sampler=str(name), steps=number) for name, number in chosen]
        outputs.write_grid(target, columns)
        print(f"wrote images of {len(read)} prompts to {target} ({'; '.join(map(str, columns))})")
    else:
        written = outputs.write_folder(target)
        existed = f"{len(read) - written} of {len(read)} existed"
        print(f"wrote images of {written} prompts to {target} ({generator}); {existed}")


@dataclass(frozen=True)
class PromptOutputs:
    """Generates and saves images of prompts. Image k of prompt i is sample k * len(prompts) + i, as in `decm test`.

    Args:
        generator: generates the images of a network that reads captions.
        prompts: all prompts of the file.
        encoder: the text encoder that the network was trained with.
        count: images per prompt.
    """

    generator: ImageGenerator
    prompts: Sequence[Prompt]
    encoder: CaptionEncoder
    count: int

    def images(self, number: int, generator: ImageGenerator) -> Tensor:
        """Return the images of prompt `number`, uint8 (count, c, h, w)."""
        captions = self.encoder([self.prompts[number].text])
        captions = _pytree.tree_map_only(Tensor, lambda part: part.to(generator.device), captions)
        parts = []
        for first in range(0, self.count, BATCH):
            rows = [k * len(self.prompts) + number for k in range(first, min(first + BATCH, self.count))]
            condition = select(captions, torch.zeros(len(rows), dtype=torch.long, device=generator.device))
            parts.append(generator.images(condition, rows))
        return torch.cat(parts)

    def write_grid(self, file: Path, generators: Sequence[ImageGenerator]) -> None:
        """Write one PNG with a row for each prompt and the generators side by side. All of them use the same noise."""
        check_plots()
        numbers = range(len(self.prompts))
        self._measure(numbers)
        with Progress(numbers, desc="sampling", unit="prompt") as bar:
            rows = [torch.cat([self.images(number, generator) for generator in generators]) for number in bar]
        names = [short(prompt.text) for prompt in self.prompts]
        # One sampler needs no mention in every heading.
        same = len({generator.sampler for generator in generators}) == 1
        headings = [in_steps(generator.steps) if same else str(generator) for generator in generators]
        save_named_grid(torch.stack(rows), names, headings, file)

    def write_folder(self, root: Path) -> int:
        """Generate a folder's missing images, and return the number of prompts that were incomplete.

        Prompt i, counted from 0, has its images in `root`/0000i/samples (0000.png, 0001.png, ...) and its line in
        `root`/0000i/metadata.jsonl. It is complete if the line is unchanged and all images are complete.
        """
        numbers = range(len(self.prompts))
        names = [[f"{number:05d}/samples/{k:04d}.png" for k in range(self.count)] for number in numbers]
        folder = SampleFolder(root, self._settings(), [name for of_prompt in names for name in of_prompt])
        folder.check()
        todo = [n for n in numbers if not self._has_line(root, n) or folder.missing(names[n], self.generator.size)]
        self._measure(todo)

        def write_line(number: int) -> None:
            with atomic(_metadata(root, number)) as partial:
                partial.write_text(self.prompts[number].line + "\n", encoding="utf-8")

        self.generator.fill(folder, names, lambda n: self.images(n, self.generator), write_line, todo)
        return len(todo)

    def _settings(self) -> dict[str, object]:
        lines = "\n".join(prompt.line for prompt in self.prompts)
        digest = hashlib.sha256(lines.encode()).hexdigest()[:DIGITS]
        return self.generator.settings(per_prompt=self.count, prompts=digest, encoder=self.encoder.identity)

    def _measure(self, numbers: Sequence[int]) -> None:
        """Move the encoder to the network's device, and log how many prompts are truncated, if any."""
        if numbers:
            self.encoder.to(self.generator.device)
            self.encoder.measured([self.prompts[number].text for number in numbers])

    def _has_line(self, root: Path, number: int) -> bool:
        try:
            return _metadata(root, number).read_bytes() == (self.prompts[number].line + "\n").encode()
        except FileNotFoundError:
            return False


def _metadata(root: Path, number: int) -> Path:
    return root / f"{number:05d}" / METADATA
