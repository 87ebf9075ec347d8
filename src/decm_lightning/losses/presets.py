"""DE-CM and its rivals, each a few rows of one table (gamma and lambda are the paper's start and end weight).

| loss | region of the triangle | start_weight (gamma) | end_weight (lambda) | preset |
|---|---|---|---|---|
| flow matching | `Diagonal`, s = t | 1 | 0 | all but `consistency_only` |
| consistency (CM, sCM, FACM) | `DataEdge`, s = 1 | 1 | 0 | `paper`, `end_identity`, `facm`, `consistency_*` |
| noise to noisy (DE-CM's N2N) | `NoiseEdge`, t = r -> 0 | 1 | 0.5 | `paper` |
| FreeFlow's predictor | `NoiseEdge`, t = 0 | 0 | 1 | `end_identity` |
| MeanFlow, AYF-EMD | `Triangle` | 1 | 0 | `mean_flow` |
| Lagrangian map distillation, AYF-LMD | `Triangle` | 0 | 1 | `lagrangian` |

`batch_fractions` are the parts of the batch that the losses take, in the order of a preset's docstring. At 1 every loss
sees every row, as published. Fractions that sum to 1 give each row to one loss; `losses.cost` shows what a step then
costs, so that methods can be compared at equal cost.
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
    """DE-CM close to its publication (arXiv 2602.10764): unit weights, N2N with ends (1, 0.5) at every third step.

    The clamp of the residual is FACM's: the paper's normalization is not public. The flow-matching loss has the paper's
    cosine term over the channels, which has no gradient where there is one channel.

    Args:
        n2n_every: number of steps from one N2N loss to the next (the paper: 3; 1 is unstable, 5 worse at few steps).
        r_start: start time of the noise edge at step 0, in [0, 1).
        r_decay_steps: steps until the noise edge has reached the noise (the paper: 20,000); None for a quarter of the
            run, at most 20,000.
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
    """DE-CM with N2N by its end identity alone, at t = 0, and one normalization for all losses.

    The end identity is a well-posed equation in s that stays on its own edge. The start identity at t = 0 needs
    derivatives in x and t there, which no loss trains (docs/method.md).

    Args:
        normalization: N(g) of all three losses.
        n2n_every: number of steps from one N2N loss to the next.
        batch_fractions: for consistency, flow matching and N2N; (0.5, 0.25, 0.25) costs about two fifths of all ones.
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
    """Flow matching to the guided teacher: the diagonal alone, which distills guidance and nothing else."""
    return Objective({"flow_matching": DualEndLoss(Diagonal())}, normalization=normalization)


def consistency_and_flow_matching(
    normalization: NormalizationName | Normalization = "tangent_norm",
    batch_fractions: tuple[float, float] = (1.0, 1.0),
) -> Objective:
    """The data edge and the diagonal, without N2N.

    Args:
        normalization: N(g) of both losses.
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
    """FACM's two edges (arXiv 2507.03738): data edge weighted by cos(pi t / 2), and the diagonal; clamped residual.

    FACM itself also scales the residual by 1 - t^0.5, takes a normalized L2 of the clamped residual, and has its own
    distribution of t.

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
    """MeanFlow's equation (arXiv 2505.13447) with a teacher: the whole triangle by its start identity; adaptive L2.

    t has MeanFlow's distribution: logit-normal(-0.4, 1) on a clock where 1 is noise. Two things differ from MeanFlow: s
    is uniform over [t, 1] instead of a second draw, and by default every row has both losses instead of 75 % flow
    matching, which is `batch_fractions=(0.25, 0.75)`.

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
    """Lagrangian flow-map distillation (arXiv 2406.07507): the whole triangle by its end identity.

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
