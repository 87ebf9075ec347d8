"""A class-conditional flow-map transformer for diffusers."""

from functools import wraps
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from decm_lightning.export.diffusers.bundle import source
from decm_lightning.export.diffusers.convention import times
from decm_lightning.networks.dit import DiT

SOURCE = source(__file__)


class FlowMapDiT(ModelMixin, ConfigMixin):
    """A `DiT` with the calling convention of diffusers. Its config has the arguments of `DiT`."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    @register_to_config
    @wraps(DiT.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        # diffusers loads weights into a model that was built with their dtype as the default.
        self.network = DiT(*args, **kwargs).to(torch.get_default_dtype())

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of a sample, (c, h, w)."""
        return self.network.sample_shape

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the mean velocity from data to noise between two timesteps.

        Args:
            hidden_states: noisy samples, (b, c, h, w).
            timestep: start of the step, 1000 for noise and 0 for data; one, or one per sample.
            r_timestep: end of the step; equal to `timestep` for the instantaneous velocity.
            class_labels: labels, (b,); the number of classes is the null class.
            return_dict: return an output object instead of a tuple.
        """
        velocity = -self.network(hidden_states, *times(hidden_states, timestep, r_timestep), class_labels)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
