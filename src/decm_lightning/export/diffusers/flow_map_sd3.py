"""A flow-map transformer with the architecture of Stable Diffusion 3 for diffusers."""

from functools import wraps
from typing import Any

from diffusers import ModelMixin, SD3Transformer2DModel  # noqa: F401 - diffusers looks ModelMixin up in this module
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from decm_lightning.export.diffusers.bundle import source
from decm_lightning.export.diffusers.convention import times
from decm_lightning.teachers.diffusers_families import TimeInput

SOURCE = source(__file__)


class FlowMapSD3(SD3Transformer2DModel):
    """SD3Transformer2DModel with an embedding of the end of a step; LoRA adapters are merged into its weights."""

    @wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        embedding: nn.Module = self.time_text_embed  # type: ignore[has-type]
        self.time_text_embed = TimeInput(embedding, self.inner_dim)
        self.time_text_embed.add_end_time()

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of a sample, (c, h, w)."""
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool = True,
        **options: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the mean velocity from data to noise between two timesteps.

        Args:
            hidden_states: noisy latents, (b, c, h, w).
            timestep: start of the step, 1000 for noise and 0 for data; one, or one per sample.
            r_timestep: end of the step; equal to `timestep` for the instantaneous velocity.
            encoder_hidden_states: tokens of the captions, (b, n, d).
            pooled_projections: one vector for each caption, (b, p).
            return_dict: return an output object instead of a tuple.
            options: further arguments of SD3Transformer2DModel.
        """
        time, end = times(hidden_states, timestep, r_timestep)
        return super().forward(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            (1000 * (1 - time), end),
            return_dict=return_dict,
            **options,
        )
