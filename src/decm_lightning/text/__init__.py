"""Captions for a network: frozen text encoders, and what they gave, kept on disk."""

from decm_lightning.text.cache import EncodedCaptions, encode
from decm_lightning.text.encoder import MiniLM, TextEncoder

__all__ = ["EncodedCaptions", "MiniLM", "TextEncoder", "encode"]
