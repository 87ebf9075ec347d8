"""Encode the latents of stored pixels once and store them next to the pixels."""

import os
from pathlib import Path
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor

from decm_lightning.autoencoders import LatentCoder
from decm_lightning.caches import make_once
from decm_lightning.data.stored_pixels import StoredPixels
from decm_lightning.errors import NonFiniteError
from decm_lightning.files import PARTIAL, text_sha256
from decm_lightning.progress import Progress

BATCH = 64


def encode_latents(
    stored: StoredPixels, coder: LatentCoder, device: torch.device, mirrored: bool = False
) -> Float[Tensor, "n c h w"]:
    """Encode the latents of all images, or of their mirror images, once. Later calls return the stored latents.

    The latents are in float16 and memory-mapped. The names of the file and of its partial file contain a hash of the
    VAE's weights and scaling. An interrupted run resumes with the next batch, and another VAE starts a new file. A
    second process that encodes the same latents waits for the first.

    Raises:
        NonFiniteError: if a latent is NaN, infinite or outside the range of float16. The message names the image.
        OSError: if the file cannot be written, for example because the disk is full. The error names the file.
        ValueError: if the file is damaged.
    """
    name = "latents-mirrored" if mirrored else "latents"
    file = stored.folder / f"{name}-{text_sha256(coder.identity)[:16]}.bin"
    shape = torch.Size((len(stored.images), *coder.autoencoder.latent_shape(stored.images.shape[-1])))

    def make() -> None:
        _write(file, stored, coder, device, mirrored)
        # Training needs the memory of the accelerator.
        coder.autoencoder.to("cpu")

    make_once(file, make)
    if (found := file.stat().st_size) != 2 * shape.numel():
        remedy = "delete it to encode the latents again"
        raise ValueError(f"{file} is damaged ({found} bytes, expected {2 * shape.numel()}): {remedy}")
    return torch.from_file(str(file), size=shape.numel(), dtype=torch.float16).view(shape)


def _write(file: Path, stored: StoredPixels, coder: LatentCoder, device: torch.device, mirrored: bool) -> None:
    # `atomic` would remove the partial file, from which an interrupted run resumes.
    partial = file.with_suffix(PARTIAL)
    try:
        with partial.open("ab") as latents:
            _append(latents, stored, coder, device, mirrored)
            latents.flush()
            os.fsync(latents.fileno())
        partial.replace(file)
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(file)) from error
        raise


def _append(latents: IO[bytes], stored: StoredPixels, coder: LatentCoder, device: torch.device, mirrored: bool) -> None:
    """Encode the images whose latents are not in the file yet, starting with a whole batch."""
    images, size = stored.images, stored.images.shape[-1]
    row_bytes = 2 * torch.Size(coder.autoencoder.latent_shape(size)).numel()
    # An interrupted run may have written part of a batch.
    done = min(latents.tell() // row_bytes // BATCH * BATCH, len(images))
    latents.truncate(done * row_bytes)
    with Progress(total=len(images), initial=done, desc="encoding images", unit="image") as bar:
        for start in range(done, len(images), BATCH):
            pixels = images[start : start + BATCH].to(device).float() / 127.5 - 1
            encoded = coder.encode(pixels.flip(-1) if mirrored else pixels).half().cpu()
            bad = encoded.isfinite().flatten(1).all(1).logical_not().nonzero()
            if len(bad):
                name = stored.names[start + int(bad[0])]
                raise NonFiniteError(f"the latent of {name} is not finite in float16: check the VAE and its scaling")
            latents.write(encoded.contiguous().numpy().tobytes())
            bar.update(len(encoded))
