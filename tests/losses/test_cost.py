"""The cost of a step: predicted passes equal the passes that are run."""

import pytest

from decm_lightning.guidance import Guidance
from decm_lightning.losses import (
    FlowMapLoss,
    Objective,
    alpha_flow,
    cost,
    discrete_consistency,
    end_identity,
    facm,
    lagrangian,
    mean_flow,
    paper,
    shortcut,
    split_mean_flow,
)
from decm_lightning.losses.middle import Fixed
from decm_lightning.triangle import DataEdge

SHARES = (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("objective", "teacher", "student", "derivative"),
    [
        # Consistency and flow matching share the velocity; N2N reads it at both of its ends, at every third step.
        (paper(), 1 + 2 / 3, 2 + 1 / 3, 1 + 1 / 3),
        (paper(n2n_every=1, batch_fractions=SHARES), 0.75 + 0.5, 1, 0.75),
        # N2N by its end identity reads one more velocity.
        (end_identity(), 1 + 1, 3, 2),
        (end_identity(batch_fractions=SHARES), 0.75 + 0.25, 1, 0.75),
        # Rows that no loss uses have no cost.
        (end_identity(batch_fractions=(0.25, 0.125, 0.125)), 0.375 + 0.125, 0.5, 0.375),
        (facm(), 1, 2, 1),
        (lagrangian(), 1 + 1, 2, 1),
        (mean_flow(batch_fractions=(1.0, 1.0)), 1, 2, 1),
        # Other methods with divided batches, for comparisons at equal cost.
        (facm((0.75, 0.25)), 1, 1, 0.75),
        (mean_flow(), 1, 1, 0.25),
        (lagrangian((0.75, 0.25)), 0.25 + 0.75, 1, 0.75),
    ],
)
def test_passes_by_hand(objective, teacher, student, derivative):
    """Each preset's passes, counted by hand, and two backward passes per forward pass of the student."""
    result = cost(objective)
    passes = (result.teacher, result.student, result.derivative)
    assert passes == pytest.approx((teacher, student, derivative), abs=2e-3)
    assert result.backward == 2 * result.student
    assert result.total == pytest.approx(teacher + 3 * student + derivative, abs=1e-2)


@pytest.mark.parametrize(
    ("objective", "teacher", "derivative", "target"),
    [
        # The teacher's first part, then one pass of the student.
        (alpha_flow(alpha=Fixed(0.5)), 1, 0, 0.5),
        (split_mean_flow(), 0.75, 0, 2 * 0.25),
        (shortcut(), 0.75, 0, 2 * 0.25),
        (discrete_consistency(), 1, 0, 1),
    ],
)
def test_passes_of_the_middle_identity(objective, teacher, derivative, target):
    """No derivative; one or two passes without a graph for the target."""
    result = cost(objective)
    assert (result.teacher, result.derivative, result.target) == pytest.approx((teacher, derivative, target), abs=2e-3)
    assert result.total == pytest.approx(teacher + 3 * result.student + target, abs=1e-2)


def test_a_schedule_is_averaged_over_the_run():
    """AlphaFlow has a target until its alpha is 0, at 71 % of the run, and a derivative afterwards."""
    result = cost(alpha_flow().for_run(10_000))
    assert (result.target, result.derivative) == pytest.approx((0.5 * 0.72, 0.5 * 0.28), abs=0.01)


def test_guidance_doubles_the_teacher_in_its_interval():
    """Null rows are evaluated only where guidance is active."""
    once = cost(facm()).teacher
    assert cost(facm(), Guidance(2.0).passes).teacher == 2 * once
    assert cost(facm(), Guidance(2.0, interval=(0.2, 0.7)).passes).teacher == pytest.approx(1.5 * once)
    assert Guidance().passes == 1


def test_facm_costs_what_is_published():
    """Eight forward passes and one tangent per sample."""
    assert cost(facm(), 2.0).total == pytest.approx(9.0)


def test_the_shares_of_the_demo_cost_less_than_two_thirds_of_facm():
    """5.75 forward passes against 9: the arithmetic behind the benchmark's ratio."""
    assert cost(end_identity(batch_fractions=SHARES), 2.0).total == pytest.approx(5.75, abs=1e-2)


def test_a_loss_that_is_due_seldom_costs_its_part():
    """Every fourth step: a quarter."""
    seldom = Objective({"consistency": FlowMapLoss(DataEdge(), every=4)})
    assert cost(seldom).total == pytest.approx(cost(Objective({"consistency": FlowMapLoss(DataEdge())})).total / 4)
