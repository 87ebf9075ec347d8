"""decm sample: images from a checkpoint or folder, as one grid or one file each."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from rich.progress import track

from decm_lightning.cli.device import checked
from decm_lightning.cli.out import checked_out
from decm_lightning.cli.prompts import PromptDrawing, read_prompts, text_encoder, write, write_grid
from decm_lightning.networks import Network, load
from decm_lightning.pictures import save_files, save_grid, to_uint8
from decm_lightning.samplers import SamplerName
from decm_lightning.samplers import sampler as make_sampler
from decm_lightning.types import Captions, Sample

BATCH = 256


def draw(
    model: str,
    out: str = "samples.png",
    sampler: SamplerName = "mix",
    steps: int | list[int] = 1,
    s1: float | None = None,
    classes: list[int] | None = None,
    per_class: int = 8,
    prompts: str | None = None,
    encoder: str | None = None,
    per_prompt: int = 4,
    seed: int = 0,
    scale: int = 4,
    device: str = "cpu",
    vae: str | None = None,
    latents: str | None = None,
) -> None:
    """Draw images and write them.

    Args:
        model: a .ckpt file, or a folder with config.json and model.safetensors.
        out: a .png file for one grid, a row for each class or prompt; or a folder for one PNG each. That of prompts is
            laid out as GenEval's scorer reads it, and prompts whose images are there are not drawn again.
        sampler: euler, consistency, mix or mix_renoised.
        steps: network evaluations per image, at least 1; several numbers, such as [1, 4], for a grid of prompts, which
            then shows them side by side.
        s1: where mix lands first, in (0, 1); its own choice by default.
        classes: labels to draw, at least one; all of them by default.
        per_class: images of each class, at least 1.
        prompts: for a model of captions, a file with one prompt a line; or, named .jsonl, one {"prompt": "..."} a line.
        encoder: the text encoder that the model was trained with: minilm, a folder or a name on the Hugging Face hub,
            or the folder of a pipeline of diffusers.
        per_prompt: images of each prompt, at least 1.
        seed: the same seed gives the same images.
        scale: how many times larger a grid shows its images, at least 1.
        device: where to draw, such as cpu or cuda.
        vae: what decodes latents, and encoded them: a folder, a name on the Hugging Face hub, or a file as of VA-VAE.
        latents: the folder of latents that the model was trained on; of it latents_stats.pt and cache.json are read. A
            model of captions needs none: its latents are scaled by the VAE's config.
    """
    if per_class < 1 or scale < 1:
        raise ValueError(f"per_class and scale must be at least 1: got {per_class} and {scale}")
    if per_prompt < 1:
        raise ValueError(f"per_prompt must be at least 1: got {per_prompt}")
    if s1 is not None and sampler in ("euler", "consistency"):
        raise ValueError(f"s1 is for the samplers mix and mix_renoised: got it with {sampler}")
    checked(device)
    target = checked_out(out)
    is_grid = target.suffix.lower() == ".png"
    network = load(model, device)
    options = {} if s1 is None else {"s1": s1}

    def make(generator: torch.Generator) -> Callable[..., Sample]:
        return make_sampler(sampler, generator, **options)

    if isinstance(network.example(1)[3], Captions):
        if prompts is None or encoder is None:
            raise ValueError(f"{model} draws captions: give --prompts FILE and --encoder, what it was trained with")
        found, decode = read_prompts(Path(prompts)), _decoder(vae, latents, network)
        drawing = PromptDrawing(network, text_encoder(encoder, device), make, decode, per_prompt, seed, device)
        if is_grid:
            write_grid(drawing, found, [steps] if isinstance(steps, int) else steps, target)
            print(f"wrote images of {len(found)} prompts to {out}")
            return
        steps = _one(steps)
        settings = {"sampler": sampler, "steps": steps, "s1": s1, "per_prompt": per_prompt, "seed": seed, "vae": vae}
        drawn = write(drawing, found, steps, target, settings)
        print(f"wrote images of {drawn} prompts to {out}; {len(found) - drawn} of {len(found)} were there")
        return
    if prompts is not None or encoder is not None:
        raise ValueError(f"{model} draws classes, not captions: give --classes, and neither --prompts nor --encoder")
    labels = _labels(classes, per_class, network.num_classes)
    generator = torch.Generator(device).manual_seed(seed)
    images = _of_classes(
        network, labels.to(device), make(generator), generator, _decoder(vae, latents, network), _one(steps)
    )
    if is_grid:
        save_grid(images, per_class, scale, target)
    else:
        save_files(images, labels, target)
    print(f"wrote {len(images)} images to {out}")


def run(argv: Sequence[str]) -> None:
    """Parse and draw."""
    auto_cli(draw, args=list(argv), prog="decm sample", exit_on_error=False)


@torch.no_grad()
def _of_classes(
    network: Network,
    labels: torch.Tensor,
    sampler: Callable[..., Sample],
    generator: torch.Generator,
    decode: Callable[[Sample], Sample],
    steps: int,
) -> torch.Tensor:
    x_0 = torch.randn(len(labels), *network.sample_shape, generator=generator, device=labels.device)
    parts = []
    for noise, part in track(list(zip(x_0.split(BATCH), labels.split(BATCH), strict=True)), "sampling"):
        parts.append(to_uint8(decode(sampler(network, noise, part, steps))))
    return torch.cat(parts)


def _decoder(vae: str | None, latents: str | None, network: Network) -> Callable[[Sample], Sample]:
    channels, reads_captions = network.sample_shape[0], isinstance(network.example(1)[3], Captions)
    if vae and not latents and reads_captions:
        # Imported here: Lightning comes along with the data, and takes seconds.
        from decm_lightning.autoencoders import load_autoencoder
        from decm_lightning.data.latent_coder import LatentCoder

        coder = LatentCoder(load_autoencoder(vae))
        return _fitting(vae, coder.decode, coder.autoencoder.latent_channels, channels)
    if vae and latents:
        from decm_lightning.data.decoding import LatentDecoder

        decoder = LatentDecoder.read(vae, latents)
        return _fitting(vae, decoder, decoder.autoencoder.latent_channels, channels)
    if vae or latents:
        raise ValueError("give --vae and --latents together: the VAE, and the folder of latents with their statistics")
    if channels not in (1, 3):
        wanted = "--vae, what encoded them," if reads_captions else "--vae and --latents"
        raise ValueError(f"the model makes {channels} channels, latents: give {wanted} to see pictures")
    return lambda drawn: drawn


def _fitting(vae: str, decode: Callable[[Sample], Sample], found: int, channels: int) -> Callable[[Sample], Sample]:
    if found != channels:
        raise ValueError(f"the model makes {channels} channels: latents of {vae} have {found}")
    return decode


def _one(steps: int | list[int]) -> int:
    if not isinstance(steps, int):
        raise ValueError(f"several numbers of steps are for prompts in one .png file: give one, not {steps}")
    return steps


def _labels(classes: list[int] | None, per_class: int, num_classes: int) -> torch.Tensor:
    wanted = list(range(num_classes)) if classes is None else classes
    if not wanted:
        raise ValueError("classes must be at least one label: got none")
    for label in wanted:
        if not 0 <= label < num_classes:
            raise ValueError(f"classes must be from 0 to {num_classes - 1}: got {label}")
    return torch.tensor(wanted).repeat_interleave(per_class)
