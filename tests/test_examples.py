"""The one-file example computes what the package computes, and trains; the others do what they say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from decm_lightning import losses, samplers
from decm_lightning.derivatives import Jump, forward_with_jvp, functional
from decm_lightning.flows import Gaussian, GaussianMixture
from decm_lightning.losses import tangent
from decm_lightning.path import interpolate, jump

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    return load("decm_in_one_file")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
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


@pytest.fixture
def among_examples(monkeypatch):
    """As if started in examples/: one example imports another."""
    monkeypatch.syspath_prepend(EXAMPLES)


def test_the_loss_trains_on_its_window_with_its_normalization():
    module = load("extend_loss")
    t = torch.linspace(0, 1, 50)
    times = module.Window(0.25).draw(t, 0, torch.Generator().manual_seed(0))
    assert ((times.s - times.t >= 0) & (times.s - times.t <= 0.25) & (times.s <= 1)).all()
    assert (times.s - times.t).max() > 0.2
    distiller = module.main(steps=3)
    assert set(distiller.terms) == {"consistency", "flow_matching", "window"}
    assert distiller.objective.normalization is module.soft_sign


@pytest.mark.parametrize("late", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampler_is_exact_on_an_exact_flow_map(steps, late):
    x_0 = torch.randn(5, 2, dtype=torch.float64)
    found = load("extend_sampler").jumps(Gaussian(3.0, 0.5), x_0, None, steps, late=late)
    torch.testing.assert_close(found, 3 + x_0 / 2, atol=1e-6, rtol=0)


def test_the_data_train_a_teacher():
    module = load("extend_data")
    images, labels = module.shapes(100, seed=0)
    assert images.shape == (100, 1, 8, 8)
    assert (images.min(), images.max()) == (-1, 1)
    # A square has a larger area than a disc of the same size.
    assert images[labels == 1].mean() > images[labels == 0].mean() + 0.1
    assert module.main(steps=3).trainer.global_step == 3


def test_the_metric_is_that_of_the_generated_images():
    values = load("extend_metric").main()
    assert set(values) == {"fd", "contrast"}
    # Uniform over 64 of the 256 gray levels.
    assert values["contrast"] == pytest.approx(64 / 255 / 12**0.5, rel=0.02)


def test_the_teacher_starts_a_student_in_our_convention():
    module = load("extend_teacher")
    u, v = module.main()
    assert torch.equal(u, v)
    teacher, x, t = module.LateTeacher(), torch.randn(4, 2), torch.rand(4)
    assert torch.equal(teacher(x, t, None), -teacher.network.foreign(x, 1 - t))
    student = teacher.student()
    student.end.end.bias.data.fill_(1.0)
    assert torch.equal(student(x, t, t, None), teacher(x, t, None) + 1)


def test_the_derivative_alone_is_that_of_forward_mode():
    found, reference = load("derivative_alone").main()
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found, reference, atol=1e-13, rtol=1e-12)


def test_mean_flow_learns_one_step(among_examples):
    errors = load("mean_flow").main(steps=120)
    mean_flow, euler = errors[1]
    assert mean_flow < 0.6 * euler
