"""A public LightningDiT as a teacher: its velocity in our convention, its student, and its use in a config."""

from pathlib import Path

import pytest
import torch

from decm_lightning.networks import DiT, load, save
from decm_lightning.teachers import PretrainedTeacher

SMALL = {"input_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 10}


def checkpoint(path: Path, **changed) -> DiT:
    """Write a small checkpoint with random weights, and return the network that wrote it."""
    torch.manual_seed(0)
    network = DiT(**SMALL | changed).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"ema": network.state_dict()}, path)
    return network.requires_grad_(False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teacher.pt"


@pytest.fixture
def inputs(generator):
    """Images, times from 0 to 1, and labels that include the null class."""
    return torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0.0, 0.3, 0.7, 1.0]), torch.tensor([0, 9, 10, 4])


def test_velocity_is_the_networks_at_the_same_time(path, inputs):
    """LightningDiT has our path (noise at 0, velocity data minus noise), so nothing is converted."""
    network = checkpoint(path)
    x_t, t, labels = inputs
    assert torch.equal(PretrainedTeacher(str(path))(x_t, t, labels), network(x_t, t, t, labels))


def test_velocity_is_the_networks_at_two_minus_t(path, inputs):
    """FACM's students return the velocity at 2 - t; converted, it is the same up to rounding."""
    network = checkpoint(path)
    x_t, t, labels = inputs
    v = PretrainedTeacher(str(path), time_convention="facm")(x_t, t, labels)
    expected = network(x_t, 2 - t, 2 - t, labels)
    assert (v - expected).abs().max() <= 3e-6 * expected.abs().max()
    # At t = 1 the two conventions agree.
    assert (v - network(x_t, t, t, labels))[:3].abs().amax((1, 2, 3)).min() > 1e-2


@pytest.mark.parametrize("time_convention", ["standard", "facm"])
def test_student_begins_as_the_teacher_and_needs_no_time_convention(time_convention, path, inputs, tmp_path):
    """The student equals it for every end time, because the weights were converted to our convention."""
    checkpoint(path)
    x_t, t, labels = inputs
    teacher = PretrainedTeacher(str(path), time_convention=time_convention)
    v = teacher(x_t, t, labels)
    save(teacher.student(), tmp_path / "student")
    student = load(tmp_path / "student")
    for s in (t, torch.ones(4), torch.zeros(4)):
        torch.testing.assert_close(student(x_t, t, s, labels), v, rtol=0, atol=1e-6 * v.abs().max().item())


def test_teacher_is_frozen_and_its_student_is_not(path):
    checkpoint(path)
    teacher = PretrainedTeacher(str(path))
    student = teacher.student()
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert student.training
    assert teacher.null(torch.tensor([1, 2])).tolist() == [10, 10]


def test_checkpoint_with_an_auxiliary_time_is_a_flow_map(path, inputs):
    """Its velocity is u(x_t, t, t), and its student is the trained flow map."""
    network = checkpoint(path, end_time=True)
    x_t, t, labels = inputs
    teacher = PretrainedTeacher(str(path))
    ends = torch.ones(4)
    assert torch.equal(teacher(x_t, t, labels), network(x_t, t, t, labels))
    assert torch.equal(teacher.student().eval()(x_t, t, ends, labels), network(x_t, t, ends, labels))
    with pytest.raises(ValueError, match=r"time_convention='facm' .*end time .*teacher.pt"):
        PretrainedTeacher(str(path), time_convention="facm")


def test_weights_are_chosen(path):
    network = checkpoint(path)
    other = {name: tensor + 1 for name, tensor in network.state_dict().items() if not name.startswith("feat_rope")}
    torch.save({"ema": network.state_dict(), "model": other}, path)
    bias = network.final_layer.linear.bias
    assert torch.equal(PretrainedTeacher(str(path)).network.final_layer.linear.bias, bias)
    assert torch.equal(PretrainedTeacher(str(path), weights="model").network.final_layer.linear.bias, bias + 1)


def test_other_time_conventions_are_refused(path):
    checkpoint(path)
    with pytest.raises(ValueError, match="time_convention must be 'standard' or 'facm': got '1 - t'"):
        PretrainedTeacher(str(path), time_convention="1 - t")


def test_config_names_it(fit, path):
    """The arguments are set in the config, and one step is trained."""
    checkpoint(path)
    assert fit("PretrainedTeacher", {"path": "teacher.pt", "time_convention": "facm"}) == 0


def test_bad_file_is_one_line_and_exit_code_2(fit, path, capsys):
    path.write_text("the weights are elsewhere")
    assert fit("PretrainedTeacher", {"path": "teacher.pt"}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "decm: error: teacher.pt cannot be read: text instead of tensors" in error
