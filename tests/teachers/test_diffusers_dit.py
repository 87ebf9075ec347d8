"""Noise predictions are converted to velocities: exactly on a Gaussian, and in agreement with diffusers' sampler."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from scipy.interpolate import CubicSpline
from torch import nn

from decm_lightning.flows import Gaussian
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.networks import load, save
from decm_lightning.path import expand
from decm_lightning.teachers import DiffusersTeacher
from decm_lightning.teachers.noise_prediction import NoisePrediction

KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
STEPS = np.arange(1000)
# The time with the signal-to-noise ratio of each step: t / (1 - t) = a / b.
TIMES = torch.from_numpy(np.sqrt(KEPT) / (np.sqrt(KEPT) + np.sqrt(1 - KEPT)))


class ExactNoise:
    """E[x_0 | z] for Gaussian data at step k of the linear betas; between the integers log a^2 is a cubic spline."""

    def __init__(self, flow: Gaussian) -> None:
        self.flow = flow
        self.log_signal = CubicSpline(STEPS, np.log(KEPT))
        self.steps: list[torch.Tensor] = []

    def __call__(self, z, timestep):
        self.steps.append(timestep)
        signal = torch.from_numpy(np.exp(self.log_signal(timestep.numpy())))[:, None]
        a, b = signal.sqrt(), (1 - signal).sqrt()
        return (b * (z - a * self.flow.mean) / ((a * self.flow.std) ** 2 + b**2)).to(z.dtype)


@pytest.fixture
def exact(flow):
    return ExactNoise(flow)


def largest_error(exact, flow, t, generator):
    """Return the error of the velocity at samples of the flow's marginals at times t."""
    deviation = expand(flow.scale(t), t[:, None]) * torch.randn(len(t), 3, generator=generator, dtype=t.dtype)
    x_t = t[:, None] * flow.mean + deviation
    return (NoisePrediction().velocity(exact, x_t, t) - flow.velocity(x_t, t)).abs().max().item()


def test_velocity_is_exact_at_every_step(exact, flow, generator):
    """At the times of the 1,000 steps, the error is rounding in float64."""
    assert largest_error(exact, flow, TIMES, generator) <= 1e-9
    assert (exact.steps[0] - torch.from_numpy(STEPS)).abs().max() <= 1e-9


def test_velocity_is_right_between_the_steps(exact, flow, generator):
    """At all times within the schedule, the error is that of interpolating the schedule."""
    t = torch.linspace(TIMES[-1], TIMES[0], 20_001, dtype=torch.float64)
    assert largest_error(exact, flow, t, generator) <= 1e-3


def test_velocity_is_held_beyond_the_last_steps(exact, flow, generator):
    """Before the noisiest, by the change of the predicted data, 0.0063 std^2 |x|; after the cleanest, hardly at all."""
    before, after = torch.linspace(0, TIMES[-1], 501).double(), torch.linspace(TIMES[0], 1, 501).double()
    assert largest_error(exact, flow, before, generator) <= TIMES[-1] * flow.std**2 * 5
    assert largest_error(exact, flow, after, generator) <= 1e-3
    assert exact.steps[0].max() <= 999 + 1e-9
    assert exact.steps[1].min() >= -1e-9


def test_velocity_is_right_in_float32(flow, generator):
    """Training uses this precision."""
    t = torch.linspace(TIMES[-1], 1, 5001, dtype=torch.float64)
    x_t = t[:, None] * flow.mean + flow.scale(t)[:, None] * torch.randn(5001, 3, generator=generator).double()
    v = NoisePrediction().velocity(ExactNoise(flow), x_t.float(), t.float())
    assert v.dtype == torch.float32
    assert (v - flow.velocity(x_t, t)).abs().max() <= 1e-3


def test_times_just_outside_are_those_of_the_ends(exact):
    """Rounding in the time grid of a sampler does not lead to NaN."""
    x_t = torch.ones(2, 3, dtype=torch.float64)
    v, expected = (
        NoisePrediction().velocity(exact, x_t, torch.tensor(times, dtype=torch.float64))
        for times in ([-1e-8, 1 + 1e-8], [0.0, 1.0])
    )
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-6)


def test_other_betas_have_other_steps():
    noise = NoisePrediction(beta_start=1e-3, beta_end=0.05, steps=200)
    signals = torch.from_numpy(np.cumprod(1 - np.linspace(1e-3, 0.05, 200)))
    torch.testing.assert_close(noise.step(signals.log()), torch.arange(200.0).double(), rtol=0, atol=1e-9)


@pytest.fixture
def model(tmp_path):
    """A tiny model with nonzero weights that also predicts the variance, saved in tmp_path."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 4}
    model = DiTTransformer2DModel(
        **sizes, in_channels=1, out_channels=2, sample_size=8, patch_size=4, num_embeds_ada_norm=10
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize(("k", "to"), [(999, 899), (500, 499), (500, 300), (40, 39), (3, 0)])
def test_a_step_of_euler_is_one_of_diffusers_own_ddim(k, to, model, generator, tmp_path):
    """For a constant noise, a DDIM step is a straight line of our path, from the same x_t to the same x_s."""
    x_t = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.tensor([0, 3, 9, 10])
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(1000 // (k - to))
    t, s = (TIMES[step].float() for step in (k, to))
    length_t, length_s = (torch.hypot(time, 1 - time) for time in (t, s))
    z = x_t / length_t
    with torch.no_grad():
        noise = model.eval()(z, timestep=torch.full((4,), k), class_labels=labels).sample[:, :1]
    x_s = length_s * scheduler.step(noise, k, z).prev_sample
    v = DiffusersTeacher(str(tmp_path))(x_t, t.expand(4), labels)
    torch.testing.assert_close(x_t + (s - t) * v, x_s, rtol=0, atol=2e-5)


def test_model_comes_from_a_folder_or_a_pipelines(model, tmp_path, generator):
    """The results are bit-identical."""
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    inputs = (torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([1, 9, 10]))
    v = DiffusersTeacher(str(tmp_path))(*inputs)
    assert v.isfinite().all()
    assert v.shape == (3, 1, 8, 8)
    assert torch.equal(DiffusersTeacher(str(tmp_path / "pipeline"))(*inputs), v)


def test_a_pipeline_with_weights_in_half_precision_alone_is_read(model, tmp_path, caplog):
    folder = tmp_path / "pipeline" / "transformer"
    model.half().save_pretrained(folder, variant="fp16")
    found = DiffusersTeacher(str(tmp_path / "pipeline")).network.model.state_dict()
    found = {name.replace(".emb.embedding.", ".emb."): tensor for name, tensor in found.items()}
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in model.state_dict().items())
    assert f"{folder} only has fp16 weights: using those" in caplog.messages


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
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file} cannot be read: {cause}"):
        DiffusersTeacher(str(tmp_path))


@pytest.mark.parametrize(("fault", "message"), [("lose", "missing: proj_out_2.bias"), ("add", "unexpected: odd")])
def test_tensors_that_do_not_fit_are_refused(fault, message, model, tmp_path):
    """diffusers would continue with random weights."""
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if fault == "lose":
        del tensors["proj_out_2.bias"]
    else:
        tensors["odd"] = torch.zeros(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DiffusersTeacher(str(tmp_path))


def test_missing_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="nothing"):
        DiffusersTeacher(str(tmp_path / "nothing"))


def test_guidance_has_the_null_class(model, tmp_path, generator):
    """The null class is 10, the last of eleven rows."""
    teacher = DiffusersTeacher(str(tmp_path))
    x_t, t, labels = torch.randn(64, 1, 8, 8, generator=generator), torch.full((64,), 0.5), torch.full((64,), 3)
    assert teacher.null(labels).tolist() == [10] * 64
    v, v_null = teacher(x_t, t, labels), teacher(x_t, t, teacher.null(labels))
    assert (v - v_null).abs().max() > 1e-3
    guided = GuidedField(teacher, teacher.null, Guidance(2.0))(x_t, t, labels)
    torch.testing.assert_close(guided, 2 * v - v_null, rtol=0, atol=1e-4)


def test_model_is_frozen_and_follows_moves_and_casts(model, tmp_path):
    teacher = DiffusersTeacher(str(tmp_path))
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    teacher.apply(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    v = teacher(torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))
    assert next(teacher.network.parameters()).dtype == torch.bfloat16
    assert v.dtype == torch.float32
    assert v.isfinite().all()


@pytest.mark.parametrize("betas", [{"beta_start": 0.0}, {"beta_end": 1.0}, {"steps": 1}], ids=str)
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be in"):
        NoisePrediction(**betas)


def test_betas_of_a_config_reach_the_network(model, tmp_path):
    teacher = DiffusersTeacher(str(tmp_path), lora_rank=2, noise=NoisePrediction(1e-3, 0.05, 200))
    save(teacher.student(), tmp_path / "student")
    assert load(tmp_path / "student").noise == teacher.network.noise == NoisePrediction(1e-3, 0.05, 200)


@pytest.mark.parametrize("own", [True, False], ids=["a student with LoRA", "a separate student"])
def test_config_names_it(own, fit, model, tmp_path):
    """One step is trained with the schedule from the config."""
    student = "--model.init_args.student"
    sizes = {"input_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 10}
    argv = [] if own else [student, "decm_lightning.networks.DiT"]
    argv += [] if own else [f"{student}.init_args.{name}={value}" for name, value in sizes.items()]
    arguments = {"model": str(tmp_path), "noise.steps": "500"} | ({"lora_rank": "2"} if own else {})
    assert fit("DiffusersTeacher", arguments, *argv) == 0


def test_bad_folder_is_one_line_and_exit_code_2(fit, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fit("DiffusersTeacher", {"model": "./nothing"}) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nothing" in error


def test_the_package_does_not_import_diffusers_for_it():
    code = "import sys, decm_lightning.teachers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
