"""Saved networks load bit-identically, and anything else is refused."""

import errno
import gc
import itertools
import json
import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from decm_lightning.networks import MLP, DiT, describe, load, save
from decm_lightning.networks.pretrained import build, refuse_partial
from tests.unprivileged import open_folder, unprivileged


@pytest.fixture
def network():
    """A small network with random weights."""
    torch.manual_seed(0)
    network = DiT(4, 2, patch_size=2, width=16, depth=2, heads=2, mlp_ratio=3.0, num_classes=3, end_time=True)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_tables_of_narrow_weights_are_exact(dtype, network, tmp_path):
    """The other weights are rounded once; positions are not, because they can be computed."""
    tables = {name: value.clone() for name, value in network.state_dict().items() if "freqs" in name}
    save(network.to(dtype), tmp_path / "narrow")
    loaded = load(tmp_path / "narrow").state_dict()
    assert len(tables) == 2
    assert all(torch.equal(loaded[name], table) for name, table in tables.items())
    assert not any(torch.equal(table.to(dtype).float(), table) for table in tables.values())


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether all tensors of two networks are equal to the bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_saved_network_comes_back_to_the_bit(network, tmp_path):
    """Weights, arguments and output survive the round trip, and the folder is created."""
    save(network, tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert same_weights(loaded, network)
    assert loaded.config == network.config
    x_t, t = torch.randn(2, 2, 4, 4), torch.tensor([0.1, 0.6])
    inputs = (x_t, t, torch.ones(2), torch.tensor([0, 3]))
    assert torch.equal(loaded(*inputs), network.eval()(*inputs))


def test_saved_mlp_comes_back_to_the_bit(tmp_path):
    """The MLP survives the round trip too."""
    network = MLP(dimensions=3, width=8, depth=2, num_classes=4)
    torch.nn.init.normal_(network.end_time.weight)
    save(network, tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, MLP)
    assert same_weights(loaded, network)
    assert loaded.config == network.config


def test_loaded_network_is_ready_to_sample(network, tmp_path):
    """The loaded network is in eval mode."""
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
    """By default, the averaged weights of a training checkpoint are loaded."""
    trained = DiT(**network.config)
    state = {f"average.{k}": v for k, v in network.state_dict().items()}
    state |= {f"network.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"network": describe(network), "state_dict": state}, tmp_path / "last.ckpt")
    loaded = load(str(tmp_path / "last.ckpt"))
    assert same_weights(loaded, network)
    assert not same_weights(loaded, trained)
    assert not loaded.training


@pytest.mark.parametrize("weights", ["ema", "model", None])
def test_weights_of_a_checkpoint_are_chosen(weights, network, tmp_path):
    trained = DiT(**network.config)
    state = {f"average.{k}": v for k, v in network.state_dict().items()}
    state |= {f"network.{k}": v for k, v in trained.state_dict().items()}
    torch.save({"network": describe(network), "state_dict": state}, tmp_path / "last.ckpt")
    assert same_weights(load(tmp_path / "last.ckpt", weights=weights), trained if weights == "model" else network)


@pytest.fixture
def hub(network, tmp_path, monkeypatch):
    """A hub cache that contains nobody/student, without access to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    stored = tmp_path / "hub" / "models--nobody--student"
    save(network, stored / "snapshots" / "abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_a_name_on_the_hub_is_loaded_and_a_local_path_goes_first(hub, network):
    assert same_weights(load("nobody/student"), network)
    save(MLP(width=8), "nobody/student")
    assert isinstance(load("nobody/student"), MLP)


def test_a_name_that_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(FileNotFoundError, match=r"network nobody/else .*folder.*hub") as e:
        load("nobody/else")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("path", ["nobody/student.pt", "a/nobody/student", "./student", "/student", "nobody", "../a"])
def test_other_paths_are_never_looked_for_on_the_hub(path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("contacted the hub"))
    with pytest.raises(FileNotFoundError, match=f"no checkpoint or folder at {path}$"):
        load(path)


@pytest.mark.parametrize("name", ["nothing", "nothing.ckpt"])
def test_missing_path_is_named(name, tmp_path):
    """The message contains the path."""
    with pytest.raises(FileNotFoundError, match=f"no checkpoint or folder at .*{name}$"):
        load(tmp_path / name)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file_of_a_folder_is_named(file, network, tmp_path):
    """The message contains the missing file."""
    save(network, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load(tmp_path)


def test_folder_of_another_class_is_refused(network, tmp_path):
    """A description with an unknown class is refused, and the message lists the known classes."""
    save(network, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 8}))
    with pytest.raises(
        ValueError, match="unknown network class 'UNet2DModel': expected DiT, MLP, TextDiT or an importable Network"
    ):
        load(tmp_path)


def test_a_pipeline_of_diffusers_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path} is a pipeline of diffusers"):
        load(tmp_path)


def test_foreign_checkpoint_is_refused(tmp_path):
    """A checkpoint that neither describes its network nor is a public one is refused, with its name."""
    torch.save({"state_dict": {"x": torch.zeros(1)}, "epoch": 3}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign.ckpt: .*: x$"):
        load(tmp_path / "foreign.ckpt")


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    """A file of another kind is refused, with its name."""
    (tmp_path / "notes.ckpt").write_text("weights are elsewhere")
    with pytest.raises(ValueError, match=r"notes.ckpt"):
        load(tmp_path / "notes.ckpt")


@pytest.mark.parametrize(
    ("file", "content", "cause"),
    [
        ("config.json", '{"_class_name": "DiT", "input_size": 4, "in_channels": 2, "color": 3}', "argument 'color'"),
        ("config.json", '{"_class_name": "DiT"}', "missing .* argument"),
        ("config.json", "[1, 2]", r"config.json must .*_class_name.*: got \[1, 2\]"),
        ("config.json", '{"_class', "Unterminated string"),
        ("config.json", b"\xff", "'utf-8' codec"),
        ("config.json", {"width": 32}, r"size mismatch for .* \.\.\."),
        ("config.json", {"depth": 3}, "Missing key"),
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
        ({"network": {"_class_name": "MLP", "color": 3}, "state_dict": {}}, "cannot be loaded: .*argument"),
        ({"state_dict": {}}, "cannot be loaded: .*Missing key"),
        ({"state_dict": [1]}, "cannot be loaded: 'list' object"),
        ({}, "cannot be loaded: .*'state_dict'"),
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
        ({"optimizer_states": None}, "lacks optimizer_states: .*ModelCheckpoint"),
        ({"seed": None, "state_dict": None}, "lacks state_dict and seed"),
        ({"state_dict": {}}, "lacks .*pos_embed"),
        (
            {"state_dict": {"pos_embed": torch.zeros(1, 4, 8)}},
            r"has weights pos_embed of shape \(1, 4, 8\), not \(1, 4, 16\)",
        ),
    ],
)
def test_partial_checkpoint_is_refused_before_training_resumes(changed, message, network, tmp_path):
    """A checkpoint that is only evaluated needs no optimizer state."""
    file = tmp_path / "partial.ckpt"
    whole = {"network": describe(network), "state_dict": network.state_dict(), "seed": 0, "optimizer_states": [{}]}
    torch.save({key: value for key, value in (whole | changed).items() if value is not None}, file)
    with pytest.raises(ValueError, match=f"^{file} {message}"):
        refuse_partial(file, network, resume=True)
    if "optimizer_states" in changed:
        refuse_partial(file, network, resume=False)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"\x08", "cut short at 1 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a git-lfs pointer"),
        (b"", "empty"),
        (b"\x00" * 4000, "all zeros"),
    ],
)
def test_broken_weights_are_named_with_the_cause(content, cause, network, tmp_path):
    save(network, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/model.safetensors cannot be read: {cause}"):
        load(tmp_path)


def test_weights_that_are_a_folder_are_named(network, tmp_path):
    save(network, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{tmp_path}/model.safetensors'"):
        load(tmp_path)


@pytest.mark.parametrize("locked", ["", "config.json", "model.safetensors", "last.ckpt"])
def test_a_missing_permission_is_not_a_missing_file(locked, network):
    with open_folder() as parent:
        folder = parent / "student"
        save(network, folder)
        torch.save({"network": describe(network), "state_dict": {}}, folder / "last.ckpt")
        (folder / locked).chmod(0)
        with unprivileged(), pytest.raises(PermissionError, match=f"Permission denied: '{folder}"):
            load(folder / locked if locked == "last.ckpt" else folder)
        folder.chmod(0o755)


def test_what_is_written_has_the_permissions_of_the_umask(network, tmp_path):
    previous = os.umask(0o027)
    try:
        save(network, tmp_path / "student")
    finally:
        os.umask(previous)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "student").iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), 0o640)


@pytest.mark.parametrize("failing", ["config.json", "model.safetensors"])
def test_a_save_that_fails_leaves_the_old_network(failing, network, tmp_path, monkeypatch):
    """Either of the two files may be the one that fails."""
    save(network, tmp_path)
    other = DiT(**network.config | {"width": 32})
    if failing == "config.json":
        monkeypatch.setattr(Path, "write_text", full_disk)
    else:
        monkeypatch.setattr("decm_lightning.networks.pretrained.save_model", full_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/{failing}'"):
        save(other, tmp_path)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert same_weights(load(tmp_path), network)
    save(other, tmp_path)
    assert same_weights(load(tmp_path), other)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def replace_and_die(at, plain=os.replace):
    """Return a function like os.replace that kills the process at call number `at`."""
    calls = itertools.count(1)
    return lambda *paths: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == at else plain(*paths)


def test_a_save_killed_at_either_rename_leaves_a_usable_network(tmp_path):
    """The process is killed by SIGKILL, so it cannot clean up."""
    torch.manual_seed(0)
    save(MLP(width=8), tmp_path)
    for at in (1, 2):
        if (child := os.fork()) == 0:
            os.replace = replace_and_die(at)
            save(MLP(width=8), tmp_path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert load(tmp_path).config["width"] == 8
    save(MLP(width=16), tmp_path)
    assert load(tmp_path).config["width"] == 16
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_network_is_saved_onto_itself(network, tmp_path):
    save(network, tmp_path)
    save(load(tmp_path), tmp_path)
    assert same_weights(load(tmp_path), network)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"_class_name": "DiTTransformer2DModel"}'}, "config.json is not of decm-lightning"),
        ({"config.json": '{"model_type": "bert"}'}, "config.json is not of decm-lightning"),
        ({"config.json": "{"}, "config.json is not of decm-lightning"),
        ({"config.json": "[]"}, "config.json is not of decm-lightning"),
        ({"model.safetensors": "weights of another"}, "model.safetensors is not of decm-lightning"),
        ({"meta.pt": ""}, "is a sharded checkpoint"),
        ({"model_index.json": "{}"}, "a pipeline of diffusers"),
    ],
)
def test_another_model_is_not_overwritten(files, message, network, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path} .*{message}.*another folder"):
        save(network, tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == files


def test_a_folder_of_other_files_is_written_to(network, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save(network, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert same_weights(load(tmp_path), network)


def test_a_name_that_is_no_folder_is_refused(network, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file is a file"):
        save(network, tmp_path / "file")
    with pytest.raises(ValueError, match="got ''"):
        save(network, "")


def test_the_hubs_own_loader_reads_the_folder(network, tmp_path):
    """Network.from_pretrained of PyTorchModelHubMixin."""
    save(network, tmp_path)
    assert same_weights(DiT.from_pretrained(tmp_path), network)


def test_what_the_hubs_own_writer_writes_is_loaded(network, tmp_path):
    """Network.save_pretrained, which push_to_hub uses, also overwrites an existing folder."""
    for _ in range(2):
        network.save_pretrained(tmp_path)
        assert same_weights(load(tmp_path), network)
    # A license that nobody has chosen.
    assert "license:" not in (tmp_path / "README.md").read_text()


def test_a_description_without_a_class_is_named(network, tmp_path):
    save(network, tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(network.config))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded: .*_class_name"):
        load(tmp_path)


class Foreign(MLP):
    """A network class from outside the package."""


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


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a network whose module has not been imported and leaves a trace when it is."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unseen.py").write_text(
        "from pathlib import Path\nfrom decm_lightning.networks import MLP\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\nclass Unseen(MLP):\n    pass\n"
    )
    save(MLP(width=8), tmp_path / "student")
    config = tmp_path / "student/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "unseen.Unseen"}))
    yield tmp_path / "student"
    sys.modules.pop("unseen", None)
    # The class is known as long as it exists.
    gc.collect()


def test_a_config_does_not_choose_what_is_imported(elsewhere, tmp_path):
    """Only the user decides, by importing the module or with trust=True."""
    message = f"^{elsewhere} cannot be loaded: .*network class unseen.Unseen is not imported: .*trust"
    with pytest.raises(ValueError, match=message):
        load(elsewhere)
    torch.save({"network": json.loads((elsewhere / "config.json").read_text()), "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"unseen.Unseen"):
        load(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()
    assert type(load(elsewhere, trust=True)).__name__ == "Unseen"
    assert (tmp_path / "ran").exists()
    assert type(load(elsewhere)).__name__ == "Unseen"


@pytest.mark.parametrize("name", ["os.system", "decm_lightning_evil.A", "antigravity.A", "subprocess.Popen"])
def test_other_modules_are_not_imported(name, network, tmp_path):
    save(network, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"network class {name} is not imported"):
        load(tmp_path)
    with pytest.raises(ValueError, match=f"unknown network class '{name}'"):
        load(tmp_path, trust=True)


def test_networks_of_this_package_are_imported_when_needed(tmp_path):
    """Such as the diffusers models in the folders of teachers."""
    with pytest.raises(OSError, match=r"config.json"):
        build({"_class_name": "decm_lightning.teachers.diffusers_network.DiffusersNetwork", "model": str(tmp_path)})
