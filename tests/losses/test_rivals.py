"""Gradients, targets, training times and schedules of published methods, against numbers from their public code.

RIVAL_LOSSES names another file of the same layout; its metadata explain every key.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from decm_lightning.derivatives import Jump, JVPResult
from decm_lightning.losses import FlowMapLoss, Objective, rivals
from decm_lightning.losses.middle import Composition, Fixed, Middle
from decm_lightning.time_laws import ArctanNormal, LogitNormal

FILE = Path(os.environ.get("RIVAL_LOSSES", Path(__file__).parents[1] / "fixtures" / "rival_losses.safetensors"))


@pytest.fixture(scope="module")
def numbers():
    """All tensors of the file."""
    with safe_open(FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def gradient(objective: Objective, name: str, data, rows, ends, step=0, jvp="jvp", v_end=None, composition=None):
    """Return the gradient of one loss of an objective with respect to all rows of u, 0 outside `rows`."""
    u = data["u"].clone().requires_grad_()
    loss = objective.active_losses(step)[name]
    t = torch.zeros_like(data["t"]) if v_end is not None else data["t"]
    jump = Jump(u[rows], t[rows], ends[rows], None)
    result = JVPResult(u[rows], data[jvp][rows] if loss.needs_derivative else None)
    start = data["v"][rows] if loss.velocities.start or loss.velocities.batch else None
    end = None if v_end is None else v_end[rows]
    composed = None
    if loss.middle_weight and composition is not None:
        composed = Composition(composition.target[rows], composition.alpha[rows])
    term = objective.term(loss, jump, result, start, end, step, composed)
    return torch.autograd.grad(term.value, u)[0]


def compose(loss: FlowMapLoss, data, alpha):
    """Return the target of a loss from the file's u_1 and u_2, checking the times at which it reads the network."""
    middle, m = loss.middle, data["t"] + alpha * (data["s"] - data["t"])

    def flow_map(x_t, t, s):
        if torch.equal(s, m) and torch.equal(t, data["t"]):
            return data["u1"]
        torch.testing.assert_close(t, m, rtol=0, atol=1e-15)
        assert torch.equal(s, data["s"])
        return data["u2"]

    first = data["v"] if middle.first == "teacher" else None
    return middle.compose(flow_map, torch.zeros_like(data["u"]), data["t"], data["s"], alpha, first)


def two_losses(objective, name, data, step=0, composition=None):
    """Return the gradient of a loss on the rows with s > t and flow matching on the others."""
    diagonal = data["s"] == data["t"]
    inside = gradient(objective, name, data, ~diagonal, data["s"], step, composition=composition)
    return inside + gradient(objective, "flow_matching", data, diagonal, data["s"], step)


def diagonal_fraction(data):
    """Return the fraction of the rows with s = t."""
    return (data["s"] == data["t"]).double().mean().item()


def check(actual, data, method):
    """The gradients agree to 1e-10 of the norm in every row."""
    expected = data[f"{method}/grad_u"]
    error, size = ((value.flatten(1).norm(dim=1)) for value in (actual - expected, expected))
    assert (error <= 1e-10 * size).all()
    assert size.max() > 1e-6


def test_facm(numbers):
    """Consistency with the clamp inside a normalized L2, and flow matching without a clamp but with a cosine."""
    every, ends = slice(None), torch.ones_like(numbers["s"])
    check(gradient(rivals.facm(), "consistency", numbers, every, ends), numbers, "facm_consistency")
    check(gradient(rivals.facm(), "flow_matching", numbers, every, numbers["t"]), numbers, "facm_flow_matching")


@pytest.mark.parametrize("warmup", ["0", "0.5", "1"])
def test_scm(numbers, warmup):
    """Tangent normalization after the factor cos(pi t / 2), with three factors of the derivative."""
    objective = rivals.scm(warmup_steps=10_000, learned_weight=False)
    actual = gradient(
        objective, "consistency", numbers, slice(None), torch.ones_like(numbers["s"]), int(10_000 * float(warmup))
    )
    check(actual, numbers, f"scm_facm_warmup_{warmup}")


@pytest.mark.parametrize(
    ("method", "arguments"), [("mean_flow_jax", {}), ("mean_flow_facm", {"constant": 1e-3, "over_sum": False})]
)
def test_mean_flow(numbers, method, arguments):
    """Power 1, with the constant added to the sum or to the mean of the squares."""
    objective = rivals.mean_flow(diagonal_fraction(numbers), **arguments)
    check(two_losses(objective, "mean_flow", numbers), numbers, method)


@pytest.mark.parametrize("alpha", ["1", "0.5", "0.05"])
def test_alpha_flow(numbers, alpha):
    """A clamped target and rows weighted by alpha, except where s = t."""
    objective = rivals.alpha_flow(diagonal_fraction(numbers), Fixed(float(alpha)))
    composition = compose(objective.losses["alpha_flow"], numbers, torch.full_like(numbers["t"], float(alpha)))
    inside = numbers["s"] > numbers["t"]
    torch.testing.assert_close(
        composition.target[inside], numbers[f"alpha_flow_{alpha}/target"][inside], rtol=0, atol=1e-12
    )
    check(two_losses(objective, "alpha_flow", numbers, composition=composition), numbers, f"alpha_flow_{alpha}")


def test_alpha_flow_ends_as_the_start_identity(numbers):
    """At the end of the schedule alpha is 0, and the loss has a derivative and no clamp."""
    objective = rivals.alpha_flow(diagonal_fraction(numbers)).for_run(1_000)
    assert objective.active_losses(999)["alpha_flow"].needs_derivative
    check(two_losses(objective, "alpha_flow", numbers, step=999), numbers, "alpha_flow_0")


def test_alpha_flow_schedule(numbers):
    """alpha over 400,000 training steps."""
    schedule = rivals.alpha_flow().for_run(400_000).losses["alpha_flow"].middle.alpha
    steps = numbers["alpha_flow_schedule/step"].tolist()
    actual = torch.tensor([schedule.alpha(step) for step in steps], dtype=torch.float64)
    torch.testing.assert_close(actual, numbers["alpha_flow_schedule/alpha"], rtol=0, atol=1e-12)


def test_split_mean_flow(numbers):
    """A mean square to a step split at a random time, over all rows as one loss."""
    loss = rivals.split_mean_flow().losses["split_mean_flow"]
    composition = compose(loss, numbers, numbers["alpha"])
    torch.testing.assert_close(composition.target, numbers["split_mean_flow/target"], rtol=0, atol=1e-12)
    alone = Objective({"loss": FlowMapLoss(loss.edge, start_weight=0.0, middle_weight=1.0, middle=loss.middle)})
    actual = gradient(alone, "loss", numbers, slice(None), numbers["s"], composition=composition)
    check(actual, numbers, "split_mean_flow")


def test_shortcut(numbers):
    """A mean square to the clamped mean of two half steps."""
    loss = rivals.shortcut().losses["shortcut"]
    composition = compose(loss, numbers, torch.full_like(numbers["t"], 0.5))
    torch.testing.assert_close(composition.target, numbers["shortcut/target"], rtol=0, atol=1e-12)
    alone = Objective({"loss": FlowMapLoss(loss.edge, start_weight=0.0, middle_weight=1.0, middle=loss.middle)})
    check(gradient(alone, "loss", numbers, slice(None), numbers["s"], composition=composition), numbers, "shortcut")


@pytest.mark.parametrize("power", ["0", "0.5", "1"])
def test_free_flow(numbers, power):
    """The end identity from pure noise, divided by a power of its mean square."""
    objective = rivals.free_flow(float(power), numbers["free_flow_eps"].item())
    actual = gradient(
        objective, "predictor", numbers, slice(None), numbers["delta"], jvp="jvp_end", v_end=numbers["v_end"]
    )
    check(actual, numbers, f"free_flow_{power}")


WRONG = {
    "FACM without its factor inside": lambda d: gradient(
        Objective({"consistency": FlowMapLoss(rivals.DataEdge(), time_weight="cosine", normalization="adaptive_l2")}),
        "consistency", d, slice(None), torch.ones_like(d["s"]),
    ),
    "MeanFlow with power 1/2": lambda d: two_losses(
        rivals.mean_flow(diagonal_fraction(d), power=0.5), "mean_flow", d
    ),
    "MeanFlow with one mean for each loss": lambda d: two_losses(rivals.mean_flow(0.5), "mean_flow", d),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "method"),
    [(name, "facm_consistency" if name.startswith("FACM") else "mean_flow_jax") for name in WRONG],
)
def test_wrong_weightings_fail(numbers, wrong, method):
    """Weightings that look alike differ by more than 1 %."""
    expected = numbers[f"{method}/grad_u"]
    assert (WRONG[wrong](numbers) - expected).norm() > 0.01 * expected.norm()


def test_a_target_without_its_clamp_fails(numbers):
    """Shortcut models clamp targets to [-4, 4]."""
    if numbers["shortcut/target"].abs().max() < 4:
        pytest.skip(f"{FILE} has no clamped target")
    free = FlowMapLoss(rivals.DataEdge(), start_weight=0.0, middle_weight=1.0, middle=Middle(Fixed(0.5), divided=False))
    composition = compose(free, numbers, torch.full_like(numbers["t"], 0.5))
    assert (composition.target - numbers["shortcut/target"]).abs().max() > 1e-3


ROWS = 20_000
LIMIT = 1.63 * (2 / ROWS) ** 0.5
"""The largest difference of the cumulative distributions of two equal laws, with a probability of 1 % to exceed it."""


def differs(counts, times):
    """Return the largest difference between the cumulative distribution of a histogram and that of `times`."""
    mine = torch.histc(times.double(), bins=len(counts), min=0, max=1)
    return (counts.cumsum(0) / counts.sum() - mine.cumsum(0) / mine.sum()).abs().max().item()


def draw(objective, name):
    """Return the times of ROWS rows of one loss."""
    generator = torch.Generator().manual_seed(0)
    t = objective.times.draw(ROWS, generator)
    times = objective.losses[name].edge.draw(t, 0, generator)
    return times.t, times.s


def test_facm_and_scm_times(numbers):
    """FACM's law, and sCM's by its ratio of noise to data and by its angle."""
    for objective, key in ((rivals.facm(), "facm_times/t"), (rivals.scm(), "scm_times/facm_t")):
        assert differs(numbers[key], draw(objective, "consistency")[0]) < LIMIT
    own = rivals.scm(times=LogitNormal(0.307, 1.4))
    assert differs(numbers["scm_times/fastgen_t"], draw(own, "consistency")[0]) < LIMIT
    by_angle = rivals.scm(times=ArctanNormal(-0.307, 1.4))
    assert differs(numbers["scm_times/fastgen_t_by_angle"], draw(by_angle, "consistency")[0]) < LIMIT
    assert differs(numbers["facm_times/t"], draw(own, "consistency")[0]) > 5 * LIMIT


@pytest.mark.parametrize("method", ["mean_flow", "alpha_flow"])
def test_times_on_the_triangle(numbers, method):
    """Start times on the diagonal and inside, end times, lengths, and the fraction of rows with s = t."""
    objective = getattr(rivals, method)()
    assert objective.losses["flow_matching"].batch_fraction == numbers[f"{method}_times/fraction_s_equals_t"].item()
    on_diagonal, _ = draw(objective, "flow_matching")
    t, s = draw(objective, method)
    inside = {"t_where_s_above_t": t, "s_where_s_above_t": s, "length_where_s_above_t": s - t}
    for key, times in {"t_where_s_equals_t": on_diagonal, **inside}.items():
        counts = numbers[f"{method}_times/{key}"]
        assert differs(counts, times) < 1.63 * (1 / ROWS + 1 / counts.sum().item()) ** 0.5, key
    other = numbers[f"{'mean_flow' if method == 'alpha_flow' else 'alpha_flow'}_times/t_where_s_equals_t"]
    assert differs(other, on_diagonal) > 5 * LIMIT
