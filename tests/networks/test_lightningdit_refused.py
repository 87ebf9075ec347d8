"""Files that are not a LightningDiT or SiT are refused in one line, with the file, the finding and the remedy."""

import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from decm_lightning.networks import DiT, load
from tests.unprivileged import open_folder, unprivileged

SMALL = {"input_size": 4, "in_channels": 2, "patch_size": 1, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}


@pytest.fixture
def small():
    """A small network."""
    return DiT(**SMALL)


def written(content, path):
    """Write with torch.save and return the path."""
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("stored", "requested"), [("model", "ema"), ("ema", "model")])
def test_missing_weights_are_reported(stored, requested, small, tmp_path):
    path = written({stored: small.state_dict(), "opt": {}}, tmp_path / "one.pt")
    with pytest.raises(ValueError, match=f"one.pt: .*'{requested}'.*{stored}.*weights='{stored}'"):
        load(path, weights=requested)


def test_an_unknown_number_of_heads_is_reported(tmp_path):
    """A checkpoint without QK norm and rotary tables."""
    state = DiT(**SMALL, qk_norm=False).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("feat_rope")}
    with pytest.raises(ValueError, match=r"q_norm.*freqs_cos.* 16: .*heads"):
        load(written(state, tmp_path / "bare.pt"))


def lose(state):
    del state["blocks.1.attn.qkv.bias"], state["t_embedder.mlp.0.weight"]
    return r"missing: 2 \(t_embedder.mlp.0.weight, blocks.1.attn.qkv.bias\); unexpected: 0; .*: 0; .*LightningDiT"


def add(state):
    state |= {f"projector.{i}.weight": torch.zeros(2) for i in range(5)}
    return r"missing: 0; unexpected: 5 \(projector.0.weight, .*projector.2.weight and 2 more\); .*: 0; .*LightningDiT"


def reshape(state):
    state["blocks.0.attn.qkv.weight"] = torch.zeros(48, 15)
    return r"wrong shape or type: 1 \(blocks.0.attn.qkv.weight \(48, 15\) of .*, not \(48, 16\)\)"


def triple_the_output(state):
    state |= {"final_layer.linear.weight": torch.zeros(6, 16), "final_layer.linear.bias": torch.zeros(6)}
    return r"wrong shape or type: 2 \(final_layer.linear.weight \(6, 16\) .*, not \(2, 16\), final_layer.linear.bias"


def quantise(state):
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].to(torch.int8)
    return r"wrong shape or type: 1 \(blocks.0.attn.qkv.weight \(48, 16\) of torch.int8"


def skip_a_block(state):
    for name in [name for name in state if name.startswith("blocks.1.")]:
        state[name.replace("blocks.1.", "blocks.7.")] = state.pop(name)
    return r"missing: 14 \(blocks.1.norm1.weight, .* and 11 more\); unexpected: 14 \(blocks.7.norm1.weight"


def call_swiglu_gelu(state):
    for name in [name for name in state if ".mlp.w" in name]:
        state[name.replace("w12", "fc1").replace("w3", "fc2")] = state.pop(name)
    return r"wrong shape or type: 4 \(blocks.0.mlp.fc1.weight \(84, 16\) .*, not \(42, 16\), .* and 1 more\)"


def use_another_mlp(state):
    for name in [name for name in state if ".mlp.w" in name]:
        state[name.replace("w12", "up").replace("w3", "down")] = state.pop(name)
    return r"LightningDiT, SiT or DiT: missing .*: blocks.0.mlp.w3.weight; found: "


def use_layer_norm_with_weights(state):
    for name in [name for name in state if name.endswith(("norm1.weight", "norm2.weight", "norm_final.weight"))]:
        state[name.replace("weight", "bias")] = torch.zeros(16)
    return r"missing: 0; unexpected: 5 \(blocks.0.norm1.bias, .* and 2 more\); .*LightningDiT, SiT or DiT"


def use_layer_norm_at_the_end(state):
    del state["final_layer.norm_final.weight"]
    return r"missing: 0; unexpected: 4 \(blocks.0.norm1.weight, .* and 1 more\); .*LightningDiT, SiT or DiT"


def drop_qk_norm_of_a_block(state):
    del state["blocks.1.attn.q_norm.weight"]
    return r"missing: 1 \(blocks.1.attn.q_norm.weight\)"


def cut_positions(state):
    state["pos_embed"] = state["pos_embed"][:, :15]
    return r"pos_embed .*got 15 tokens"


def flatten_patches(state):
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].flatten(1)
    return r"dimensions: x_embedder.proj.weight; found: "


def empty(state):
    state["x_embedder.proj.weight"] = torch.zeros(0, 2, 1, 1)
    return r"dimensions: x_embedder.proj.weight; found: "


def widen_heads(state):
    state["blocks.0.attn.q_norm.weight"] = torch.ones(1000)
    return r"wrong shape or type: 6 \(.*q_norm.weight \(1000,\)"


def twice(state):
    state["module.pos_embed"] = state["pos_embed"]
    return r"pos_embed, .*module.pos_embed: "


FAULTS = [lose, add, reshape, triple_the_output, quantise, skip_a_block, call_swiglu_gelu, use_another_mlp]
FAULTS += [use_layer_norm_with_weights, use_layer_norm_at_the_end, drop_qk_norm_of_a_block]
FAULTS += [cut_positions, flatten_patches, empty, widen_heads, twice]


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_listed(fault, small, tmp_path):
    """Missing and unexpected tensors are listed in one line with the name of the file."""
    state = dict(small.state_dict())
    message = fault(state)
    with pytest.raises(ValueError, match=message) as refused:
        load(written({"ema": state}, tmp_path / "odd.pt"))
    assert str(refused.value).startswith(f"{tmp_path / 'odd.pt'}: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


class Trap:
    """An object whose unpickling would run a command."""

    def __reduce__(self):
        return (open, ("trapped", "w"))

    def __repr__(self):
        return "Trap()"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "expected .*: got Tensor"),
        ([torch.zeros(3)], "expected .*: got list"),
        ({}, "got nothing"),
        ({"ema": {}}, "got nothing"),
        ({"ema": 0.999, "step": 3}, "got ema, step"),
        ({"epoch": 3, "state_dict": {"x": torch.zeros(1)}}, "LightningDiT, SiT or DiT: .*: x$"),
        ({"epoch": 3, "weights": {"x": torch.zeros(1)}}, "ema, state_dict, .*: got epoch, weights"),
        ({"ema": {"decay": 0.999, "pos_embed": torch.zeros(1)}}, "got decay"),
        ({0: torch.zeros(3)}, "dimensions: pos_embed, .* and 3 more; found: 0"),
        (Trap(), "other.pt cannot be read: .*io.open.*weights_only=False"),
    ],
    ids=str,
)
def test_other_contents_are_refused(content, message, tmp_path, monkeypatch):
    """The message says what was found, and no code is run."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(written(content, tmp_path / "other.pt"))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("the weights are elsewhere\n", "text instead of tensors: it begins with 'the weights are elsewhere"),
        ("", "empty .0 bytes"),
        ("PK\x03\x04 no zip", "cut short at 11 bytes"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 27\n",
            "a git-lfs pointer .*: run git lfs pull",
        ),
        ("<!doctype html><html>", "a web page"),
    ],
)
def test_text_is_refused(suffix, text, cause, tmp_path):
    path = tmp_path / f"notes{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path} cannot be read: {cause}"):
        load(path)


def test_a_renamed_file_is_read_or_named(small, tmp_path):
    save_file(small.state_dict(), tmp_path / "a.pt")
    state = load(tmp_path / "a.pt").state_dict()
    assert torch.equal(state["pos_embed"], small.state_dict()["pos_embed"])
    torch.save(small.state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors.*torch.save"):
        load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_missing_permission_is_not_a_missing_file(suffix, small):
    """The permission may be missing for the file or for its folder."""
    with open_folder() as folder:
        path = folder / "in" / f"a{suffix}"
        path.parent.mkdir()
        (save_file if suffix == ".safetensors" else torch.save)(small.state_dict(), path)
        for locked in (path, path.parent):
            mode = locked.stat().st_mode
            locked.chmod(0)
            with unprivileged(), pytest.raises(PermissionError, match=f"Permission denied: '{path}'"):
                load(path)
            locked.chmod(mode)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_garbage_is_refused_whatever_it_is(small, tmp_path):
    """Random bytes, random pickles, and truncated or modified files either raise a ValueError or load."""
    draw = random.Random(0)
    torch.save(small.state_dict(), tmp_path / "real.pt")
    save_file(small.state_dict(), tmp_path / "real.safetensors")
    pickled = pickle.dumps({"ema": {"a": [1, 2.0, "b"]}})
    refused = 0
    for round_ in range(120):
        suffix = draw.choice([".pt", ".safetensors"])
        source = draw.choice([(tmp_path / f"real{suffix}").read_bytes(), pickled, draw.randbytes(300)])
        content = bytearray(source[: draw.randrange(1, len(source))] if round_ % 2 else source)
        for _ in range(draw.choice([1, 5, 50])):
            content[draw.randrange(min(len(content), 2000))] = draw.randrange(256)
        path = tmp_path / f"garbage{suffix}"
        path.write_bytes(content)
        try:
            load(path)
        except ValueError:
            refused += 1
    assert refused >= 100


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.pt"):
        load(tmp_path / "nothing.pt")
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/a.safetensors/config.json is missing"):
        load(tmp_path / "a.safetensors")
