"""Objectives of DE-CM and its ablations. gamma and lambda are the paper's names for the start and end weight.

| loss | region of the triangle | start_weight (gamma) | end_weight (lambda) | preset |
|---|---|---|---|---|
| flow matching | `Diagonal`, s = t | 1 | 0 | all but `consistency_only` |
| consistency | `DataEdge`, s = 1 | 1 | 0 | all but `flow_matching_only` and `whole_triangle` |
| noise to noisy (DE-CM's N2N) | `NoiseEdge`, t = r -> 0 | 1 | 0.5 | `paper` |
| FreeFlow's predictor | `NoiseEdge`, t = 0 | 0 | 1 | `end_identity` |
| AYF-LMD | `Lengths`, the whole triangle | 0 | 1 | `whole_triangle` |

`rivals` has the other published methods. `batch_fractions` are the fractions of the batch that the losses use, in the
order given by a preset's docstring. With 1 every loss uses every row, as published. Fractions that sum to 1 assign each
row to one loss. `losses.cost` returns the cost of a step, so that methods can be compared at equal cost.
"""

from decm_lightning.losses.loss import FlowMapLoss
from decm_lightning.losses.objective import Objective
from decm_lightning.losses.weighting import Normalization, NormalizationName
from decm_lightning.time_laws import LogitNormal, TimeLaw, Uniform
from decm_lightning.triangle import DataEdge, Diagonal, Lengths, NoiseEdge

UNIFORM = Uniform()


def paper(
    n2n_every: int = 3,
    r_start: float = 0.1,
    r_decay_steps: int | None = None,
    batch_fractions: tuple[float, float, float] = (1.0, 1.0, 1.0),
    end_weight: float = 0.5,
    times: TimeLaw = UNIFORM,
) -> Objective:
    """DE-CM close to the paper (arXiv 2602.10764): unit weights, N2N with weights (1, 0.5) at every third step.

    The residual is clamped as in FACM, because the paper's normalization is not public. The flow-matching loss includes
    the paper's cosine term over the channels, which has no gradient for data with one channel.

    Args:
        n2n_every: N2N is computed at every `n2n_every`-th step (the paper: 3; 1 is unstable, 5 worse at few steps).
        r_start: start time of the noise edge at step 0, in [0, 1).
        r_decay_steps: steps until the start time of the noise edge is 0 (the paper: 20,000); None for a quarter of the
            run, but at most 20,000.
        batch_fractions: for consistency, flow matching and N2N.
        end_weight: N2N's lambda (the paper: 0.5; 0 and 1 are worse at 1 step).
        times: the law of t (the paper: uniform, better than logit-normal and arctan-normal).
    """
    consistency, flow_matching, n2n = batch_fractions
    noise_edge = NoiseEdge(r_start, r_decay_steps)
    return Objective(
        {
            "consistency": FlowMapLoss(DataEdge(), batch_fraction=consistency),
            "flow_matching": FlowMapLoss(Diagonal(), cosine_weight=1.0, batch_fraction=flow_matching),
            "noise_to_noisy": FlowMapLoss(
                noise_edge, start_weight=1.0, end_weight=end_weight, every=n2n_every, batch_fraction=n2n
            ),
        },
        normalization="clamp",
        times=times,
    )


def end_identity(
    normalization: NormalizationName | Normalization = "tangent_norm",
    n2n_every: int = 1,
    batch_fractions: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Objective:
    """DE-CM with only the end identity for N2N, at t = 0, and one normalization for all losses.

    The end identity is a well-posed equation in s on the noise edge alone. The start identity at t = 0 needs
    derivatives in x and t there, which no loss trains (docs/method.md).

    Args:
        normalization: N(g) for all three losses.
        n2n_every: N2N is computed at every `n2n_every`-th step.
        batch_fractions: for consistency, flow matching and N2N; (0.5, 0.25, 0.25) costs two fifths of (1, 1, 1).
    """
    consistency, flow_matching, n2n = batch_fractions
    return Objective(
        {
            "consistency": FlowMapLoss(DataEdge(), batch_fraction=consistency),
            "flow_matching": FlowMapLoss(Diagonal(), batch_fraction=flow_matching),
            "noise_to_noisy": FlowMapLoss(
                NoiseEdge(), start_weight=0.0, end_weight=1.0, every=n2n_every, batch_fraction=n2n
            ),
        },
        normalization=normalization,
    )


def whole_triangle(
    batch_fractions: tuple[float, float] = (0.75, 0.25), mean: float = -0.6, std: float = 1.6
) -> Objective:
    """The end identity on the whole triangle, next to flow matching without a normalization.

    AYF-LMD (arXiv 2506.14603, section 3.1) without its warm-up, with a loss for many steps: the default of `Distiller`,
    for its results on digits and Fashion-MNIST (docs/results.md).

    Args:
        batch_fractions: for the end identity and flow matching.
        mean: mean of the logit of the length s - t.
        std: standard deviation of the logit of the length.
    """
    triangle, flow_matching = batch_fractions
    lengths = Lengths(LogitNormal(mean, std))
    return Objective(
        {
            "triangle": FlowMapLoss(lengths, start_weight=0.0, end_weight=1.0, batch_fraction=triangle),
            # A normalized gradient does not shrink with the residual: 1 step is then at 0.72 on digits instead of 0.52.
            "flow_matching": FlowMapLoss(Diagonal(), batch_fraction=flow_matching, normalization="plain"),
        },
        normalization="tangent_norm",
    )


def consistency_only(normalization: NormalizationName | Normalization = "tangent_norm") -> Objective:
    """Continuous-time consistency distillation: the data edge alone."""
    return Objective({"consistency": FlowMapLoss(DataEdge())}, normalization=normalization)


def flow_matching_only(normalization: NormalizationName | Normalization = "tangent_norm") -> Objective:
    """Flow matching to the guided teacher: the diagonal alone, which only distills guidance."""
    return Objective({"flow_matching": FlowMapLoss(Diagonal())}, normalization=normalization)


def consistency_and_flow_matching(
    normalization: NormalizationName | Normalization = "tangent_norm",
    batch_fractions: tuple[float, float] = (1.0, 1.0),
) -> Objective:
    """The data edge and the diagonal, without N2N.

    Args:
        normalization: N(g) for both losses.
        batch_fractions: for consistency and flow matching.
    """
    consistency, flow_matching = batch_fractions
    return Objective(
        {
            "consistency": FlowMapLoss(DataEdge(), batch_fraction=consistency),
            "flow_matching": FlowMapLoss(Diagonal(), batch_fraction=flow_matching),
        },
        normalization=normalization,
    )
