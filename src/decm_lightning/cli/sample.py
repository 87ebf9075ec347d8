"""decm sample: images from a checkpoint or folder, as one grid or one file each."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.progress import track

from decm_lightning.networks import load
from decm_lightning.pictures import save_files, save_grid, to_uint8
from decm_lightning.samplers import SamplerName
from decm_lightning.samplers import sampler as make_sampler
from decm_lightning.types import Sample

BATCH = 256


def draw(
    model: str,
    out: str = "samples.png",
    sampler: SamplerName = "mix",
    steps: int = 1,
    s1: float | None = None,
    classes: list[int] | None = None,
    per_class: int = 8,
    seed: int = 0,
    scale: int = 4,
    device: str = "cpu",
    vae: str | None = None,
    latents: str | None = None,
) -> None:
    """Draw images and write them.

    Args:
        model: a .ckpt file, or a folder with config.json and model.safetensors.
        out: a .png file for one grid (a row for each class), or a folder for one PNG each.
        sampler: euler, consistency, mix or mix_renoised.
        steps: network evaluations per image, at least 1.
        s1: where mix lands first, in (0, 1); its own choice by default.
        classes: labels to draw; all of them by default.
        per_class: images of each class, at least 1.
        seed: the same seed gives the same images.
        scale: how many times larger a grid shows its images, at least 1.
        device: where to draw, such as cpu or cuda.
        vae: what decodes latents, and encoded them: a folder, a name on the Hugging Face hub, or a file as of VA-VAE.
        latents: the folder of latents that the model was trained on; of it latents_stats.pt and cache.json are read.
    """
    if per_class < 1 or scale < 1:
        raise ValueError(f"per_class and scale must be at least 1: got {per_class} and {scale}")
    if s1 is not None and sampler in ("euler", "consistency"):
        raise ValueError(f"s1 is for the samplers mix and mix_renoised: got it with {sampler}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not there: {str(error).splitlines()[0]}") from error
    network = load(model, device)
    decode = _decoder(vae, latents, network.sample_shape[0])
    labels = _labels(classes, per_class, network.num_classes)
    generator = torch.Generator(device).manual_seed(seed)
    x_0 = torch.randn(len(labels), *network.sample_shape, generator=generator, device=device)
    run_sampler = make_sampler(sampler, generator, **({} if s1 is None else {"s1": s1}))
    parts = []
    with torch.no_grad():
        for noise, part in track(list(zip(x_0.split(BATCH), labels.to(device).split(BATCH), strict=True)), "sampling"):
            drawn = run_sampler(network, noise, part, steps)
            parts.append(to_uint8(decode(drawn)))
    images = torch.cat(parts)
    if Path(out).suffix == ".png":
        save_grid(images, per_class, scale, Path(out))
    else:
        save_files(images, labels, Path(out))
    print(f"wrote {len(images)} images to {out}")


def run(argv: Sequence[str]) -> None:
    """Parse and draw."""
    auto_cli(draw, args=list(argv), prog="decm sample", exit_on_error=False)


def _decoder(vae: str | None, latents: str | None, channels: int) -> Callable[[Sample], Sample]:
    if vae and latents:
        # Imported here: Lightning comes along with the data, and takes seconds.
        from decm_lightning.data.decoding import LatentDecoder

        decoder = LatentDecoder.read(vae, latents)
        if decoder.autoencoder.latent_channels != channels:
            found = decoder.autoencoder.latent_channels
            raise ValueError(f"the model makes {channels} channels: latents of {vae} have {found}")
        return decoder
    if vae or latents:
        raise ValueError("give --vae and --latents together: the VAE, and the folder of latents with their statistics")
    if channels not in (1, 3):
        raise ValueError(f"the model makes {channels} channels, latents: give --vae and --latents to see pictures")
    return lambda drawn: drawn


def _labels(classes: list[int] | None, per_class: int, num_classes: int) -> torch.Tensor:
    wanted = classes or list(range(num_classes))
    for label in wanted:
        if not 0 <= label < num_classes:
            raise ValueError(f"classes must be from 0 to {num_classes - 1}: got {label}")
    return torch.tensor(wanted).repeat_interleave(per_class)
