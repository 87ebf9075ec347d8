"""Networks built without weights: no weight file is read and no memory is used."""

import pytest
import torch
from safetensors.torch import save_file

from decm_lightning.networks import MLP, DiT, TextDiT, load, save
from decm_lightning.networks.weightless import is_weightless, on_meta, without_weights
from decm_lightning.teachers import PretrainedTeacher

SIZES = {"input_size": 8, "in_channels": 2, "patch_size": 2, "width": 16, "depth": 1, "heads": 2}


def assert_without_weights(network: torch.nn.Module) -> None:
    assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_load_reads_no_weights(tmp_path):
    """A truncated weight file does not matter."""
    network = DiT(**SIZES, num_classes=3)
    save(network, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with without_weights():
        assert is_weightless()
        found = load(tmp_path)
        student = PretrainedTeacher(str(tmp_path)).student()
    assert not is_weightless()
    assert_without_weights(found)
    assert_without_weights(student)
    assert found.config == network.config
    assert {n: t.shape for n, t in found.state_dict().items()} == {n: t.shape for n, t in network.state_dict().items()}
    with pytest.raises(ValueError, match="cut short"):
        load(tmp_path)


@pytest.mark.parametrize("prediction", ["velocity", None])
def test_public_networks_have_their_shapes_alone(prediction, tmp_path):
    save_file(DiT(**SIZES, num_classes=3).state_dict(), tmp_path / "public.safetensors")
    expected = load(tmp_path / "public.safetensors")
    with without_weights():
        found = PretrainedTeacher(str(tmp_path / "public.safetensors"), prediction=prediction).network
        assert_without_weights(load(tmp_path / "public.safetensors"))
    assert_without_weights(found)
    assert found.config == expected.config


class Computing(MLP):
    """A network from outside the package that computes with its weights in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = float(next(self.parameters()).square().sum())


def test_every_network_can_be_built_so():
    captions = {"caption_width": 4}
    for network in (on_meta(MLP), on_meta(DiT, **SIZES), on_meta(TextDiT, **SIZES, **captions), on_meta(Computing)):
        assert_without_weights(network)
