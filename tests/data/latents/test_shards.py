"""Folders of shards: the values that are read, the memory that is used, and the errors of damaged files."""

import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decm_lightning.autoencoders.normalization import LatentNormalization
from decm_lightning.autoencoders.provenance import Provenance
from decm_lightning.data.latents.shards import KEYS, Shards
from decm_lightning.files import file_sha256
from tests.test_files import LFS
from tests.unprivileged import open_folder, unprivileged

SHAPE = (2, 4, 4)


def write_shards(folder, counts=(6, 4), shape=SHAPE, mean=3.0, std=5.0, dtype=torch.float32, record=True):
    """Write random shards with statistics and a record; return all latents and mirrored latents, not normalized."""
    generator = torch.Generator().manual_seed(0)
    latents = (mean + std * torch.randn(sum(counts), *shape, generator=generator)).to(dtype)
    labels = torch.arange(len(latents)) % 10
    mirrored = latents.flip(-1).contiguous()
    for i, parts in enumerate(zip(*(whole.split(list(counts)) for whole in (latents, mirrored, labels)), strict=True)):
        tensors = {key: part.clone() for key, part in zip(KEYS, parts, strict=True)}
        save_file(tensors, folder / f"latents_rank00_shard{i:03d}.safetensors")
    std, mean = torch.std_mean(latents.float(), (0, 2, 3), correction=0, keepdim=True)
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    if record:
        checksums = {"latents_stats.pt": file_sha256(folder / "latents_stats.pt")}
        scaling = {"latent_norm": True, "latent_multiplier": 1.0}
        Provenance("a VAE", scaling, list(shape), len(latents), 10, checksums).write(folder)
    return latents, mirrored


def change(folder, **tensors):
    """Replace tensors of the second shard; None removes one."""
    labels = tensors.get("labels")
    count = 4 if labels is None else len(labels)
    whole = {
        "latents": torch.randn(count, *SHAPE),
        "latents_flip": torch.randn(count, *SHAPE),
        "labels": torch.arange(count),
    }
    changed = {key: value for key, value in (whole | tensors).items() if value is not None}
    save_file(changed, folder / "latents_rank00_shard001.safetensors")


def resident(what):
    """Return the memory of this process in MB: VmRSS is the current value, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) / 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_item_is_a_row_of_a_file_or_its_mirror_image(dtype, tmp_path):
    latents, mirrored = write_shards(tmp_path, dtype=dtype)
    shards = Shards(tmp_path, 10)
    assert (len(shards), shards.shape) == (10, SHAPE)
    assert shards.labels.tolist() == list(range(10))
    items = [7, 0, 19, 5, 6, 10, 16]
    assert torch.equal(shards.read(items), torch.cat([latents, mirrored])[items].float())
    assert shards.place(7).endswith("latents_rank00_shard001.safetensors: row 1 of latents")
    assert shards.place(15).endswith("latents_rank00_shard000.safetensors: row 5 of latents_flip")


def test_shards_may_differ_in_type(tmp_path):
    whole = torch.cat(write_shards(tmp_path))
    other = torch.randn(3, 4, *SHAPE)
    for i, (dtype, x) in enumerate(zip((torch.float64, torch.bfloat16, torch.float16), other, strict=True)):
        tensors = {"latents": x.to(dtype), "latents_flip": x.flip(-1).to(dtype).contiguous(), "labels": torch.arange(4)}
        save_file(tensors, tmp_path / f"other{i}.safetensors")
    x = Shards(tmp_path).read(range(44))
    assert torch.equal(x[[0, 9, 22]], whole[[0, 9, 10]])
    for i, dtype in enumerate((torch.float64, torch.bfloat16, torch.float16)):
        assert torch.equal(x[10 + 4 * i : 14 + 4 * i], other[i].to(dtype).float())
        assert torch.equal(x[32 + 4 * i : 36 + 4 * i], other[i].to(dtype).float().flip(-1))


def test_a_fork_reads_what_its_parent_opened(tmp_path):
    """Loading processes are forks. Exit code 0 means that the fork read the right row."""
    latents, _ = write_shards(tmp_path)
    shards = Shards(tmp_path)
    shards.read([3])
    if (child := os.fork()) == 0:
        os._exit(int(not torch.equal(shards.read([3, 8]), latents[[3, 8]])))
    assert os.waitpid(child, 0)[1] == 0


def test_open_shards_can_be_sent_to_another_process(tmp_path):
    latents, _ = write_shards(tmp_path)
    shards = Shards(tmp_path)
    shards.read([3])
    sent = pickle.dumps(shards)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent).read([3, 8]), latents[[3, 8]])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_a_gigabyte_is_opened_and_read_in_a_few_megabytes(tmp_path):
    count, size = 16384, 32 * 16 * 16 * 4
    ends = [0, count * size, 2 * count * size, 2 * count * size + 8 * count]
    shapes = {"latents": [count, 32, 16, 16], "latents_flip": [count, 32, 16, 16], "labels": [count]}
    header = {
        key: {"dtype": "I64" if key == "labels" else "F32", "shape": shape, "data_offsets": ends[i : i + 2]}
        for i, (key, shape) in enumerate(shapes.items())
    }
    text = json.dumps(header).encode()
    with (tmp_path / "hole.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + ends[-1])  # a hole, which uses no disk space and reads as zeros
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
    before = resident("VmRSS")
    shards = Shards(tmp_path)
    x = shards.read(range(0, 2 * count, 1000))
    assert x.shape == (33, 32, 16, 16)
    assert x.count_nonzero() == 0
    assert resident("VmHWM") - before < 50


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: .*safetensors"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"\*.safetensors"):
        Shards(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 100, -1, -1000])
def test_a_file_cut_short_is_named(left, tmp_path):
    write_shards(tmp_path)
    file = tmp_path / "latents_rank00_shard001.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"shard001.safetensors: {'cut short at' if left else 'empty'}"):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"latents_flip": None}, "lacks latents_flip: a shard has latents, latents_flip, labels"),
        ({"labels": torch.arange(0)}, "is empty: a shard needs at least one row"),
        ({"labels": torch.tensor([0, 1, 10, 3])}, "row 2 of labels is 10: expected from 0 to 9"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "row 3 of labels is -1: expected from 0 to 9"),
        ({"labels": torch.ones(4)}, "labels are F32: expected one of U8"),
        ({"latents": torch.ones(4, *SHAPE).int()}, "latents are I32: expected one of F16"),
        (
            {"latents": torch.ones(3, *SHAPE)},
            r"latents \(3, 2, 4, 4\), latents_flip \(4, 2, 4, 4\), labels \(4,\) do not",
        ),
        ({"latents_flip": torch.ones(4, 2, 4, 8)}, r"latents_flip \(4, 2, 4, 8\), labels \(4,\)"),
        ({"latents": torch.ones(4, 32), "latents_flip": torch.ones(4, 32)}, r"expected \(n, c, h, w\) twice and"),
        (
            {"latents": torch.ones(4, 2, 8, 8), "latents_flip": torch.ones(4, 2, 8, 8)},
            r"latents are \(2, 8, 8\), .*latents_rank00_shard000.safetensors are \(2, 4, 4\)",
        ),
    ],
)
def test_a_shard_that_does_not_fit_is_refused(tensors, message, tmp_path):
    write_shards(tmp_path)
    change(tmp_path, **tensors)
    with pytest.raises(ValueError, match=f"latents_rank00_shard001.safetensors:? .*{message}"):
        Shards(tmp_path, 10)


def test_as_many_labels_as_latents(tmp_path):
    write_shards(tmp_path)
    change(tmp_path, labels=torch.arange(5), latents=torch.ones(4, *SHAPE), latents_flip=torch.ones(4, *SHAPE))
    with pytest.raises(ValueError, match=r"latents \(4, 2, 4, 4\), .*, labels \(5,\)"):
        Shards(tmp_path)


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = Provenance("VA-VAE", {"latent_norm": True, "latent_multiplier": 1.0}, [2, 4, 4], 10, 10, {"a": "b"})
    assert Provenance.read(tmp_path) is None
    written.write(tmp_path)
    assert Provenance.read(tmp_path) == written


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"shape": [2, 8, 8]}, r"says that shape is \[2, 8, 8\]: got \[2, 4, 4\]"),
        ({"num_images": 11}, "num_images is 11: got 10"),
        ({"num_classes": 12}, "num_classes is 12: got 10"),
        (
            {"scaling": {"latent_norm": False, "latent_multiplier": 0.18215}},
            "says that scaling is .*0.18215}: got .*1.0",
        ),
        (
            {"checksums": {"latents_rank00_shard002.safetensors": ""}},
            r"shard002\.safetensors .*cache\.json",
        ),
    ],
)
def test_shards_that_are_not_those_of_the_record_are_refused(entries, message, tmp_path):
    write_shards(tmp_path)
    file = tmp_path / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Provenance.read(tmp_path).check(Shards(tmp_path, 10), {"latent_norm": True, "latent_multiplier": 1.0})


RECORD = {
    "vae": "a",
    "scaling": {"latent_norm": True, "latent_multiplier": 1},
    "shape": [2, 4, 4],
    "num_images": 10,
    "num_classes": 10,
    "checksums": {},
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cache.json: not JSON"),
        ("", r"cache.json: empty \(0 bytes\)"),
        ("[" * 100_000, "cache.json: not JSON"),
        (LFS, "git lfs pull"),
        ("<!doctype html>", "web page"),
        ("[]", r"must hold an object with vae, scaling, .*: got \[\]"),
        ("null", "must hold an object with .*: got null"),
        ("{}", "cache.json lacks vae, scaling, shape, num_images, num_classes, checksums"),
        ({"vae": None}, "vae must be a string: got null"),
        ({"scaling": "a"}, 'scaling must be latent_norm .true or false.*: got "a"'),
        ({"scaling": {}}, "scaling must be .*: got {}"),
        ({"scaling": {"latent_norm": "true", "latent_multiplier": 1}}, "scaling must be"),
        ({"scaling": {"latent_norm": True, "latent_multiplier": "1"}}, "scaling must be"),
        ({"scaling": {"latent_norm": True, "latent_multiplier": float("nan")}}, "scaling must be .*NaN"),
        ({"shape": "b"}, 'shape must be .channels, height, width.*: got "b"'),
        ({"shape": [2, 4]}, r"shape must be .*: got \[2, 4\]"),
        ({"shape": ["2", 4, 4]}, "shape must be"),
        ({"num_images": "4"}, 'num_images must be an integer above 0: got "4"'),
        ({"num_images": True}, "num_images must be an integer above 0: got true"),
        ({"num_images": 4.5}, "num_images must be"),
        ({"num_images": "4", "vae": 1}, 'vae must be a string: got 1; num_images must be an integer above 0: got "4"'),
        ({"num_classes": "10"}, 'num_classes must be an integer above 0: got "10"'),
        ({"num_classes": None}, "num_classes must be an integer above 0: got null"),
        ({"num_classes": -1}, "num_classes must be"),
        ({"checksums": 3}, "checksums must be SHA-256 by file name: got 3"),
        ({"checksums": {"a": 1}}, "checksums must be SHA-256"),
        ({"checksums": ["a" * 100]}, r"checksums must be SHA-256 .*\.\.\.$"),
        ({"encoding": "x"}, "encoding must be an object or null"),
    ],
)
def test_a_damaged_record_is_refused(text, message, tmp_path):
    if isinstance(text, dict):
        text = json.dumps(RECORD | text)
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Provenance.read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "cache.json"))
    assert "\n" not in str(caught.value)


def test_a_record_that_is_binary_or_a_folder_is_refused(tmp_path):
    file = tmp_path / "cache.json"
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"cache.json: not JSON: .* can't decode byte 0xff"):
        Provenance.read(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"cache.json: a folder instead of a file"):
        Provenance.read(tmp_path)
    file.rmdir()
    file.symlink_to("gone")
    with pytest.raises(ValueError, match=r"cache.json: .*gone"):
        Provenance.read(tmp_path)


def test_entries_of_a_later_version_are_left_alone(tmp_path):
    scaling = RECORD["scaling"] | {"why": "x"}
    (tmp_path / "cache.json").write_text(json.dumps(RECORD | {"new": 1, "scaling": scaling}))
    record = Provenance.read(tmp_path)
    write_shards(tmp_path, record=False)
    record.check(Shards(tmp_path, 10), {"latent_norm": True, "latent_multiplier": 1.0})


def read_normalization(folder):
    return LatentNormalization.read(folder, 2, True, 1.0)


@pytest.mark.parametrize("name", ["latents_rank00_shard001.safetensors", "cache.json", "latents_stats.pt", "."])
def test_a_missing_permission_is_named(name):
    """The permission is missing for a shard, the record or the folder."""
    with open_folder() as folder:
        write_shards(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        (folder / name).chmod(0)
        read = {"cache.json": Provenance.read, "latents_stats.pt": read_normalization}.get(name, Shards)
        with unprivileged(), pytest.raises((ValueError, OSError), match=r"(?i)permission denied") as caught:
            read(folder)
        (folder / name).chmod(0o755)
        assert str(folder / name) in str(caught.value)


def test_a_shard_that_is_a_folder_or_a_pointer_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"x.safetensors: a folder instead of a file"):
        Shards(tmp_path)
    (tmp_path / "x.safetensors").rmdir()
    (tmp_path / "x.safetensors").write_text(LFS)
    with pytest.raises(ValueError, match=r"x.safetensors: .*git lfs pull"):
        Shards(tmp_path)


@pytest.mark.parametrize("offsets", [[-8, 8], [8, 0], [0, 10**30], [0, 4], None, "ab"])
def test_a_shard_with_wrong_offsets_is_named(offsets, tmp_path):
    write_shards(tmp_path)
    header = {"latents": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"12345678")
    with pytest.raises(ValueError, match=r"x.safetensors: ") as caught:
        Shards(tmp_path)
    assert "\n" not in str(caught.value)


def test_hidden_and_unfinished_files_are_skipped_and_counted(tmp_path):
    others = ["._a.safetensors", ".b.safetensors", "c.safetensors.partial", "d.safetensors.part", ".e.safetensors.XYZ"]
    for name in others:
        (tmp_path / name).write_bytes(b"no shard")
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors file in .* \(skipped 3 hidden files and 2"):
        Shards(tmp_path)
    write_shards(tmp_path)
    shards = Shards(tmp_path)
    assert len(shards) == 10
    assert shards.skipped == {"hidden": 3, "unfinished": 2}


def test_a_named_pipe_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: not a regular file"):
        Shards(tmp_path)
