"""Captions that are encoded on the fly, for data sets whose encoded captions would not fit on a disk."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from decm_lightning import conditions
from decm_lightning.text.cache import EncodedCaptions
from decm_lightning.text.encoder import CaptionEncoder
from decm_lightning.types import Captions, Condition

CHUNK = 32


@dataclass(frozen=True)
class UnencodedCaptions:
    """n captions as text. A data loader only reads their numbers, which `encode` turns into tokens."""

    texts: Sequence[str]

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.texts)

    def read(self, rows: Sequence[int] | Tensor) -> Int[Tensor, " b"]:
        """Return the numbers as a tensor, for `encode`."""
        return torch.as_tensor(rows)

    def encode(self, numbers: Int[Tensor, " b"], encoder: CaptionEncoder) -> Captions:
        """Return the encoded captions of these numbers, padded to the longest, on the device of the encoder."""
        parts = [encoder([self.texts[number] for number in part.tolist()]) for part in numbers.split(CHUNK)]
        longest = max(part.tokens.shape[1] for part in parts)
        joined = conditions.join([_padded(part, longest) for part in parts])
        assert isinstance(joined, Captions)
        return joined


def encoded(
    captions: EncodedCaptions | UnencodedCaptions | None,
    condition: Condition,
    encoder: CaptionEncoder | None,
    device: torch.device,
) -> Condition:
    """Return a condition with encoded captions: the numbers of `UnencodedCaptions` are replaced by their tokens."""
    if not (isinstance(captions, UnencodedCaptions) and isinstance(condition, Tensor)):
        return condition
    assert encoder is not None
    encoder.to(device)
    return captions.encode(condition, encoder)


def _padded(captions: Captions, longest: int) -> Captions:
    more = longest - captions.tokens.shape[1]
    # Captions without a mask all have the same length.
    if not more or captions.mask is None:
        return captions
    return captions._replace(tokens=pad(captions.tokens, (0, 0, 0, more)), mask=pad(captions.mask, (0, more)))
