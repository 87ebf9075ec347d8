"""One .safetensors file: loaded equal to the bit, with its record; damaged and foreign files are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decm_lightning.export.own_formats import write
from decm_lightning.networks import DiT, describe, load
from decm_lightning.networks.record import Record, Reference
from decm_lightning.networks.weightless import without_weights


@pytest.fixture
def network():
    torch.manual_seed(0)
    return DiT(4, 3, patch_size=2, width=16, depth=1, heads=2, num_classes=3)


@pytest.fixture
def file(network, tmp_path):
    """A written file."""
    network.record = Record(
        teacher=Reference("black-forest-labs/FLUX.1-dev", "abc"), sampling={2: "mix?s1=0.6"}, config={"data": 1}
    )
    return write(network, tmp_path / "new" / "student.safetensors", torch.float32)[0]


def test_a_file_is_loaded_equal_to_the_bit(file, network):
    found = load(file)
    assert describe(found) == describe(network)
    assert found.record == network.record
    expected = network.state_dict()
    assert expected.keys() == found.state_dict().keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.state_dict().items())
    assert not found.training


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_only_set_of_weights_is_loaded(weights, file, network):
    assert load(file, weights=weights).identity() == network.identity()


def test_no_weights_are_read_where_none_are_needed(file):
    with without_weights():
        assert next(load(file).parameters()).is_meta


def test_stored_weights_are_rounded_to_their_dtype(network, tmp_path):
    weight = network.final_layer.linear.weight
    torch.nn.init.normal_(weight)
    expected = weight.detach().clone().bfloat16()
    file = write(network, tmp_path / "half.safetensors", torch.bfloat16)[0]
    assert load_file(file)["final_layer.linear.weight"].dtype == torch.bfloat16
    assert torch.equal(load(file).final_layer.linear.weight, expected.float())
    assert load(file).record is None


def test_metadata_have_the_license_of_the_teacher(file):
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    assert metadata["license"] == "flux-1-dev-non-commercial-license"
    assert metadata["license_link"].startswith("https://")
    assert metadata["base_model"] == "black-forest-labs/FLUX.1-dev"
    assert json.loads(metadata["network"])["_class_name"] == "DiT"


def test_a_file_is_replaced_by_the_next_export(file, network):
    torch.nn.init.ones_(network.final_layer.linear.weight)
    write(network, file, torch.float32)
    assert load(file).identity() == network.identity()


def test_the_file_of_another_model_is_not_replaced(network, tmp_path):
    other = tmp_path / "base.safetensors"
    save_file({"weight": torch.ones(2)}, other)
    content = other.read_bytes()
    with pytest.raises(ValueError, match=f"{other} contains another model"):
        write(network, other, torch.float32)
    assert other.read_bytes() == content
    with pytest.raises(ValueError, match=r"\.safetensors.*student\.pt"):
        write(network, tmp_path / "student.pt", torch.float32)


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("network", "{", "metadata are not JSON"),
        ("record", "{", "metadata are not JSON"),
        ("record", '{"colour": 1}', "colour"),
        ("network", '{"_class_name": "Nothing"}', "Nothing"),
    ],
)
def test_damaged_metadata_are_named_in_one_line(key, value, cause, file):
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    save_file(load_file(file), file, metadata | {key: value})
    with pytest.raises(ValueError, match=f"{file} .*{cause}") as e:
        load(file)
    assert "\n" not in str(e.value)


def test_a_truncated_file_is_named(file):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file} cannot be read: cut short"):
        load(file)
