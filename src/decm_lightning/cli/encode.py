"""decm encode: encode images into a folder of latents that ImageNetLatents and LightningDiT read."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.cli.noise import hide_noise
from decm_lightning.data.images.image_files import ImageFiles, OnError
from decm_lightning.data.latents.encoding import Encoding, EncodingData, Plan, Posterior
from decm_lightning.data.latents.manifest import EncodingSettings, Manifest
from decm_lightning.image_listing import broken, counted, printable
from decm_lightning.signals import end_at_signals
from decm_lightning.training import RunProgress


def encode(
    images: str,
    vae: str,
    out: str,
    size: int = 256,
    batch_size: int = 32,
    shard_size: int = 4096,
    num_classes: int | None = None,
    on_error: OnError = "raise",
    posterior: Posterior = "sample",
    seed: int = 0,
    num_workers: int = 4,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = "auto",
    num_nodes: int = 1,
) -> None:
    """Encode images and their mirror images, and write shards, latents_stats.pt and cache.json.

    Run the same command again to resume an interrupted run, on any number of devices. Images whose files were replaced
    are encoded again. Adding or removing an image changes only its shard. The result is bit-identical on the same kind
    of device with the same batch_size and number of threads, and otherwise equal up to rounding. For text-image pairs,
    use decm encode-pairs.

    Args:
        images: a folder of class folders, a folder of webdataset tars, one tar, or a pattern such as "train-*.tar".
        vae: the VAE: a folder, a name on the Hugging Face hub, or a file in latent diffusion's format such as VA-VAE's.
        out: the folder to write.
        size: images are cropped to size x size pixels.
        batch_size: images encoded at once on each device, each plain and mirrored, at least 1.
        shard_size: images per shard, at least 1; a killed run loses at most one shard per device.
        num_classes: number of classes; by default the number of class folders, or the largest label plus 1.
        on_error: raise an error for a broken image or label, or skip and count it.
        posterior: the latent of an image: sample (mean + std * noise, as LightningDiT) or mode (the mean).
        seed: seed of the posterior's noise, from 0 to 2^63 - 1; an image's noise depends on the seed and its name.
        num_workers: processes per device that read images.
        accelerator: auto, cpu, gpu, ...
        devices: number of devices per node; auto for all GPUs.
        num_nodes: number of machines.
    """
    hide_noise()
    files = ImageFiles(images, num_classes, on_error)
    files.check_output(out)
    autoencoder = load_autoencoder(vae)
    if autoencoder.image_channels != 3:
        raise ValueError(f"the VAE must encode RGB images with 3 channels: {vae} has {autoencoder.image_channels}")
    shape = autoencoder.latent_shape(size)
    settings = EncodingSettings(autoencoder.identity, size, posterior, seed, files.num_classes, shard_size)
    manifest = Manifest(out, settings)
    data = EncodingData(files, manifest, size, batch_size, num_workers, on_error)
    trainer = _trainer(accelerator, devices, num_nodes)
    end_at_signals(trainer)
    if trainer.is_global_zero and files.left_out:
        print(f"left out of {printable(images)}: {counted(files.left_out)}")
    try:
        trainer.predict(Encoding(autoencoder, data, posterior, seed), data, return_predictions=False)
        _wait_for_all(trainer)
        if trainer.is_global_zero:
            provenance, skipped = manifest.finish(shape, data.plan.shards)
            print(_result(data.plan, provenance.num_images, skipped, out))
    finally:
        manifest.unlock()


def _wait_for_all(trainer: L.Trainer) -> None:
    try:
        trainer.strategy.barrier("all shards are written")
    except RuntimeError as error:
        # The connection breaks when another process stops.
        raise ValueError("another process failed and prints the cause: run the command again to resume") from error


def _result(plan: Plan, count: int, skipped: Mapping[str, str], out: str) -> str:
    written, total = len(plan.pending), len(plan.shards)
    folder = printable(out)
    left_out = f"\nleft out {broken(skipped)}" if skipped else ""
    if not written:
        return f"all {total} shards of {count} images in {folder} were up to date{left_out}"
    others = f" ({total - written} were up to date)" if written < total else ""
    return f"wrote {written} shards{others} of {count} images, latents_stats.pt and cache.json to {folder}{left_out}"


def _trainer(accelerator: str, devices: int | Literal["auto"], num_nodes: int) -> L.Trainer:
    automatic = torch.cuda.device_count() if accelerator != "cpu" else 1
    several = num_nodes * (automatic if devices == "auto" else devices) > 1
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        # A process may finish long before the others.
        strategy=DDPStrategy(timeout=timedelta(days=7)) if several else "auto",
        use_distributed_sampler=False,
        callbacks=[RunProgress("encoding")],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
