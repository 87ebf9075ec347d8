"""Published methods in the distiller: exact students have no loss, and students learn the exact mixture."""

import lightning as L
import pytest
import torch

from decm_lightning import Distiller, losses
from decm_lightning.flows import Gaussian, GaussianMixture
from decm_lightning.guidance import Guidance
from decm_lightning.losses.learned_weight import LogWeight
from decm_lightning.networks import MLP
from decm_lightning.samplers import euler
from decm_lightning.teachers import ExactTeacher, NoTeacher
from decm_lightning.types import Batch
from tests.test_distiller import ExactStudent, GaussianTeacher

RIVALS = {
    "facm": losses.facm(),
    "scm": losses.scm(warmup_steps=0, learned_weight=False),
    "mean_flow": losses.mean_flow(),
    "ayf_emd": losses.ayf_emd(warmup_steps=0),
    "ayf_lmd": losses.ayf_lmd(warmup_steps=0),
    "lagrangian": losses.lagrangian(),
    "free_flow": losses.free_flow(),
    "split_mean_flow": losses.split_mean_flow(),
    "whole_triangle": losses.whole_triangle(),
}
APPROXIMATE = {
    "alpha_flow": losses.alpha_flow(),
    "shortcut": losses.shortcut(),
    "discrete_consistency": losses.discrete_consistency(),
}
"""Their first part is an Euler step, or their shortest step is taken for the velocity."""


def step(objective, monkeypatch, spread=0.6):
    """Run one training step of the exact student and return the distiller."""
    flow = Gaussian(mean=torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), std=spread)
    distiller = Distiller(GaussianTeacher(flow), ExactStudent(flow), objective).double()
    monkeypatch.setattr(distiller, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(distiller, "log", lambda *a, **k: None)
    distiller.training_step(Batch(flow.sample(64, 3, torch.Generator().manual_seed(0), torch.float64), None), 0)
    return distiller


@pytest.mark.parametrize("name", RIVALS)
def test_exact_students_have_no_loss(name, monkeypatch):
    """Every loss of the distiller vanishes for the exact flow map."""
    distiller = step(RIVALS[name], monkeypatch)
    assert set(distiller.terms) == set(RIVALS[name].losses)
    assert all(term.residual_rms < 1e-12 for term in distiller.terms.values())


@pytest.mark.parametrize("name", APPROXIMATE)
def test_discretized_methods_are_nearly_exact(name, monkeypatch):
    """Their error on the exact flow map is that of their discretization, not 0."""
    distiller = step(APPROXIMATE[name], monkeypatch)
    residuals = [term.residual_rms for term in distiller.terms.values()]
    assert 1e-6 < max(residuals) < (3 if name == "alpha_flow" else 0.1)


def distill(objective, teacher=None, steps=400):
    """Train a student on a mixture of two Gaussians in one dimension, and return it with the exact flow map's error."""
    torch.manual_seed(0)
    flow = GaussianMixture(torch.tensor([[-2.0], [2.0]]), 0.3)
    student = MLP(dimensions=1, width=64, depth=2)
    rows = flow.sample(4096, torch.Generator().manual_seed(1)).x_1
    loader = torch.utils.data.DataLoader(list(rows), batch_size=256, collate_fn=collate, drop_last=True)
    distiller = Distiller(teacher(flow) if teacher else None, student, objective, optimizer=adam)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(distiller, loader)
    x_0 = torch.randn(1024, 1, generator=torch.Generator().manual_seed(2))
    return distiller, (x_0, flow)


def adam(parameters):
    """Adam with a rate for a short run."""
    return torch.optim.Adam(parameters, lr=3e-3)


def collate(rows):
    """Return a batch without conditions."""
    return Batch(torch.stack(rows), None)


def distance(samples, flow):
    """Return the difference of the sorted samples from the exact quantiles: their Wasserstein distance."""
    real = flow.sample(len(samples), torch.Generator().manual_seed(3)).x_1
    return (samples.flatten().sort().values - real.flatten().sort().values).abs().mean().item()


def test_mean_flow_learns_without_a_teacher():
    """One step of MeanFlow from data alone is close to the data; an untrained student is not."""
    distiller, (x_0, flow) = distill(losses.mean_flow())
    assert isinstance(distiller.teacher, NoTeacher)
    assert list(distiller.models()) == ["student"]
    trained = euler(distiller.average, x_0, None, 1)
    untrained = euler(MLP(dimensions=1, width=64, depth=2), x_0, None, 1)
    assert distance(trained, flow) < 0.6
    assert distance(untrained, flow) > 1


def test_scm_learns_its_weight():
    """exp(w(t)) L(t) - w(t) is smallest at w(t) = -log L(t): the learned weight follows the loss of each time."""
    weight = LogWeight()
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.02)
    t = torch.linspace(0, 1, 256)
    loss = 0.1 + 3 * (1 - t) ** 2
    for _ in range(400):
        optimizer.zero_grad()
        w = weight(t)
        (w.exp() * loss - w).mean().backward()
        optimizer.step()
    assert (weight(t) + loss.log()).abs().mean() < 0.05


def test_a_learned_weight_is_trained_and_saved():
    """Its parameters are in the optimizer and in the state of the module, and leave 0."""
    distiller, _ = distill(losses.scm(warmup_steps=10), ExactTeacher, steps=30)
    names = [name for name, _ in distiller.named_parameters() if name.startswith("log_weights.consistency")]
    assert len(names) == 2
    assert all(distiller.get_parameter(name).abs().max() > 0 for name in names)
    assert {f"{name}" for name in names} <= distiller.state_dict().keys()


@pytest.mark.parametrize(("objective", "guidance"), [(losses.paper(), Guidance()), (losses.mean_flow(), Guidance(1.5))])
def test_what_needs_a_teacher_is_refused_without_one(objective, guidance):
    """The end identity and guidance read velocities away from the rows' own paths."""
    with pytest.raises(ValueError, match="teacher"):
        Distiller(None, MLP(dimensions=1, width=4, depth=1), objective, guidance)
    with pytest.raises(ValueError, match="student"):
        Distiller(None, objective=losses.mean_flow())
