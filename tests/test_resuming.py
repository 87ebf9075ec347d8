"""A run resumed from any of its checkpoints ends with the bits and the steps of an uninterrupted one."""

import itertools
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from decm_lightning import Distiller, TeacherTraining, losses
from decm_lightning.data import Digits
from decm_lightning.data.images import InMemoryImages, LabelledImages
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher

NETWORK = {"input_size": 4, "in_channels": 1, "patch_size": 2, "width": 8, "depth": 1, "heads": 2, "num_classes": 3}
HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)


class Few(InMemoryImages):
    """Thirteen images in batches of three: an epoch of four steps."""

    num_classes = 3

    def setup(self, stage: str) -> None:
        images = torch.randn(13, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        self.train = self.reference = LabelledImages(images, torch.arange(13) % 3)


class Plain(L.LightningDataModule):
    """Somebody's own data, without a place to keep: in order, by an ordinary DataLoader."""

    def setup(self, stage: str) -> None:
        images = torch.randn(13, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        self.rows = LabelledImages(images, torch.arange(13) % 3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=4, drop_last=True, collate_fn=lambda batch: batch)


class SaveEverywhere(L.Callback):
    """Saves a checkpoint in every hook there is, numbered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0


def _saving(hook: str):  # type: ignore[no-untyped-def]
    def save(self, trainer, pl_module, *args):  # type: ignore[no-untyped-def]
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.count:03d}-{hook}-{trainer.global_step}.ckpt")
            self.count += 1

    return save


for name in HOOKS:
    setattr(SaveEverywhere, name, _saving(name))


def module(what: str = "teacher") -> L.LightningModule:
    torch.manual_seed(0)
    network = DiT(**NETWORK)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.2)
    options = {
        "optimizer": lambda p: torch.optim.AdamW(p, 1e-2),
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        "ema_decay": 0.9,
    }
    if what == "student":
        return Distiller(Teacher(network), objective=losses.paper(r_decay_steps=5), **options)
    return TeacherTraining(network, **options)


def fit(folder, data, callbacks, checkpoint=None, what="teacher", **options):  # type: ignore[no-untyped-def]
    L.seed_everything(1 if checkpoint else 0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **{"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)} | options,
    )
    trained = module(what)
    trainer.fit(trained, data, ckpt_path=checkpoint)
    return trainer, trained


def same(first: L.LightningModule, second: L.LightningModule) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def distinct(folder: Path) -> list[Path]:
    """The checkpoints from which different runs begin: several hooks save the same."""
    found = {}
    for checkpoint in sorted(folder.glob("*.ckpt")):
        content = torch.load(checkpoint, weights_only=True)
        found.setdefault(f"{content['global_step']} {content['loops']['fit_loop']}", checkpoint)
    return list(found.values())


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("teacher", {"max_epochs": 3, "limit_val_batches": 0}),
        ("student", {"max_steps": 10, "max_epochs": -1}),
        ("teacher", {"max_steps": 5, "max_epochs": -1, "accumulate_grad_batches": 3, "val_check_interval": 1}),
        ("teacher", {"max_epochs": 3, "limit_train_batches": 3, "val_check_interval": 2}),
        ("teacher", {"max_steps": 9, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None}),
    ],
)
def test_every_checkpoint_resumes_to_the_same_bits_and_counters(what, options, tmp_path):
    whole, expected = fit(tmp_path, Few(3), [SaveEverywhere(tmp_path)], what=what, **options)
    for checkpoint in distinct(tmp_path):
        trainer, resumed = fit(tmp_path, Few(3), [], checkpoint, what, **options)
        assert trainer.global_step == whole.global_step, checkpoint.name
        if "max_steps" not in options:
            assert trainer.current_epoch == whole.current_epoch, checkpoint.name
        assert same(expected, resumed), checkpoint.name
        # Of a run that had ended already nothing is counted.
        if torch.load(checkpoint, weights_only=True)["global_step"] < whole.global_step:
            counters = [t.fit_loop.epoch_loop._batches_that_stepped for t in (whole, trainer)]
            assert counters[0] == counters[1], checkpoint.name


def test_a_run_may_be_interrupted_after_every_step(tmp_path):
    _, expected = fit(tmp_path, Few(3), [], max_epochs=3, limit_val_batches=0)
    last = None
    for step in range(1, 13):
        saving = ModelCheckpoint(tmp_path / str(step), every_n_train_steps=1, save_last=True)
        trainer, resumed = fit(tmp_path, Few(3), [saving], last, max_steps=step, max_epochs=3, limit_val_batches=0)
        assert trainer.global_step == step
        last = tmp_path / str(step) / "last.ckpt"
    assert same(expected, resumed)


def test_more_epochs_than_the_checkpoint_s_run_had(tmp_path):
    _, expected = fit(tmp_path, Few(3), [], max_epochs=4, limit_val_batches=0)
    saving = ModelCheckpoint(tmp_path / "first")
    fit(tmp_path, Few(3), [saving], max_epochs=2, limit_val_batches=0)
    trainer, resumed = fit(tmp_path, Few(3), [], saving.best_model_path, max_epochs=4, limit_val_batches=0)
    assert (trainer.global_step, trainer.current_epoch) == (16, 4)
    assert same(expected, resumed)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 1)])
def test_workers_do_not_matter(before, after, tmp_path):
    _, expected = fit(tmp_path, Few(3), [], max_steps=10, limit_val_batches=0)
    saving = ModelCheckpoint(tmp_path / "first", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, Few(3, num_workers=before), [saving], max_steps=8, limit_val_batches=0)
    for step in (3, 6):
        checkpoint = tmp_path / "first" / f"step={step}.ckpt"
        _, resumed = fit(tmp_path, Few(3, num_workers=after), [], checkpoint, max_steps=10, limit_val_batches=0)
        assert same(expected, resumed)


def test_data_of_somebody_s_own_loses_no_step(tmp_path):
    """A plain DataLoader begins the epoch anew in the middle of one; at an end of an epoch it is exact."""
    whole, expected = fit(tmp_path, Plain(), [SaveEverywhere(tmp_path)], max_epochs=3)
    for checkpoint in distinct(tmp_path):
        trainer, resumed = fit(tmp_path, Plain(), [], checkpoint, max_epochs=3)
        assert (trainer.global_step, trainer.current_epoch) == (whole.global_step, whole.current_epoch) == (9, 3)
        if torch.load(checkpoint, weights_only=True)["global_step"] % 3 == 0:
            assert same(expected, resumed), checkpoint.name


def test_a_schedule_that_counts_the_run_s_steps_asks_for_the_loader_early(tmp_path):
    """`trainer.estimated_stepping_batches` builds the loader before the checkpoint's counters are restored."""

    class Counting(TeacherTraining):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 12
            return super().configure_optimizers()

    def run(checkpoint, callbacks, **options):
        L.seed_everything(1 if checkpoint else 0, verbose=False)
        torch.manual_seed(0)
        trained = Counting(DiT(**NETWORK), optimizer=lambda p: torch.optim.AdamW(p, 1e-2))
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, max_epochs=3, callbacks=callbacks, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(trained, Few(3, num_workers=1), ckpt_path=checkpoint)
        return trained

    saving = ModelCheckpoint(tmp_path / "all", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    expected = run(None, [saving])
    for step in (3, 6, 9):
        assert same(expected, run(tmp_path / "all" / f"step={step}.ckpt", []))


def test_a_row_of_a_batch_is_found_again(tmp_path):
    """`place` names the row that a batch holds, in any epoch and after a resume."""
    seen = []

    class Looking(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            data = trainer.datamodule
            row = int(data.place(batch_idx, 2).split()[-1])
            seen.append(torch.equal(data.train.images[row], batch.x_1[2]))

    saving = ModelCheckpoint(tmp_path / "all", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, Few(3), [Looking(), saving], max_steps=7)
    fit(tmp_path, Few(3), [Looking()], tmp_path / "all" / "step=6.ckpt", max_steps=9)
    assert seen == [True] * 10


def test_lightning_still_has_what_this_leans_on():
    """The counters' names, and the order of hooks, are Lightning's own affair."""
    data, loop = Digits(), L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    keys = loop.state_dict().keys()
    assert {"epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"} <= keys
    assert "epoch_loop.val_loop.batch_progress" in keys
    assert loop.epoch_loop.restarting is False
    data.setup("fit")
    assert len(list(itertools.islice(data.train_dataloader(), 2))) == 2
