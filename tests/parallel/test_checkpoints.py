"""Sharded checkpoints: twenty steps of two processes with an interruption, against twenty steps of one process."""

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from decm_lightning import Distiller, load, losses
from decm_lightning.cli.consolidate import consolidate
from decm_lightning.cli.export import export
from decm_lightning.guidance import Guidance
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from tests.parallel.pair import SIZE, refusal
from tests.parallel.test_training import ROWS, Exact, OfBoth, student, whole

pytestmark = pytest.mark.slow
STEPS, BREAK = 20, 10
NETWORK = {"input_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 10}
# AdamW depends on all earlier steps, and the schedule on the number of steps.
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-2)
SCHEDULE = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=STEPS, pct_start=0.3)


class Run(NamedTuple):
    """Results of a run: full weights and averages, this process's loss at each step, and the teacher."""

    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    losses: list[float]
    teacher: dict[str, Tensor]


class Curve(L.Callback):
    """Records the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, *_):
        self.losses.append(trainer.callback_metrics["loss/total"].item())


def teacher() -> Teacher:
    """A teacher with a velocity that is not zero."""
    torch.manual_seed(1)
    network = DiT(**NETWORK)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.2)
    return Teacher(network.double())


def fit(
    processes: int,
    sharded: bool,
    folder: str = "",
    resumed: str | None = None,
    network: DiT | None = None,
    optimizer: OptimizerCallable = OPTIMIZER,
) -> Run:
    """Train to step 20, as one of two processes or as a single process that runs the steps of both.

    With a folder a checkpoint of the tenth step is left there.
    """
    a_teacher, flow_map = teacher(), network or student()
    # A resumed run starts with another seed and must continue with the checkpoint's.
    L.seed_everything(0 if resumed is None else 7, verbose=False)
    distiller = (partial(OfBoth, accumulated=1) if processes == 1 else Distiller)(
        a_teacher,
        flow_map,
        objective=losses.paper(2, batch_fractions=(0.5, 0.25, 0.25)),
        guidance=Guidance(2.0),
        optimizer=optimizer,
        lr_scheduler=SCHEDULE,
    )
    curve = Curve()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=BREAK, save_top_k=-1) if folder else None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=ModelParallelStrategy(processes, 1, save_distributed_checkpoint=True) if sharded else "auto",
        max_steps=STEPS,
        use_distributed_sampler=False,
        gradient_clip_val=0.5,
        callbacks=[curve, *([saving] if saving else [])],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=bool(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(distiller.double(), Exact(batch_size=ROWS * SIZE // processes), ckpt_path=resumed)
    return Run(whole(distiller.network), whole(distiller.average), curve.losses, whole(a_teacher.network))


@cache
def unbroken() -> Run:
    """Twenty steps of one process without shards."""
    return fit(1, sharded=False)


@pytest.fixture(scope="module")
def two(pair, tmp_path_factory):
    """Twenty steps of two processes, and the folder with the checkpoint of step 10."""
    folder = tmp_path_factory.mktemp("two")
    return pair.run(fit, SIZE, True, str(folder)), folder / f"step={BREAK}.ckpt"


def assert_same(runs: list[Run], first: int = 0) -> None:
    """Check that the results equal those of the uninterrupted run, and so do the mean losses from a step on."""
    right = unbroken()
    for run in runs:
        torch.testing.assert_close(run.weights, right.weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(run.averages, right.averages, rtol=0, atol=1e-10)
    curve = torch.tensor([run.losses for run in runs], dtype=torch.float64).mean(0)
    torch.testing.assert_close(curve, curve.new_tensor(right.losses[first:]), rtol=0, atol=1e-10)


def test_twenty_steps_of_two_processes_are_those_of_one(two):
    """Losses, weights and averages, by AdamW on a schedule, with clipped gradients."""
    runs, _ = two
    assert len(unbroken().losses) == STEPS
    assert_same(runs)
    start = student().double().state_dict()
    assert (unbroken().weights["blocks.0.attn.qkv.weight"] - start["blocks.0.attn.qkv.weight"]).abs().max() > 1e-2


def test_teacher_is_untouched_and_in_no_checkpoint(two):
    """Bit-identical, with student, average and optimizer state, each tensor once."""
    runs, checkpoint = two
    before = teacher().network.state_dict()
    for run in runs:
        assert run.teacher.keys() == before.keys()
        assert all(torch.equal(run.teacher[name], tensor) for name, tensor in before.items())
    stored = set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)
    network = student()
    kept = {f"state_dict.{part}.{name}" for part in ("network", "average") for name in network.state_dict()}
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    state = {f"optimizer_0.state.network.{n}.{k}" for n in trained for k in ("step", "exp_avg", "exp_avg_sq")}
    assert {name for name in stored if ".param_groups." not in name} == kept | state


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_from_shards(processes, two, pair, single):
    """On two processes or one: the same twenty steps as without an interruption, up to float64 rounding."""
    _, checkpoint = two
    runs = (single if processes == 1 else pair).run(fit, processes, True, "", str(checkpoint))
    assert_same(runs, BREAK)


def test_a_consolidated_checkpoint_goes_on_without_shards(two, tmp_path):
    """On one process with Lightning's default strategy."""
    _, checkpoint = two
    consolidate(str(checkpoint), str(tmp_path / "whole.ckpt"))
    assert_same([fit(1, False, "", str(tmp_path / "whole.ckpt"))], BREAK)


def test_a_consolidated_checkpoint_goes_on_in_shards(two, pair, tmp_path):
    """Two processes shard it again."""
    _, checkpoint = two
    consolidate(str(checkpoint), str(tmp_path / "whole.ckpt"))
    assert_same(pair.run(fit, SIZE, True, "", str(tmp_path / "whole.ckpt")), BREAK)


def test_averaged_weights_are_read_from_shards_file_and_folder(two, tmp_path):
    """`load` returns the average of step 10 from each, in float32."""
    _, checkpoint = two
    consolidate(str(checkpoint), str(tmp_path / "whole.ckpt"))
    export(str(checkpoint), str(tmp_path / "folder"))
    kept = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    expected = {name.removeprefix("average."): v.float() for name, v in kept.items() if name.startswith("average.")}
    networks = [load(path) for path in (checkpoint, tmp_path / "whole.ckpt", tmp_path / "folder")]
    for state in (*(network.state_dict() for network in networks), load_file(tmp_path / "folder/model.safetensors")):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert (expected["blocks.0.attn.qkv.weight"] - kept["network.blocks.0.attn.qkv.weight"]).abs().max() > 1e-4


def resume_wider(checkpoint: str) -> str:
    """Resume the checkpoint with a wider network; return the error message."""
    distiller = Distiller(teacher(), DiT(**NETWORK | {"width": 32}, end_time=True))
    return refusal(distiller.check_checkpoint, checkpoint, ModelParallelStrategy(SIZE, 1))


def test_another_network_is_refused_before_shards_are_read(two, pair):
    _, checkpoint = two
    for text in pair.run(resume_wider, str(checkpoint)):
        assert text.startswith(f"{checkpoint} ")
        assert "(width: 16 in the checkpoint, 32 in the config)" in text


def test_every_process_writes_a_part(two):
    """Each about half of the total."""
    _, checkpoint = two
    sizes = [file.stat().st_size for file in sorted(Path(checkpoint).glob("*.distcp"))]
    assert len(sizes) == SIZE
    assert max(sizes) < 2 * min(sizes)
