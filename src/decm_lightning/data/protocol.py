"""Optional interfaces of data modules for training and evaluation. A plain LightningDataModule works without them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

from decm_lightning.networks import Network
from decm_lightning.networks.record import Record
from decm_lightning.types import Condition, Sample


@runtime_checkable
class HasClasses(Protocol):
    """Data with labels below `num_classes`, which is 0 for data without classes."""

    num_classes: int


@runtime_checkable
class HasConditions(Protocol):
    """Data that provides the conditions of generated samples, such as captions."""

    def condition(self, rows: Sequence[int], seed: int) -> Condition:
        """Return the conditions of the samples with the numbers `rows`."""


@runtime_checkable
class HasTexts(Protocol):
    """Data with captions. Sample i has caption i mod len(texts)."""

    texts: Sequence[str]


@runtime_checkable
class DecodesSamples(Protocol):
    """Data whose samples must be decoded into images, such as latents."""

    def decode(self, x: Sample) -> Sample:
        """Return images in [-1, 1]."""


@runtime_checkable
class ReleasesDecoder(Protocol):
    """Data whose decoder only evaluation uses."""

    def release(self) -> None:
        """Move the decoder off the accelerator."""


@runtime_checkable
class HasIdentity(Protocol):
    """Data that uses pretrained networks, such as a VAE and a text encoder."""

    def identity(self) -> dict[str, str]:
        """Return the identities of these networks by name."""


@runtime_checkable
class HasRecord(Protocol):
    """Data that describe themselves in the records of networks."""

    def record(self) -> Record:
        """Return a record with the parts that the data determine, such as classes and VAE. Call it after `setup`."""


@runtime_checkable
class NamesRows(Protocol):
    """Data that can tell where a row comes from."""

    def place(self, batch_idx: int, row: int) -> str:
        """Return where a row of this epoch's training batch number `batch_idx` comes from."""


@runtime_checkable
class LacksSamples(Protocol):
    """Data of conditions alone, for losses that start at noise. x_1 is zeros of the network's sample shape."""

    lacks_samples: Literal[True]


@runtime_checkable
class HasNetwork(Protocol):
    """A LightningModule with a network that data can be checked against."""

    network: Network


@dataclass(frozen=True)
class EvaluationData:
    """The parts of a data module that evaluation uses, with defaults. Samples have labels without `condition`."""

    num_classes: int = 0
    condition: Callable[[Sequence[int], int], Condition] | None = None
    texts: Sequence[str] = ()
    decode: Callable[[Sample], Sample] = lambda x: x
    release: Callable[[], None] = lambda: None
    identity: Callable[[], dict[str, str]] = dict


PARTS = (HasClasses, HasConditions, HasTexts, DecodesSamples, ReleasesDecoder, HasIdentity)
"""The Protocol of each field of `EvaluationData`, in order."""


def evaluation_data(datamodule: object) -> EvaluationData:
    """Return the parts of a data module, or of None, that evaluation uses. Call it after `setup`."""
    parts = zip(fields(EvaluationData), PARTS, strict=True)
    return EvaluationData(
        **{part.name: getattr(datamodule, part.name) for part, has in parts if isinstance(datamodule, has)}
    )
