"""Text-image pairs of your own: pixels or latents, with captions of any encoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.data.latents.latent_coder import LatentCoder
from decm_lightning.data.pairs.cache import PreparedPairs, prepare
from decm_lightning.data.pairs.captioned_images import CaptionedImages
from decm_lightning.data.pairs.latents import encode_latents
from decm_lightning.data.pairs.pair import no_caption_column, summary
from decm_lightning.image_listing import counted
from decm_lightning.text import CaptionEncoder, EncodedCaptions, MiniLM, UnencodedCaptions, encode
from decm_lightning.types import Batch, Condition, Sample


class TextImagePairs(CaptionedImages):
    """Pairs from webdataset tars, parquet or Arrow tables, a list of image files, or a data set on Hugging Face's hub.

    - tars: neighbors `name.jpg` (or another format that Pillow reads) and `name.txt` or `name.json`; .tar.gz as well;
    - tables: a column `image` of {"bytes", "path"}, bytes or names of files, and one of captions;
    - lists: a CSV file with a header, or JSON lines; `file_name`, relative to the folder of the list, and the caption;
    - with `split`, whatever `datasets` loads: a name on the hub, an image folder, `save_to_disk`. It stops at the first
      damaged row, while the readers above name and count all of them.

    A folder has one of these kinds. Links are followed, and hidden files are skipped. Images are read, cropped to a
    square about their center, resized and composited on white where they are transparent, once, into `cache`. So all
    errors are found before training starts: an image that cannot be read, a caption that is empty or too long, a pair
    with one half missing, a damaged row group, a tar cut short. With a VAE, a batch holds latents,
    (z - shift_factor) scaling_factor. The content of `cache` can be prepared ahead of training: `decm encode-pairs`.

    Args:
        source: a file, a folder, or a pattern such as "train-*.tar".
        size: height and width of the images in pixels, at least 1.
        encoder: the text encoder, such as text.TextEncoder, or teachers.DiffusersPrompts for a teacher of diffusers;
            None for MiniLM.
        cache: folder of pixels and tokens, which are used again while source and encoder are the same.
        captions: "cached", encoded once, or "on_the_fly", on the device of the network when they are needed: those of
            SD3, 2.7 MB each, for 100,000 pairs or more.
        vae: for latents, the VAE as `load_autoencoder` takes it, such as the folder of a pipeline; None for pixels.
        latents: with a VAE, "cached", encoded once and stored in float16 (13 GB for 100,000 of SD3 at 512 x 512), or
            "on_the_fly", on the device of the network when they are needed.
        batch_size: pairs per training batch on each device, at least 1.
        held_out: fraction of pairs that is not trained on, chosen by a hash of their names, in [0, 1).
        reference_size: at most this number of reference images; None for all that are held out.
        caption_column: the caption's name in JSON files and tables, which comes before a .txt file; None for caption,
            text or prompt.
        max_characters: longer captions are errors, at least 1.
        on_error: "raise" if a pair is bad, or "skip" to count the bad ones in the log and train on the others.
        num_workers: loading processes on each device.
        split: reads the source, which may then be "user/name" on the Hugging Face hub, by `datasets`: "train", ...

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
        if size < 1 or max_characters < 1:
            raise ValueError(f"size and max_characters must be at least 1: got {size} and {max_characters}")
        self.source = Path(source)
        self.source_split = split
        self.size = size
        self.encoder = encoder or MiniLM()
        self.captions = captions
        self.vae = vae
        self.latents = latents
        self.coder: LatentCoder | None = None
        self.cache = Path(cache)
        self.caption_column = caption_column
        self.max_characters = max_characters
        self.on_error = on_error

    def prepare_data(self) -> None:
        """Read and encode on one process of each machine, where it has not been done."""
        self.prepare()

    def prepare(self, device: str | torch.device | None = None) -> int:
        """Read and encode what has not been, and return the number of good pairs.

        Args:
            device: where to encode; None for `self.device`.

        Raises:
            FileNotFoundError, ValueError, ImportError: as `setup`.
        """
        return len(self._load("prepare", torch.device(device) if device else self.device).captions)

    def setup(self, stage: str) -> None:
        """Read the pairs.

        Raises:
            FileNotFoundError: if there is no source, or no VAE.
            ValueError: counting and naming the errors, if no pair is good, or the network makes other samples; naming
                the columns, if none is the caption column.
            ImportError: if what reads tables or encodes captions is not installed.
        """
        self._load(stage, self.device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Return the batch as the network takes it: latents, if there is a VAE, and captions that are encoded."""
        x_1 = self.coder.encode(batch.x_1) if self.coder and self.latents == "on_the_fly" else batch.x_1
        return Batch(x_1, self._encoded(batch.condition, x_1.device))

    def condition(self, rows: Sequence[int], seed: int = 0) -> Condition:
        """Return the captions of samples number `rows`: sample i has that of held-out pair i mod their number.

        Raises:
            ValueError: if no pair is held out.
        """
        return self._encoded(super().condition(rows, seed), self.device)

    def decode(self, x: Sample) -> Sample:
        """Return the images in [-1, 1] of what the network makes: of latents, if there is a VAE."""
        return x if self.coder is None else self.coder.decode(x)

    def identity(self) -> dict[str, str]:
        """Return the identities of the text encoder and of the VAE, if there is one."""
        vae = {} if self.coder is None else {"VAE": self.coder.autoencoder.identity}
        return vae | {"encoder": self.encoder.identity}

    def release(self) -> None:
        """Move the VAE off the accelerator, unless training uses it too."""
        if self.coder is not None and self.latents == "cached":
            self.coder.autoencoder.to("cpu")

    def _encoded(self, condition: Condition, device: torch.device) -> Condition:
        unencoded = self.train.captions
        if not (isinstance(unencoded, UnencodedCaptions) and isinstance(condition, Tensor)):
            return condition
        self.encoder.to(device)
        return unencoded.encode(condition, self.encoder)

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
            missing = no_caption_column(self.source, errors, self.caption_column)
            raise ValueError(missing or f"no good pair in {self.source}" + (f": {message}" if errors else ""))
        if errors and self.on_error == "raise":
            raise ValueError(f"{message}; on_error: skip trains on the others")
        if errors and stage == "prepare":
            rank_zero_warn(f"{message}; left out")
        if prepared.unread and stage == "prepare":
            rank_zero_warn(f"{self.source} has files that are not read: {counted(prepared.unread)}")
        return prepared
