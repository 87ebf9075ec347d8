"""Latents in training: values, order, mirror images and resuming, and the checks before training starts."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save, save_file
from torch import nn

from decm_lightning.autoencoders.normalization import LatentNormalization, Moments, finite_rows
from decm_lightning.data import Digits, ImageNetLatents
from decm_lightning.data.latents.imagenet import Latents
from decm_lightning.data.resumable import EpochSampler
from decm_lightning.networks import MLP
from tests.data.latents.test_shards import write_shards
from tests.test_files import LFS

SHARD = "latents_rank00_shard001.safetensors"
ONES = torch.ones(1, 2, 1, 1)


def module(folder, **options):
    """Return a datamodule that is set up, with its own seed."""
    latents = ImageNetLatents(str(folder), **({"batch_size": 4, "num_workers": 0, "num_classes": 10} | options))
    latents.seed = 7
    latents.setup("fit")
    return latents


def same(batches, others):
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def poison(folder, key, row, value):
    """Put one value into a latent of the second shard."""
    tensors = load_file(folder / SHARD)
    tensors[key][row, 1, 2, 3] = value
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SHARD)


def test_a_latent_is_normalised_by_the_statistics_of_its_channel(tmp_path):
    latents, mirrored = write_shards(tmp_path)
    mean = torch.tensor([2.9, 3.1]).view(1, 2, 1, 1)
    std = torch.tensor([5.0, 4.0]).view(1, 2, 1, 1)
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    (tmp_path / "cache.json").unlink()
    batch = Latents(tmp_path, 10).__getitems__([3, 18])
    assert batch.condition.tolist() == [3, 8]
    expected = [(latents[3, 0] - 2.9) / 5, (latents[3, 1] - 3.1) / 4, (mirrored[8, 0] - 2.9) / 5]
    torch.testing.assert_close(batch.x_1[[0, 0, 1], [0, 1, 0]], torch.stack(expected))
    assert batch.x_1.dtype == torch.float32


def test_a_bare_multiplier_needs_no_statistics(tmp_path):
    # Stable Diffusion's latents of ImageNet by channel (EDM2), whose mean times 0.18215 is 0.32.
    mean = torch.tensor([5.81, 3.25, 0.12, -2.15]).view(4, 1, 1)
    std = torch.tensor([4.17, 4.62, 3.71, 3.28]).view(4, 1, 1)
    latents, _ = write_shards(tmp_path, (100,), (4, 8, 8), mean, std, record=False)
    (tmp_path / "latents_stats.pt").unlink()
    train = module(tmp_path, latent_norm=False, latent_multiplier=0.18215).train
    assert torch.equal(train.__getitems__([5]).x_1, latents[5:6] * 0.18215)
    assert train.measure(train.shards.blocks()).overall()[0] == pytest.approx(0.32, abs=0.01)


def test_half_of_the_images_are_mirrored_by_seed_epoch_and_number_alone():
    def mirrored(seed=0, epoch=0, world=1, count=10_000):
        whole = torch.zeros(count, dtype=torch.bool)
        for rank in range(world):
            sampler = EpochSampler(range(count), 2, num_replicas=world, rank=rank, seed=seed)
            sampler.set_epoch(epoch)
            items = torch.tensor(list(sampler))
            whole[items % count] = items >= count
        return whole

    first = mirrored()
    assert first.float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(first, mirrored())
    assert torch.equal(first, mirrored(world=2))
    for other in (mirrored(epoch=1), mirrored(seed=1)):
        assert (first == other).float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_the_images_between_them(processes, tmp_path):
    """Also if there are more processes than the two shards."""
    write_shards(tmp_path)
    train = module(tmp_path).train
    parts = []
    for rank in range(processes):
        sampler = EpochSampler(train, 2, num_replicas=processes, rank=rank, seed=3)
        parts.append({item % 10 for item in sampler})
    assert [len(part) for part in parts] == [10 // processes] * processes
    assert set.union(*parts) == set(range(10))


def test_mirroring_can_be_left_out(tmp_path):
    latents, _ = write_shards(tmp_path)
    train = module(tmp_path, batch_size=10, flip=False)
    (batch,) = train.train_dataloader()
    assert torch.equal(batch.x_1, train.train.normalization.normalize(latents[batch.condition]))


def test_workers_change_nothing_and_an_epoch_has_every_image_once(tmp_path):
    write_shards(tmp_path, (20, 1, 12))
    alone, helped = (list(module(tmp_path, num_workers=workers).train_dataloader()) for workers in (0, 2))
    assert len(alone) == 33 // 4
    assert same(alone, helped)
    images = torch.cat([batch.x_1 for batch in alone])
    assert len(torch.minimum(images, images.flip(-1)).flatten(1).unique(dim=0)) == len(images)


class Recorder(L.LightningModule):
    """Records the training batches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def record(folder, data, steps, checkpoint=None):
    """Return the batches of a run that stops after `steps` steps."""
    saving = ModelCheckpoint(folder, every_n_train_steps=steps, filename="{step}", save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=[saving], logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    recorder = Recorder()
    trainer.fit(recorder, data, ckpt_path=checkpoint)
    return recorder.batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_an_unbroken_one_would(workers, tmp_path):
    write_shards(tmp_path, (20, 1, 12))

    def data(seed):
        latents = ImageNetLatents(str(tmp_path), batch_size=4, num_workers=workers, num_classes=10)
        latents.seed = seed
        return latents

    # 33 images in batches of 4 are 8 steps: the run stops in the middle of its second epoch.
    whole = record(tmp_path / "whole", data(7), 19)
    first = record(tmp_path / "first", data(7), 11)
    rest = record(tmp_path / "rest", data(8), 19, tmp_path / "first" / "step=11.ckpt")
    assert (len(first), len(rest)) == (11, 8)
    assert same(whole, first + rest)


def test_the_sample_is_of_at_most_1000_images_from_all_shards(tmp_path):
    write_shards(tmp_path, (1500, 700), (1, 1, 1))
    train = module(tmp_path).train
    images = [item for block in train.sample() for item in block]
    assert 500 <= len({item % 2200 for item in images}) <= 1000
    assert len(images) == 2 * len({item % 2200 for item in images}) == len(set(images))
    assert {item // 1000 for item in images} == {0, 1, 2, 3, 4}
    assert sorted(item for block in train.shards.blocks() for item in block) == list(range(4400))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_moments_are_those_of_all_values_together(count, tmp_path):
    latents, mirrored = write_shards(tmp_path, (count,))
    train = module(tmp_path, batch_size=1).train
    for blocks in (train.sample(), train.shards.blocks()):
        moments = train.measure(blocks)
        both = train.normalization.normalize(torch.cat([latents, mirrored])).double()
        torch.testing.assert_close(moments.mean, both.mean((0, 2, 3)), atol=1e-6, rtol=0)
        std, mean = torch.std_mean(both, correction=0)
        assert moments.overall() == pytest.approx((mean.item(), std.item()), abs=1e-6)


@pytest.mark.parametrize(
    ("written", "options", "message"),
    [
        # Normalized when written, and again when read.
        ({"mean": 0.0, "std": 1.0}, {}, r"deviation 0\.2.*latents_stats\.pt"),
        (
            {},
            {"latent_norm": False},
            r"mean 2\.97 and standard deviation 5\.01 .*set latent_norm to true",
        ),
        ({"mean": 0.0}, {"latent_norm": False, "latent_multiplier": 0.05}, r"or latent_multiplier to 0\.2"),
        ({}, {"latent_multiplier": 0.18215}, "deviation 0.182 after .*, times 0.18215: .*latent_multiplier to 1"),
    ],
)
def test_latents_that_are_far_from_normal_are_refused(written, options, message, tmp_path):
    write_shards(tmp_path, (100,))
    statistics = (tmp_path / "latents_stats.pt").read_bytes()
    write_shards(tmp_path, (100,), record=False, **written)
    (tmp_path / "latents_stats.pt").write_bytes(statistics)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["latents", "latents_flip"])
def test_a_latent_that_is_not_finite_is_named_by_its_row(key, value, tmp_path):
    write_shards(tmp_path)
    poison(tmp_path, key, 2, value)
    with pytest.raises(ValueError, match=f"{SHARD}: row 2 of {key} is NaN or infinite"):
        module(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"latents_stats\.pt: .*latent_norm to false"),
        (b"no zip", "text instead of tensors: it begins with 'no zip'"),
        (b"", r"empty \(0 bytes\)"),
        (LFS.encode(), "git lfs pull"),
        (b"<html></html>", "web page"),
        (b"PK\x03\x04" + bytes(range(100)), "cut short at 104 bytes"),
        (b"\x80\x02\xff\xff", "not a file of tensors"),
        (save({"mean": ONES, "std": ONES + 1}), "not a file of tensors"),
        (Path, "could run code"),
        ([1], "must hold mean and std by name: got one list"),
        (ONES, "must hold mean and std by name: got one Tensor"),
        ({"mean": ONES}, r"std must be .*\(1, 2, 1, 1\): got nothing"),
        ({"mean": [0.0, 0.0], "std": ONES}, "mean must be .*: got a list"),
        ({"mean": torch.zeros(1, 4, 1, 1)}, r"mean must be .*\(1, 2, 1, 1\): got \(1, 4, 1, 1\)"),
        ({"mean": torch.zeros(2), "std": ONES}, r"got \(2,\)"),
        ({"mean": ONES.to_sparse(), "std": ONES}, "mean must be finite"),
        ({"mean": ONES.to("meta"), "std": ONES}, "mean must be finite"),
        ({"mean": ONES * 1j, "std": ONES}, "mean must be finite"),
        ({"mean": torch.tensor([0, torch.nan]).view(1, 2, 1, 1), "std": ONES}, "got nan in channel 1"),
        ({"mean": 1e300 * ONES.double(), "std": ONES}, r"got 1e\+300 in channel 0"),
        ({"mean": ONES, "std": 0 * ONES}, "std must be above 0 in float32: got 0 in channel 0"),
        ({"mean": ONES, "std": 1e-300 * ONES.double()}, "std must be above 0 in float32"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(content, message, tmp_path):
    write_shards(tmp_path, record=False)
    file = tmp_path / "latents_stats.pt"
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Latents(tmp_path, 10)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_that_are_a_broken_link_or_a_folder_are_refused(tmp_path):
    write_shards(tmp_path, record=False)
    file = tmp_path / "latents_stats.pt"
    file.unlink()
    file.symlink_to("gone.pt")
    with pytest.raises(ValueError, match=r"latents_stats.pt: .*gone.pt"):
        Latents(tmp_path, 10)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"latents_stats.pt: a folder instead of a file"):
        Latents(tmp_path, 10)


def test_statistics_may_be_in_float64_and_next_to_others(tmp_path):
    write_shards(tmp_path, record=False)
    stats = torch.load(tmp_path / "latents_stats.pt")
    torch.save({name: x.double() for name, x in stats.items()} | {"count": 10}, tmp_path / "latents_stats.pt")
    assert torch.equal(LatentNormalization.read(tmp_path, 2, True, 1.0).std, stats["std"])


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((1.2, -1.2), (1.0, 1.0), "channel 0 of latents of .* have mean 1.19"),
        ((0.0, 0.0), (1.0, 0.1), "channel 1 of latents of .* standard deviation 0.101"),
        ((0.9, -0.9), (1.2, 0.25), None),
    ],
)
def test_one_channel_with_statistics_of_another_is_refused(mean, std, message, tmp_path):
    """Over all channels, the mean is 0 and the standard deviation between 0.5 and 2."""
    mean, std = (torch.tensor(values).view(2, 1, 1) for values in (mean, std))
    write_shards(tmp_path, (100,), (2, 8, 8), mean, std, record=False)
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": ONES}, tmp_path / "latents_stats.pt")
    train = Latents(tmp_path, 10)
    if message is None:
        train.measure(train.sample())
        return
    with pytest.raises(ValueError, match=message):
        train.measure(train.sample())


def test_large_values_are_finite_and_moments_are_exact_far_from_0():
    """The sum of 32 of them overflows, and a difference of two large numbers would give a wrong variance."""
    x = torch.full((3, 2, 4, 4), 3e38)
    assert finite_rows(x).tolist() == [True, True, True]
    x[1, 0, 0, 0] = -torch.inf
    assert finite_rows(x).tolist() == [True, False, True]
    x = 1000 + 0.01 * torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    moments = Moments(2)
    for block in x.split(20):
        moments.add(block)
    std, mean = torch.std_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(moments.std(), std, rtol=0.02, atol=0)


def test_skipped_files_are_counted_in_a_warning(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "._a.safetensors").write_bytes(b"no shard")
    with pytest.warns(UserWarning, match="skipped 1 hidden file in "):
        Latents(tmp_path, 10)


def test_an_item_is_named_by_file_and_row(tmp_path):
    write_shards(tmp_path)
    train = Latents(tmp_path, 10)
    assert train.place(17) == f"{tmp_path / SHARD}: row 1 of latents_flip"
    assert train.place(3).endswith("shard000.safetensors: row 3 of latents")


def test_statistics_saved_on_a_gpu_are_read_where_the_latents_are(tmp_path, monkeypatch):
    """LightningDiT's own scripts may leave them on the device that computed them."""
    write_shards(tmp_path, record=False)
    stats = torch.load(tmp_path / "latents_stats.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(stats, tmp_path / "latents_stats.pt")
    scaling = LatentNormalization.read(tmp_path, 2, True, 1.0)
    assert torch.equal(scaling.mean, stats["mean"])
    assert scaling.std.device.type == "cpu"


def test_statistics_that_are_not_those_of_the_record_are_refused(tmp_path):
    write_shards(tmp_path)
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)}, tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match=r"latents_stats\.pt .*cache\.json"):
        module(tmp_path)


def test_an_unknown_origin_is_a_warning(tmp_path):
    write_shards(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(tmp_path)
    (tmp_path / "cache.json").unlink()
    with pytest.warns(UserWarning, match="cache.json"):
        module(tmp_path)


def test_the_record_says_how_many_classes_there_are(tmp_path):
    write_shards(tmp_path)
    assert Latents(tmp_path, None).shards.num_classes == 10
    with pytest.raises(ValueError, match="num_classes is 10: got 1000"):
        module(tmp_path, num_classes=1000)


def test_a_multiplier_must_be_positive(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(ValueError, match=r"latent_multiplier.*got 0"):
        module(tmp_path, latent_multiplier=0)


def test_fewer_images_than_a_batch_in_each_process_are_refused(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(ValueError, match="1 processes with batch_size 11 need 11, got 10"):
        module(tmp_path, batch_size=11).train_dataloader()
    latents = module(tmp_path, batch_size=6)
    latents.trainer = type("Trainer", (), {"world_size": 2, "global_rank": 0, "current_epoch": 0})()
    with pytest.raises(ValueError, match="2 processes with batch_size 6 need 12, got 10"):
        latents.train_dataloader()
    digits = Digits(batch_size=2000)
    digits.setup("fit")
    with pytest.raises(ValueError, match="need 2000, got 1797"):
        digits.train_dataloader()


def test_a_network_for_another_shape_is_refused(tmp_path):
    write_shards(tmp_path)
    recorder = Recorder()
    recorder.network = MLP()
    recorder.network.sample_shape = (4, 32, 32)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"latents of .* are \(2, 4, 4\) and the network's \(4, 32, 32\)"):
        trainer.fit(recorder, ImageNetLatents(str(tmp_path), 4, 0, 10))
