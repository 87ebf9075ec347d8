"""A student on FACM's clock: one time embedding, of 2 - t on the diagonal and of t elsewhere."""

import pytest
import torch
from torch import nn

from decm_lightning import Distiller, load, losses, save
from decm_lightning.derivatives import Tangent, dual, functional
from decm_lightning.networks import DiT
from decm_lightning.teachers import PretrainedTeacher
from decm_lightning.types import Batch

# The dual engine passes values that are not tensors.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def network():
    """A tiny network without an end time, in float64, with no zero weights."""
    torch.manual_seed(0)
    network = DiT(input_size=4, in_channels=2, patch_size=2, width=16, depth=2, heads=2, num_classes=3).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture
def inputs():
    """Rows with s = t and with s = 1."""
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9, 0.0, 0.3, 0.8], dtype=torch.float64)
    s = torch.where(torch.arange(6) < 3, t, 1.0)
    return x_t, t, s, torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def student(network, tmp_path):
    """The student of a teacher whose file has FACM's clock, through the public loader."""
    save(network, tmp_path / "teacher")
    teacher = PretrainedTeacher(str(tmp_path / "teacher"), time_convention="facm", student_time="facm")
    return teacher, teacher.student().double()


def test_the_diagonal_has_the_clock_2_minus_t(network, student, inputs):
    """u(x, t, t) is the file's output at 2 - t, the teacher's velocity; u(x, t, 1) is its output at t."""
    x_t, t, s, labels = inputs
    teacher, own = student
    with torch.no_grad():
        u = own(x_t, t, s, labels)
        expected = network(x_t, torch.where(s == t, 2 - t, t), s, labels)
        velocity = teacher.network.double()(x_t, t, t, labels)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(u[:3], velocity[:3], rtol=0, atol=1e-6)
    assert (u[3:] - velocity[3:]).abs().max() > 0.01


def test_the_derivative_along_the_data_edge_is_exact(student, inputs):
    """The dual engine and torch.func.jvp agree, and see the embedding of t."""
    x_t, t, s, labels = (value[3:] for value in inputs)
    own = student[1]
    tangent = Tangent(torch.ones_like(x_t), torch.ones_like(t), torch.zeros_like(s))
    ours, reference = (engine(own, x_t, t, s, labels, tangent) for engine in (dual, functional))
    torch.testing.assert_close(ours.jvp, reference.jvp, rtol=0, atol=1e-12)
    without = functional(own, x_t, t, s, labels, Tangent(tangent.x, torch.zeros_like(t), tangent.s))
    assert (reference.jvp - without.jvp).abs().max() > 0.01


def test_facm_trains_it_and_it_is_saved(student, tmp_path, monkeypatch):
    """A step of FACM has gradients in the only time embedding, and the clock is in the saved description."""
    teacher, own = student
    distiller = Distiller(teacher, own.float(), losses.facm())
    for name in ("log", "log_dict"):
        monkeypatch.setattr(distiller, name, lambda *a, **k: None)
    labels = torch.tensor([0, 1, 2, 0])
    distiller.training_step(Batch(torch.randn(4, 2, 4, 4), labels), 0).backward()
    assert own.t_embedder.mlp[0].weight.grad.abs().max() > 0
    assert own.r_embedder is None
    save(own, tmp_path / "student")
    loaded = load(tmp_path / "student")
    assert loaded.config["end_time"] == "facm"
    assert [loaded.sampling(steps=steps) for steps in (1, 4, 50)] == [
        ("consistency", 1),
        ("consistency", 4),
        ("euler", 50),
    ]


def test_other_clocks_are_refused(network, tmp_path):
    """A standard teacher has no second clock, and end_time has three values."""
    save(network, tmp_path / "teacher")
    with pytest.raises(ValueError, match="time_convention"):
        PretrainedTeacher(str(tmp_path / "teacher"), student_time="facm")
    with pytest.raises(ValueError, match="'later'"):
        DiT(**(network.config | {"end_time": "later"}))
