"""The average in float32 while two processes train in bfloat16, full or sharded, and as loaded from a checkpoint."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from decm_lightning import TeacherTraining, load
from decm_lightning.data import Digits
from tests.parallel.test_training import STRATEGIES
from tests.training.test_ema import Drift, drifted, tiny

pytestmark = pytest.mark.slow
STEPS = 40


def fit(strategy: str, folder: str) -> dict[str, Tensor]:
    """Return the average after weights drift from 0, gathered if sharded; save a checkpoint to the folder."""
    network = tiny()
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    module = TeacherTraining(network, Drift, ema_decay=0.999)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](),
        precision="bf16-true",
        max_steps=STEPS,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=STEPS, filename="run")],
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Digits(batch_size=8))
    assert {p.dtype for p in module.network.parameters()} == {torch.bfloat16}
    means = dict(module.average.named_parameters())
    assert {p.dtype for p in means.values()} == {torch.float32}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in means.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_average_of_two_processes_is_that_of_float32(strategy, pair, tmp_path):
    expected = dict(drifted("32-true").average.named_parameters())
    runs = pair.run(fit, strategy, str(tmp_path))
    loaded = dict(load(tmp_path / "run.ckpt").named_parameters())
    for name, mean in expected.items():
        for run in runs:
            torch.testing.assert_close(run[name], mean.detach(), rtol=1e-3, atol=1e-6)
            assert torch.equal(run[name], loaded[name])
