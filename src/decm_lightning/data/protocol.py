"""Optional interfaces of data modules for training and evaluation. A plain LightningDataModule works without them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

from decm_lightning.networks import Network
from decm_lightning.networks.record import Record
from decm_lightning.types import Condition, Sample


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
    """The attributes of a data module that evaluation uses. A data module may lack any of them.

    Attributes:
        num_classes: labels are below it; 0 for data without classes.
        condition: returns the conditions of the samples with the numbers `rows`, such as captions: condition(rows,
            seed). Without it, samples have labels.
        texts: captions. Sample i has caption i mod len(texts).
        decode: decodes the data's samples, such as latents, into images in [-1, 1].
        release: moves the decoder off the accelerator, if only evaluation uses it.
        identity: returns the identities of the pretrained networks of the data, such as a VAE, by name.
    """

    num_classes: int = 0
    condition: Callable[[Sequence[int], int], Condition] | None = None
    texts: Sequence[str] = ()
    decode: Callable[[Sample], Sample] = lambda x: x
    release: Callable[[], None] = lambda: None
    identity: Callable[[], dict[str, str]] = dict

    @classmethod
    def of(cls, datamodule: object) -> "EvaluationData":
        """Return the attributes of a data module, or of None. Call it after `setup`."""
        names = [field.name for field in fields(cls) if hasattr(datamodule, field.name)]
        return cls(**{name: getattr(datamodule, name) for name in names})
