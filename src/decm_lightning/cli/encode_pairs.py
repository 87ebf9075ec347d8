"""decm encode-pairs: prepare the data of a training on text-image pairs."""

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

    Training on TextImagePairs of the same source, size, encoder and VAE, with `out` as their cache, then starts at
    once. The same command resumes an interrupted run.

    Args:
        pairs: webdataset tars, parquet or Arrow tables, or a list of image files (.csv, .jsonl): a file, a folder, or a
            pattern such as "train-*.tar"; with split also user/name on the Hugging Face hub.
        size: images are cropped to size x size pixels.
        encoder: the text encoder, as in a config: a class such as decm_lightning.text.TextEncoder, with --encoder.path
            and the like for its settings; MiniLM by default.
        out: the folder for pixels, latents and tokens.
        captions: cached, or on_the_fly to encode them during training.
        vae: for latents, a folder, a name on the Hugging Face hub, or a file, as in decm encode; none for pixels.
        caption_column: the caption's name in JSON files and tables, which comes before a .txt file; caption, text or
            prompt by default.
        max_characters: longer captions are errors, at least 1.
        on_error: raise if a pair is bad, or skip to count the bad ones and use the others.
        device: where to encode, such as cpu or cuda:1; by default the first accelerator if there is one.
        split: for a name on the Hugging Face hub, or a folder that its `datasets` reads: train, test, ...
    """
    data = TextImagePairs(
        pairs, size, encoder, out, captions, vae,
        caption_column=caption_column, max_characters=max_characters, on_error=on_error, split=split,
    )  # fmt: skip
    count = data.prepare(device and check_device(device))
    stored = [f"latents of {vae}" if vae else "pixels", *(["captions"] if captions == "cached" else [])]
    print(f"{count} pairs: {' and '.join(stored)} are in {out}")
