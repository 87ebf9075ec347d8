"""Muon for matrices with AdamW for the rest: torch's own steps, resumed runs, schedules, configs."""

import copy
import math
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from decm_lightning import TeacherTraining
from decm_lightning.data import Digits
from decm_lightning.networks import DiT
from decm_lightning.training import Muon


def orthogonal(g: Tensor) -> Tensor:
    """Return the step that Muon takes from 0 for one gradient, divided by its learning rate and scale."""
    weight = nn.Parameter(torch.zeros_like(g))
    weight.grad = g
    Muon([weight], lr=1.0, momentum=0.0).step()
    return -weight.detach() / (0.2 * math.sqrt(max(g.shape)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def train(net: nn.Module, *optimizers: torch.optim.Optimizer, first: int = 0, steps: int = 5) -> None:
    for seed in range(first, first + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        net.zero_grad()
        net(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_a_step_is_those_of_muon_and_adamw():
    """Bit-identical to torch's two optimizers, with weight decay and momentum."""
    ours, theirs = network(), network()
    train(ours, Muon(ours.parameters(), 1e-2, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.99)))
    matrices, others = ([p for p in theirs.parameters() if (p.ndim == 2) == yes] for yes in (True, False))
    muon = torch.optim.Muon(matrices, 1e-2, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    train(theirs, muon, torch.optim.AdamW(others, 1e-2, (0.8, 0.99), weight_decay=0.1))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours[0].weight, network()[0].weight)


def test_the_step_of_a_matrix_is_orthogonal_and_as_long_as_that_of_adamw():
    """Singular values near 1, whatever those of the gradient are; root mean square near 0.2 of the learning rate."""
    g = torch.diag(torch.tensor([1.0, 0.3, 0.1, 0.03])) @ torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(g))
    assert torch.linalg.svdvals(g)[[0, -1]].log().diff().abs() > 2
    assert ((values > 0.6) & (values < 1.3)).all()
    rms = 0.2 * math.sqrt(12) * orthogonal(g).square().mean().sqrt()
    assert 0.15 < rms < 0.25


def test_matrices_alone_and_no_matrices():
    for weights in ([nn.Parameter(torch.ones(2, 3))], [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2, 1))]):
        optimizer = Muon(weights, lr=0.1)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert all((weight < 1).all() for weight in weights)
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([])


def test_the_state_continues():
    """After loading, steps are bit-identical and the loaded learning rate counts, as for torch's optimizers."""
    net = network()
    optimizer = Muon(net.parameters(), 1e-2)
    train(net, optimizer)
    other = copy.deepcopy(net)
    loaded = Muon(other.parameters(), lr=1.0)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, first=5)
    train(other, loaded, first=5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def fit(folder, steps: int, checkpoint: str | None = None) -> TeacherTraining:
    L.seed_everything(1 if checkpoint else 0, verbose=False)
    torch.manual_seed(0)
    module = TeacherTraining(
        DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10),
        optimizer=partial(Muon, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, 10),
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, Digits(batch_size=16), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """With a schedule that changes the learning rate and the momentum of every step."""
    whole = fit(tmp_path, 8)
    fit(tmp_path, 4)
    resumed = fit(tmp_path, 8, str(tmp_path / "4.ckpt"))
    states = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    steps = {group["lr"] for group in resumed.optimizers().param_groups}
    assert len(steps) == 1
