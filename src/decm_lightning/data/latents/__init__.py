"""Latents of a VAE: encoded into shards, checked, and loaded for training."""

from decm_lightning.data.latents.imagenet import ImageNetLatents

__all__ = ["ImageNetLatents"]
