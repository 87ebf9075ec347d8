"""Captions that are encoded when they are needed: kept, all of them would not fit a disk."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from decm_lightning import conditions
from decm_lightning.text.encoder import CaptionEncoder
from decm_lightning.types import Captions

CHUNK = 32


@dataclass(frozen=True)
class UnencodedCaptions:
    """n captions in words; what a loader reads of them is their numbers.

    Attributes:
        texts: the captions.
    """

    texts: Sequence[str]

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.texts)

    def read(self, rows: Sequence[int] | Tensor) -> Int[Tensor, " b"]:
        """Return the numbers as they are, for `encode`."""
        return torch.as_tensor(rows)

    def encode(self, numbers: Int[Tensor, " b"], encoder: CaptionEncoder) -> Captions:
        """Return the captions of these numbers, padded to the longest of them, where the encoder works."""
        parts = [encoder([self.texts[number] for number in part.tolist()]) for part in numbers.split(CHUNK)]
        longest = max(part.tokens.shape[1] for part in parts)
        joined = conditions.join([_padded(part, longest) for part in parts])
        assert isinstance(joined, Captions)
        return joined


def _padded(captions: Captions, longest: int) -> Captions:
    more = longest - captions.tokens.shape[1]
    # Without a mask all have one length.
    if not more or captions.mask is None:
        return captions
    return captions._replace(tokens=pad(captions.tokens, (0, 0, 0, more)), mask=pad(captions.mask, (0, more)))
