"""Shards written whole or not at all: a process that dies at any moment leaves a folder that another can finish."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decm_lightning.data.latents import Latents
from decm_lightning.data.manifest import Manifest, Request
from decm_lightning.data.scaling import Moments
from decm_lightning.data.shards import Provenance, checksum

SHAPE = (2, 4, 4)
REQUEST = Request("a VAE", 8, "sample", 0, "the names", num_images=10, num_classes=10, shard_size=4)


def write(manifest: Manifest, shard: int) -> None:
    numbers = manifest.shards[shard]
    generator = torch.Generator().manual_seed(shard)
    latents, mirrored = torch.randn(2, len(numbers), *SHAPE, generator=generator)
    moments = Moments(2)
    moments.add(latents)
    moments.add(mirrored)
    tensors = {"latents": latents, "latents_flip": mirrored, "labels": torch.tensor(numbers)}
    manifest.write(shard, {name: tensor.clone() for name, tensor in tensors.items()}, moments)


def encode(folder: Path) -> None:
    """Do all that is left to do."""
    manifest = Manifest(folder, REQUEST)
    manifest.begin()
    for shard in manifest.pending():
        write(manifest, shard)
    manifest.finish(SHAPE)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def encode_and_die(folder: Path, before: bool, count: int) -> bool:
    """Encode in a process that is killed before or after its count-th file gets its name; say if it was."""
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
    # The request, three shards with their records, the statistics and cache.json.
    assert count - 1 == 9


def test_a_finished_folder_is_read_as_latents(tmp_path):
    encode(tmp_path)
    latents = Latents(tmp_path, None)
    assert [file.name for file in latents.shards.files][-1] == "latents_rank00_shard002.safetensors"
    assert latents.shards.labels.tolist() == list(range(10))
    both = torch.cat([latents.shards.read(range(20))]).double()
    std, mean = torch.std_mean(both, (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(latents.scaling.mean, mean.float(), atol=1e-7, rtol=0)
    torch.testing.assert_close(latents.scaling.std, std.float(), atol=1e-7, rtol=0)
    provenance = Provenance.read(tmp_path)
    assert provenance.checksums == {f.name: checksum(f) for f in [*latents.shards.files, tmp_path / "latents_stats.pt"]}
    assert provenance.encoding["size"] == 8


def test_shards_are_shared_among_processes(tmp_path):
    manifest = Manifest(tmp_path, replace(REQUEST, num_images=21))
    assert [len(numbers) for numbers in manifest.shards] == [4, 4, 4, 4, 4, 1]
    assert [manifest.pending(rank, 4) for rank in range(4)] == [[0, 4], [1, 5], [2], [3]]
    assert Manifest(tmp_path, replace(REQUEST, num_images=3)).pending(5, 8) == []


def test_many_shards_keep_their_order_by_name(tmp_path):
    manifest = Manifest(tmp_path, replace(REQUEST, num_images=4 * 1200))
    names = [manifest.name(shard) for shard in range(len(manifest.shards))]
    assert names[7] == "latents_rank00_shard0007.safetensors"
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vae", "another VAE"), ("size", 16), ("images_sha256", "others"), ("seed", 1), ("posterior", "mode")],
)
def test_another_request_is_refused(name, value, tmp_path):
    Manifest(tmp_path, REQUEST).begin()
    begun = getattr(REQUEST, name)
    with pytest.raises(ValueError, match=f"was begun with {name} {begun}: got {value}; give the same, or another"):
        Manifest(tmp_path, replace(REQUEST, **{name: value}))


def test_shards_of_others_are_left_alone(tmp_path):
    (tmp_path / "latents_rank00_shard000.safetensors").touch()
    with pytest.raises(ValueError, match="holds shards that were not encoded here: give --out a folder of its own"):
        Manifest(tmp_path, REQUEST)


def test_a_shard_that_has_changed_is_never_taken_for_done(tmp_path):
    encode(tmp_path)
    file = tmp_path / "latents_rank00_shard001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard001.safetensors has changed since it was written: delete it"):
        Manifest(tmp_path, REQUEST).pending()
    file.unlink()
    assert Manifest(tmp_path, REQUEST).pending() == [1]
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing in .*, latents_rank00_shard001.safetensors first"):
        Manifest(tmp_path, REQUEST).finish(SHAPE)


def test_what_is_not_complete_trains_nothing(tmp_path):
    manifest = Manifest(tmp_path, REQUEST)
    manifest.begin()
    write(manifest, 0)
    with pytest.raises(ValueError, match=r"the latents in .* are not complete: run decm encode again"):
        Latents(tmp_path, 10)


def test_a_shard_has_at_least_one_image():
    with pytest.raises(ValueError, match="shard_size must be at least 1: got 0"):
        replace(REQUEST, shard_size=0)
