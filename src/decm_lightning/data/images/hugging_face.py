"""Labeled images of a data set that Hugging Face's `datasets` reads: saved on disk, parquet files, or on the hub."""

from pathlib import Path
from typing import Any

import datasets

from decm_lightning.data.images.sources import ImageSource
from decm_lightning.data.pairs.pair import first_line, listed, stamp_of
from decm_lightning.networks.hub import cache_without_network


def read_data_set(
    name: str, is_saved: bool, tables: list[str], image_column: str, label_column: str | None, split: str
) -> ImageSource:
    """Return the images of a data set. Classes are the names of a ClassLabel, numbers, or sorted texts.

    `tables` are the parquet files of the folder, if there are any. Images are encoded bytes, {"bytes", "path"}, or file
    names. Without a label column, there is a single class.
    """
    data = _load(name, is_saved, tables, split)
    for column, option in ((image_column, "image_column"), (label_column, "label_column")):
        if column is not None and column not in data.column_names:
            remedy = f"set {option}" + (", or to null for one class" if option == "label_column" else "")
            raise ValueError(f"{name} has no column {column!r}: its columns are {listed(data.column_names)}; {remedy}")
    if isinstance(data.features[image_column], datasets.Image):
        data = data.cast_column(image_column, datasets.Image(decode=False))
    labels, class_names = _classes(data, label_column, Path(name).name)
    images = data.select_columns([image_column])
    stamps = [stamp_of(file["filename"]) for file in data.cache_files]

    def read(number: int) -> bytes:
        return _content(images[number][image_column], Path(name))

    identity = str([name, split, image_column, label_column, len(data), stamps])
    return ImageSource([f"{name}: row {row}" for row in range(len(data))], labels, class_names, identity, read)


def _load(name: str, is_saved: bool, tables: list[str], split: str) -> Any:
    try:
        if is_saved:
            found: Any = datasets.load_from_disk(name)
        elif tables:
            found = datasets.load_dataset("parquet", data_files=tables)
        else:
            with cache_without_network(name):
                found = datasets.load_dataset(name)
    # `datasets` raises errors of many types, from Arrow's to those of the connection.
    except Exception as error:
        raise FileNotFoundError(f"{name} cannot be read as a data set: {first_line(error)}") from error
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}: its splits are {listed(found)}")
    return found[split]


def _classes(data: Any, column: str | None, name: str) -> tuple[list[int], tuple[str, ...]]:
    if column is None:
        return [0] * len(data), (name,)
    values, feature = list(data[column]), data.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return [-1 if value is None else int(value) for value in values], tuple(feature.names)
    if all(value is None or (isinstance(value, int) and value >= -1) for value in values):
        numbers = [-1 if value is None else int(value) for value in values]
        return numbers, tuple(map(str, range(max(numbers, default=-1) + 1)))
    if not all(value is None or isinstance(value, str) for value in values):
        raise ValueError(f"the column {column!r} of {name} must hold class numbers or names: it holds {feature}")
    names = sorted({value for value in values if value is not None})
    number = {value: label for label, value in enumerate(names)}
    return [number.get(value, -1) for value in values], tuple(names)


def _content(image: Any, folder: Path) -> bytes:
    """Return the bytes of an image in a row."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str):
        return (folder / image).read_bytes()
    if not isinstance(image, bytes):
        raise ValueError("has no image")
    return image
