"""decm sample: generate images of classes, as one grid or one file per image."""

import torch
from torch import Tensor

from decm_lightning.cli.sampling import image_generator, load_model
from decm_lightning.cli.targets import is_grid
from decm_lightning.image_writer import save_grid
from decm_lightning.networks import Network
from decm_lightning.progress import Progress
from decm_lightning.sample_folder import SampleFolder, sample_name

BATCH = 256


def sample(
    model: str,
    out: str = "samples.png",
    sampler: str | None = None,
    steps: int | None = None,
    classes: list[int] | None = None,
    per_class: int = 8,
    seed: int = 0,
    scale: int = 4,
    device: str = "cpu",
    vae: str | None = None,
    latents: str | None = None,
    trust: bool = False,
) -> None:
    """Generate images of classes and save them.

    Args:
        model: a .ckpt file, a folder with config.json and model.safetensors, or a name on the Hugging Face hub. Its
            record has the defaults of the other options.
        out: a .png file for a grid with one row per class, or a folder for one PNG per image. A folder holds images of
            one set of settings. The same command resumes it; other settings are refused.
        sampler: euler, consistency, flow_map, mix, or a path such as my_module.heun. Options follow a question mark:
            mix?s1=0.6. By default the recommended one for the number of steps, which for a teacher is euler.
        steps: network evaluations per image, at least 1; by default 2, or 50 for a teacher.
        classes: labels to sample, such as '[3, 5]'; by default all.
        per_class: images per class, at least 1.
        seed: from 0 to 2**63 - 1. Image k of class c is sample k * num_classes + c of the seed, as in decm test.
        scale: enlargement of the images in a grid, from 1 to 64.
        device: the device, such as cpu or cuda.
        vae: the VAE of the latents: a folder, a name on the Hugging Face hub, or a file such as VA-VAE's. By default
            the recorded one; another one is refused.
        latents: the folder of latents that the model was trained on, whose latents_stats.pt and cache.json are read. By
            default the recorded statistics.
        trust: allow a network class from outside this package; importing its module runs its code.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1: got {per_class}")
    if not 1 <= scale <= 64:
        raise ValueError(f"scale must be from 1 to 64: got {scale}")
    network, target = load_model(model, False, out, seed, device, trust)
    generator = image_generator(network, sampler, steps, seed, vae, latents)
    selected = _classes(classes, network)
    labels = [label for label in selected for _ in range(per_class)]
    rows = [number % per_class * network.num_classes + label for number, label in enumerate(labels)]
    batches = [slice(first, first + BATCH) for first in range(0, len(labels), BATCH)]

    def images(batch: int) -> Tensor:
        return generator.images(torch.tensor(labels[batches[batch]], device=generator.device), rows[batches[batch]])

    if is_grid(target):
        with Progress(range(len(batches)), desc="sampling", unit="batch") as bar:
            save_grid(torch.cat([images(batch) for batch in bar]), per_class, scale, target)
        print(f"wrote {len(labels)} images to {target} ({generator})")
        return
    names = [sample_name(row, label) for row, label in zip(rows, labels, strict=True)]
    folder = SampleFolder(target, generator.settings(classes=selected, per_class=per_class), names)
    folder.check()
    written = generator.fill(folder, [names[batch] for batch in batches], images)
    print(f"wrote {written} images to {target} ({generator}); {len(names) - written} of {len(names)} existed")


def _classes(requested: list[int] | None, network: Network) -> list[int]:
    """Return the classes to sample."""
    known = list(range(network.num_classes))
    if not known:
        raise ValueError("decm sample needs a class-conditional model: this model has no classes and reads no captions")
    if requested is None:
        return known
    if not requested:
        raise ValueError("classes must be at least one label: got none")
    for label in requested:
        if label not in known:
            raise ValueError(f"classes must be from 0 to {len(known) - 1}: got {label}")
    return requested
