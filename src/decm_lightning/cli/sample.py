"""decm sample: images from a checkpoint or folder, as one grid or one file each."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli

from decm_lightning.cli.classes import ClassSamples
from decm_lightning.cli.device import checked
from decm_lightning.cli.out import checked_out
from decm_lightning.cli.prompts import PromptSamples, read_prompts, text_encoder
from decm_lightning.cli.sampling import Decoder, SamplerChoice
from decm_lightning.networks import Network, load
from decm_lightning.samplers import SamplerName
from decm_lightning.seeds import check_seed
from decm_lightning.types import Captions


def draw(
    model: str,
    out: str = "samples.png",
    sampler: SamplerName | None = None,
    steps: int | list[int] | None = None,
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
    trust: bool = False,
) -> None:
    """Generate images and write them.

    Args:
        model: a .ckpt file, or a folder with config.json and model.safetensors.
        out: a .png file for one grid, a row for each class or prompt; or a folder for one PNG each. A folder holds the
            images of one set of settings: started again, the same command writes those that are missing, and another
            is refused. That of prompts is laid out as GenEval's scorer reads it.
        sampler: euler, consistency or mix; by default mix, and euler for a teacher.
        steps: network evaluations per image, at least 1; several numbers, such as [1, 4], for a grid of prompts, which
            then shows them side by side. By default 1, and 50 for euler.
        s1: the end time of mix's first step, in (0, 1); its own choice by default.
        classes: labels to sample, at least one; all of them by default.
        per_class: images of each class, at least 1.
        prompts: for a model of captions, a file with one prompt a line; or, named .jsonl, one {"prompt": "..."} a line.
        encoder: the text encoder that the model was trained with: minilm, a folder or a name on the Hugging Face hub,
            or the folder of a pipeline of diffusers.
        per_prompt: images of each prompt, at least 1.
        seed: from 0 to 2**63 - 1; each image depends on it and on the image's number alone.
        scale: how many times larger a grid shows its images, at least 1.
        device: where to compute, such as cpu or cuda.
        vae: what decodes latents, and encoded them: a folder, a name on the Hugging Face hub, or a file as of VA-VAE.
        latents: the folder of latents that the model was trained on; of it latents_stats.pt and cache.json are read. A
            model of captions needs none: its latents are scaled by the VAE's config.
        trust: import the module of a network class from outside this package, which runs its code.
    """
    for name, value in (("per_class", per_class), ("scale", scale), ("per_prompt", per_prompt)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")
    check_seed(seed)
    checked(device)
    target = checked_out(out)
    network = load(model, device, trust)
    choice = SamplerChoice.of(network, sampler, steps, s1)
    if isinstance(network.example(1)[3], Captions):
        if prompts is None or encoder is None:
            raise ValueError(f"{model} reads captions: give --prompts FILE and --encoder, what it was trained with")
        if classes is not None:
            raise ValueError(f"{model} reads captions, not classes: leave out --classes {classes}")
        found, decoder = read_prompts(Path(prompts)), Decoder.of(network, vae, latents)
        _of_prompts(
            PromptSamples(network, decoder, choice, found, text_encoder(encoder, device), per_prompt, seed, device),
            target,
        )
        return
    if prompts is not None or encoder is not None:
        raise ValueError(f"{model} reads classes, not captions: give --classes, and neither --prompts nor --encoder")
    decoder = Decoder.of(network, vae, latents)
    labels = _classes(classes, network)
    _of_classes(ClassSamples(network, decoder, choice, labels, per_class, seed, device), scale, target)


def run(argv: Sequence[str]) -> None:
    """Parse and generate."""
    auto_cli(draw, args=list(argv), prog="decm sample", exit_on_error=False)


def _of_classes(samples: ClassSamples, scale: int, target: Path) -> None:
    total = len(samples.labels)
    if _is_grid(target):
        samples.write_grid(scale, target)
        print(f"wrote {total} images to {target} ({samples.choice})")
    else:
        written = samples.write_folder(target)
        print(f"wrote {written} images to {target} ({samples.choice}); {total - written} of {total} were there")


def _of_prompts(samples: PromptSamples, target: Path) -> None:
    total = len(samples.prompts)
    if _is_grid(target):
        samples.write_grid(target)
        print(f"wrote images of {total} prompts to {target} ({samples.choice})")
    else:
        written = samples.write_folder(target)
        print(
            f"wrote images of {written} prompts to {target} ({samples.choice}); {total - written} of {total} were there"
        )


def _is_grid(target: Path) -> bool:
    return target.suffix.lower() == ".png"


def _classes(classes: list[int] | None, network: Network) -> list[int]:
    known = list(range(network.num_classes))
    if not known:
        raise ValueError("the model has no classes, and does not read captions: decm sample cannot use it")
    requested = known if classes is None else classes
    if not requested:
        raise ValueError("classes must be at least one label: got none")
    for label in requested:
        if label not in known:
            raise ValueError(f"classes must be from 0 to {len(known) - 1}: got {label}")
    return requested
