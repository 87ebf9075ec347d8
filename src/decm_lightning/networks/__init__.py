"""Flow map networks u(x_t, t, s, condition): class- and caption-conditional DiTs and an MLP, with load and save."""

from decm_lightning.networks.dit import DiT
from decm_lightning.networks.mlp import MLP
from decm_lightning.networks.network import Network
from decm_lightning.networks.pretrained import describe, load, save
from decm_lightning.networks.text_dit import TextDiT

__all__ = ["MLP", "DiT", "Network", "TextDiT", "describe", "load", "save"]
