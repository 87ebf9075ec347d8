"""Convert AutoencoderKL checkpoints of latent diffusion (CompVis; VA-VAE, arXiv 2501.01423) to the names of diffusers.

The converter of diffusers does not support attention inside the levels, which VA-VAE has at the coarsest level.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

TRAINING = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
"""Prefixes of tensors that only training needs: the discriminator, and the model that VA-VAE aligns its latents to."""
FIRST_STAGE = "first_stage_model."
"""The prefix of the autoencoder in the checkpoint of a whole latent diffusion model."""
PREFIX = re.compile(r"^((first_stage_model|model|vae)\.)+")
"""Prefixes that training scripts add to the names."""
DIFFUSERS = ("encoder.down_blocks.", "encoder.layers.", "decoder.up_blocks.")
"""Prefixes of names in diffusers files, whose architecture is in a separate config."""
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
    """Return the tensors of the autoencoder without prefixes, and without those that only training needs.

    Raises:
        ValueError: if two tensors have the same name without their prefixes.
    """
    whole = any(FIRST_STAGE in name for name in tensors)
    own = {name: tensor for name, tensor in tensors.items() if not whole or FIRST_STAGE in name}
    named = {PREFIX.sub("", name): tensor for name, tensor in own.items()}
    if len(named) < len(own):
        raise ValueError(
            f"{len(own) - len(named)} tensors occur twice, with and without a prefix: remove the duplicates"
        )
    return {name: tensor for name, tensor in named.items() if not name.startswith(TRAINING)}


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the diffusers AutoencoderKL with these tensors, inferred from names and shapes.

    Raises:
        ValueError: if the tensors are not of such an autoencoder, or its encoder predicts no variance (double_z false).
    """
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    ends = [f"{part}.{end}.weight" for part in ("encoder", "decoder") for end in ("conv_in", "conv_out")]
    lacking = [name for name in (*ends, *firsts) if name not in tensors]
    if any(name.startswith(DIFFUSERS) for name in tensors):
        raise ValueError("the tensors have the names of diffusers: pass the folder, which has a config.json")
    if lacking or not levels:
        raise ValueError(f"not an LDM AutoencoderKL: it lacks {', '.join(lacking) or 'encoder.down'}")
    latent_channels, moments = tensors["decoder.conv_in.weight"].shape[1], len(tensors["encoder.conv_out.weight"])
    if moments != 2 * latent_channels:
        raise ValueError(f"the encoder must output mean and variance, {2 * latent_channels} channels: got {moments}")

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
    """Return the tensors under the names of diffusers; 1 x 1 convolutions of attention become linear layers."""
    levels = _count(tensors, r"decoder\.up\.(\d+)\.")
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
        # LDM numbers the decoder levels by resolution, diffusers in the order of use.
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)
        for pattern, replacement in INSIDE_BLOCKS:
            name = re.sub(pattern, replacement, name)
        linear = ".attentions." in name and tensor.ndim == 4
        renamed[name] = tensor.flatten(1) if linear else tensor
    return renamed


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})
