"""Images of a file of prompts, as one grid or in the layout that GenEval's scorer reads."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree
from tqdm.auto import tqdm

from decm_lightning.cli.sampling import DIGITS, Decoder, SamplerChoice, generate, weights_sha256
from decm_lightning.conditions import select
from decm_lightning.evaluation.sample_folder import SampleFolder
from decm_lightning.files import atomic
from decm_lightning.image_writer import check_plots, save_named_grid, short
from decm_lightning.networks import Network
from decm_lightning.text import CaptionEncoder, MiniLM, TextEncoder

METADATA = "metadata.jsonl"
BATCH = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt and its line of the file as JSON, with what a scorer needs to know beside it."""

    text: str
    line: str


@dataclass(frozen=True)
class PromptSamples:
    """Samples of prompts. The k-th of prompt i is sample number k * len(prompts) + i, as in `decm test`.

    Args:
        network: it reads captions.
        decoder: turns its samples into images.
        choice: the sampler.
        prompts: all prompts of the file.
        encoder: the text encoder that it was trained with.
        images: how many of each prompt.
        seed: of all noise.
        device: where to compute.
    """

    network: Network
    decoder: Decoder
    choice: SamplerChoice
    prompts: Sequence[Prompt]
    encoder: CaptionEncoder
    images: int
    seed: int
    device: str

    def generate(self, number: int, steps: int) -> Tensor:
        """Return the images of a prompt, uint8 (images, c, h, w), with this number of network evaluations each."""
        captions = self.encoder([self.prompts[number].text])
        captions = _pytree.tree_map_only(Tensor, lambda part: part.to(self.device), captions)
        parts = []
        for first in range(0, self.images, BATCH):
            rows = [image * len(self.prompts) + number for image in range(first, min(first + BATCH, self.images))]
            condition = select(captions, torch.zeros(len(rows), dtype=torch.long, device=self.device))
            parts.append(generate(self.network, self.decoder, self.choice, condition, steps, self.seed, rows))
        return torch.cat(parts)

    def write_folder(self, folder: Path) -> int:
        """Generate what is missing in a folder, and return how many prompts that were.

        Prompt number i, from 0, has `folder`/0000i/samples/0000.png and so on, and its own line in
        `folder`/0000i/metadata.jsonl. A prompt is complete if its line is the same and its images are whole.

        Raises:
            ValueError: if the folder holds samples of other settings, or other images.
        """
        names = [[_name(number, image) for image in range(self.images)] for number in range(len(self.prompts))]
        samples = SampleFolder(folder, self._settings(), [name for of_prompt in names for name in of_prompt])
        samples.check()
        size = self.decoder.size(self.network)
        todo = [
            number
            for number, prompt in enumerate(self.prompts)
            if not _has_line(_metadata(folder, number), prompt) or samples.missing(names[number], size)
        ]
        self._measure(todo)
        for number in tqdm(todo, "sampling"):
            images = self.generate(number, self.choice.one)
            if number == todo[0]:
                samples.begin()
            for name, image in zip(names[number], images, strict=True):
                samples.write(name, image)
            with atomic(_metadata(folder, number)) as partial:
                partial.write_text(self.prompts[number].line + "\n", encoding="utf-8")
        return len(todo)

    def write_grid(self, file: Path) -> None:
        """Generate all prompts as one PNG: a row a prompt, numbers of steps from the same noise side by side.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if the list of steps is empty.
        """
        check_plots()
        several = [self.choice.steps] if isinstance(self.choice.steps, int) else self.choice.steps
        if not several:
            raise ValueError("steps must be at least one number: got none")
        numbers = range(len(self.prompts))
        self._measure(numbers)
        rows = [torch.cat([self.generate(number, steps) for steps in several]) for number in tqdm(numbers, "sampling")]
        columns = [f"{steps} step{'s' * (steps > 1)}" for steps in several]
        save_named_grid(torch.stack(rows), [short(prompt.text) for prompt in self.prompts], columns, file)

    def _settings(self) -> dict[str, object]:
        lines = "\n".join(prompt.line for prompt in self.prompts)
        return {
            "weights": weights_sha256(self.network),
            **self.choice.settings(),
            "per_prompt": self.images,
            "seed": self.seed,
            "vae": self.decoder.identity,
            "prompts": hashlib.sha256(lines.encode()).hexdigest()[:DIGITS],
            "encoder": self.encoder.identity,
        }

    def _measure(self, numbers: Sequence[int]) -> None:
        """Log how many prompts are cut, if any."""
        if numbers:
            self.encoder.measured([self.prompts[number].text for number in numbers])


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a file.

    Args:
        file: one prompt a line; or, named .jsonl, one JSON object a line with the prompt under "prompt", such as
            GenEval's evaluation_metadata.jsonl.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: naming file and line, if a line is empty or of another form.
    """
    try:
        content = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file of prompts at {file}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    if not content:
        raise ValueError(f"{file} has no prompt: it is empty")
    read = _of_json if file.suffix == ".jsonl" else _of_text
    # Not splitlines, which would also part a line at what a JSON string may contain.
    return [read(line, f"{file}, line {number}") for number, line in enumerate(content.split("\n"), start=1)]


def text_encoder(name: str, device: str) -> CaptionEncoder:
    """Return the text encoder of that name.

    Args:
        name: "minilm" for the one that comes as a package, the folder of a pipeline of diffusers, or else a folder or
            name on the Hugging Face hub as `TextEncoder` takes it.
        device: where a pipeline's encoders work.
    """
    if name.lower() == "minilm":
        return MiniLM()
    if (Path(name) / "model_index.json").is_file():
        # Imported here, with what only such teachers need.
        from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts

        return DiffusersPrompts(name, device=device)
    return TextEncoder(name)


def _of_text(line: str, where: str) -> Prompt:
    if not line.strip():
        raise ValueError(f"{where}: the prompt is empty")
    return Prompt(line.strip(), json.dumps({"prompt": line.strip()}, ensure_ascii=False))


def _of_json(line: str, where: str) -> Prompt:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a line of JSON ({error.msg} at character {error.pos + 1})") from error
    text = content.get("prompt") if isinstance(content, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected {{"prompt": "..."}} with more keys if need be, got {line[:60]}')
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty")
    return Prompt(text, line)


def _metadata(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}" / METADATA


def _name(number: int, image: int) -> str:
    return f"{number:05d}/samples/{image:04d}.png"


def _has_line(file: Path, prompt: Prompt) -> bool:
    try:
        return file.read_bytes() == (prompt.line + "\n").encode()
    except FileNotFoundError:
        return False
