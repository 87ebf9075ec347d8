"""decm encode-pairs: prepare text-image pairs for training."""

from typing import Literal

from decm_lightning.cli.targets import check_device
from decm_lightning.data import TextImagePairs
from decm_lightning.text import CaptionEncoder


def encode_pairs(
    pairs: str,
    size: int,
    encoder: CaptionEncoder | None = None,
    out: str = "runs/cache",
    captions: Literal["cached", "on_the_fly"] = "cached",
    vae: str | None = None,
    caption_column: str | None = None,
    max_characters: int = 2000,
    on_error: Literal["raise", "skip"] = "raise",
    device: str | None = None,
    split: str | None = None,
) -> None:
    """Read and check text-image pairs, encode their captions and, with a VAE, their images, and store the result.

    Training on TextImagePairs with the same source, size, encoder, VAE and cache folder then starts immediately. The
    same command resumes an interrupted run.

    Args:
        pairs: webdataset tars, parquet or Arrow tables, or a list of image files (.csv, .jsonl): a file, a folder, or a
            pattern such as "train-*.tar"; with split, also user/name on the Hugging Face hub.
        size: images are cropped to size x size pixels.
        encoder: the text encoder, as in a config: a class such as decm_lightning.text.TextEncoder, with options
            such as --encoder.path; MiniLM by default.
        out: the cache folder for pixels, latents and tokens.
        captions: cached to encode captions now, or on_the_fly to encode them during training.
        vae: the VAE that encodes the images, as in decm encode; by default pixels are stored.
        caption_column: the caption's key in JSON files and tables, which take precedence over a .txt file; by default
            caption, text or prompt.
        max_characters: length of the longest valid caption, at least 1.
        on_error: raise an error for a broken pair, or skip and count it.
        device: the device, such as cpu or cuda:1; by default the first accelerator, or else the CPU.
        split: train, test, ... of a dataset on the Hugging Face hub, or of a folder that the datasets library reads.
    """
    data = TextImagePairs(
        pairs, size, encoder, out, captions, vae,
        caption_column=caption_column, max_characters=max_characters, on_error=on_error, split=split,
    )  # fmt: skip
    count = data.prepare(device and check_device(device))
    stored = [f"latents of {vae}" if vae else "pixels", *(["captions"] if captions == "cached" else [])]
    print(f"{count} pairs: {' and '.join(stored)} are in {out}")
