"""Text-image pairs of data sets that Hugging Face's `datasets` reads: names on the hub, and local folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from decm_lightning.data.pairs.pair import DataError, Pair, first_line, pair_of

IMAGE, TEXT, JSON, KEY = "image", "txt", "json", "__key__"


class DataSet:
    """One split of a data set, streamed: a second copy of it on the disk is not needed.

    Args:
        name: "user/name" on the hub, or a folder: parquet, an image folder with metadata, tars, `save_to_disk`.
        split: such as "train".

    Raises:
        FileNotFoundError: if there is no such data set, or the hub cannot be reached.
        ValueError: if it has no such split.
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            self._builder = datasets.load_dataset_builder(name)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(f"no data set {name}: {first_line(error)}") from error
        self.name = name
        self.split = split

    def identity(self) -> list[str]:
        """Return what differs once the data set has changed: by the hub's revision, or the times of local files."""
        return [self.name, self.split, str(self._builder.hash)]

    def pairs(self, column: str | None) -> Iterator[Pair | DataError]:
        """Yield the pairs: the column `image` or the first one of images, and that of captions, `txt` or in `json`.

        Raises:
            ValueError: if a row cannot be read. `datasets` cannot go on after it, and may have lost its connection.
        """
        row = -1
        try:
            for row, values in enumerate(self._rows()):
                name = values.pop(KEY, None) or f"{self.split}/{row}"
                yield pair_of(f"{self.name} {self.split}: row {row}", values, Path(self.name), column, name)
        # Each format fails in its own way.
        except Exception as error:
            place = f"{self.name} {self.split}: row {row + 1}"
            remedy = "without split, local files are read past damaged rows"
            raise ValueError(f"{place} cannot be read ({first_line(error)}): {remedy}") from error

    def _rows(self) -> Iterator[dict[str, Any]]:
        rows = self._builder.as_streaming_dataset(self.split)
        features = rows.features or {}
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        for name in images:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        for values in rows:
            if images and IMAGE not in values:
                values[IMAGE] = next((values[name] for name in images if values[name] is not None), None)
            if TEXT in values:
                values["text"] = values.pop(TEXT)
            # As in our own reader of tars, a .txt file comes first.
            yield (values[JSON] | values if isinstance(values.get(JSON), dict) else values)
