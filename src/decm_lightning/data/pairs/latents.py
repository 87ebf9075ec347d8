"""The latents of pairs, encoded once and stored next to their pixels."""

import os
from pathlib import Path
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from decm_lightning.caches import make_once
from decm_lightning.data.latents.latent_coder import LatentCoder
from decm_lightning.data.pairs.cache import PreparedPairs
from decm_lightning.errors import NonFiniteError
from decm_lightning.files import PARTIAL, text_sha256

BATCH = 64


def encode_latents(prepared: PreparedPairs, coder: LatentCoder, device: torch.device) -> Float[Tensor, "n c h w"]:
    """Return the latents of all pairs, in float16: encoded and stored on the first call.

    The file is named by a hash of the VAE's weights and of its scaling, and so is its partial file: an interrupted run
    resumes with the next batch, and with another VAE from the start. Of two processes that encode the same latents, the
    second waits for the first.

    Args:
        prepared: the pairs.
        coder: the VAE.
        device: where to encode.

    Returns:
        (n, c, h, w), mapped into memory from the disk.

    Raises:
        NonFiniteError: naming the pair, if a latent is NaN, infinite, or beyond float16.
        OSError: naming the file, if the disk is full.
        ValueError: if the file is damaged.
    """
    file = prepared.folder / f"latents-{text_sha256(coder.identity)[:16]}.bin"
    shape = torch.Size((len(prepared.images), *coder.autoencoder.latent_shape(prepared.images.shape[-1])))

    def make() -> None:
        _write(file, prepared, coder, device)
        # Training needs the memory.
        coder.autoencoder.to("cpu")

    make_once(file, make)
    if (found := file.stat().st_size) != 2 * shape.numel():
        remedy = "delete it, and it is made again"
        raise ValueError(f"{file} is damaged ({found} bytes, expected {2 * shape.numel()}): {remedy}")
    return torch.from_file(str(file), size=shape.numel(), dtype=torch.float16).view(shape)


def _write(file: Path, prepared: PreparedPairs, coder: LatentCoder, device: torch.device) -> None:
    # Not `atomic`, which would remove what an interrupted run resumes from.
    partial = file.with_suffix(PARTIAL)
    try:
        with partial.open("ab") as latents:
            _append(latents, prepared, coder, device)
            latents.flush()
            os.fsync(latents.fileno())
        partial.replace(file)
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(file)) from error
        raise


def _append(latents: IO[bytes], prepared: PreparedPairs, coder: LatentCoder, device: torch.device) -> None:
    """Encode the images whose latents are not in the file yet, in whole batches."""
    images, size = prepared.images, prepared.images.shape[-1]
    row_bytes = 2 * torch.Size(coder.autoencoder.latent_shape(size)).numel()
    # An interrupted run may have left a part of a batch.
    done = min(latents.tell() // row_bytes // BATCH * BATCH, len(images))
    latents.truncate(done * row_bytes)
    with tqdm(total=len(images), initial=done, desc="encoding images", unit="image") as bar:
        for start in range(done, len(images), BATCH):
            encoded = coder.encode(images[start : start + BATCH].to(device).float() / 127.5 - 1).half().cpu()
            bad = encoded.isfinite().flatten(1).all(1).logical_not().nonzero()
            if len(bad):
                name = prepared.names[start + int(bad[0])]
                raise NonFiniteError(f"the latent of {name} is not finite in float16: the VAE or its scaling is broken")
            latents.write(encoded.contiguous().numpy().tobytes())
            bar.update(len(encoded))
