"""Shards are written atomically: a folder can be finished after a process is killed at any time."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decm_lightning.autoencoders.normalization import Moments
from decm_lightning.autoencoders.provenance import Provenance
from decm_lightning.data.latents.imagenet import Latents
from decm_lightning.data.latents.manifest import EncodingSettings, Manifest, Shard
from decm_lightning.files import file_sha256

SHAPE = (2, 4, 4)
SETTINGS = EncodingSettings("a VAE", 8, "sample", 0, num_classes=100, shard_size=4)
NAMES = [f"{number:04d}" for number in range(10)]


def write(manifest: Manifest, shard: Shard, **options) -> None:
    numbers = list(shard.images)
    generator = torch.Generator().manual_seed(numbers[0])
    latents, mirrored = torch.randn(2, len(numbers), *SHAPE, generator=generator)
    moments = Moments(2)
    moments.add(latents)
    moments.add(mirrored)
    tensors = {"latents": latents, "latents_flip": mirrored, "labels": torch.tensor(numbers)}
    manifest.write(shard, {name: tensor.clone() for name, tensor in tensors.items()}, moments, **options)


def plan(folder: Path, names: list[str] = NAMES, changed: tuple[str, ...] = ()) -> tuple[Manifest, list[Shard]]:
    manifest = Manifest(folder, SETTINGS)
    return manifest, manifest.plan([(name,) for name in names], [name + "!" * (name in changed) for name in names])


def encode(folder: Path, *args) -> list[Shard]:
    """Encode all pending shards and return the shards that were written."""
    manifest, shards = plan(folder, *args)
    manifest.lock()
    pending = [shard for shard in shards if not manifest.is_up_to_date(shard)]
    if pending:
        manifest.begin()
    for shard in pending:
        write(manifest, shard)
    manifest.finish(SHAPE, shards)
    manifest.unlock()
    return pending


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def encode_and_die(folder: Path, before: bool, count: int) -> bool:
    """Encode in a process that is killed before or after it renames its file number `count`; return whether it was."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    rename, calls = os.replace, 0

    def fatal(*args: Path) -> None:
        nonlocal calls
        calls += 1
        if not before:
            rename(*args)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        if before:
            rename(*args)

    os.replace = fatal
    encode(folder)
    os._exit(0)


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_dies_anywhere_is_finished_to_the_same_bytes(before, tmp_path):
    encode(tmp_path / "whole")
    count = 1
    while encode_and_die(tmp_path / str(count), before, count):
        done = {f: f.stat().st_mtime_ns for f in (tmp_path / str(count)).glob("*.safetensors")}
        encode(tmp_path / str(count))
        assert contents(tmp_path / str(count)) == contents(tmp_path / "whole")
        assert {file: file.stat().st_mtime_ns for file in done} == done
        count += 1
    # The settings, three shards with their records, the statistics and cache.json.
    assert count - 1 == 9


def test_a_finished_folder_is_read_as_latents(tmp_path):
    encode(tmp_path)
    latents = Latents(tmp_path, None)
    assert [file.name for file in latents.shards.files][-1] == "latents_rank00_shard002.safetensors"
    assert latents.shards.labels.tolist() == list(range(10))
    both = torch.cat([latents.shards.read(range(20))]).double()
    std, mean = torch.std_mean(both, (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(latents.normalization.mean, mean.float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(latents.normalization.std, std.float(), atol=1e-7, rtol=0)
    provenance = Provenance.read(tmp_path)
    assert provenance.checksums == {
        f.name: file_sha256(f) for f in [*latents.shards.files, tmp_path / "latents_stats.pt"]
    }
    assert provenance.encoding["size"] == 8


def test_shards_are_ranges_of_the_images(tmp_path):
    _, shards = plan(tmp_path)
    assert [shard.images for shard in shards] == [range(4), range(4, 8), range(8, 10)]


def test_many_shards_keep_their_order_by_name(tmp_path):
    _, shards = plan(tmp_path, [f"{number:04d}" for number in range(4 * 1200)])
    names = [shard.name for shard in shards]
    assert names[7] == "latents_rank00_shard0007.safetensors"
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("name", "value"), [("vae", "another VAE"), ("size", 16), ("seed", 1), ("posterior", "mode"), ("num_classes", 5)]
)
def test_other_settings_are_refused(name, value, tmp_path):
    manifest, _ = plan(tmp_path)
    manifest.begin()
    begun = getattr(SETTINGS, name)
    with pytest.raises(ValueError, match=f"with {name} {begun}, .*{name} is {value}: .*--out"):
        Manifest(tmp_path, replace(SETTINGS, **{name: value})).plan([("0",)], ["0"])


@pytest.mark.parametrize(
    ("names", "changed", "pending"),
    [
        (NAMES, ("0005",), [range(4, 8)]),
        (NAMES[1:], (), [range(3)]),
        (NAMES[:5] + NAMES[6:], (), [range(4, 7)]),
        ([*NAMES[:4], "0003a", *NAMES[4:]], (), [range(5)]),
        (["", *NAMES, "z"], (), [range(5), range(9, 12)]),
        (NAMES[:4] + NAMES[8:], (), []),
        (NAMES[8:], (), []),
    ],
)
def test_a_change_of_images_keeps_the_other_shards(names, changed, pending, tmp_path):
    assert len(encode(tmp_path)) == 3
    files = set(tmp_path.glob("*.safetensors"))
    assert [shard.images for shard in encode(tmp_path, names, changed)] == pending
    assert encode(tmp_path, names, changed) == []
    left = sorted(tmp_path.glob("*.safetensors"))
    assert set(left) <= files
    assert sum(len(shard.images) for shard in plan(tmp_path, names, changed)[1]) == len(names)
    assert Provenance.read(tmp_path).num_images == len(names)
    assert Provenance.read(tmp_path).checksums.keys() == {*(file.name for file in left), "latents_stats.pt"}


def test_a_shard_never_grows_beyond_twice_its_size(tmp_path):
    encode(tmp_path)
    more = [f"0005{number:03d}" for number in range(20)]
    encode(tmp_path, sorted([*NAMES, *more]))
    _, shards = plan(tmp_path, sorted([*NAMES, *more]))
    assert [len(shard.images) for shard in shards] == [4] * 7 + [2]


def test_the_statistics_are_of_the_images_that_are_left(tmp_path):
    encode(tmp_path / "a")
    encode(tmp_path / "a", NAMES[8:])
    both = Latents(tmp_path / "a", 100)
    std, mean = torch.std_mean(both.shards.read(range(4)), (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(both.normalization.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(both.normalization.std, std, atol=1e-6, rtol=0)


def test_a_shard_with_left_out_images_is_up_to_date_if_they_may_be(tmp_path):
    manifest, shards = plan(tmp_path)
    write(manifest, shards[0], skipped={"0001": "is broken"})
    assert manifest.is_up_to_date(shards[0], allow_skipped=True)
    assert not manifest.is_up_to_date(shards[0])


def test_of_two_processes_one_is_refused(tmp_path):
    first, _ = plan(tmp_path)
    first.lock()
    with pytest.raises(ValueError, match=f"another process .* {tmp_path}"):
        plan(tmp_path)[0].lock()
    first.unlock()
    plan(tmp_path)[0].lock()


def test_shards_of_others_are_left_alone(tmp_path):
    (tmp_path / "latents_rank00_shard000.safetensors").touch()
    with pytest.raises(ValueError, match="such as latents_rank00_shard000"):
        plan(tmp_path)
    (tmp_path / "latents_rank00_shard000.safetensors").unlink()
    encode(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    with pytest.raises(ValueError, match=r"such as mine\.safetensors: .*--out"):
        plan(tmp_path)


def test_a_shard_that_has_changed_is_encoded_again(tmp_path):
    encode(tmp_path)
    file = tmp_path / "latents_rank00_shard001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert [shard.name for shard in encode(tmp_path)] == [file.name]
    assert file.read_bytes() == whole
    file.unlink()
    manifest, shards = plan(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 3 .*latents_rank00_shard001.safetensors"):
        manifest.finish(SHAPE, shards)
    assert [shard.name for shard in encode(tmp_path)] == [file.name]


def test_an_incomplete_folder_is_not_trained_on(tmp_path):
    manifest, shards = plan(tmp_path)
    manifest.begin()
    write(manifest, shards[0])
    with pytest.raises(ValueError, match=f"{tmp_path} .*: run decm encode"):
        Latents(tmp_path, 100)
    encode(tmp_path)
    manifest, shards = plan(tmp_path, NAMES, ("0001",))
    manifest.begin()
    with pytest.raises(ValueError, match=f"{tmp_path} .*: run decm encode"):
        Latents(tmp_path, 100)


@pytest.mark.parametrize(("name", "value"), [("shard_size", 0), ("seed", -1), ("seed", 1 << 63)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*: got {value}"):
        replace(SETTINGS, **{name: value})
