"""Read text-image pairs with Hugging Face's `datasets`, from the hub or local folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from decm_lightning.data.pairs.pair import DataError, Pair, first_line, pair_of
from decm_lightning.networks.hub import cache_without_network

IMAGE, TEXT, JSON, KEY = "image", "txt", "json", "__key__"


class DataSet:
    """One split of a data set. It is streamed, so no second copy is stored on disk.

    Args:
        name: "user/name" on the hub, or a folder of parquet files, images with metadata, tars, or `save_to_disk`.
        split: name of the split, such as "train".
    """

    def __init__(self, name: str, split: str) -> None:
        try:
            with cache_without_network(name):
                self._builder = datasets.load_dataset_builder(name)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(f"no data set {name}: {first_line(error)}") from error
        self.name = name
        self.split = split

    def identity(self) -> list[str]:
        """Return an identity that changes with the data set: with the hub's revision, or the times of local files."""
        return [self.name, self.split, str(self._builder.hash)]

    def pairs(self, column: str | None) -> Iterator[Pair | DataError]:
        """Yield the pairs.

        The image comes from the column `image`, or else the first column of images. The caption comes from a caption
        column, from `txt` or from `json`.

        Raises:
            ValueError: if a row cannot be read, or the connection is lost. `datasets` cannot continue after that.
        """
        row = -1
        try:
            for row, values in enumerate(self._rows()):
                name = values.pop(KEY, None) or f"{self.split}/{row}"
                yield pair_of(f"{self.name} {self.split}: row {row}", values, Path(self.name), column, name)
        # `datasets` raises errors of many types.
        except Exception as error:
            place = f"{self.name} {self.split}: row {row + 1}"
            remedy = "local files can be read past damaged rows without split"
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
            # A .txt file takes precedence, as in `read_tar`.
            yield (values[JSON] | values if isinstance(values.get(JSON), dict) else values)
