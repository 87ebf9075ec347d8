"""Small labeled photographs, cropped from the two that scikit-learn includes, as class folders and as tars."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images


def photos(count: int, side: int = 20, seed: int = 0) -> list[tuple[Image.Image, int]]:
    """Return images with sides from `side` to 2 * `side`, and their classes: 0 for China, 1 for the flower."""
    sources = load_sample_images().images
    generator = np.random.default_rng(seed)
    cut = []
    for number in range(count):
        height, width = generator.integers(side, 2 * side, 2)
        top, left = generator.integers(0, 300, 2)
        cut.append((Image.fromarray(sources[number % 2][top : top + height, left : left + width]), number % 2))
    return cut


def write_folder(folder: Path, count: int, **options: int) -> Path:
    """Write class folders of PNGs, which are lossless."""
    for number, (image, label) in enumerate(photos(count, **options)):
        place = folder / ("china", "flower")[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:04d}.png")
    return folder


def encoded(image: Image.Image, suffix: str = "png") -> bytes:
    """Return the content of an image file."""
    content = io.BytesIO()
    image.save(content, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return content.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    """Write a plain tar of these members."""
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def noise_generator(seed: int, name: str) -> torch.Generator:
    """Return the noise generator of an image's latent, which depends on the seed of the encoding and the image name."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed, spawn_key=(digest,)).generate_state(1)[0]))
