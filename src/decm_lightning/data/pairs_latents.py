"""The latents of pairs, encoded once and kept beside their pixels."""

import hashlib
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from decm_lightning.data.latent_coder import LatentCoder
from decm_lightning.data.pairs_cache import PreparedPairs
from decm_lightning.errors import NonFiniteError

BATCH = 64


def encode_latents(prepared: PreparedPairs, coder: LatentCoder, device: torch.device) -> Float[Tensor, "n c h w"]:
    """Return the latents of all pairs, in float16: as they were kept, or encoded and kept now.

    The file is named by a hash of the VAE's weights and of its scaling. A run that is stopped goes on with the next
    batch; of two that work at once, the second waits for the first.

    Args:
        prepared: the pairs.
        coder: the VAE.
        device: where to encode.

    Returns:
        (n, c, h, w), mapped into memory from the disk.

    Raises:
        NonFiniteError: naming the pair, if a latent is NaN, infinite, or beyond float16.
    """
    made = f"{coder.autoencoder.identity} {coder.shift} {coder.scale}"
    file = prepared.folder / f"latents-{hashlib.sha256(made.encode()).hexdigest()[:16]}.bin"
    shape = (len(prepared.images), *coder.autoencoder.latent_shape(prepared.images.shape[-1]))
    if not file.exists():
        with FileLock(f"{file}.lock"):
            if not file.exists():
                _write(file, prepared, coder, device)
                # Whoever trains needs the memory.
                coder.autoencoder.to("cpu")
    return torch.from_file(str(file), size=torch.Size(shape).numel(), dtype=torch.float16).view(shape)


def _write(file: Path, prepared: PreparedPairs, coder: LatentCoder, device: torch.device) -> None:
    # Another name until it is whole.
    partial = file.with_suffix(".partial")
    images, size = prepared.images, prepared.images.shape[-1]
    row_bytes = 2 * torch.Size(coder.autoencoder.latent_shape(size)).numel()
    with partial.open("ab") as latents, tqdm(total=len(images), desc="encoding images", unit="image") as bar:
        # What was stopped may have left a part of a batch.
        done = latents.tell() // row_bytes // BATCH * BATCH
        latents.truncate(done * row_bytes)
        bar.update(done)
        for start in range(done, len(images), BATCH):
            encoded = coder.encode(images[start : start + BATCH].to(device).float() / 127.5 - 1).half().cpu()
            bad = encoded.isfinite().flatten(1).all(1).logical_not().nonzero()
            if len(bad):
                name = prepared.names[start + int(bad[0])]
                raise NonFiniteError(f"the latent of {name} is not finite in float16: the VAE or its scaling is broken")
            latents.write(encoded.contiguous().numpy().tobytes())
            bar.update(len(encoded))
    partial.replace(file)
