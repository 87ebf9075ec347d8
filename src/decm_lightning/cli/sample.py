"""decm sample: images from a checkpoint or folder, as one grid or one file each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jsonargparse import auto_cli
from PIL import Image
from rich.progress import track

from decm_lightning.networks import load
from decm_lightning.samplers import SamplerName
from decm_lightning.samplers import sampler as make_sampler
from decm_lightning.types import Sample

BATCH = 256


def draw(
    model: str,
    out: str = "samples.png",
    sampler: SamplerName = "mix",
    steps: int = 1,
    classes: list[int] | None = None,
    per_class: int = 8,
    seed: int = 0,
    scale: int = 4,
    device: str = "cpu",
) -> None:
    """Draw images and write them.

    Args:
        model: a .ckpt file, or a folder with config.json and model.safetensors.
        out: a .png file for one grid (a row for each class), or a folder for one PNG each.
        sampler: euler, consistency, mix or mix_renoised.
        steps: network evaluations per image, at least 1.
        classes: labels to draw; all of them by default.
        per_class: images of each class, at least 1.
        seed: the same seed gives the same images.
        scale: how many times larger a grid shows its images, at least 1.
        device: where to draw, such as cpu or cuda.
    """
    if per_class < 1 or scale < 1:
        raise ValueError(f"per_class and scale must be at least 1: got {per_class} and {scale}")
    network = load(model, device)
    labels = _labels(classes, per_class, network.num_classes)
    generator = torch.Generator(device).manual_seed(seed)
    x_0 = torch.randn(len(labels), *network.sample_shape, generator=generator, device=device)
    run_sampler = make_sampler(sampler, generator)
    parts = []
    with torch.no_grad():
        for noise, part in track(list(zip(x_0.split(BATCH), labels.to(device).split(BATCH), strict=True)), "sampling"):
            parts.append(run_sampler(network, noise, part, steps))
    images = to_bytes(torch.cat(parts).cpu())
    if Path(out).suffix == ".png":
        write_grid(images, per_class, scale, Path(out))
    else:
        write_folder(images, labels, Path(out))
    print(f"wrote {len(images)} images to {out}")


def to_bytes(images: Sample) -> np.ndarray:
    """Return images (n, c, h, w) in [-1, 1] as bytes (n, h, w, c), rounded."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels: got {images.shape[1]} (latents need a decoder)")
    return rearrange(((images.clamp(-1, 1) + 1) * 127.5).round().byte(), "n c h w -> n h w c").numpy()


def write_grid(images: np.ndarray, columns: int, scale: int, file: Path) -> None:
    """Write all images as one picture with `columns` images in a row."""
    grid = rearrange(images, "(row column) h w c -> (row h) (column w) c", column=columns)
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(file)


def write_folder(images: np.ndarray, labels: torch.Tensor, folder: Path) -> None:
    """Write each image as <number>_class<label>.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / f"{i:06d}_class{label}.png")


def run(argv: Sequence[str]) -> None:
    """Parse and draw."""
    auto_cli(draw, args=list(argv), prog="decm sample", exit_on_error=False)


def _labels(classes: list[int] | None, per_class: int, num_classes: int) -> torch.Tensor:
    wanted = list(range(num_classes)) if classes is None else classes
    for label in wanted:
        if not 0 <= label < num_classes:
            raise ValueError(f"classes must be from 0 to {num_classes - 1}: got {label}")
    return torch.tensor(wanted).repeat_interleave(per_class)
