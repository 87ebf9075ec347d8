"""The average of the weights: float32 in every precision, buffers, and loading it again."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from decm_lightning import Distiller, TeacherTraining, load
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.networks.network import Network
from decm_lightning.samplers import euler
from decm_lightning.teachers import Teacher
from tests.networks.test_lora import Line

HALVES = ["bf16-true", "16-true"]


class Drift(torch.optim.Optimizer):
    """Adds the same number to every weight: exact in bfloat16 up to 256 steps from 0."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure):
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p += 2**-9


def tiny(**options) -> DiT:
    torch.manual_seed(0)
    return DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, **options)


def trained(module, precision, steps, folder=None, resumed=None):
    """Return the module after training, and the checkpoint of its last step in the folder."""
    saving = [ModelCheckpoint(folder, every_n_train_steps=steps, filename="run")] if folder else []
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=steps,
        callbacks=saving,
        enable_checkpointing=bool(folder),
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Digits(batch_size=16), ckpt_path=resumed)
    return module


def drifted(precision) -> TeacherTraining:
    """Return a network that began with zero weights and drifted for 40 steps, and its average."""
    network = tiny()
    for p in network.parameters():
        nn.init.zeros_(p)
    return trained(TeacherTraining(network, Drift, ema_decay=0.999), precision, 40)


@pytest.mark.parametrize("precision", HALVES)
def test_average_moves_in_half_precision_as_in_float32(precision):
    """The same drift of the weights is averaged to within 1e-3, where an average in bfloat16 is 1 % off and more."""
    half, full = drifted(precision), drifted("32-true")
    for name, weights in full.network.named_parameters():
        assert half.network.get_parameter(name).dtype != torch.float32
        assert torch.equal(half.network.get_parameter(name).float(), weights), name
        mean = half.average.get_parameter(name)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, full.average.get_parameter(name), rtol=1e-3, atol=1e-6)
    assert full.average.final_layer.linear.bias.mean() > 0.04


@pytest.mark.parametrize("precision", HALVES)
def test_average_is_saved_resumed_and_loaded_in_float32(precision, tmp_path):
    """Bit for bit: what training left, what the checkpoint holds, what `load` reads, and what a resumed run leaves."""

    def module():
        L.seed_everything(1, verbose=False)
        return Distiller(Teacher(tiny()), optimizer=lambda p: torch.optim.SGD(p, 1e-2), ema_decay=0.99)

    whole = trained(module(), precision, 6)
    trained(module(), precision, 3, tmp_path)
    resumed = trained(module(), precision, 6, tmp_path / "last", tmp_path / "run.ckpt")
    loaded = load(tmp_path / "last" / "run.ckpt").state_dict()
    for name, mean in whole.average.state_dict().items():
        assert torch.equal(mean, resumed.average.state_dict()[name]), name
        assert torch.equal(mean, loaded[name]), name
    # More than bfloat16 and float16 can hold.
    weight = whole.average.blocks[0].attn.qkv.weight
    assert not torch.equal(weight, weight.bfloat16().float())
    assert not torch.equal(weight, weight.half().float())


@pytest.mark.parametrize("precision", HALVES)
def test_moves_and_casts_leave_the_average_in_float32(precision):
    """The average stays in float32 for narrower casts of the module, and follows wider ones."""
    module = TeacherTraining(tiny())
    before = {name: value.clone() for name, value in module.average.state_dict().items()}
    module.bfloat16().half().cpu()
    assert {p.dtype for p in module.network.parameters()} == {torch.float16}
    for name, value in module.average.state_dict().items():
        assert torch.equal(value, before[name])
    assert {p.dtype for p in module.double().average.parameters()} == {torch.float64}
    # A network that was made in half precision is averaged in float32 as well.
    assert {p.dtype for p in TeacherTraining(tiny().bfloat16()).average.parameters()} == {torch.float32}


class Counting(Network):
    """A user's network, whose layers take one dtype alone, with buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.sample_shape, self.num_classes = {}, (1, 8, 8), 0
        self.norm = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, 64)
        self.register_buffer("table", torch.linspace(0, 1, 64))
        self.register_buffer("largest", torch.zeros(()), persistent=False)

    def forward(self, x_t, t, s, condition):
        if self.training:
            self.largest.fill_(max(float(self.largest), float(x_t.abs().max())))
        return self.linear(self.norm(x_t.flatten(1)) + self.table).reshape(x_t.shape)

    def with_end_time(self):
        raise NotImplementedError


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_buffers_are_copied(precision):
    """Running statistics and counters, persistent or not; a constant table keeps its float32 digits."""
    module = trained(TeacherTraining(Counting(), class_dropout=0.0), precision, 5)
    network, average = module.network, module.average
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "largest"):
        assert torch.equal(average.get_buffer(name), network.get_buffer(name).to(average.get_buffer(name).dtype)), name
    assert average.norm.num_batches_tracked == 5
    assert average.norm.running_mean.abs().max() > 0
    assert average.largest > 1
    assert torch.equal(average.table, torch.linspace(0, 1, 64))


def test_average_is_sampled_in_half_precision():
    """Inputs are cast to the average's dtype: the samples have that of the noise."""
    module = trained(TeacherTraining(Counting(), class_dropout=0.0), "bf16-true", 1).eval()
    x_0 = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        samples = euler(module.models()["teacher"], x_0.bfloat16(), None, 2)
        wide = euler(module.models()["teacher"], x_0.bfloat16().float(), None, 2)
    assert samples.dtype == torch.bfloat16
    torch.testing.assert_close(samples.float(), wide, rtol=2e-2, atol=2e-2)


def test_average_of_lora_shares_its_base_and_is_float32_elsewhere():
    """The frozen base is cast with the network's and held once; adapters and end time are averaged in float32."""
    torch.manual_seed(0)
    module = TeacherTraining(Line(lora_rank=2), class_dropout=0.0).bfloat16()
    for name, p in module.network.named_parameters():
        mean = module.average.get_parameter(name)
        assert p.dtype == torch.bfloat16
        assert (mean is p) == (name not in module.network.added)
        assert mean.dtype == (torch.float32 if name in module.network.added else torch.bfloat16)
