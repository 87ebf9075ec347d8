"""Frozen text encoders, and a disk cache of encoded captions."""

from decm_lightning.text.cache import EncodedCaptions, encode
from decm_lightning.text.encoder import CaptionEncoder, MiniLM, TextEncoder, named_encoder
from decm_lightning.text.unencoded import UnencodedCaptions, encoded

__all__ = [
    "CaptionEncoder",
    "EncodedCaptions",
    "MiniLM",
    "TextEncoder",
    "UnencodedCaptions",
    "encode",
    "encoded",
    "named_encoder",
]
