"""The multi-process configs in configs/trainer, started as documented, on CPUs instead of GPUs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from decm_lightning import load

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FSDP = ["--trainer.devices", "2"]


@pytest.fixture
def experiment(tmp_path):
    """The digits' config, short, with a checkpoint at every second step and a validation at the fourth."""
    content = yaml.safe_load((ROOT / "configs/digits/decm.yaml").read_text())
    content["trainer"] |= {"val_check_interval": 4, "logger": False, "default_root_dir": str(tmp_path)}
    named = {callback["class_path"].split(".")[-1]: callback for callback in content["trainer"]["callbacks"]}
    saving = {"dirpath": str(tmp_path / "kept"), "filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1}
    named["ModelCheckpoint"]["init_args"] = saving
    named["Evaluation"]["init_args"] |= {"samples": 64, "test_samples": 64, "test_specs": ["student/mix/1"]}
    del named["LearningRateMonitor"], named["SampleGrid"]
    content["trainer"]["callbacks"] = list(named.values())
    content["data"]["init_args"]["batch_size"] = 16
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "experiment.yaml"


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> str:
    """Wait, and return the output of the first process; a failure shows all outputs."""
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(printed)
    return printed[0]


def decm(*argv: str) -> str:
    return finish(start(sys.executable, "-m", "decm_lightning", *argv))


def torchrun(processes: int, *argv: str, nodes: tuple[str, ...] = ("--standalone",)) -> subprocess.Popen:
    workers = ["--nproc-per-node", str(processes), "-m", "decm_lightning"]
    return start(sys.executable, "-m", "torch.distributed.run", *nodes, *workers, *argv)


def fit(experiment: Path, overlay: str, *more: str) -> list[str]:
    return ["fit", "--config", str(experiment), "--config", f"configs/trainer/{overlay}.yaml", *CPU, *more]


def same(one: Path, other: Path, tolerance: float) -> None:
    """Check that two checkpoints have the same averaged weights."""
    for a, b in zip(load(one).parameters(), load(other).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_fsdp_trains_resumes_tests_and_is_consolidated(experiment):
    """Four steps in bf16-mixed; the last two are repeated from the shards, and on one process from a single file."""
    kept = experiment.parent / "kept"
    finish(torchrun(2, *fit(experiment, "fsdp", *FSDP, "--trainer.max_steps", "4")))
    assert {path.name for path in kept.iterdir()} == {"step=2.ckpt", "step=4.ckpt", "last.ckpt"}
    (kept / "step=4.ckpt").rename(kept / "first.ckpt")
    resumed = ["--ckpt_path", str(kept / "step=2.ckpt"), "--trainer.max_steps", "4"]
    finish(torchrun(2, *fit(experiment, "fsdp", *FSDP, *resumed)))
    same(kept / "first.ckpt", kept / "step=4.ckpt", 0)
    test = fit(experiment, "fsdp", *FSDP, "--ckpt_path", str(kept / "first.ckpt"))
    assert "| student | mix | 1 | 1 |" in finish(torchrun(2, "test", *test[1:]))
    one = str(kept / "one.ckpt")
    assert decm("consolidate", str(kept / "first.ckpt"), "--out", one) == f"wrote {one}\n"
    same(Path(one), kept / "first.ckpt", 0)
    decm(*fit(experiment, "cpu", "--ckpt_path", one, "--trainer.max_steps", "6"))
    assert (kept / "step=6.ckpt").is_file()


def test_ddp_and_nodes_train_as_fsdp_does(experiment):
    """Two processes on one machine, and one on each of two machines, which are both this one."""
    kept = experiment.parent / "kept"
    steps = ["--trainer.max_steps", "2", "--trainer.precision", "32-true"]
    finish(torchrun(2, *fit(experiment, "fsdp", *FSDP, *steps)))
    (kept / "step=2.ckpt").rename(kept / "fsdp.ckpt")
    finish(torchrun(2, *fit(experiment, "ddp", "--trainer.devices", "2", *steps)))
    (kept / "step=2.ckpt").rename(kept / "ddp.ckpt")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meet = ["--nnodes", "2", "--master-addr", "localhost", "--master-port", str(probe.getsockname()[1])]
    argv = fit(experiment, "nodes", "--trainer.devices", "1", *steps)
    finish(*(torchrun(1, *argv, nodes=(*meet, "--node-rank", str(rank))) for rank in range(2)))
    # Sums are rounded in a different order, and Adam divides by their size.
    same(kept / "fsdp.ckpt", kept / "ddp.ckpt", 1e-5)
    same(kept / "step=2.ckpt", kept / "ddp.ckpt", 1e-5)
