"""Predicted noise becomes the velocity of our path: exactly on a Gaussian, and as diffusers' own sampler would go."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from scipy.interpolate import CubicSpline
from torch import nn

from decm_lightning.flows import Gaussian
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.path import expand
from decm_lightning.teachers import DiffusersDiTTeacher

KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
STEPS = np.arange(1000)
# Where each step's ratio of signal to noise is on our path: t / (1 - t) = a / b.
TIMES = torch.from_numpy(np.sqrt(KEPT) / (np.sqrt(KEPT) + np.sqrt(1 - KEPT)))


class ExactNoise(nn.Module):
    """E[x_0 | z] for Gaussian data at step k of the linear betas; between the integers log a^2 is a cubic spline."""

    def __init__(self, flow: Gaussian) -> None:
        super().__init__()
        self.flow = flow
        self.config = SimpleNamespace(num_embeds_ada_norm=3)
        self.log_signal = CubicSpline(STEPS, np.log(KEPT))
        self.asked: list[torch.Tensor] = []

    def forward(self, z, timestep, class_labels):
        self.asked.append(timestep)
        signal = torch.from_numpy(np.exp(self.log_signal(timestep.numpy())))[:, None]
        a, b = signal.sqrt(), (1 - signal).sqrt()
        noise = b * (z - a * self.flow.mean) / ((a * self.flow.std) ** 2 + b**2)
        return SimpleNamespace(sample=torch.cat([noise, torch.full_like(z, torch.nan)], 1))


@pytest.fixture
def exact(flow):
    return DiffusersDiTTeacher(ExactNoise(flow))


def largest_error(teacher, flow, t, generator):
    """Return that of the velocity at points of the flow's own marginals at times t."""
    deviation = expand(flow.scale(t), t[:, None]) * torch.randn(len(t), 3, generator=generator, dtype=t.dtype)
    x_t = t[:, None] * flow.mean + deviation
    return (teacher(x_t, t, torch.zeros(len(t), dtype=torch.long)) - flow.velocity(x_t, t)).abs().max().item()


def test_velocity_is_exact_at_every_step(exact, flow, generator):
    """At the times of the 1,000 steps, to the last digits of float64."""
    assert largest_error(exact, flow, TIMES, generator) <= 1e-9
    assert (exact.model.asked[0] - torch.from_numpy(STEPS)).abs().max() <= 1e-9


def test_velocity_is_right_between_the_steps(exact, flow, generator):
    """Over all times the model was trained for, to what interpolating its schedule costs."""
    t = torch.linspace(TIMES[-1], TIMES[0], 20_001, dtype=torch.float64)
    assert largest_error(exact, flow, t, generator) <= 1e-3


def test_velocity_is_held_beyond_the_last_steps(exact, flow, generator):
    """Before the noisiest, by the change of the predicted data, 0.0063 std^2 |x|; after the cleanest, hardly at all."""
    before, after = torch.linspace(0, TIMES[-1], 501).double(), torch.linspace(TIMES[0], 1, 501).double()
    assert largest_error(exact, flow, before, generator) <= TIMES[-1] * flow.std**2 * 5
    assert largest_error(exact, flow, after, generator) <= 1e-3
    assert exact.model.asked[0].max() <= 999 + 1e-9
    assert exact.model.asked[1].min() >= -1e-9


def test_velocity_is_right_in_float32(flow, generator):
    """In which training asks for it."""
    t = torch.linspace(TIMES[-1], 1, 5001, dtype=torch.float64)
    x_t = t[:, None] * flow.mean + flow.scale(t)[:, None] * torch.randn(5001, 3, generator=generator).double()
    v = DiffusersDiTTeacher(ExactNoise(flow))(x_t.float(), t.float(), torch.zeros(5001, dtype=torch.long))
    assert v.dtype == torch.float32
    assert (v - flow.velocity(x_t, t)).abs().max() <= 1e-3


def test_times_just_outside_are_those_of_the_ends(exact):
    """Rounding in a sampler's grid gives no NaN."""
    x_t, labels = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0, 0])
    v = exact(x_t, torch.tensor([-1e-8, 1 + 1e-8], dtype=torch.float64), labels)
    torch.testing.assert_close(v, exact(x_t, torch.tensor([0.0, 1.0], dtype=torch.float64), labels), rtol=0, atol=1e-6)


def test_other_betas_have_other_steps(flow):
    teacher = DiffusersDiTTeacher(ExactNoise(flow), beta_start=1e-3, beta_end=0.05, steps=200)
    signals = torch.from_numpy(np.cumprod(1 - np.linspace(1e-3, 0.05, 200)))
    torch.testing.assert_close(teacher.step(signals.log()), torch.arange(200.0).double(), rtol=0, atol=1e-9)


@pytest.fixture
def model():
    """A tiny model that also predicts the variance, with no weight zero."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 4}
    model = DiTTransformer2DModel(
        **sizes, in_channels=1, out_channels=2, sample_size=8, patch_size=4, num_embeds_ada_norm=10
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(("k", "to"), [(999, 899), (500, 499), (500, 300), (40, 39), (3, 0)])
def test_a_step_of_euler_is_one_of_diffusers_own_ddim(k, to, model, generator):
    """With the noise held, DDIM moves on a straight line of our path: from the same x_t to the same x_s."""
    x_t = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.tensor([0, 3, 9, 10])
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(1000 // (k - to))
    t, s = (TIMES[step].float() for step in (k, to))
    length_t, length_s = (torch.hypot(time, 1 - time) for time in (t, s))
    z = x_t / length_t
    with torch.no_grad():
        noise = model.eval()(z, timestep=torch.full((4,), k), class_labels=labels).sample[:, :1]
    landing = length_s * scheduler.step(noise, k, z).prev_sample
    v = DiffusersDiTTeacher(model)(x_t, t.expand(4), labels)
    torch.testing.assert_close(x_t + (s - t) * v, landing, rtol=0, atol=2e-5)


def test_model_comes_from_a_folder_or_a_pipelines(model, tmp_path, generator):
    """To the bit."""
    model.save_pretrained(tmp_path / "alone")
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    inputs = (torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([1, 9, 10]))
    v = DiffusersDiTTeacher(model)(*inputs)
    assert v.isfinite().all()
    assert v.shape == (3, 1, 8, 8)
    for folder in ("alone", "pipeline"):
        assert torch.equal(DiffusersDiTTeacher(str(tmp_path / folder))(*inputs), v)


def test_a_pipeline_with_weights_in_half_precision_alone_is_read(model, tmp_path, caplog):
    folder = tmp_path / "transformer"
    model.half().save_pretrained(folder, variant="fp16")
    with torch.no_grad():
        expected = DiffusersDiTTeacher(str(tmp_path)).model.state_dict()
    assert all(torch.equal(expected[name], tensor.float()) for name, tensor in model.state_dict().items())
    assert f"{folder} has weights in fp16 only: read those" in caplog.messages


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer instead of the file: run git lfs pull"),
        (b"", "empty"),
        (b"<html></html>", "a web page"),
        (b"\x08", "cut short at 1 bytes"),
    ],
)
def test_a_damaged_file_is_named_with_the_cause(content, cause, model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file} cannot be read: {cause}"):
        DiffusersDiTTeacher(str(tmp_path))


@pytest.mark.parametrize(("fault", "message"), [("lose", "missing: proj_out_2.bias"), ("add", "left over: odd")])
def test_tensors_that_do_not_fit_are_refused(fault, message, model, tmp_path):
    """Where diffusers would go on with random weights."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if fault == "lose":
        del tensors["proj_out_2.bias"]
    else:
        tensors["odd"] = torch.zeros(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DiffusersDiTTeacher(str(tmp_path))


def test_missing_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="nothing"):
        DiffusersDiTTeacher(str(tmp_path / "nothing"))


def test_labels_are_never_dropped_and_guidance_has_its_null_class(model, generator):
    """diffusers' model would drop labels in training mode; class 10 of its eleven rows is the null class."""
    teacher = DiffusersDiTTeacher(model.train())
    x_t, t, labels = torch.randn(64, 1, 8, 8, generator=generator), torch.full((64,), 0.5), torch.full((64,), 3)
    v = teacher(x_t, t, labels)
    assert torch.equal(v, teacher(x_t, t, labels))
    v_null = teacher(x_t, t, teacher.null(labels))
    assert (v - v_null).abs().max() > 1e-3
    guided = GuidedField(teacher, teacher.null, Guidance(2.0))(x_t, t, labels)
    torch.testing.assert_close(guided, 2 * v - v_null, rtol=0, atol=1e-4)


def test_model_is_frozen_and_follows_moves_and_casts(model):
    teacher = DiffusersDiTTeacher(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    teacher.apply(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    v = teacher(torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert v.dtype == torch.float32
    assert v.isfinite().all()
    assert teacher.networks() == []


def test_what_it_cannot_do_is_said(model):
    teacher = DiffusersDiTTeacher(model)
    with pytest.raises(ValueError, match="give Distiller"):
        teacher.student()
    with pytest.raises(ValueError, match=r"use teacher.null\(labels\)"):
        teacher(torch.zeros(1, 1, 8, 8), torch.zeros(1), None)


@pytest.mark.parametrize("betas", [{"beta_start": 0.0}, {"beta_end": 1.0}, {"steps": 1}], ids=str)
def test_betas_outside_their_range_are_refused(betas, model):
    with pytest.raises(ValueError, match="betas must be in"):
        DiffusersDiTTeacher(model, **betas)


def test_config_names_it(fit, model, tmp_path):
    """With a student of its own, and a step is trained."""
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    student = "--model.init_args.student"
    sizes = {"input_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 10}
    own = [f"{student}.init_args.{name}={value}" for name, value in sizes.items()]
    assert fit("DiffusersDiTTeacher", {"model": "pipeline"}, student, "decm_lightning.networks.DiT", *own) == 0


def test_bad_folder_is_one_line_and_exit_code_2(fit, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fit("DiffusersDiTTeacher", {"model": "./nothing"}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing" in error


def test_the_package_does_not_import_diffusers_for_it():
    code = "import sys, decm_lightning.teachers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
