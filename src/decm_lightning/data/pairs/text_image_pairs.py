"""Data module of your own text-image pairs: pixels or latents, with captions from any text encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from decm_lightning.autoencoders import LatentCoder, load_autoencoder
from decm_lightning.data.latents.cached import encode_latents
from decm_lightning.data.pairs.cache import PreparedPairs, prepare
from decm_lightning.data.pairs.captioned_images import CaptionedImages
from decm_lightning.data.pairs.pair import summary
from decm_lightning.errors import check_at_least
from decm_lightning.image_listing import counted
from decm_lightning.text import CaptionEncoder, EncodedCaptions, MiniLM, UnencodedCaptions, encode, encoded
from decm_lightning.types import Batch, Condition


class TextImagePairs(CaptionedImages):
    """Pairs from webdataset tars, parquet or Arrow tables, a list of image files, or a data set on Hugging Face's hub.

    - Tars hold consecutive members `name.jpg` (or another image format) and `name.txt` or `name.json`. They may be
      compressed, such as .tar.gz.
    - Tables have a column `image` of {"bytes", "path"}, bytes or file names, and a column of captions.
    - Lists are a CSV file with a header or JSON lines, with the caption and a `file_name` relative to the list.
    - With `split`, Hugging Face's `datasets` reads the source: a name on the hub, an image folder, or `save_to_disk`.
      It stops at the first damaged row, while the readers above count and name all damaged rows.

    A folder holds one of these kinds. Links are followed, and hidden files are skipped. Images are read once,
    center-cropped to a square, resized, composited on white, and stored in `cache`. All errors are therefore found
    before training starts: unreadable images, empty or long captions, incomplete pairs, damaged row groups and tars
    that are cut short. With a VAE, batches hold latents, (z - shift_factor) * scaling_factor. `decm encode-pairs`
    prepares the cache ahead of training.

    Args:
        source: a file, a folder, or a pattern such as "train-*.tar".
        size: height and width of the images in pixels, at least 1.
        encoder: the text encoder, such as text.TextEncoder, or teachers.DiffusersPrompts for a teacher from diffusers;
            None for MiniLM.
        cache: folder of pixels and tokens, which are reused for the same source and encoder.
        captions: "cached" to encode captions once, or "on_the_fly" to encode them on the network's device for each
            batch. The latter suits SD3, whose captions take 2.7 MB each, with 100,000 pairs or more.
        vae: the VAE for latents, such as the folder of a pipeline, see `load_autoencoder`; None for pixels.
        latents: with a VAE, "cached" to encode latents once and store them in float16 (13 GB for 100,000 images of
            512 x 512 with SD3), or "on_the_fly" to encode them on the network's device for each batch.
        batch_size: pairs per training batch on each device, at least 1.
        held_out: fraction of pairs that are not used for training, chosen by a hash of their names, in [0, 1).
        reference_size: maximum number of reference images; None for all held-out pairs.
        caption_column: name of the caption in JSON files and tables, which then takes precedence over .txt files; None
            for caption, text or prompt.
        max_characters: longer captions are errors, at least 1.
        on_error: "raise" to stop at bad pairs, or "skip" to count them in the log and train on the others.
        num_workers: number of loading processes on each device.
        split: split such as "train", which `datasets` reads. The source may then be "user/name" on the hub.

    Raises:
        ValueError: if a number is outside its range.
    """

    def __init__(
        self,
        source: str,
        size: int,
        encoder: CaptionEncoder | None = None,
        cache: str = "runs/cache",
        captions: Literal["cached", "on_the_fly"] = "cached",
        vae: str | None = None,
        latents: Literal["cached", "on_the_fly"] = "cached",
        batch_size: int = 64,
        held_out: float = 0.05,
        reference_size: int | None = None,
        caption_column: str | None = None,
        max_characters: int = 2000,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int = 2,
        split: str | None = None,
    ) -> None:
        super().__init__(batch_size, held_out, reference_size, num_workers)
        check_at_least(1, size=size, max_characters=max_characters)
        self.source = Path(source)
        self.data_name = str(source)
        self.source_split = split
        self.size = size
        self.encoder = encoder or MiniLM()
        self.captions = captions
        self.vae = vae
        self.latents = latents
        self.cache = Path(cache)
        self.caption_column = caption_column
        self.max_characters = max_characters
        self.on_error = on_error

    def prepare_data(self) -> None:
        """Read and encode the pairs in one process of each machine, unless they are already stored."""
        self.prepare()

    def prepare(self, device: str | torch.device | None = None) -> int:
        """Read and encode the pairs unless they are already stored, and return the number of good pairs.

        Args:
            device: device that encodes; None for `self.device`.

        Raises:
            FileNotFoundError, ValueError, ImportError: see `setup`.
        """
        return len(self._load("prepare", torch.device(device) if device else self.device).captions)

    def setup(self, stage: str) -> None:
        """Read the pairs.

        Raises:
            FileNotFoundError: if the source or the VAE does not exist.
            ValueError: if pairs are bad and on_error is "raise", or no pair is good (the message counts and names the
                errors), if the caption column is missing (it gives the columns), or if the network expects samples of
                another shape.
            ImportError: if a package that reads tables or encodes captions is not installed.
        """
        self._load(stage, self.device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Return the network's input: latents if there is a VAE, and encoded captions."""
        x_1 = self.coder.encode(batch.x_1) if self.coder and self.latents == "on_the_fly" else batch.x_1
        return Batch(x_1, encoded(self.train.captions, batch.condition, self.encoder, x_1.device))

    def condition(self, rows: Sequence[int], seed: int = 0) -> Condition:
        """Return the captions of samples `rows`. Sample i uses held-out pair i mod their number.

        Raises:
            ValueError: if no pair is held out.
        """
        return encoded(self.train.captions, super().condition(rows, seed), self.encoder, self.device)

    def release(self) -> None:
        """Move the VAE off the accelerator, unless training uses it too."""
        if self.latents == "cached":
            super().release()

    def _load(self, stage: str, device: torch.device) -> PreparedPairs:
        if self.vae is None:
            self.check_network("the pairs are images", (3, self.size, self.size))
        else:
            self.coder = self.coder or LatentCoder(load_autoencoder(self.vae))
            self.check_network(f"the pairs are latents of {self.vae}", self.coder.autoencoder.latent_shape(self.size))
        prepared = self._prepared(stage)
        captions: EncodedCaptions | UnencodedCaptions
        if self.captions == "cached":
            captions = encode(prepared.captions, self.encoder, self.cache, device)
        else:
            captions = UnencodedCaptions(prepared.captions)
            if stage == "prepare":
                self.encoder.measured(prepared.captions)
        images = prepared.images
        if self.coder and self.latents == "cached":
            images = encode_latents(prepared, self.coder, device)
        self.split(images, captions, prepared.captions, prepared.names)
        return prepared

    def _prepared(self, stage: str) -> PreparedPairs:
        prepared = prepare(
            self.source, self.cache, self.size, self.caption_column, self.max_characters, self.source_split
        )
        count, errors = len(prepared.captions), prepared.errors
        message = summary(self.source, count, errors)
        if not count:
            raise ValueError(f"no good pair in {self.source}" + (f": {message}" if errors else ""))
        if errors and self.on_error == "raise":
            raise ValueError(f"{message}; set on_error: skip to train on the others")
        if errors and stage == "prepare":
            rank_zero_warn(f"{message}; the bad pairs are left out")
        if prepared.unread and stage == "prepare":
            rank_zero_warn(f"{self.source} has files that are not read: {counted(prepared.unread)}")
        return prepared
