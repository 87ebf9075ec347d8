"""decm encode: images into a folder of latents, which ImageNetLatents and LightningDiT read."""

import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy

from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.data.image_files import ImageFiles
from decm_lightning.data.manifest import Manifest, Request
from decm_lightning.encoding import Encoding, Portions, Posterior, ShardWriter


def encode(
    images: str,
    vae: str,
    out: str,
    size: int = 256,
    batch_size: int = 32,
    shard_size: int = 4096,
    num_classes: int | None = None,
    posterior: Posterior = "sample",
    seed: int = 0,
    num_workers: int = 4,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = "auto",
    num_nodes: int = 1,
) -> None:
    """Encode images and their mirror images, and write shards, latents_stats.pt and cache.json.

    It can be killed at any moment: the same command goes on where it was, with any number of devices. The result is the
    same to the bit on the same kind of device, with the same batch_size and number of threads, else up to rounding.
    Text-image pairs are another matter: decm encode --pairs SOURCE --help.

    Args:
        images: a folder of class folders, a folder of webdataset tars, one tar, or a pattern such as "train-*.tar".
        vae: a folder, a name on the Hugging Face hub, or a file with latent diffusion's names such as VA-VAE's.
        out: the folder to write.
        size: images are cropped to size x size pixels.
        batch_size: images encoded at once on each device, each plain and mirrored, at least 1.
        shard_size: images in a file, at least 1; a killed run loses at most so many on each device.
        num_classes: labels must be below it; by default as many as there are class folders, or the largest label says.
        posterior: sample (mean + std noise, as LightningDiT) or mode (the mean) of what the VAE encodes.
        seed: of the samples of the posterior; each image has noise of its own.
        num_workers: processes that read images, for each device.
        accelerator: auto, cpu, gpu, ...
        devices: how many devices, on each node; auto for all GPUs.
        num_nodes: how many machines.
    """
    # The second comes where all is done already.
    for noise in (".*does not have many workers which may be a bottleneck", ".*across ranks is zero"):
        warnings.filterwarnings("ignore", noise)
    files = ImageFiles(images, num_classes)
    autoencoder = load_autoencoder(vae)
    if autoencoder.image_channels != 3:
        raise ValueError(f"the VAE must be for RGB images: {vae} has {autoencoder.image_channels} channels")
    shape = autoencoder.latent_shape(size)
    manifest = Manifest(out, _request(files, autoencoder.identity, size, posterior, seed, shard_size))
    trainer = _trainer(accelerator, devices, num_nodes, ShardWriter(manifest))
    if trainer.is_global_zero:
        manifest.begin()
    pending = {n: manifest.shards[n] for n in manifest.pending(trainer.global_rank, trainer.world_size)}
    portions = Portions(files, size, pending, batch_size)
    module = Encoding(autoencoder, posterior, seed)
    trainer.predict(module, portions.loader(num_workers), return_predictions=False)
    _wait_for_all(trainer)
    if trainer.is_global_zero:
        manifest.finish(shape)
        print(f"wrote {len(manifest.shards)} shards of {len(files)} images, latents_stats.pt and cache.json to {out}")


def run(argv: Sequence[str]) -> None:
    """Parse and encode."""
    auto_cli(encode, args=list(argv), prog="decm encode", exit_on_error=False, as_positional=False)


def _wait_for_all(trainer: L.Trainer) -> None:
    try:
        trainer.strategy.barrier("all shards are written")
    except RuntimeError as error:
        # It broke the connection when it stopped.
        raise ValueError("another process has stopped, it says why: start again, finished shards are kept") from error


def _request(files: ImageFiles, vae: str, size: int, posterior: Posterior, seed: int, shard_size: int) -> Request:
    return Request(
        vae=vae,
        size=size,
        posterior=posterior,
        seed=seed,
        images_sha256=files.fingerprint(),
        num_images=len(files),
        num_classes=files.num_classes,
        shard_size=shard_size,
    )


def _trainer(accelerator: str, devices: int | Literal["auto"], num_nodes: int, writer: L.Callback) -> L.Trainer:
    automatic = torch.cuda.device_count() if accelerator != "cpu" else 1
    several = num_nodes * (automatic if devices == "auto" else devices) > 1
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        # A process may be done long before the others.
        strategy=DDPStrategy(timeout=timedelta(days=7)) if several else "auto",
        use_distributed_sampler=False,
        callbacks=[writer, TQDMProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
