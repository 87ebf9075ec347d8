"""Checkpoints of latent diffusion's AutoencoderKL (CompVis; VA-VAE, arXiv 2501.01423) in diffusers' names.

diffusers' own converter leaves out attention inside the levels, which VA-VAE has at its coarsest.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

TRAINING = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
"""Beginnings of the names that only training needs: the discriminator, and what VA-VAE's latents are aligned to."""
FIRST_STAGE = "first_stage_model."
"""The beginning of the autoencoder's names in the checkpoint of a whole latent diffusion model."""
PREFIX = re.compile(r"^((first_stage_model|model|vae)\.)+")
"""Beginnings that training scripts add to the names."""
DIFFUSERS = ("encoder.down_blocks.", "encoder.layers.", "decoder.up_blocks.")
"""Beginnings of names in diffusers' own files, whose architecture is in the config next to them."""
INSIDE_BLOCKS = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder's own tensors, without wrappers' prefixes and without what only training needs.

    Raises:
        ValueError: if two tensors have the same name without their prefixes.
    """
    whole = any(FIRST_STAGE in name for name in tensors)
    own = {name: tensor for name, tensor in tensors.items() if not whole or FIRST_STAGE in name}
    named = {PREFIX.sub("", name): tensor for name, tensor in own.items()}
    if len(named) < len(own):
        raise ValueError(
            f"{len(own) - len(named)} tensors are there twice, with and without a prefix: keep one of them"
        )
    return {name: tensor for name, tensor in named.items() if not name.startswith(TRAINING)}


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKL that has these tensors, from their names and shapes.

    Raises:
        ValueError: if they are no such autoencoder, or its encoder makes no variance (double_z false).
    """
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    ends = [f"{part}.{end}.weight" for part in ("encoder", "decoder") for end in ("conv_in", "conv_out")]
    lacking = [name for name in (*ends, *firsts) if name not in tensors]
    if any(name.startswith(DIFFUSERS) for name in tensors):
        raise ValueError("its tensors are named as diffusers names them: give its folder, which has a config.json")
    if lacking or not levels:
        raise ValueError(f"no LDM AutoencoderKL: it lacks {', '.join(lacking) or 'encoder.down'}")
    latent_channels, moments = tensors["decoder.conv_in.weight"].shape[1], len(tensors["encoder.conv_out.weight"])
    if moments != 2 * latent_channels:
        raise ValueError(f"its encoder must make mean and variance, {2 * latent_channels} channels: got {moments}")

    def attentive(level: str) -> bool:
        return f"{level}.attn.0.q.weight" in tensors

    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "block_out_channels": [len(tensors[name]) for name in firsts],
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": [f"{'Attn' * attentive(f'encoder.down.{i}')}DownEncoderBlock2D" for i in range(levels)],
        "up_block_types": [f"{'Attn' * attentive(f'decoder.up.{i}')}UpDecoderBlock2D" for i in reversed(range(levels))],
        "latent_channels": latent_channels,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "scaling_factor": 1.0,
    }


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under diffusers' names; the 1 x 1 convolutions of attention become linear layers."""
    levels = _count(tensors, r"decoder\.up\.(\d+)\.")
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
        # The decoder's levels are numbered by resolution there, and in the order of their use here.
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
        for pattern, replacement in INSIDE_BLOCKS:
            name = re.sub(pattern, replacement, name)
        linear = ".attentions." in name and tensor.ndim == 4
        renamed[name] = tensor.flatten(1) if linear else tensor
    return renamed


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})
