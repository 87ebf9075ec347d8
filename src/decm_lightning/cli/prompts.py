"""Images of a file of prompts, in the layout that GenEval's scorer reads."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.random import SeedSequence
from rich.progress import track
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.conditions import select
from decm_lightning.networks import Network
from decm_lightning.pictures import picture, save_named_grid, short, to_uint8
from decm_lightning.text import CaptionEncoder, MiniLM, TextEncoder
from decm_lightning.types import Sample

METADATA = "metadata.jsonl"
SETTINGS = "settings.json"
BATCH = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt and its line of the file as JSON, with what a scorer needs to know beside it."""

    text: str
    line: str


@dataclass(frozen=True)
class PromptDrawing:
    """Draws images of prompts; each follows from the seed, the prompt's number and its own alone.

    Args:
        network: it reads captions.
        encoder: the text encoder that it was trained with.
        sampler: gives a sampler around a generator.
        decode: turns what the network makes into images in [-1, 1].
        images: so many of each prompt.
        seed: of all noise.
        device: where to draw.
    """

    network: Network
    encoder: CaptionEncoder
    sampler: Callable[[torch.Generator], Callable[..., Sample]]
    decode: Callable[[Sample], Sample]
    images: int
    seed: int
    device: str

    @torch.no_grad()
    def draw(self, number: int, text: str, steps: int) -> Tensor:
        """Return the images of a prompt, uint8 (images, c, h, w), with so many network evaluations each."""
        captions = _pytree.tree_map_only(Tensor, lambda part: part.to(self.device), self.encoder([text]))
        shape = self.network.sample_shape
        x_0 = torch.stack(
            [torch.randn(shape, generator=self._generator("cpu", number, image)) for image in range(1, self.images + 1)]
        )
        sampler = self.sampler(self._generator(self.device, number, 0))
        parts = []
        for noise in x_0.to(self.device).split(BATCH):
            rows = select(captions, torch.zeros(len(noise), dtype=torch.long, device=self.device))
            parts.append(to_uint8(self.decode(sampler(self.network, noise, rows, steps))))
        return torch.cat(parts).cpu()

    def _generator(self, device: str, *entropy: int) -> torch.Generator:
        seed = int(SeedSequence((self.seed, *entropy)).generate_state(1)[0])
        return torch.Generator(device).manual_seed(seed)


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a file.

    Args:
        file: one prompt a line; or, named .jsonl, one JSON object a line with the prompt under "prompt", such as
            GenEval's evaluation_metadata.jsonl.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if a line is empty or of another form.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file of prompts at {file}")
    try:
        content = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    if not content:
        raise ValueError(f"{file} has no prompt: it is empty")
    read = _of_json if file.suffix == ".jsonl" else _of_text
    # Not splitlines, which would also part a line at what a JSON string may contain.
    return [read(line, f"{file}, line {number}") for number, line in enumerate(content.split("\n"), start=1)]


def write(drawing: PromptDrawing, prompts: Sequence[Prompt], steps: int, folder: Path, settings: dict[str, Any]) -> int:
    """Draw what is not there yet, and return how many prompts that were.

    Prompt number i, from 0, has `folder`/0000i/samples/0000.png and so on, and its own line in
    `folder`/0000i/metadata.jsonl, which is written last: where it stands, the images are whole.

    Args:
        drawing: how.
        prompts: all of the file.
        steps: network evaluations per image.
        folder: where to, made if need be.
        settings: what the images depend on, kept in `folder`/settings.json.

    Raises:
        ValueError: if the folder's images were drawn with other settings.
    """
    lines = "\n".join(prompt.line for prompt in prompts)
    settings |= {"prompts": _digest(lines.encode()), "encoder": drawing.encoder.identity}
    settings |= {"weights": _weights(drawing.network)}
    _refuse_others(folder / SETTINGS, settings)
    places = [folder / f"{number:05d}" for number in range(len(prompts))]
    missing = [number for number, place in enumerate(places) if not _is_whole(place, drawing.images)]
    for number in track(missing, "sampling"):
        images = drawing.draw(number, prompts[number].text, steps)
        if not (folder / SETTINGS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        samples = places[number] / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        for row, image in enumerate(images):
            picture(image).save(samples / _name(row))
        (places[number] / METADATA).write_text(prompts[number].line + "\n", encoding="utf-8")
    return len(missing)


def write_grid(drawing: PromptDrawing, prompts: Sequence[Prompt], steps: Sequence[int], file: Path) -> None:
    """Draw all prompts, from the same noise at each number of steps, as one PNG: a row a prompt, steps side by side.

    Raises:
        ValueError: if there is no number of steps.
    """
    if not steps:
        raise ValueError("steps must be at least one number: got none")
    rows = [
        torch.cat([drawing.draw(number, prompt.text, taken) for taken in steps])
        for number, prompt in enumerate(track(prompts, "sampling"))
    ]
    columns = [f"{taken} step{'s' * (taken > 1)}" for taken in steps]
    save_named_grid(torch.stack(rows), [short(prompt.text) for prompt in prompts], columns, file)


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


def _refuse_others(file: Path, settings: dict[str, Any]) -> None:
    if not file.exists():
        return
    found = json.loads(file.read_text())
    differing = [f"{key} {found.get(key)}, not {value}" for key, value in settings.items() if found.get(key) != value]
    if differing:
        raise ValueError(f"{file.parent} holds images drawn otherwise ({'; '.join(differing)}): give another --out")


def _is_whole(place: Path, images: int) -> bool:
    return all(
        file.is_file() for file in (place / METADATA, *(place / "samples" / _name(row) for row in range(images)))
    )


def _name(row: int) -> str:
    return f"{row:04d}.png"


def _weights(network: Network) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
