"""Networks u(x_t, t, s, condition): a DiT for images and latents, an MLP for points; loading and saving."""

from decm_lightning.networks.dit import DiT
from decm_lightning.networks.lightningdit import load_lightningdit
from decm_lightning.networks.mlp import MLP
from decm_lightning.networks.network import Network
from decm_lightning.networks.pretrained import describe, load, save

__all__ = ["MLP", "DiT", "Network", "describe", "load", "load_lightningdit", "save"]
