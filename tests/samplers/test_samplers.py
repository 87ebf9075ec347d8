"""The samplers on an exact Gaussian flow: jumps are exact, and Euler steps have first order."""

import math
import sys

import pytest
import torch

from decm_lightning.samplers import consistency, euler, flow_map, flow_map_of, mix, sampler

SAMPLERS = [euler, consistency, flow_map, mix]


@pytest.fixture
def x_0(generator):
    """Noise for the exact flow."""
    return torch.randn(64, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def x_1(flow, x_0):
    """The samples that the exact flow maps this noise to."""
    return flow.mean + flow.std * x_0


class Recorder:
    """A student that records its jumps."""

    def __init__(self, student):
        self.student = student
        self.jumps = []

    def __call__(self, x_t, t, s, condition):
        assert (t == t[0]).all()
        assert (s == s[0]).all()
        self.jumps.append((t[0].item(), s[0].item()))
        return self.student(x_t, t, s, condition)


def error(samples, x_1) -> float:
    """Return the root mean square error."""
    return (samples - x_1).square().mean().sqrt().item()


def test_euler_converges_at_order_one(flow, x_0, x_1):
    """Halving the step halves the error."""
    errors = [error(euler(flow, x_0, None, steps), x_1) for steps in (32, 64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)
    assert errors[2] > 1e-4


def test_mix_converges_at_order_one(flow, x_0, x_1):
    """All of its error is from the Euler steps."""
    errors = [error(mix(flow, x_0, None, steps, s1=0.5), x_1) for steps in (34, 66, 130)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("steps", [3, 4, 8, 16])
def test_mix_is_nearer_than_euler(steps, flow, x_0, x_1):
    """With an exact flow map, the two jumps shorten the part of the Euler steps."""
    assert error(mix(flow, x_0, None, steps), x_1) < error(euler(flow, x_0, None, steps), x_1) / 2


@pytest.mark.parametrize(
    ("method", "steps"), [(consistency, 1), (mix, 1), (mix, 2), (flow_map, 1), (flow_map, 3), (flow_map, 8)]
)
def test_samplers_that_only_jump_are_exact(method, steps, flow, x_0, x_1):
    """With the exact flow map jumps end at x_1."""
    torch.testing.assert_close(method(flow, x_0, None, steps), x_1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("s1", [0.05, 0.35, 0.7, 0.99])
def test_two_jumps_are_exact_for_any_first_landing(s1, flow, x_0, x_1):
    """Jumps compose at any intermediate time."""
    torch.testing.assert_close(mix(flow, x_0, None, 2, s1=s1), x_1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 4, 6])
def test_renoised_samples_have_the_mean_and_std_of_data(steps, flow, generator):
    """Noise added at the correct scale preserves the distribution of x_1, within five standard errors."""
    x_0 = torch.randn(100_000, 3, generator=generator, dtype=torch.float64)
    samples = consistency(flow, x_0, None, steps, generator=generator)
    torch.testing.assert_close(samples.mean(0), flow.mean, rtol=0, atol=5 * flow.std / math.sqrt(1e5))
    torch.testing.assert_close(
        samples.std(0), torch.full_like(flow.mean, flow.std), rtol=0, atol=5 * flow.std / math.sqrt(2e5)
    )


def test_renoising_draws_new_noise_from_the_generator_alone(flow, x_0, x_1):
    """The same seed gives the same samples, another seed other samples, and neither equals the deterministic result."""
    first, again, other = (
        consistency(flow, x_0, None, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert error(first, other) > 0.05
    assert error(first, x_1) > 0.05


@pytest.mark.parametrize(
    ("method", "steps", "options", "jumps"),
    [
        (euler, 2, {}, [(0, 0), (0.5, 0.5)]),
        (consistency, 1, {}, [(0, 1)]),
        (consistency, 2, {}, [(0, 1), (0.7, 1)]),
        (consistency, 4, {}, [(0, 1), (0.7, 1), (0.8, 1), (0.9, 1)]),
        (consistency, 3, {"times": [0.2, 0.6]}, [(0, 1), (0.2, 1), (0.6, 1)]),
        (mix, 1, {}, [(0, 1)]),
        (mix, 2, {}, [(0, 0.75), (0.75, 1)]),
        (mix, 4, {}, [(0, 0.7), (0.7, 0.7), (0.8, 0.8), (0.9, 1)]),
        (mix, 3, {"s1": 0.5}, [(0, 0.5), (0.5, 0.5), (0.75, 1)]),
        (mix, 3, {"times": [0.2, 0.6]}, [(0, 0.2), (0.2, 0.2), (0.6, 1)]),
        (euler, 3, {"times": [0.2, 0.6]}, [(0, 0), (0.2, 0.2), (0.6, 0.6)]),
        (euler, 4, {"shift": 3.0}, [(0, 0), (0.1, 0.1), (0.25, 0.25), (0.5, 0.5)]),
        (consistency, 4, {"shift": 2.0}, [(0, 1), (0.7 / 1.3, 1), (2 / 3, 1), (0.9 / 1.1, 1)]),
        (mix, 4, {"shift": 3.0, "s1": 0.5}, [(0, 0.5), (0.5, 0.5), (0.625, 0.625), (11 / 14, 1)]),
        (mix, 2, {"shift": 3.0}, [(0, 0.75), (0.75, 1)]),
    ],
)
def test_samplers_ask_for_the_stated_jumps(method, steps, options, jumps, flow, x_0):
    """One network evaluation per step, on the edges and at the times of the docstring."""
    student = Recorder(flow)
    method(student, x_0, None, steps, **options)
    assert student.jumps == [pytest.approx(jump, abs=1e-12) for jump in jumps]


def test_mix_lands_first_at_its_default_times(flow, x_0):
    """0.75 up to 3 steps, 0.7 for 4 to 7, and 0.5 from 8."""
    landings = []
    for steps in (2, 3, 4, 7, 8, 50):
        student = Recorder(flow)
        mix(student, x_0, None, steps)
        landings.append(student.jumps[0][1])
    assert landings == [0.75, 0.75, 0.7, 0.7, 0.5, 0.5]


@pytest.mark.parametrize("method", SAMPLERS)
def test_samplers_pass_the_condition_on(method):
    """Each row uses its class: with u = class number, f = x + class number."""

    def student(x_t, t, s, condition):
        return condition.double()[:, None].expand_as(x_t)

    x_0, labels = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 5])
    samples = method(student, x_0, labels, 1)
    assert samples.tolist() == [[0, 0], [1, 1], [5, 5]]


def test_a_velocity_field_becomes_a_student_that_ignores_s(flow, x_0, x_1):
    """Euler samples it like a teacher; a single jump is wrong."""
    student = flow_map_of(flow.velocity)
    torch.testing.assert_close(euler(student, x_0, None, 16), euler(flow, x_0, None, 16), rtol=0, atol=1e-12)
    assert error(consistency(student, x_0, None, 1), x_1) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", SAMPLERS)
def test_times_of_half_precision_samples_are_exact(method, dtype, x_0):
    """The network is evaluated at exactly the times of float32, and samples have the dtype of the noise."""

    def times_in(dtype):
        times = []

        def student(x_t, t, s, condition):
            assert x_t.dtype == dtype
            assert t.dtype == s.dtype == torch.float32
            times.append((t[0].item(), s[0].item()))
            return x_t.float()

        assert method(student, x_0.to(dtype), None, 6).dtype == dtype
        return times

    expected = times_in(torch.float32)
    assert times_in(dtype) == expected
    # Rounding to the dtype would have changed some times.
    assert any(torch.tensor(t).to(dtype).item() != t for pair in expected for t in pair)


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -3])
def test_samplers_refuse_fewer_than_one_step(method, steps, flow, x_0):
    """The message contains the value."""
    with pytest.raises(ValueError, match=f"steps .*got {steps}$"):
        method(flow, x_0, None, steps)


@pytest.mark.parametrize("s1", [0.0, 1.0, -0.25, 1.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_mix_refuses_a_first_landing_outside_the_interval(s1, steps, flow, x_0):
    """The message contains the value, also for 1 step."""
    with pytest.raises(ValueError, match=f"s1 .*got {s1}$"):
        mix(flow, x_0, None, steps, s1=s1)


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_samplers_refuse_a_shift_that_is_not_above_zero(method, shift, flow, x_0):
    """The message contains the value."""
    with pytest.raises(ValueError, match=rf"shift .*got {shift}$"):
        method(flow, x_0, None, 4, shift=shift)


@pytest.mark.parametrize(("method", "options"), [*((m, {"shift": 3.0}) for m in SAMPLERS), (mix, {"s1": 0.5})])
def test_times_and_an_option_that_shapes_the_default_times_exclude_each_other(method, options, flow, x_0):
    """The message names the option."""
    with pytest.raises(ValueError, match=f"times or {next(iter(options))}"):
        method(flow, x_0, None, 3, times=[0.2, 0.5], **options)


@pytest.mark.parametrize("method", SAMPLERS)
def test_samples_have_no_graph(method, flow, generator):
    """Even if the student's parameters and the noise require gradients and gradients are enabled."""
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    x_0 = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.is_grad_enabled()
    samples = method(lambda *arguments: scale * flow(*arguments), x_0, None, 3)
    assert not samples.requires_grad
    assert torch.is_grad_enabled()


def euler_times(flow, steps, **options):
    """Return the times at which Euler evaluates the network, and 1."""
    student = Recorder(flow)
    euler(student, torch.zeros(2, 3, dtype=torch.float64), None, steps, **options)
    return [t for t, _ in student.jumps] + [1.0]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_shift_is_that_of_diffusers(shift, steps, flow):
    """FlowMatchEulerDiscreteScheduler's sigmas are 1 - t, given the uniform sigmas of SD3's and Flux's pipelines."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    expected = 1 - torch.tensor(euler_times(flow, steps, shift=shift))
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0, atol=1e-6)


def test_a_time_shift_of_lightningdit_is_the_inverse(flow):
    """Its `timestep_shift: 0.3` turns t into 0.3 t / (1 + (0.3 - 1) t), where t = 0 is noise."""
    expected = [0.3 * t / (1 + (0.3 - 1) * t) for t in torch.linspace(0, 1, 11, dtype=torch.float64).tolist()]
    assert euler_times(flow, 10, shift=1 / 0.3) == pytest.approx(expected, abs=1e-12)
    assert expected[5] == pytest.approx(3 / 13)


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (2, [0.0]),
        (2, [1.0]),
        (2, [-0.1]),
        (2, [1.2]),
        (3, [0.6, 0.4]),
        (3, [0.5, 0.5]),
        (3, [0.5]),
        (1, [0.5]),
        (2, []),
    ],
)
@pytest.mark.parametrize("method", SAMPLERS)
def test_samplers_refuse_times_that_do_not_fit(method, steps, times, flow, x_0):
    """The message contains the times and their required number."""
    with pytest.raises(ValueError, match=rf"times .*{steps - 1} .*got \[{', '.join(map(str, times))}\]$"):
        method(flow, x_0, None, steps, times=times)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("euler", euler, {}),
        ("mix", mix, {"s1": 0.6}),
        ("consistency", consistency, {"times": [0.3, 0.6, 0.9]}),
        ("decm_lightning.samplers.euler", euler, {"shift": 2.0}),
        (mix, mix, {"shift": 2.0}),
    ],
)
def test_samplers_are_selected_by_name_path_or_function(name, method, options, flow, x_0):
    """Options are bound, and the sampler accepts a generator."""
    samples, expected = (
        function(flow, x_0, None, 4, generator=torch.Generator().manual_seed(5), **own)
        for function, own in ((sampler(name, **options), {}), (method, options))
    )
    assert torch.equal(samples, expected)


OWN = """
from decm_lightning.path import jump
from decm_lightning.samplers.steps import at

def heun(student, x, condition, steps, generator=None, *, order=2):
    for k in range(steps):
        t, s = at(k / steps, x), at((k + 1) / steps, x)
        v = student(x, t, t, condition)
        end = jump(x, v, t, s)
        x = jump(x, (v + student(end, s, s, condition)) / 2, t, s) if order == 2 else end
    return x

class Heun:
    def __init__(self, order=2):
        self.order = order

    def __call__(self, student, x_0, condition, steps, generator=None):
        return heun(student, x_0, condition, steps, order=self.order)

def deterministic(student, x_0, condition, steps):
    return x_0

STEPS = 3
"""


@pytest.fixture
def own_sampler(tmp_path, monkeypatch):
    """A module with samplers in the working directory, which is not on sys.path."""
    (tmp_path / "own_samplers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield
    sys.modules.pop("own_samplers", None)


@pytest.mark.parametrize("name", ["own_samplers.heun", "own_samplers.Heun"])
def test_a_custom_sampler_is_imported_from_the_working_directory(name, own_sampler, flow, x_0, x_1):
    """A function or a class; its options are bound."""
    path = list(sys.path)
    assert error(sampler(name)(flow, x_0, None, 16), x_1) < error(euler(flow, x_0, None, 16), x_1) / 10
    assert torch.equal(sampler(name, order=1)(flow, x_0, None, 16), euler(flow, x_0, None, 16))
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("heun", {}, ValueError, "euler, consistency, flow_map, mix.*'heun'"),
        ("mix", {"s2": 0.5}, ValueError, "'s2'.*times, s1, shift$"),
        ("euler", {"s1": 0.5}, ValueError, "'s1'.*times, shift$"),
        ("own_samplers.heun", {"ordre": 1}, ValueError, "'ordre'.*order$"),
        ("own_samplers.Heun", {"ordre": 1}, ValueError, "'ordre'.*order$"),
        ("own_samplers.euler", {}, ValueError, "own_samplers.*'euler'"),
        ("own_samplers.deterministic", {}, ValueError, "generator"),
        ("own_samplers.STEPS", {}, ValueError, "got 3"),
        ("no_samplers.heun", {}, ImportError, "no_samplers"),
        ("decm_lightning.samplers.nothing.heun", {}, ImportError, "nothing"),
    ],
)
def test_unknown_samplers_and_options_are_refused_in_one_line(name, options, error, message, own_sampler):
    """The message contains the name and the alternatives."""
    with pytest.raises(error, match=message) as caught:
        sampler(name, **options)
    assert "\n" not in str(caught.value)
