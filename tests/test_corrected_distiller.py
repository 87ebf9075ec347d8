"""FreeFlow's corrector: zero for equal distributions, its gradient by its formula, and its network in a run."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from decm_lightning import CorrectedDistiller, Distiller, load, losses
from decm_lightning.corrected_distiller import Corrector
from decm_lightning.data import Digits
from decm_lightning.flows import Gaussian
from decm_lightning.losses import FlowMapLoss, Objective
from decm_lightning.networks import MLP
from decm_lightning.time_laws import Uniform
from decm_lightning.training.schedule import WarmupCosine
from decm_lightning.triangle import NoiseEdge
from decm_lightning.types import Batch
from tests.test_distiller import ExactStudent, GaussianTeacher, tiny_teacher, trainer

OBJECTIVE = Objective(
    {"predictor": FlowMapLoss(NoiseEdge(), start_weight=0.0, end_weight=1.0, batch_fraction=0.75)}, "tangent_norm"
)


class ExactVelocity(MLP):
    """The velocity of the samples of a student that is off by `shift`, with a weight so that it can be trained."""

    def __init__(self, flow: Gaussian, shift: float = 0.0) -> None:
        super().__init__(dimensions=3, width=4, depth=1)
        self.flow = Gaussian(flow.mean + shift, flow.std)
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x_t, t, s, condition):
        return self.flow.velocity(x_t, t) + self.bias


def corrected(shift: float = 0.0, **options) -> CorrectedDistiller:
    """A student of a Gaussian that adds `shift` to each sample, with the exact velocity of its samples."""
    flow = Gaussian(mean=torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), std=0.6)
    student = ExactStudent(flow)
    nn.init.constant_(student.bias, shift)
    module = CorrectedDistiller(
        GaussianTeacher(flow), Corrector(**options), ExactVelocity(flow, shift), student=student, objective=OBJECTIVE
    )
    return module.double()


def terms(module: CorrectedDistiller, rows: int = 64) -> dict[str, losses.LossTerm]:
    batch = Batch(torch.zeros(rows, 3, dtype=torch.float64), None)
    module.terms = {"predictor": losses.LossTerm(torch.zeros(()), torch.tensor(0.3, dtype=torch.float64))}
    generator = torch.Generator().manual_seed(0)
    return module.more_terms(batch, generator, generator)


def test_equal_distributions_need_no_correction():
    module = corrected()
    found = terms(module)
    found["corrector"].value.backward()
    assert found["corrector"].residual_rms < 1e-12
    assert module.student.bias.grad.abs().max() < 1e-12
    assert found["fake"].value > 0.1  # The variance of flow matching's target.


@pytest.mark.parametrize("shift", [0.2, -0.2])
def test_the_correction_moves_samples_toward_the_teacher_s(shift):
    """Descent lowers the shift. The residual is at most the relative size that the weight gives it."""
    module = corrected(shift)
    found = terms(module)
    found["corrector"].value.backward()
    assert (module.student.bias.grad * shift > 0).all()
    assert found["corrector"].residual_rms > 0.01
    # The network of v_fake learns nothing from the corrector, and the student nothing from flow matching.
    assert module.fake.bias.grad is None
    module.student.bias.grad = None
    found["fake"].value.backward()
    assert module.student.bias.grad is None
    assert module.fake.bias.grad is not None


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_gradient_is_that_of_the_formula(weight):
    module = corrected(0.2, batch_fraction=0.5, weight=weight, times=Uniform())
    found = terms(module)
    found["corrector"].value.backward()
    # The same draws: noise of the jumps, added noise, times.
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 32, 3, generator=generator, dtype=torch.float64)
    r = Uniform().draw(32, generator).double()
    flow, zero = module.teacher.flow, torch.zeros(32, dtype=torch.float64)
    x_hat = x_0 + flow(x_0, zero, zero + 1) + 0.2
    x_r = (1 - r)[:, None] * noise + r[:, None] * x_hat
    g = Gaussian(flow.mean + 0.2, flow.std).velocity(x_r, r) - flow.velocity(x_r, r)
    assert found["corrector"].residual_rms.item() == pytest.approx(g.square().mean().sqrt().item(), rel=1e-12)
    g = g * weight * 0.3 / g.square().mean().sqrt()
    normalized = losses.weighting.normalized(g, zero, "tangent_norm")
    expected = 2 * normalized.sum(0) / normalized.numel()
    torch.testing.assert_close(module.student.bias.grad, expected, rtol=1e-10, atol=1e-14)


def test_a_run_trains_both_networks_and_resumes(tmp_path):
    """A resumed run equals an uninterrupted one, also in the network of v_fake."""

    def fit(steps: int, place: str, checkpoint: str | None = None) -> CorrectedDistiller:
        L.seed_everything(0, verbose=False)
        constant = partial(WarmupCosine, warmup=0.0, floor=1.0)
        module = CorrectedDistiller(tiny_teacher(), objective=OBJECTIVE, lr_scheduler=constant)
        own = trainer(tmp_path / place, max_steps=steps)
        own.fit(module, Digits(batch_size=16), ckpt_path=checkpoint)
        own.save_checkpoint(tmp_path / place / "last.ckpt")
        return module

    start = CorrectedDistiller(tiny_teacher(), objective=OBJECTIVE).fake.state_dict()
    whole = fit(4, "whole")
    assert set(whole.terms) == {"predictor", "corrector", "fake"}
    assert any(not torch.equal(value, start[name]) for name, value in whole.fake.state_dict().items())
    fit(2, "half")
    resumed = fit(4, "rest", str(tmp_path / "half" / "last.ckpt"))
    for network, again in ((whole.student, resumed.student), (whole.fake, resumed.fake)):
        torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=0, atol=1e-7)
    student = load(tmp_path / "whole" / "last.ckpt")
    torch.testing.assert_close(student.state_dict(), whole.average.state_dict())
    assert student.record.objective.endswith(
        ", Corrector(batch_fraction=0.25, weight=1.0, times=LogitNormal(mean=-0.8, std=1.0))"
    )


def test_a_corrected_row_costs_two_networks_and_the_teacher():
    plain = Distiller(tiny_teacher(), objective=OBJECTIVE).cost()
    found = CorrectedDistiller(tiny_teacher(), objective=OBJECTIVE).cost()
    assert found.student == plain.student + 2 * 0.25
    assert found.teacher == plain.teacher + 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_fraction": 0.0}, "batch_fraction must be in"), ({"weight": -1.0}, "weight must be above 0: got -1.0")],
)
def test_corrector_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Corrector(**options)


def test_a_corrector_needs_a_teacher():
    with pytest.raises(ValueError, match="got teacher None"):
        CorrectedDistiller(None, student=MLP(), objective="mean_flow")  # type: ignore[arg-type]
