"""Networks whose weights are only in the first process are sharded to the same values as networks in all processes."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from decm_lightning import Distiller, losses
from decm_lightning.networks import DiT
from decm_lightning.teachers import Teacher
from decm_lightning.training.strategies import FSDP2
from tests.parallel.pair import SIZE
from tests.parallel.test_training import ROWS, Exact, whole

pytestmark = pytest.mark.slow
NETWORK = {
    "input_size": 8,
    "in_channels": 1,
    "patch_size": 4,
    "width": 16,
    "depth": 2,
    "heads": 2,
    "num_classes": 10,
    "pixel_skip": True,
}


class WithTable(DiT):
    """Has a buffer that is not in the state_dict."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register_buffer("table", torch.arange(3.0, dtype=torch.float64), persistent=False)


def fit(first_alone: bool) -> tuple[dict, dict, list[float], int]:
    """Return weights, average, the table, and the number of values in this process before sharding."""
    torch.manual_seed(1)
    network = WithTable(**NETWORK)
    nn.init.normal_(network.final_layer.linear.weight, std=0.2)
    teacher = Teacher(network.double())
    student = WithTable(**NETWORK | {"end_time": True}).double()
    L.seed_everything(0, verbose=False)
    distiller = Distiller(teacher, student, losses.paper(2), optimizer=partial(torch.optim.AdamW, lr=1e-2)).double()
    if first_alone and torch.distributed.get_rank():
        distiller.network.to("meta")
        distiller.average.to("meta")
        teacher.network.to("meta")
    networks = (distiller.network, distiller.average, teacher.network)
    held = sum(p.numel() for each in networks for p in each.parameters() if not p.is_meta)
    trainer = L.Trainer(
        accelerator="cpu", devices=SIZE, strategy=FSDP2(), max_steps=3, use_distributed_sampler=False, logger=False,
        limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(distiller, Exact(batch_size=ROWS))
    return whole(distiller.network), whole(distiller.average), distiller.network.table.tolist(), held


def test_weights_of_the_first_process_are_enough(pair):
    expected, actual = pair.run(fit, False), pair.run(fit, True)
    for (network, average, _, _), (other, other_average, table, _) in zip(expected, actual, strict=True):
        assert all(torch.equal(network[name], other[name]) for name in network)
        assert all(torch.equal(average[name], other_average[name]) for name in average)
        assert table == [0, 1, 2]
    assert [run[-1] for run in actual] == [expected[0][-1], 0]
