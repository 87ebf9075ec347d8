"""Tiny autoencoders of the real diffusers classes with random weights, written by save_pretrained."""

from pathlib import Path

import torch


def save_kl(folder: Path, seed: int = 0, latent_channels: int = 2) -> Path:
    """Write an AutoencoderKL that halves the sides, and return its folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=latent_channels, sample_size=16,
    )  # fmt: skip
    # The variance of a trained autoencoder. With random weights it is about 1, so that samples are pure noise.
    with torch.no_grad():
        model.quant_conv.bias[latent_channels:] -= 4
    model.save_pretrained(folder)
    return folder


def save_dc(folder: Path, seed: int = 0) -> Path:
    """Write an AutoencoderDC that quarters the sides, and return its folder."""
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    levels = {"block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
    both = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in levels.items()}
    AutoencoderDC(latent_channels=4, attention_head_dim=4, **both).save_pretrained(folder)
    return folder


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """Write an AutoencoderTiny that halves the sides, and return its folder."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=3,
    ).save_pretrained(folder)  # fmt: skip
    return folder
