"""Objectives of DE-CM and related methods. gamma and lambda are the paper's names for the start and end weight.

| loss | region of the triangle | start_weight (gamma) | end_weight (lambda) | preset |
|---|---|---|---|---|
| flow matching | `Diagonal`, s = t | 1 | 0 | all but `consistency_only` |
| consistency (CM, sCM, FACM) | `DataEdge`, s = 1 | 1 | 0 | `paper`, `end_identity`, `facm`, `consistency_*` |
| noise to noisy (DE-CM's N2N) | `NoiseEdge`, t = r -> 0 | 1 | 0.5 | `paper` |
| FreeFlow's predictor | `NoiseEdge`, t = 0 | 0 | 1 | `end_identity` |
| MeanFlow, AYF-EMD | `Triangle` | 1 | 0 | `mean_flow` |
| Lagrangian map distillation, AYF-LMD | `Triangle` | 0 | 1 | `lagrangian` |

`batch_fractions` are the fractions of the batch that the losses use, in the order given by a preset's docstring. With 1
every loss uses every row, as published. Fractions that sum to 1 assign each row to one loss. `losses.cost` returns the
cost of a step, so that methods can be compared at equal cost.
"""

from decm_lightning.losses.dual_end import DualEndLoss, Objective
from decm_lightning.losses.weighting import Normalization, NormalizationName
from decm_lightning.triangle import DataEdge, Diagonal, LogitNormal, NoiseEdge, Triangle


def paper(
    n2n_every: int = 3,
    r_start: float = 0.1,
    r_decay_steps: int | None = None,
    batch_fractions: tuple[float, float, float] = (1.0, 1.0, 1.0),
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
    """
    consistency, flow_matching, n2n = batch_fractions
    noise_edge = NoiseEdge(r_start, r_decay_steps)
    return Objective(
        {
            "consistency": DualEndLoss(DataEdge(), batch_fraction=consistency),
            "flow_matching": DualEndLoss(Diagonal(), cosine_weight=1.0, batch_fraction=flow_matching),
            "noise_to_noisy": DualEndLoss(
                noise_edge, start_weight=1.0, end_weight=0.5, every=n2n_every, batch_fraction=n2n
            ),
        },
        normalization="clamp",
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
            "consistency": DualEndLoss(DataEdge(), batch_fraction=consistency),
            "flow_matching": DualEndLoss(Diagonal(), batch_fraction=flow_matching),
            "noise_to_noisy": DualEndLoss(
                NoiseEdge(), start_weight=0.0, end_weight=1.0, every=n2n_every, batch_fraction=n2n
            ),
        },
        normalization=normalization,
    )


def consistency_only(normalization: NormalizationName | Normalization = "tangent_norm") -> Objective:
    """Continuous-time consistency distillation: the data edge alone."""
    return Objective({"consistency": DualEndLoss(DataEdge())}, normalization=normalization)


def flow_matching_only(normalization: NormalizationName | Normalization = "tangent_norm") -> Objective:
    """Flow matching to the guided teacher: the diagonal alone, which only distills guidance."""
    return Objective({"flow_matching": DualEndLoss(Diagonal())}, normalization=normalization)


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
            "consistency": DualEndLoss(DataEdge(), batch_fraction=consistency),
            "flow_matching": DualEndLoss(Diagonal(), batch_fraction=flow_matching),
        },
        normalization=normalization,
    )


def facm(batch_fractions: tuple[float, float] = (1.0, 1.0)) -> Objective:
    """FACM (arXiv 2507.03738): the data edge weighted by cos(pi t / 2), and the diagonal; clamped residual.

    Unlike this preset, FACM also scales the residual by 1 - t^0.5, applies a normalized L2 loss to the clamped
    residual, and uses another distribution of t.

    Args:
        batch_fractions: for consistency and flow matching.
    """
    consistency, flow_matching = batch_fractions
    return Objective(
        {
            "consistency": DualEndLoss(DataEdge(), time_weight="cosine", batch_fraction=consistency),
            "flow_matching": DualEndLoss(Diagonal(), cosine_weight=1.0, batch_fraction=flow_matching),
        },
        normalization="clamp",
    )


def mean_flow(batch_fractions: tuple[float, float] = (1.0, 1.0)) -> Objective:
    """MeanFlow (arXiv 2505.13447) with a teacher: the whole triangle by the start identity, with adaptive L2.

    t has MeanFlow's distribution, which is logit-normal(-0.4, 1) when time 1 is noise. There are two differences: s is
    uniform over [t, 1] instead of a second sample, and by default every row has both losses. MeanFlow uses 75 % of the
    rows for flow matching: `batch_fractions=(0.25, 0.75)`.

    Args:
        batch_fractions: for MeanFlow's loss and flow matching.
    """
    triangle, flow_matching = batch_fractions
    return Objective(
        {
            "mean_flow": DualEndLoss(Triangle(), batch_fraction=triangle),
            "flow_matching": DualEndLoss(Diagonal(), batch_fraction=flow_matching),
        },
        normalization="adaptive_l2",
        times=LogitNormal(0.4, 1.0),
    )


def lagrangian(batch_fractions: tuple[float, float] = (1.0, 1.0)) -> Objective:
    """Lagrangian flow-map distillation (arXiv 2406.07507): the whole triangle by the end identity.

    Args:
        batch_fractions: for the Lagrangian loss and flow matching.
    """
    triangle, flow_matching = batch_fractions
    return Objective(
        {
            "lagrangian": DualEndLoss(Triangle(), start_weight=0.0, end_weight=1.0, batch_fraction=triangle),
            "flow_matching": DualEndLoss(Diagonal(), batch_fraction=flow_matching),
        }
    )
