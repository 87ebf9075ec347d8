"""decm export: write a checkpoint's averaged weights in a format that other programs, or `load`, read."""

import logging
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.cli.sampling import image_generator, reads_captions
from decm_lightning.cli.targets import check_device
from decm_lightning.errors import NonFiniteError
from decm_lightning.export import Format, hub, writer
from decm_lightning.export.card import Samples, places, write_card
from decm_lightning.export.diffusers.target import check_target as check_pipeline_folder
from decm_lightning.export.own_formats import check_target as check_file
from decm_lightning.networks import Network, load
from decm_lightning.networks.pretrained import check_target as check_network_folder
from decm_lightning.networks.record import Record
from decm_lightning.types import Condition

CHECKS: dict[Format, Callable[[str], Path]] = {
    "folder": check_network_folder,
    "diffusers": check_pipeline_folder,
    "safetensors": check_file,
    "lora": check_file,
    "lora-comfyui": check_file,
}
"""Functions that check the target of a format."""
STEPS = (1, 2, 4)
"""The numbers of steps in the samples of a model card."""
COLUMNS = 10
PROMPTS = ("a red apple", "a cat", "a sailing boat", "a snowy mountain")
log = logging.getLogger(__name__)


def export(
    checkpoint: str,
    out: str,
    to: Format = "folder",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    vae: str | None = None,
    latents: str | None = None,
    encoder: str | None = None,
    samples: bool = True,
    push: str | None = None,
    public: bool = False,
    device: str = "cpu",
    trust: bool = False,
) -> None:
    """Write a checkpoint's averaged weights in one of several formats, with a model card.

    Args:
        checkpoint: a checkpoint written by decm fit (a .ckpt file, or a folder of shards), or an exported folder.
        out: the folder or file to write. An existing network is replaced once the new one is complete.
        to: folder (config.json and model.safetensors, which decm_lightning.load, decm sample and teachers read);
            safetensors (the same in one .safetensors file);
            diffusers (a folder that DiffusionPipeline.from_pretrained loads with trust_remote_code=True);
            lora or lora-comfyui (one LoRA .safetensors file of an SD3, Flux or Sana student, for load_lora_weights of
            diffusers or for ComfyUI; consistency sampler only).
        dtype: dtype of the stored weights. float16 halves the file and rounds each weight to 1 part in 2,000. Networks
            loaded from the folder always compute in float32.
        vae: for diffusers, the VAE of the latents, unless the model records it: a folder, a name on the Hugging Face
            hub, or a file such as VA-VAE's.
        latents: for diffusers, the folder of latents that the model was trained on, unless the model records their
            normalization.
        encoder: for diffusers, the text encoder that the model was trained with, unless the model records it: minilm,
            a folder or a name on the Hugging Face hub.
        samples: generate images at 1, 2 and 4 steps for the model card.
        push: user/name on the Hugging Face hub, to upload the written files to. A new repository is private.
        public: make a new repository on the hub public.
        device: the device that generates the samples, such as cpu or cuda.
        trust: allow a network class from outside this package; importing its module runs its code.
    """
    write = writer(to)
    options = {name: value for name, value in (("vae", vae), ("latents", latents), ("encoder", encoder)) if value}
    if unknown := options.keys() - signature(write).parameters.keys():
        raise ValueError(f"--to {to} has no option --{min(unknown)}: leave it out")
    # Reading the checkpoint may take minutes, so the target is checked first.
    target = CHECKS[to](out)
    name = hub.check_name(push) if push else ""
    check_device(device)
    network = load(checkpoint, trust=trust)
    files = write(network, target, getattr(torch, dtype), **options)
    # Loaded again, because writing may round the weights in place to a dtype in which they do not run.
    images = _samples(load(checkpoint, device, trust)) if samples else None
    card = write_card(network, target, to, images, name)
    if not card:
        log.warning("%s has a model card without decm export's mark, which is left unchanged", target)
    print(f"wrote {', '.join(map(str, [*files, *card]))}")
    if name:
        uploaded = [*files, *(file for file in places(target) if file.exists())]
        print(f"pushed to {hub.push(target, uploaded, name, public)}")


def _samples(network: Network) -> Samples | None:
    """Return images for the model card, or None with a message if they cannot be generated."""
    try:
        generator = image_generator(network, None, None, 0, None, None)
        steps = STEPS if network.reads_end_time else (generator.steps,)
        condition, rows, names = _columns(network, generator.device)
        images = [generator.at(number).images(condition, rows) for number in steps]
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        log.warning("the model card has no samples: %s", error)
        return None
    return Samples(torch.stack(images), steps, names)


def _columns(network: Network, device: torch.device) -> tuple[Condition, list[int], list[str]]:
    """Return the condition, the sample number and the name of each column; a sample is as in decm sample."""
    if reads_captions(network):
        captions = network.caption_encoder()(list(PROMPTS))
        moved = _pytree.tree_map_only(Tensor, lambda part: part.to(device), captions)
        return moved, list(range(len(PROMPTS))), list(PROMPTS)
    if not network.num_classes:
        return None, list(range(COLUMNS)), [f"sample {row}" for row in range(COLUMNS)]
    labels = list(range(0, network.num_classes, -(-network.num_classes // COLUMNS)))
    named = dict(enumerate((network.record or Record()).class_names))
    return torch.tensor(labels, device=device), labels, [named.get(label, str(label)) for label in labels]
