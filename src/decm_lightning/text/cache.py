"""A cache of encoded captions: stored in one file without padding, and padded when they are read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from decm_lightning.caches import make_once, remove_abandoned
from decm_lightning.errors import NonFiniteError
from decm_lightning.files import atomic
from decm_lightning.progress import Progress
from decm_lightning.text.encoder import CaptionEncoder
from decm_lightning.types import Captions

BATCH = 64
CHECKED = 1 << 16
"""Number of rows to check for NaN at once."""


@dataclass(frozen=True)
class EncodedCaptions:
    """The encoded tokens of n captions, m of them distinct.

    Attributes:
        tokens: the concatenated tokens of the distinct captions, (total, d) in float16.
        ends: the end of each distinct caption in `tokens`, (m,).
        which: the index of each caption among the distinct ones, (n,).
        masked: whether captions are read with a mask; otherwise all must have the same number of tokens.
        pooled: one vector for each distinct caption, (m, p) in float16, if the encoder returns one.
        length: number of tokens to pad captions to; None for that of the longest caption.
    """

    tokens: Float[Tensor, "total d"]
    ends: Int[Tensor, " m"]
    which: Int[Tensor, " n"]
    masked: bool = True
    pooled: Float[Tensor, "m p"] | None = None
    length: int | None = None

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.which)

    def read(self, rows: Sequence[int] | Tensor) -> Captions:
        """Return captions in float32, padded to a fixed length, so that every batch has the same shape."""
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        lengths = self.ends - starts
        index = self.which[torch.as_tensor(rows)]
        position = torch.arange(self.length or int(lengths.max()))
        mask = position < lengths[index, None]
        tokens = self.tokens[(starts[index, None] + position).clamp(max=len(self.tokens) - 1)]
        pooled = None if self.pooled is None else self.pooled[index].float()
        return Captions(tokens.float().masked_fill(~mask[..., None], 0), mask if self.masked else None, pooled)


def encode(
    captions: Sequence[str], encoder: CaptionEncoder, folder: str | Path, device: str | torch.device = "cpu"
) -> EncodedCaptions:
    """Return encoded captions in order, read from a file in `folder`, or encoded now on `device` and written to it.

    The file name contains a hash of the encoder and the captions. Repeated captions are encoded once. Captions with
    more than the encoder's max_tokens are truncated, and a warning counts them. If several processes encode the same
    captions, one does the work and the others wait. The encoder is moved back to the CPU afterwards.

    Raises:
        ImportError: if the encoder is needed and not installed.
        NonFiniteError: naming the caption, if a token is NaN, infinite, or overflows float16.
        OSError: naming the file, if it cannot be written or opened.
        ValueError: if captions is empty, or the file is damaged.
    """
    if not captions:
        raise ValueError("captions must contain at least 1 caption: got 0")
    distinct = sorted(set(captions))
    digest = hashlib.sha256(encoder.identity.encode())
    for caption in distinct:
        digest.update(caption.encode() + b"\0")
    file = Path(folder) / f"captions-{digest.hexdigest()[:32]}.safetensors"

    def make() -> None:
        remove_abandoned(file.parent, "captions-*.safetensors")
        encoder.to(device)
        content = _encode(distinct, encoder)
        encoder.to("cpu")
        with atomic(file) as partial:
            save_file(content, partial)

    make_once(file, make)
    content = _load(file, len(distinct))
    index = {caption: row for row, caption in enumerate(distinct)}
    which = torch.tensor([index[caption] for caption in captions])
    masked, length = bool(content["masked"]), int(content["length"])
    return EncodedCaptions(content["tokens"], content["ends"], which, masked, content.get("pooled"), length)


def _load(file: Path, count: int) -> dict[str, Tensor]:
    # Opened first: safetensors reports a missing permission as a missing file.
    file.open("rb").close()
    try:
        content = load_file(file)
        _check(content, count)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to encode the captions again") from error
    return content


def _check(content: dict[str, Tensor], count: int) -> None:
    if missing := {"tokens", "ends", "masked", "length"} - content.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    tokens, ends, pooled = content["tokens"], content["ends"], content.get("pooled")
    if tokens.ndim != 2 or ends.shape != (count,) or (pooled is not None and len(pooled) != count):
        raise ValueError(f"tokens {tuple(tokens.shape)} and ends {tuple(ends.shape)} do not match {count} captions")
    lengths = ends.diff(prepend=ends.new_zeros(1))
    if ends[-1] != len(tokens) or lengths.min() < 0 or lengths.max() > content["length"]:
        raise ValueError("the ends of the captions do not match the tokens")
    for name, values in {"tokens": tokens, "pooled": pooled}.items():
        # In chunks: a mask of all values would take half of their memory.
        if values is not None and not all(part.isfinite().all() for part in values.split(CHECKED)):
            raise ValueError(f"{name} are NaN or infinite")


def _encode(captions: Sequence[str], encoder: CaptionEncoder) -> dict[str, Tensor]:
    lengths = encoder.measured(captions)
    # Sorted by length: otherwise most of the work would be on padding.
    order = sorted(range(len(captions)), key=lengths.__getitem__, reverse=True)
    tokens: list[Tensor] = [torch.empty(0)] * len(captions)
    pooled: list[Tensor] = []
    # Some encoders pad every batch to a fixed length, others to its longest caption.
    length = 0
    with Progress(total=len(captions), desc="encoding captions", unit="caption") as bar:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            encoded = encoder([captions[row] for row in rows])
            length = max(length, encoded.tokens.shape[1])
            mask = torch.ones_like(encoded.tokens[..., 0], dtype=torch.bool) if encoded.mask is None else encoded.mask
            for row, part, valid in zip(rows, encoded.tokens, mask, strict=True):
                tokens[row] = _finite(part[valid].half().cpu(), captions[row])
            if encoded.pooled is not None:
                pooled += [
                    _finite(part.half().cpu(), captions[row])[None]
                    for row, part in zip(rows, encoded.pooled, strict=True)
                ]
            bar.update(len(rows))
    content = {
        "tokens": torch.cat(tokens),
        "ends": torch.tensor([len(part) for part in tokens]).cumsum(0),
        "masked": torch.tensor(encoded.mask is not None),
        "length": torch.tensor(length),
    }
    back = torch.tensor(order).argsort()
    return content | ({"pooled": torch.cat(pooled)[back]} if pooled else {})


def _finite(encoded: Tensor, caption: str) -> Tensor:
    if not encoded.isfinite().all():
        raise NonFiniteError(f"the tokens of {caption!r:.80} are not finite in float16: the text encoder is broken")
    return encoded
