"""The dual engine on public networks: tiny diffusers models with random weights and unchanged code.

diffusers always embeds times in float32, and QwenImage also normalizes and rotates queries and keys in float32.
`functional` rounds at the same places, so both engines still agree to the last digits of float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from itertools import product

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from decm_lightning.derivatives import JVPResult, Tangent, dual, functional


@dataclass
class Foreign:
    """A model, the shape of its samples, and its call with x_t, t, s and condition, which all affect the output."""

    model: nn.Module
    shape: tuple[int, ...]
    network: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    """Return random values in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Encoded captions for five prompts of three tokens, some of them padding.
CAPTIONS, POOLED = normal(1, 5, 3, 6), normal(2, 5, 7)
IS_TOKEN = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PATCHES = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}


def shifted(x_t: Tensor, s: Tensor) -> Tensor:
    """Return a sample that depends on s, for models with a single time."""
    return x_t + s.view(-1, *[1] * (x_t.ndim - 1))


def make_dit() -> Foreign:
    model = DiTTransformer2DModel(**HEADS, **PATCHES, num_embeds_ada_norm=5)
    return Foreign(model, (4, 4, 4), lambda x, t, s, c: model(shifted(x, s), 1000 * (1 - t), c).sample)


def make_sd3() -> Foreign:
    widths = {"joint_attention_dim": 6, "pooled_projection_dim": 7, "caption_projection_dim": 16}
    extras = {"pos_embed_max_size": 6, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    model = SD3Transformer2DModel(**HEADS, **PATCHES, **widths, **extras)

    def network(x_t, t, s, condition):
        return model(shifted(x_t, s), CAPTIONS[condition], POOLED[condition], 1000 * (1 - t)).sample

    return Foreign(model, (4, 4, 4), network)


def make_flux() -> Foreign:
    widths = {"in_channels": 4, "joint_attention_dim": 6, "pooled_projection_dim": 7, "axes_dims_rope": (2, 2, 4)}
    model = FluxTransformer2DModel(**HEADS, **widths, num_layers=1, num_single_layers=1, guidance_embeds=True)
    image = torch.tensor([(0.0, row, column) for row, column in product(range(2), repeat=2)])

    def network(x_t, t, s, condition):
        text = {"encoder_hidden_states": CAPTIONS[condition], "pooled_projections": POOLED[condition]}
        places = {"img_ids": image, "txt_ids": torch.zeros(3, 3)}
        return model(x_t, timestep=1 - t, guidance=s, **text, **places).sample

    return Foreign(model, (4, 4), network)


def make_sana() -> Foreign:
    crossing = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    extras = {"caption_channels": 6, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
    model = SanaTransformer2DModel(**HEADS, **PATCHES, **crossing, **extras)

    def network(x_t, t, s, condition):
        return model(x_t, CAPTIONS[condition], 1000 * (1 - t), s, IS_TOKEN[condition]).sample

    return Foreign(model, (4, 4, 4), network)


def make_pixart() -> Foreign:
    model = PixArtTransformer2DModel(**HEADS, **PATCHES, cross_attention_dim=16, caption_channels=6)

    def network(x_t, t, s, condition):
        text = {"encoder_hidden_states": CAPTIONS[condition], "encoder_attention_mask": IS_TOKEN[condition]}
        sizes = {"resolution": None, "aspect_ratio": None}
        return model(shifted(x_t, s), timestep=1000 * (1 - t), added_cond_kwargs=sizes, **text).sample

    return Foreign(model, (4, 4, 4), network)


def make_qwen() -> Foreign:
    widths = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 6, "axes_dims_rope": (2, 2, 4)}
    model = QwenImageTransformer2DModel(**HEADS, **widths, num_layers=2)

    def network(x_t, t, s, condition):
        text = {"encoder_hidden_states": CAPTIONS[condition], "encoder_hidden_states_mask": IS_TOKEN[condition]}
        if "txt_seq_lens" in signature(model.forward).parameters:
            # Required by diffusers 0.36, ignored and then removed by later versions.
            text["txt_seq_lens"] = [IS_TOKEN.shape[1]] * len(x_t)
        return model(shifted(x_t, s), timestep=1 - t, img_shapes=[[(1, 2, 2)]] * len(x_t), **text).sample

    return Foreign(model, (4, 16), network)


@pytest.fixture(params=[make_dit, make_sd3, make_flux, make_sana, make_pixart, make_qwen])
def foreign(request) -> Foreign:
    """One of the models in float64, without zero weights."""
    made = request.param()
    torch.manual_seed(0)
    for parameter in made.model.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.model.double().eval()
    return made


def draw(foreign: Foreign, rows: int = 3, along: str = "x t s") -> tuple:
    """Return the engine's arguments after the network, with a tangent along some of them."""
    times = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.6, 1.0]], dtype=torch.float64)
    parts = {"x": normal(4, rows, *foreign.shape), "t": normal(5, rows), "s": normal(6, rows)}
    tangent = Tangent(**{name: part if name in along else 0 * part for name, part in parts.items()})
    return normal(3, 3, *foreign.shape), *times, torch.tensor([1, 4, 2]), tangent


def gradients(foreign: Foreign, u: Tensor) -> list[Tensor]:
    """Return the gradients of a loss on u for all parameters, 0 for unused parameters."""
    parameters = list(foreign.model.parameters())
    return list(torch.autograd.grad(u.square().sum(), parameters, allow_unused=True, materialize_grads=True))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("along", ["x t s", "x", "t", "s"])
@pytest.mark.parametrize("rows", [3, 2])
def test_dual_is_that_of_functional(foreign, rows, along):
    """Also along each argument alone, so that no tangent is lost, for example by a cast."""
    arguments = draw(foreign, rows, along)
    exact = functional(foreign.network, *arguments)
    result = dual(foreign.network, *arguments)
    assert_close(result.u, exact.u, 1e-12)
    assert exact.jvp.abs().max() > 0.1
    assert_close(result.jvp, exact.jvp, 1e-10)


def test_dual_leaves_the_gradients_as_they_are(foreign):
    """A loss on u has the gradients of the plain forward pass."""
    x_t, t, s, condition, tangent = draw(foreign, rows=2)
    u = dual(foreign.network, x_t, t, s, condition, tangent).u
    pairs = zip(gradients(foreign, u), gradients(foreign, foreign.network(x_t, t, s, condition)), strict=True)
    for gradient, expected in pairs:
        assert_close(gradient, expected, 1e-12)


def test_dual_passes_through_gradient_checkpointing(foreign):
    """With blocks recomputed in the backward pass u, jvp and the gradients are unchanged."""
    foreign.model.train()

    def evaluate() -> tuple[JVPResult, list[Tensor]]:
        # In training mode DiT drops labels.
        torch.manual_seed(0)
        result = dual(foreign.network, *draw(foreign, rows=2))
        return result, gradients(foreign, result.u)

    expected, expected_gradients = evaluate()
    foreign.model.enable_gradient_checkpointing()
    runs = []
    foreign.model.transformer_blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    result, recomputed_gradients = evaluate()
    assert len(runs) == 2
    assert_close(result.u, expected.u, 1e-12)
    assert_close(result.jvp, expected.jvp, 1e-12)
    for gradient, other in zip(recomputed_gradients, expected_gradients, strict=True):
        assert_close(gradient, other, 1e-12)


STAGES = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


@pytest.mark.parametrize("make", [UNet2DModel, UNet2DConditionModel])
def test_dual_is_refused_by_unets(make):
    """They accept only a torch.Tensor as times and convert anything else to a number, which has no tangent."""
    downs = "AttnDownBlock2D" if make is UNet2DModel else "CrossAttnDownBlock2D"
    ups = downs.replace("Down", "Up")
    model = make(**STAGES, in_channels=4, out_channels=4, down_block_types=(downs,) * 2, up_block_types=(ups,) * 2)
    foreign = Foreign(model.double(), (4, 8, 8), lambda x, t, s, c: model(x, 1000 * t, CAPTIONS[c]).sample)
    with pytest.raises(NotImplementedError, match="no tangent for torch's tensor"):
        dual(foreign.network, *draw(foreign))
