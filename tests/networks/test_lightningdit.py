"""Public LightningDiT checkpoints are imported completely and reproduce the published output."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decm_lightning.derivatives import Tangent, dual, functional
from decm_lightning.networks import DiT, load, save
from decm_lightning.networks.import_public import architecture

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lightningdit_tiny.safetensors"
SMALL = {"input_size": 4, "in_channels": 2, "patch_size": 1, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}


def randomised(network: DiT) -> DiT:
    """Return the network in eval mode with random, non-zero weights."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.fixture(scope="module")
def published():
    """The inputs, output and weights of a run of the public code."""
    tensors = load_file(FIXTURE)
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    return {k: v for k, v in tensors.items() if not k.startswith("weight.")}, weights


@pytest.fixture
def small():
    """A small network with random weights."""
    return randomised(DiT(**SMALL))


def error_of(network, inputs):
    """Return the largest difference from the output of the public code."""
    with torch.no_grad():
        u = network(inputs["input.x"], inputs["input.t"], inputs["input.r"], inputs["input.y"])
    return (u - inputs["output"]).abs().max().item()


def written(content, path):
    """Write with torch.save and return the path."""
    torch.save(content, path)
    return path


def wrap(prefix):
    return lambda weights: {f"{prefix}{name}": tensor for name, tensor in weights.items()}


LAYOUTS = {
    "alone": lambda weights: weights,
    "ema": lambda weights: {"ema": weights},
    "model": lambda weights: {"model": weights},
    "a whole training checkpoint": lambda weights: {
        "model": {name: tensor + 1 for name, tensor in weights.items()},
        "ema": weights,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "args": argparse.Namespace(lr=1e-4, data_dir="latents"),
        "step": 80_000,
    },
    "facm's averages": lambda weights: {
        "model": wrap("module.")({name: tensor + 1 for name, tensor in weights.items()}),
        "emas": {"ema_models.0.initted": torch.tensor(True), "ema_models.0.ema_model.pos_embed": torch.zeros(1)}
        | wrap("ema_models.1.ema_model.")(weights),
    },
    "module.": lambda weights: {"ema": wrap("module.")(weights)},
    "_orig_mod.": wrap("_orig_mod."),
    "module._orig_mod.": lambda weights: {"model": wrap("module._orig_mod.")(weights)},
    "_orig_mod.module.": wrap("_orig_mod.module."),
    "each block compiled": lambda weights: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in weights.items()
    },
    "parameters": lambda weights: {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_is_that_of_the_public_code(layout, published, tmp_path):
    """The nesting and prefixes of the weights do not matter."""
    inputs, weights = published
    network = load(written(LAYOUTS[layout](weights), tmp_path / "public.pt"))
    assert error_of(network, inputs) <= 1e-5
    assert network.config["end_time"]
    assert not network.training


def test_safetensors_and_the_old_format_of_torch_are_read_too(published, tmp_path):
    inputs, weights = published
    save_file(wrap("module.")(weights), tmp_path / "public.safetensors")
    assert error_of(load(str(tmp_path / "public.safetensors")), inputs) <= 1e-5
    torch.save({"ema": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert error_of(load(tmp_path / "old.pt"), inputs) <= 1e-5


@pytest.mark.parametrize("weights", ["ema", "model", None])
def test_the_requested_weights_are_read(weights, small, tmp_path):
    """The default is the averaged weights."""
    state = small.state_dict()
    trained = state | {"final_layer.linear.bias": state["final_layer.linear.bias"] + 1}
    path = written({"model": trained, "ema": state}, tmp_path / "both.pt")
    expected = (trained if weights == "model" else state)["final_layer.linear.bias"]
    assert torch.equal(load(path, weights=weights).final_layer.linear.bias, expected)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"end_time": True},
        {"qk_norm": False},
        {"shift": False},
        {"patch_size": 2, "input_size": 6, "in_channels": 3},
        {"mlp_ratio": 3.0},
        {"mlp_ratio": 2.5, "num_classes": 17},
        {"heads": 1, "depth": 11},
        {"width": 24, "heads": 3, "qk_norm": False, "shift": False, "end_time": True},
        {"norm": "layer"},
        {"learn_sigma": True, "patch_size": 2},
        {"mlp": "gelu", "mlp_ratio": 2.5},
        {"mlp": "gelu", "qk_norm": False},
        {"mlp": "gelu", "rotary": False, "norm": "layer"},
    ],
    ids=str,
)
def test_architecture_is_found_from_shapes(changed, tmp_path, generator):
    """Arguments and output are restored, and weights are bit-identical."""
    network = randomised(DiT(**SMALL | changed, prediction=None))
    loaded = load(written(network.state_dict(), tmp_path / "any.pt"))
    assert loaded.config == network.config
    own, other = network.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    x_t = torch.randn(3, *network.sample_shape, generator=generator)
    t, s = torch.rand(2, 3, generator=generator)
    assert torch.equal(loaded(x_t, t, s, torch.tensor([0, 1, 3])), network(x_t, t, s, torch.tensor([0, 1, 3])))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("end_time", [True, False])
def test_xl_is_found_and_has_the_published_number_of_parameters(qk_norm, end_time):
    """LightningDiT-XL/1: 675,260,768 with the 28 x 2 x 72 weights of QK norm, which the published checkpoints lack."""
    with torch.device("meta"):
        network = DiT(16, 32, qk_norm=qk_norm, end_time=end_time, prediction=None)
    found = architecture(network.state_dict())
    assert found == network.config
    assert found == {
        **{"input_size": 16, "in_channels": 32, "patch_size": 1, "width": 1152, "depth": 28, "heads": 16},
        **{"mlp_ratio": 4.0, "num_classes": 1000, "end_time": end_time, "qk_norm": qk_norm, "shift": True},
        **{"norm": "rms", "mlp": "swiglu", "rotary": True, "learn_sigma": False, "prediction": None},
        "pixel_skip": False,
    }
    count = sum(parameter.numel() for parameter in network.parameters())
    second_embedder = 1152 * 256 + 1152 + 1152 * 1152 + 1152
    assert count - end_time * second_embedder + (not qk_norm) * 28 * 2 * 72 == 675_260_768


def test_mlp_ratio_gives_back_every_hidden_width():
    """Every ratio yields the same hidden width, and a round ratio is recovered exactly."""
    with torch.device("meta"):
        tensors = dict(DiT(**SMALL).state_dict())
        for width in range(8, 1537, 8):
            tensors["x_embedder.proj.weight"] = torch.empty(width, 2, 1, 1)
            tensors["blocks.0.attn.q_norm.weight"] = torch.empty(width)
            for hidden in {1, 7, width - 1, width, int(2 / 3 * 3.7 * width), int(2 / 3 * int(4.0 * width)), 8 * width}:
                tensors["blocks.0.mlp.w3.weight"] = torch.empty(width, hidden)
                assert int(2 / 3 * architecture(tensors)["mlp_ratio"] * width) == hidden
            for ratio in (2.0, 2.5, 3.0, 4.0):
                tensors["blocks.0.mlp.w3.weight"] = torch.empty(width, int(2 / 3 * ratio * width))
                found = architecture(tensors)["mlp_ratio"]
                assert found == ratio


def test_formulas_are_those_of_the_public_code(published, reference):
    """The independent computation that the variants are compared with agrees with the published output."""
    inputs, weights = published
    u = reference(weights, inputs["input.x"], inputs["input.t"], inputs["input.y"], 12, inputs["input.r"])
    assert (u - inputs["output"]).abs().max() <= 1e-5


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("end_time", [True, False])
def test_variants_are_those_of_the_formulas(qk_norm, shift, end_time, reference, tmp_path, generator):
    """They agree in float64 up to rounding, also without QK norm and without shift."""
    network = randomised(DiT(**SMALL, qk_norm=qk_norm, shift=shift, end_time=end_time))
    network = load(written(network.state_dict(), tmp_path / "variant.pt")).double()
    x_t = torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64)
    t, s = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    u = network(x_t, t, s, labels)
    expected = reference(network.state_dict(), x_t, t, labels, 8, s if end_time else None)
    assert expected.abs().max() > 0.1
    # The rotary tables are in float32 in one computation and in float64 in the other.
    assert (u - expected).abs().max() <= 1e-6 * expected.abs().max()


SIT = {"norm": "layer", "mlp": "gelu", "rotary": False, "qk_norm": False, "learn_sigma": True}


@pytest.mark.parametrize(
    "changed",
    [{"qk_norm": False}, {"shift": False}, SIT, *({key: value} for key, value in SIT.items() if key != "qk_norm")],
    ids=str,
)
def test_dual_passes_through_variants(changed, generator):
    """The derivative of the variants agrees with torch.func.jvp."""
    network = randomised(DiT(**SMALL | changed, end_time=True)).double()
    x_t, along = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    t, s, along_t, along_s = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    arguments = (network, x_t, t, s, torch.tensor([0, 1, 3]), Tangent(along, along_t, along_s))
    exact, result = functional(*arguments), dual(*arguments)
    assert exact.jvp.abs().max() > 0.1
    assert (result.u - exact.u).abs().max() <= 1e-12 * exact.u.abs().max()
    assert (result.jvp - exact.jvp).abs().max() <= 1e-10 * exact.jvp.abs().max()


def test_loaded_network_can_be_trained_saved_and_made_a_student(small, tmp_path):
    """All weights except the positions require gradients, and `save` and `load` accept the network."""
    network = load(written(small.state_dict(), tmp_path / "small.pt"))
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["pos_embed"]
    save(network, tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert saved.config == network.config
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), network.parameters(), strict=True))
    assert network.with_end_time().config["end_time"]


def test_network_does_not_hang_on_its_file(small, tmp_path):
    """Overwriting the file afterwards does not change the network."""
    path = written(small.state_dict(), tmp_path / "small.pt")
    network = load(path)
    before = copy.deepcopy(network.state_dict())
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_read_as_float32(dtype, small, tmp_path):
    """Weights are rounded as in the file, rotary tables are not."""
    state = {name: tensor.to(dtype) for name, tensor in small.state_dict().items()}
    network = load(written(state, tmp_path / "rounded.pt"))
    for name, tensor in network.state_dict().items():
        expected = small.state_dict()[name] if name.startswith("feat_rope") else state[name].float()
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected)


def test_rotary_tables_may_be_left_out(small, tmp_path):
    """The number of heads is then inferred from QK norm."""
    state = {name: tensor for name, tensor in small.state_dict().items() if not name.startswith("feat_rope")}
    network = load(written(state, tmp_path / "bare.pt"))
    assert torch.equal(network.feat_rope.freqs_cos, small.feat_rope.freqs_cos)


def test_rotary_tables_of_a_large_grid_are_those_of_the_public_formula(tmp_path):
    """Heads of size 72 on 32 x 32 latents, as in XL: a different order of operations would differ by 2e-6."""
    frequencies = 1.0 / (10_000 ** (torch.arange(0, 36, 2)[:18].float() / 36))
    turns = torch.einsum("i,f->if", torch.arange(32) / 32 * 32, frequencies).repeat_interleave(2, dim=-1)
    angles = torch.cat([turns[:, None].expand(-1, 32, -1), turns[None].expand(32, -1, -1)], -1).reshape(1024, 72)
    network = DiT(32, 2, width=72, depth=1, heads=1, num_classes=2)
    assert (network.feat_rope.freqs_cos - angles.cos()).abs().max() <= 1e-7
    assert (network.feat_rope.freqs_sin - angles.sin()).abs().max() <= 1e-7


@pytest.mark.parametrize(("error", "accepted"), [(9e-7, True), (1e-5, False), (torch.nan, False)])
@pytest.mark.parametrize("name", ["feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_other_rotary_tables_are_refused(name, error, accepted, small, tmp_path):
    """Differences of up to 1e-6 are accepted."""
    state = {key: tensor.clone() for key, tensor in small.state_dict().items()}
    state[name][5, 3] += error
    path = written(state, tmp_path / "turned.pt")
    if accepted:
        assert torch.equal(load(path).state_dict()[name], small.state_dict()[name])
    else:
        with pytest.raises(ValueError, match=rf"turned.pt: {name} .* 4 x 4 grid"):
            load(path)
