"""The one-file example computes what the package computes, and trains a student."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from decm_lightning import losses, samplers
from decm_lightning.derivatives import Jump, forward_with_jvp, functional
from decm_lightning.flows import GaussianMixture
from decm_lightning.losses import tangent
from decm_lightning.path import interpolate, jump

FILE = Path(__file__).parents[1] / "examples" / "decm_in_one_file.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("decm_in_one_file", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def network(example):
    torch.manual_seed(0)
    return example.Student(16).double()


class AsNetwork(nn.Module):
    """The example's student as the package calls networks."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, x_t, t, s, condition):
        return self.student(x_t, t, s)


def test_its_teacher_is_the_exact_mixture(example):
    x, t = torch.randn(50, 2, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    exact = GaussianMixture.ring(8, 2.0, 0.2, torch.float64)(x, t)
    # The example holds its means in float32.
    torch.testing.assert_close(example.teacher(x, t), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 3, 4, 900])
def test_losses_and_gradients_are_those_of_the_package(example, network, number):
    """On the example's own draws: its times are read back by drawing them again."""
    x_0, x_1 = torch.randn(2, 12, 2, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(number)
        found = example.losses(network, example.teacher, x_0, x_1, number, 600)
        torch.manual_seed(number)
        t, s = example.strata(12), example.strata(12)
    finally:
        torch.set_default_dtype(torch.float32)
    objective = losses.paper(r_decay_steps=600)
    assert set(found) == set(objective.active_losses(number))
    edge = objective.losses["noise_to_noisy"].edge
    r = torch.full_like(t, max(0.0, 0.1 * (1 - number / 600)))
    assert edge.draw(t, number, torch.Generator().manual_seed(0)).t.tolist() == pytest.approx(r.tolist())
    times = {"consistency": (t, torch.ones_like(t)), "flow_matching": (t, t), "noise_to_noisy": (r, r + (1 - r) * s)}
    student = AsNetwork(network)
    for name, loss in objective.active_losses(number).items():
        start, end = times[name]
        x_t = interpolate(x_0, x_1, start)
        v_start = example.teacher(x_t, start)
        along = tangent(v_start, start, loss.start_weight, loss.end_weight) if name != "flow_matching" else None
        row = Jump(x_t, start, end, None, along)
        (result,) = forward_with_jvp(functional, student, [row])
        v_end = example.teacher(jump(x_t, result.u.detach(), start, end), end) if loss.end_weight else None
        value = objective.term(loss, row, result, v_start, v_end, number).value
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-12)
        ours, theirs = (torch.autograd.grad(each, tuple(network.parameters())) for each in (value, found[name]))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 9])
def test_samplers_are_those_of_the_package(example, network, steps):
    student, x_0 = AsNetwork(network), torch.randn(20, 2, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        for name in ("euler", "consistency", "mix"):
            torch.manual_seed(5)
            found = getattr(example, name)(network, x_0, steps)
            torch.manual_seed(5)
            torch.testing.assert_close(found, getattr(samplers, name)(student, x_0, None, steps), atol=1e-12, rtol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_trains_and_writes_a_picture(example, tmp_path):
    """150 steps bring one step of the student far below one step of the teacher."""
    from PIL import Image

    torch.manual_seed(0)
    student = example.train(150, 128)
    x_0 = torch.randn(2000, 2)
    with torch.no_grad():
        truth = example.euler(lambda x, t, s: example.teacher(x, t), x_0, 100)
        error = (example.mix(student, x_0, 1) - truth).square().sum(1).mean().sqrt()
        of_teacher = (
            (example.euler(lambda x, t, s: example.teacher(x, t), x_0, 1) - truth).square().sum(1).mean().sqrt()
        )
    assert error < 0.6 * of_teacher
    example.save_histograms([[truth, truth], [x_0, x_0]], tmp_path / "decm.png", 32)
    with Image.open(tmp_path / "decm.png") as image:
        assert image.size == (64, 64)
        assert len(set(image.getdata())) > 10
