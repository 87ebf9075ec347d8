"""Networks come back from disk to the bit, and what is no network of ours is refused."""

import json
import sys
import types

import pytest
import torch

from decm_lightning.networks import MLP, DiT, describe, load, save
from decm_lightning.networks.pretrained import refuse_partial


@pytest.fixture
def network():
    """A small network with random weights."""
    torch.manual_seed(0)
    network = DiT(4, 2, patch_size=2, width=16, depth=2, heads=2, mlp_ratio=3.0, num_classes=3, landing_time=True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether all tensors of two networks are equal to the bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_saved_network_comes_back_to_the_bit(network, tmp_path):
    """Weights, arguments and output survive the round trip, in a folder that is made."""
    save(network, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert same_weights(loaded, network)
    assert loaded.config == network.config
    x_t, t = torch.randn(2, 2, 4, 4), torch.tensor([0.1, 0.6])
    inputs = (x_t, t, torch.ones(2), torch.tensor([0, 3]))
    assert torch.equal(loaded(*inputs), network.eval()(*inputs))


def test_saved_mlp_comes_back_to_the_bit(tmp_path):
    """The network of points is kept in the same way."""
    network = MLP(dimensions=3, width=8, depth=2, num_classes=4)
    torch.nn.init.normal_(network.landing.weight)
    save(network, tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, MLP)
    assert same_weights(loaded, network)
    assert loaded.config == network.config


def test_loaded_network_is_ready_to_sample(network, tmp_path):
    """It is in eval mode."""
    save(network.train(), tmp_path)
    assert not load(tmp_path).training


def test_folder_holds_a_readable_description(network, tmp_path):
    """config.json names the class and its arguments."""
    save(network, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"_class_name": "DiT", **network.config}
    assert config == describe(network)
    assert (tmp_path / "model.safetensors").is_file()


def test_checkpoint_gives_the_averaged_weights(network, tmp_path):
    """Of the two sets in a training checkpoint, the average is loaded."""
    trained = DiT(**network.config)
    state = {f"average.{k}": v for k, v in network.state_dict().items()}
    state |= {f"network.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"network": describe(network), "state_dict": state}, tmp_path / "last.ckpt")
    loaded = load(str(tmp_path / "last.ckpt"))
    assert same_weights(loaded, network)
    assert not same_weights(loaded, trained)
    assert not loaded.training


@pytest.mark.parametrize("name", ["nothing", "nothing.ckpt"])
def test_missing_path_is_named(name, tmp_path):
    """The message holds the path."""
    with pytest.raises(FileNotFoundError, match=f"no checkpoint or folder at .*{name}$"):
        load(tmp_path / name)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file_of_a_folder_is_named(file, network, tmp_path):
    """The message holds the file that is missing."""
    save(network, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load(tmp_path)


def test_folder_of_another_class_is_refused(network, tmp_path):
    """A description that names no network of ours is refused, with the names of ours."""
    save(network, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 8}))
    with pytest.raises(
        ValueError, match="unknown network class 'UNet2DModel': expected DiT, MLP, TextDiT or an importable Network"
    ):
        load(tmp_path)


def test_foreign_checkpoint_is_refused(tmp_path):
    """A checkpoint that does not describe its network is refused by name."""
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign.ckpt is not a checkpoint of decm-lightning"):
        load(tmp_path / "foreign.ckpt")


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    """A file of another kind is refused by name too."""
    (tmp_path / "notes.ckpt").write_text("weights are elsewhere")
    with pytest.raises(ValueError, match=r"notes.ckpt is not a checkpoint of decm-lightning"):
        load(tmp_path / "notes.ckpt")


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("config.json", '{"_class_name": "DiT", "input_size": 4, "in_channels": 2, "colour": 3}', "argument 'colour'"),
        ("config.json", '{"_class_name": "DiT"}', "missing .* argument"),
        ("config.json", "[1, 2]", r"config.json must hold _class_name and the arguments: got \[1, 2\]"),
        ("config.json", '{"_class', "Unterminated string"),
        ("config.json", b"\xff", "'utf-8' codec"),
        ("config.json", {"width": 32}, r"size mismatch for .* \.\.\."),
        ("config.json", {"depth": 3}, "Missing key"),
        ("model.safetensors", b"\x08", "deserializing header"),
    ],
)
def test_broken_folder_is_named_with_the_cause_in_one_line(file, content, cause, network, tmp_path):
    save(network, tmp_path)
    if isinstance(content, dict):
        content = json.dumps(describe(network) | content)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be loaded: .*{cause}") as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 350


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"network": {"_class_name": "MLP", "colour": 3}, "state_dict": {}}, "cannot be loaded: .*argument"),
        ({"network": [1], "state_dict": {}}, "is not a checkpoint of decm-lightning: it does not describe its network"),
        ({"state_dict": {}}, "cannot be loaded: .*Missing key"),
        ({"state_dict": [1]}, "cannot be loaded: 'list' object"),
        ({}, "cannot be loaded: it has no 'state_dict'"),
    ],
)
def test_broken_checkpoint_is_named_with_the_cause(checkpoint, message, network, tmp_path):
    file = tmp_path / "broken.ckpt"
    torch.save({"network": describe(network)} | checkpoint, file)
    with pytest.raises(ValueError, match=f"^{file} {message}"):
        load(file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer_states": None}, "no optimizer_states: take a whole one, which ModelCheckpoint writes"),
        ({"seed": None, "state_dict": None}, "no state_dict and no seed"),
        ({"state_dict": {}}, "no weights pos_embed"),
        (
            {"state_dict": {"pos_embed": torch.zeros(1, 4, 8)}},
            r"weights pos_embed of shape \(1, 4, 8\), not \(1, 4, 16\)",
        ),
    ],
)
def test_partial_checkpoint_is_refused_before_training_goes_on(changed, message, network, tmp_path):
    """What is read only to be measured needs no optimiser's state."""
    file = tmp_path / "partial.ckpt"
    whole = {"network": describe(network), "state_dict": network.state_dict(), "seed": 0, "optimizer_states": [{}]}
    torch.save({key: value for key, value in (whole | changed).items() if value is not None}, file)
    with pytest.raises(ValueError, match=f"^{file} has {message}"):
        refuse_partial(file, network, resume=True)
    if "optimizer_states" in changed:
        refuse_partial(file, network, resume=False)


class Foreign(MLP):
    """A network class that the package does not know by name."""


def test_a_network_class_from_elsewhere_is_found_by_its_module(tmp_path, monkeypatch):
    module = types.ModuleType("elsewhere")
    module.Foreign = Foreign
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    monkeypatch.setattr(Foreign, "__module__", "elsewhere")
    network = Foreign(dimensions=3, width=8, depth=1)
    save(network, tmp_path)
    again = load(tmp_path)
    assert type(again) is Foreign
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
