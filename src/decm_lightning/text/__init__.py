"""Captions for a network: frozen text encoders, and what they gave, kept on disk."""

from decm_lightning.text.cache import EncodedCaptions, encode
from decm_lightning.text.encoder import CaptionEncoder, MiniLM, TextEncoder, named_encoder
from decm_lightning.text.unencoded import UnencodedCaptions

__all__ = ["CaptionEncoder", "EncodedCaptions", "MiniLM", "TextEncoder", "UnencodedCaptions", "encode", "named_encoder"]
