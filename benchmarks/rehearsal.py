"""python -m benchmarks.rehearsal images FOLDER, or vae FOLDER: the inputs of `make imagenet-rehearsal`.

`images` writes the 1,797 digits of scikit-learn in ImageNet's layout, FOLDER/<class>/<number>.png, at 16 x 16 pixels.
`vae` trains the small autoencoder in weights/rehearsal/vae on them, which takes a few minutes.
"""

from pathlib import Path

import torch
from jsonargparse import auto_cli
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional
from tqdm import trange

SIZE = 16


def digits() -> list[Image.Image]:
    """Return the digits as enlarged grayscale images."""
    pixels = (load_digits().images / 16 * 255).round().astype("uint8")
    return [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in pixels]


def images(folder: Path) -> None:
    """Write the digits into class folders.

    Args:
        folder: the output folder.
    """
    for number, (image, label) in enumerate(zip(digits(), load_digits().target, strict=True)):
        file = folder / str(label) / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(file)
    print(f"wrote {number + 1} images to {folder}")


def vae(folder: Path, steps: int = 1500, batch: int = 32, threads: int = 1) -> None:
    """Train a small AutoencoderKL of diffusers, 4 channels at half the size, and save it.

    Args:
        folder: the output folder.
        steps: training steps.
        batch: images per step.
        threads: CPU threads.
    """
    from diffusers import AutoencoderKL

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        # Latents are normalized by their statistics.
        scaling_factor=1.0,
    )
    data = torch.stack([torch.tensor(list(image.tobytes())) for image in digits()]).reshape(-1, 1, SIZE, SIZE)
    x = (data / 127.5 - 1).expand(-1, 3, -1, -1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    bar = trange(steps)
    for _ in bar:
        rows = torch.randint(len(x), (batch,))
        # `decm encode` also encodes flipped images, so train on both.
        real = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x[rows], x[rows].flip(-1))
        latents = network.encode(real).latent_dist
        error = functional.mse_loss(network.decode(latents.sample()).sample, real)
        (error + 1e-5 * latents.kl().mean() / latents.mean[0].numel()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(error=f"{error.item():.4f}")
    with torch.no_grad():
        latents = network.encode(x).latent_dist.mode()
        error = functional.mse_loss(network.decode(latents).sample, x).sqrt()
    network.save_pretrained(folder)
    print(
        f"root mean square error {error:.4f} of pixels in [-1, 1]; latents have mean {latents.mean():.3f} and "
        f"standard deviation {latents.std():.3f}"
    )


if __name__ == "__main__":
    auto_cli([images, vae], as_positional=True)
