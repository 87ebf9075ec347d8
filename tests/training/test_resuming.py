"""A run resumed from any of its checkpoints ends with the bits and the steps of an uninterrupted one."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from decm_lightning import Distiller, TeacherTraining, losses
from decm_lightning.data.images.labelled_images import LabelledImages
from decm_lightning.data.resumable import ResumableData
from decm_lightning.guidance import Guidance
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from decm_lightning.training import WarmupCosine
from decm_lightning.types import Batch

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


class Few(ResumableData):
    """Thirteen images in batches of three: an epoch of four steps."""

    num_classes = 3

    def setup(self, stage: str) -> None:
        images = torch.randn(13, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        self.train = self.reference = LabelledImages(images, torch.arange(13) % 3)


class Plain(L.LightningDataModule):
    """A user's data without a saved position, in order, from an ordinary DataLoader."""

    def setup(self, stage: str) -> None:
        images = torch.randn(13, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        self.rows = LabelledImages(images, torch.arange(13) % 3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=4, drop_last=True, collate_fn=lambda batch: batch)


class Stream(L.LightningDataModule):
    """A user's stream of four batches per epoch, which does not know its length."""

    class Batches(IterableDataset):
        def __iter__(self):
            images = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(5))
            yield from (Batch(x_1, torch.arange(3)) for x_1 in images.split(3))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.Batches(), batch_size=None)


class SaveEverywhere(L.Callback):
    """Saves a numbered checkpoint in every hook."""

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


@pytest.mark.parametrize("scheduling", [{0: 1, 1: 2, 2: 3}, {0: 3, 1: 2}])
def test_accumulation_that_changes_by_epochs(scheduling, tmp_path):
    def accumulation():
        return GradientAccumulationScheduler(dict(scheduling))

    options = {"max_epochs": 3, "limit_val_batches": 0}
    whole, expected = fit(tmp_path, Few(3), [accumulation(), SaveEverywhere(tmp_path)], **options)
    for checkpoint in distinct(tmp_path):
        trainer, resumed = fit(tmp_path, Few(3), [accumulation()], checkpoint, **options)
        assert trainer.global_step == whole.global_step, checkpoint.name
        assert same(expected, resumed), checkpoint.name


def test_a_stream_is_exact_at_an_epoch_s_end_and_warns_within_one(tmp_path):
    _, expected = fit(tmp_path, Stream(), [SaveEverywhere(tmp_path)], max_epochs=2)
    for checkpoint in distinct(tmp_path):
        within = torch.load(checkpoint, weights_only=True)["global_step"] % 4
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, resumed = fit(tmp_path, Stream(), [], checkpoint, max_epochs=2)
        assert any(f"repeats the {within} batches" in str(each.message) for each in caught) == (within > 0)
        assert same(expected, resumed) == (within == 0), checkpoint.name


def test_overfit_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"overfit_batches.*Few.*limit_train_batches"):
        fit(tmp_path, Few(3), [], max_epochs=2, overfit_batches=1)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_every_precision_resumes_to_the_same_bits(precision, tmp_path):
    options = {"max_steps": 6, "precision": precision, "limit_val_batches": 0}
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    _, expected = fit(tmp_path, Few(3), [saving], **options)
    _, resumed = fit(tmp_path, Few(3), [], tmp_path / "step=3.ckpt", **options)
    assert same(expected, resumed)


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


SCHEDULES = {
    "one cycle": lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, n),
    "cosine": lambda o, n: torch.optim.lr_scheduler.CosineAnnealingLR(o, n),
    "warm-up, then cosine": lambda o, n: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, n - 3),
        ],
        [3],
    ),
    "by a function": lambda o, n: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
}


def run(folder, steps, checkpoint=None, every=None, **options):  # type: ignore[no-untyped-def]
    """Train with a given optimizer, schedule and so on, and return the trainer."""
    torch.manual_seed(0)
    trained = TeacherTraining(DiT(**NETWORK), **options)
    saving = ModelCheckpoint(folder, every_n_train_steps=every or steps, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, max_steps=steps, callbacks=[saving], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(trained, Few(3), ckpt_path=checkpoint)
    return trainer


def adam(lr=1e-2, **options):  # type: ignore[no-untyped-def]
    return lambda p: torch.optim.AdamW(p, lr, **options)


def test_learning_rate_and_weight_decay_come_from_the_config_and_are_named(tmp_path, caplog):
    constant = {"lr_scheduler": lambda o: WarmupCosine(o, warmup=0.0, floor=1.0)}
    run(tmp_path / "first", 3, optimizer=adam(1e-3, weight_decay=0.1), **constant)
    checkpoint = tmp_path / "first" / "step=3.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"]
    resumed = run(tmp_path / "again", 4, checkpoint, optimizer=adam(1e-6, weight_decay=0.5), **constant)
    group = resumed.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-6, 0.5)
    assert "optimizer.lr 1e-06 (0.001 in the checkpoint)" in caplog.text
    assert "optimizer.weight_decay 0.5 (0.1 in the checkpoint)" in caplog.text
    # Moments are state and are restored.
    (before, *_), (after, *_) = saved.values(), resumed.optimizers[0].state_dict()["state"].values()
    assert after["step"] == before["step"] + 1 == 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_other_length_is_that_of_the_config_from_the_next_step_on(name, tmp_path):
    def options(length):
        return {"optimizer": adam(), "lr_scheduler": lambda o: SCHEDULES[name](o, length)}

    rates = []

    class Rates(TeacherTraining):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            super().on_before_optimizer_step(optimizer)

    optimizer = adam()(DiT(**NETWORK).parameters())
    schedule, expected = SCHEDULES[name](optimizer, 12), []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    run(tmp_path / "first", 5, **options(9))
    checkpoint = tmp_path / "first" / "step=5.ckpt"
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        max_steps=12, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Rates(DiT(**NETWORK), **options(12)), Few(3), ckpt_path=checkpoint)
    assert rates == pytest.approx(expected[5:], rel=1e-12)


def test_a_schedule_of_another_class_is_as_the_config_has_it(tmp_path):
    cosine = {"lr_scheduler": lambda o: SCHEDULES["cosine"](o, 10)}
    constant = {"lr_scheduler": lambda o: WarmupCosine(o, warmup=0.0, floor=1.0)}
    run(tmp_path / "constant", 5, optimizer=adam(), **constant)
    run(tmp_path / "cosine", 5, optimizer=adam(), **cosine)
    added = run(tmp_path / "1", 6, tmp_path / "constant" / "step=5.ckpt", optimizer=adam(), **cosine)
    removed = run(tmp_path / "2", 6, tmp_path / "cosine" / "step=5.ckpt", optimizer=adam(), **constant)
    same = run(tmp_path / "3", 6, tmp_path / "cosine" / "step=5.ckpt", optimizer=adam(), **cosine)
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (added, removed, same)]
    assert rates[0] == pytest.approx(rates[2], rel=1e-12)
    assert rates[1] == 1e-2
    assert rates[2] < 1e-2


def test_a_schedule_that_follows_a_metric_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        run(tmp_path, 2, optimizer=adam(), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_another_optimizer_is_refused_by_name(tmp_path):
    run(tmp_path, 2, optimizer=adam())
    with pytest.raises(ValueError, match=r"optimizer\.class: got SGD \(AdamW"):
        run(tmp_path / "b", 4, tmp_path / "step=2.ckpt", optimizer=lambda p: torch.optim.SGD(p, 0.1))


def distill(folder, checkpoint=None, teacher_scale=1.0, **options):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network = DiT(**NETWORK)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.2 * teacher_scale)
    saving = ModelCheckpoint(folder, every_n_train_steps=2, filename="{step}")
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        max_steps=4 if checkpoint else 2, callbacks=[saving],
    )  # fmt: skip
    trainer.fit(Distiller(Teacher(network), optimizer=adam(), **options), Few(3), ckpt_path=checkpoint)
    return trainer


def test_another_teacher_is_refused_by_the_hash_of_its_weights(tmp_path):
    distill(tmp_path / "a")
    checkpoint = tmp_path / "a" / "step=2.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["settings"]["teacher"]
    with pytest.raises(ValueError, match=f"another teacher: got [0-9a-f]{{16}} .{saved} in the checkpoint"):
        distill(tmp_path / "b", checkpoint, teacher_scale=1.1)
    assert distill(tmp_path / "c", checkpoint).global_step == 4


def test_objective_and_guidance_come_from_the_config_and_are_named(tmp_path, caplog):
    distill(tmp_path / "a", objective=losses.paper(n2n_every=3), guidance=Guidance(1.5))
    checkpoint = tmp_path / "a" / "step=2.ckpt"
    distill(tmp_path / "b", checkpoint, objective=losses.paper(n2n_every=2), guidance=Guidance(2.0), ema_decay=0.5)
    assert "objective.losses.noise_to_noisy.every 2 (3 in the checkpoint)" in caplog.text
    assert "guidance.scale 2.0 (1.5 in the checkpoint)" in caplog.text
    assert "ema_decay 0.5 (0.9999 in the checkpoint)" in caplog.text
