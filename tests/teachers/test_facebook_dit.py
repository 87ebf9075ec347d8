"""Checkpoints of facebookresearch/DiT: the velocity agrees with the formulas, and DiT is distinguished from SiT."""

import json
import math
from pathlib import Path

import pytest
import torch

from decm_lightning.networks import DiT, load
from decm_lightning.networks.weightless import is_weightless, without_weights
from decm_lightning.teachers import PretrainedTeacher
from decm_lightning.teachers.noise_prediction import NoisePrediction
from decm_lightning.teachers.prediction import prediction_of
from tests.teachers.test_sit import CHANNELS, HEADS, SIT, SIZE, sit, weights

ROOT = Path(__file__).parents[2]
SIGNALS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


@pytest.fixture
def path(tmp_path):
    """A file for a checkpoint."""
    return str(tmp_path / "DiT.pt")


@pytest.mark.parametrize("step", [999, 731, 500, 20, 1])
def test_velocity_is_that_of_the_noise_at_every_step(step, path, generator):
    """The formulas of the network and of DDPM are computed in float64."""
    torch.save(weights(), path)
    teacher = PretrainedTeacher(path, heads=HEADS, prediction="noise")
    teacher.network.double()
    a, b = SIGNALS[step].sqrt(), (1 - SIGNALS[step]).sqrt()
    z = torch.randn(3, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 4, 5])
    # z = a x_1 + b x_0, divided by a + b, is x_t at t = a / (a + b).
    x_t, t = z / (a + b), a / (a + b)
    noise = sit(weights(), z, torch.full((3,), float(step), dtype=torch.float64), labels)
    expected = (x_t - noise) / t
    found = teacher(x_t, t.expand(3), labels)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_its_time_embedding_is_not_that_of_diffusers(path):
    """The frequencies are 10000^(-i / 128) and 10000^(-i / 127)."""
    network = weights()
    torch.save(network, path)
    embedder = PretrainedTeacher(path, heads=HEADS, prediction="noise").network.t_embedder
    seen = []
    embedder.mlp[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    embedder(torch.tensor([999.0]))
    own, foreign = (
        torch.cat([angles.cos(), angles.sin()])
        for angles in (999 * torch.exp(-math.log(10_000) * torch.arange(128) / parts) for parts in (128, 127))
    )
    torch.testing.assert_close(seen[0][0], own, atol=1e-3, rtol=0)
    assert (seen[0][0] - foreign).norm() / foreign.norm() > 0.1


def constructed(sign):
    """Return tensors of a network whose output is nearly x, or -x, at every time."""
    found = {name: torch.zeros_like(tensor) for name, tensor in weights().items()}
    into, out = found["x_embedder.proj.weight"], found["final_layer.linear.weight"]
    for number in range(12):
        channel, row, column = number // 4, number // 2 % 2, number % 2
        # A pair of opposite entries has mean 0, so layer norm does not change its direction.
        into[number, channel, row, column], into[12 + number, channel, row, column] = 1, -1
        out[(row * 2 + column) * 2 * CHANNELS + channel, number] = sign
    return found


def trained(prediction):
    """Return the tensors of a small network after 100 steps of DDPM or of flow matching on correlated colors."""
    torch.manual_seed(0)
    network = DiT(SIZE, CHANNELS, patch_size=2, width=24, depth=2, heads=HEADS, num_classes=5, **SIT)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    log_signals = NoisePrediction().log_signals.float()
    for _ in range(100):
        x_0, labels = torch.randn(32, CHANNELS, SIZE, SIZE), torch.randint(6, (32,))
        x_1 = 0.5 * torch.randn(32, CHANNELS, 1, 1) + 0.3 * torch.randn_like(x_0)
        if prediction == "noise":
            times = torch.randint(1000, (32,))
            signal = log_signals[times].exp()[:, None, None, None]
            x_t, target = signal.sqrt() * x_1 + (1 - signal).sqrt() * x_0, x_0
        else:
            times = torch.rand(32)
            part = times[:, None, None, None]
            x_t, target = (1 - part) * x_0 + part * x_1, x_1 - x_0
        loss = (network(x_t, times.float(), times.float(), labels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize(
    ("make", "prediction"),
    [
        (lambda: constructed(1), "noise"),
        (lambda: constructed(-1), "velocity"),
        (lambda: trained("noise"), "noise"),
        (lambda: trained("velocity"), "velocity"),
    ],
    ids=["constructed noise", "constructed velocity", "trained noise", "trained velocity"],
)
def test_dit_and_sit_are_distinguished(make, prediction, path, generator):
    """Their tensors have the same names and shapes."""
    torch.save({"ema": make()}, path)
    found, given = PretrainedTeacher(path, heads=HEADS), PretrainedTeacher(path, heads=HEADS, prediction=prediction)
    assert found.prediction == prediction
    inputs = (torch.randn(2, CHANNELS, SIZE, SIZE, generator=generator), torch.tensor([0.3, 0.8]), torch.tensor([0, 5]))
    assert torch.equal(found(*inputs), given(*inputs))
    other = {"noise": "velocity", "velocity": "noise"}[prediction]
    with pytest.raises(ValueError, match=f"^{path} predicts {prediction}, not {other}"):
        PretrainedTeacher(path, heads=HEADS, prediction=other)


@pytest.mark.parametrize("name", ["digits/teacher", "digits/student", "fashion/teacher", "fashion/student"])
def test_real_networks_of_this_package_predict_velocities(name):
    assert prediction_of(load(ROOT / "weights" / name)) == "velocity"


@pytest.mark.parametrize("prediction", ["velocity", "noise", None])
def test_random_weights_are_what_is_said(prediction, path, caplog):
    """They are assumed to predict velocities, with a warning in the log."""
    torch.save(weights(), path)
    teacher = PretrainedTeacher(path, heads=HEADS, prediction=prediction)
    assert prediction_of(teacher.network) is None
    assert teacher.prediction == (prediction or "velocity")
    assert (path in caplog.text) == (prediction is None)


@pytest.mark.parametrize("time_convention", ["standard", "facm"])
def test_a_lightningdit_that_predicts_noise_is_found(time_convention, path):
    """A network with RMSNorm and rotary positions is recognized as well."""
    network = DiT(SIZE, CHANNELS, patch_size=2, width=24, depth=1, heads=HEADS, num_classes=5)
    plain = constructed(1)
    network.pos_embed.data.zero_()
    network.x_embedder.load_state_dict(
        {f"proj.{name}": plain[f"x_embedder.proj.{name}"] for name in ("weight", "bias")}
    )
    rows = plain["final_layer.linear.weight"].unflatten(0, (4, 2 * CHANNELS))[:, :CHANNELS].flatten(0, 1)
    for sign, prediction in ((1, "noise"), (-1, "velocity")):
        network.final_layer.linear.weight.data = sign * rows
        torch.save(network.state_dict(), path)
        if prediction == "noise" and time_convention == "facm":
            with pytest.raises(ValueError, match=f"^{path} predicts noise, not velocity"):
                PretrainedTeacher(path, time_convention=time_convention)
        else:
            assert PretrainedTeacher(path, time_convention=time_convention).prediction == prediction


def test_every_process_finds_the_same_prediction(path):
    """This includes a process that receives its shard and has no weights otherwise."""
    torch.save(constructed(1), path)
    with without_weights():
        teacher = PretrainedTeacher(path, heads=HEADS)
        assert is_weightless()
    assert teacher.prediction == "noise"
    assert all(tensor.is_meta for tensor in teacher.network.state_dict().values())


def test_what_it_cannot_do_is_said(path):
    torch.save(weights(), path)
    teacher = PretrainedTeacher(path, heads=HEADS, prediction="noise")
    with pytest.raises(ValueError, match=r"Distiller.student=.*networks.DiT"):
        teacher.student()
    with pytest.raises(ValueError, match="needs class labels"):
        teacher(torch.zeros(1, CHANNELS, SIZE, SIZE), torch.zeros(1), None)
    network = DiT(SIZE, CHANNELS, patch_size=2, width=24, depth=2, heads=HEADS, end_time=True, **SIT)
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match=f"prediction='noise' .*r_embedder.*{path}"):
        PretrainedTeacher(path, heads=HEADS, prediction="noise")


def test_config_names_it(fit, path):
    """One step is trained with a separate student."""
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, **SIT)
    torch.save(network.state_dict(), path)
    student = {"class_path": "decm_lightning.networks.DiT", "init_args": network.config | {"end_time": True}}
    arguments = {"path": path, "heads": "2", "prediction": "noise", "noise.beta_end": "0.01"}
    assert fit("PretrainedTeacher", arguments, "--model.init_args.student", json.dumps(student)) == 0
