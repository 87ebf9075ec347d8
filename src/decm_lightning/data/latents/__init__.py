"""Encode images into shards of VAE latents, validate them, and load them for training."""

from decm_lightning.data.latents.imagenet import ImageNetLatents

__all__ = ["ImageNetLatents"]
