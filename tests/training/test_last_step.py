"""The last step of every run is in last.ckpt, and a signal gives the exit code that shells expect."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from decm_lightning import TeacherTraining
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.training.last_step import Stopped


def trainer(folder: Path, *callbacks: L.Callback, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"limit_val_batches": 0, "num_sanity_val_steps": 0} | options,
    )


def module() -> TeacherTraining:
    L.seed_everything(0, verbose=False)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    return TeacherTraining(network, optimizer=lambda p: torch.optim.AdamW(p, 1e-2))


def step_of(file: Path) -> int:
    return torch.load(file, weights_only=True)["global_step"]


class At(L.Callback):
    """Does something in a hook, at a step."""

    def __init__(self, step: int, action, hook: str = "on_train_batch_start") -> None:
        self.step = step
        setattr(self, hook, lambda trainer, *_: trainer.global_step == step and action(trainer))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_time": timedelta(seconds=1)}, None),
    ],
)
@pytest.mark.parametrize(
    "saving",
    [
        {"every_n_train_steps": 3, "save_last": True},
        {"every_n_train_steps": 3, "save_last": "link", "save_top_k": -1},
        {"every_n_train_steps": 3},
        {"save_top_k": 0},
        {},
    ],
)
def test_the_last_step_is_saved(options, steps, saving, tmp_path):
    run = trainer(tmp_path, ModelCheckpoint(tmp_path, **saving), **options)
    run.fit(module(), Digits(batch_size=100))
    assert steps in (None, run.global_step)
    assert step_of(tmp_path / "last.ckpt") == run.global_step > 0


def test_a_run_that_stops_early_saves_its_last_step(tmp_path):
    stopping = EarlyStopping("loss/flow_matching", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_last=True)
    run = trainer(tmp_path, saving, stopping, max_epochs=9, limit_train_batches=7)
    run.fit(module(), Digits(batch_size=100))
    assert run.global_step < 9 * 7
    assert step_of(tmp_path / "last.ckpt") == run.global_step


def test_each_callback_that_saves_the_last_has_it(tmp_path):
    first = ModelCheckpoint(tmp_path / "a", every_n_train_steps=2, save_last=True)
    second = ModelCheckpoint(tmp_path / "b", every_n_train_steps=3, save_last=True)
    trainer(tmp_path, first, second, max_steps=5).fit(module(), Digits(batch_size=100))
    assert [step_of(tmp_path / name / "last.ckpt") for name in "ab"] == [5, 5]


@pytest.mark.parametrize("steps", [4, 5])
def test_a_checkpoint_named_last_is_replaced_by_its_own_run(steps, tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="last")
    trainer(tmp_path, saving, max_steps=steps).fit(module(), Digits(batch_size=100))
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    assert step_of(tmp_path / "last.ckpt") == steps
    assert "last-v1.ckpt" not in caplog.text


def test_a_second_run_in_a_folder_says_where_its_last_step_is(tmp_path, caplog):
    for steps in (5, 3):
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
        trainer(tmp_path, saving, max_steps=steps).fit(module(), Digits(batch_size=100))
        assert ("last-v1.ckpt" in caplog.text) == (steps == 3)
    assert [step_of(tmp_path / name) for name in ("last.ckpt", "last-v1.ckpt")] == [5, 3]


def test_resuming_a_run_that_has_ended_says_that_nothing_was_trained(tmp_path, caplog):
    def fit(checkpoint):
        run = trainer(tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_steps=5)
        run.fit(module(), Digits(batch_size=100), ckpt_path=checkpoint)

    fit(None)
    assert "nothing was trained" not in caplog.text
    fit(tmp_path / "last.ckpt")
    assert "nothing was trained: the run is at step 5, and trainer.max_steps is 5" in caplog.text


def test_without_checkpoints_nothing_is_saved(tmp_path):
    trainer(tmp_path, max_steps=2, enable_checkpointing=False).fit(module(), Digits(batch_size=100))
    trainer(tmp_path, ModelCheckpoint(tmp_path), fast_dev_run=2).fit(module(), Digits(batch_size=100))
    assert not list(tmp_path.glob("**/*.ckpt"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_start", "on_validation_batch_end"])
def test_a_run_that_a_signal_has_stopped_resumes_to_the_same_bits(signum, hook, tmp_path):
    # An epoch has 14 steps: the 18th is the fourth of the second one.
    options = {"max_steps": 30, "val_check_interval": 4, "limit_val_batches": 1}
    whole = module()
    trainer(tmp_path, enable_checkpointing=False, **options).fit(whole, Digits(batch_size=128))
    before = signal.getsignal(signum)
    interrupted = trainer(
        tmp_path,
        ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True),
        At(18, lambda _: os.kill(os.getpid(), signum), hook),
        **options,
    )
    with pytest.raises(Stopped) as caught:
        interrupted.fit(module(), Digits(batch_size=128))
    assert caught.value.code == 128 + signum
    assert signal.getsignal(signum) == before
    assert step_of(tmp_path / "last.ckpt") == 18 + (hook == "on_train_batch_start")
    resumed = module()
    trainer(tmp_path, enable_checkpointing=False, **options).fit(
        resumed, Digits(batch_size=128), ckpt_path=tmp_path / "last.ckpt"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class KilledWhileLoading(Digits):
    """Receives SIGTERM after Lightning has installed its handlers and before the first batch."""

    def train_dataloader(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().train_dataloader()


@pytest.mark.parametrize("stage", ["fit", "sanity", "validate", "test", "predict"])
def test_sigterm_where_nothing_can_be_saved_ends_the_run_at_once(stage, tmp_path):
    before, trained = signal.getsignal(signal.SIGTERM), module()
    hook = {"sanity": "on_sanity_check_start", "validate": "on_validation_start"}.get(stage, f"on_{stage}_start")
    killing = [] if stage == "fit" else [At(0, lambda _: os.kill(os.getpid(), signal.SIGTERM), hook)]
    run = trainer(tmp_path, *killing, max_steps=3, limit_val_batches=1, num_sanity_val_steps=1)
    data = (KilledWhileLoading if stage == "fit" else Digits)(batch_size=100)
    with pytest.raises(SystemExit) as caught:
        getattr(run, "fit" if stage == "sanity" else stage)(trained, data)
    assert caught.value.code == 128 + signal.SIGTERM
    assert run.global_step == 0
    assert signal.getsignal(signal.SIGTERM) == before


class KilledWhileSaving(L.Callback):
    """Receives SIGTERM again, once it is stopping."""

    stopping = False

    def on_exception(self, trainer, pl_module, exception):
        self.stopping = True

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        # Lightning 2.5.6 also saves at every validation.
        if self.stopping:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_end"])
def test_a_second_sigterm_leaves_the_saving_alone(hook, tmp_path):
    first = At(4, lambda _: os.kill(os.getpid(), signal.SIGTERM), hook)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True)
    options = {"max_steps": 9, "val_check_interval": 4, "limit_val_batches": 1}
    with pytest.raises(Stopped):
        trainer(tmp_path, saving, first, KilledWhileSaving(), **options).fit(module(), Digits(batch_size=100))
    assert step_of(tmp_path / "last.ckpt") == 4 + (hook == "on_train_batch_start")


def test_ctrl_c_twice_stops_at_once(tmp_path):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True)
    with pytest.raises(SystemExit) as caught:
        trainer(tmp_path, saving, At(2, twice), max_steps=9).fit(module(), Digits(batch_size=100))
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_job_that_slurm_will_requeue_is_saved_between_two_steps(tmp_path, monkeypatch):
    """Lightning saves within the signal handler, in the middle of a step, which would not resume exactly."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: 0)
    run = trainer(
        tmp_path,
        At(3, lambda _: os.kill(os.getpid(), signal.SIGUSR1)),
        max_steps=6,
        enable_checkpointing=False,
        plugins=[SLURMEnvironment()],
        devices=1,
    )
    monkeypatch.setattr(SLURMEnvironment, "world_size", lambda self: 1)
    monkeypatch.setattr(SLURMEnvironment, "global_rank", lambda self: 0)
    monkeypatch.setattr(SLURMEnvironment, "local_rank", lambda self: 0)
    run.fit(module(), Digits(batch_size=100))
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 4
    assert run.global_step == 6


CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: {devices}
  max_steps: 100000
  limit_val_batches: 0
  enable_progress_bar: false
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: ., name: run, version: ""}}}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{every_n_train_steps: 10, save_last: true}}
model:
  class_path: decm_lightning.TeacherTraining
  init_args:
    network:
      class_path: decm_lightning.networks.DiT
      init_args: {{input_size: 8, in_channels: 1, patch_size: 4, width: 16, depth: 1, heads: 2, num_classes: 10}}
data: {{class_path: decm_lightning.data.Digits, init_args: {{batch_size: 32}}}}
"""


def children(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in listed.stdout.split()]


# A terminal sends Ctrl-C to all processes, a scheduler SIGTERM to the first, or to those of the machine it takes back.
def to_all(process: subprocess.Popen, signum: int) -> None:
    os.killpg(process.pid, signum)


def to_first(process: subprocess.Popen, signum: int) -> None:
    process.send_signal(signum)


def to_second(process: subprocess.Popen, signum: int) -> None:
    os.kill(children(process)[0], signum)


@pytest.mark.parametrize(
    ("signum", "devices", "send"),
    [
        (signal.SIGTERM, 1, to_first),
        (signal.SIGINT, 1, to_all),
        pytest.param(signal.SIGTERM, 2, to_first, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, to_second, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, to_all, marks=pytest.mark.slow),
    ],
)
def test_the_command_exits_as_shells_expect(signum, devices, send, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG.format(devices=devices))
    command = [sys.executable, "-m", "decm_lightning", "fit", "--config", "config.yaml"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    try:
        while not last.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        send(process, signum)
        assert process.wait(120) == 128 + signum
    finally:
        subprocess.run(["pkill", "-9", "-s", str(process.pid)], check=False)
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert f"after step {step_of(last)}" in log


class Signalled(Digits):
    """Digits that get SIGTERM while Lightning sets up their loaders, after it has taken over the signals."""

    def train_dataloader(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().train_dataloader()

    def predict_dataloader(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().val_dataloader()


def test_a_signal_before_the_first_batch_is_not_lost(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        trainer(tmp_path, ModelCheckpoint(tmp_path, save_last=True), max_steps=9).fit(module(), Signalled())
    assert stopped.value.code == 143
    assert not (tmp_path / "last.ckpt").exists()
    with pytest.raises(SystemExit) as ended:
        trainer(tmp_path).predict(module(), Signalled())
    assert ended.value.code == 143
