"""Find the images of a source: class folders, a flat folder, tars, or a data set of Hugging Face's `datasets`."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from decm_lightning.data.images.image_files import ImageFiles, OnError
from decm_lightning.errors import needs
from decm_lightning.image_listing import list_files
from decm_lightning.networks.hub import is_hub_name

SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files that `save_to_disk` writes into a data set's folder."""
PARQUET = ".parquet"


@dataclass(frozen=True)
class ImageSource:
    """The encoded images of a source and their classes.

    Attributes:
        names: unique name of each image, for messages.
        labels: class number of each image; below 0 if it is missing.
        class_names: name of each class.
        identity: text that changes when an image or a label changes.
        read: returns the bytes of the image with this number. It may be called in threads.
        left_out: number of files that are not read, by kind.
    """

    names: Sequence[str]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    identity: str
    read: Callable[[int], bytes]
    left_out: Counter[str] = field(default_factory=Counter)


def find_images(
    folder: str,
    on_error: OnError = "raise",
    image_column: str = "image",
    label_column: str | None = "label",
    split: str = "train",
) -> ImageSource:
    """Find the images of a source.

    The source is a folder or tars, see `ImageFiles`; a folder written by `save_to_disk`; a parquet file or a folder of
    them; or the name of a data set on the Hugging Face hub. For the other arguments see `ImageFolder`.
    """
    path = Path(folder)
    is_saved = any((path / name).is_file() for name in SAVED)
    tables = [] if is_saved else _parquet_files(path)
    if not (is_saved or tables or (is_hub_name(folder) and not path.exists())):
        return _of_files(ImageFiles(folder, on_error=on_error))
    with needs(f"the data set {folder}", "datasets", "text"):
        from decm_lightning.data.images.hugging_face import read_data_set
    return read_data_set(folder, is_saved, tables, image_column, label_column, split)


def _parquet_files(path: Path) -> list[str]:
    """Return the parquet files of a source; none if it is a folder with images or tars."""
    if path.is_file():
        return [str(path)] if path.suffix.lower() == PARQUET else []
    if not path.is_dir():
        return []
    listing = list_files(path, {PARQUET})
    return [str(path.joinpath(*parts)) for parts in listing.files]


def _of_files(images: ImageFiles) -> ImageSource:
    files = images.files
    identity = "\n".join(map(images.identity, files))
    labels = [file.label for file in files]
    return ImageSource(
        [file.name for file in files], labels, images.class_names, identity, lambda i: files[i].place.read(),
        images.left_out,
    )  # fmt: skip
