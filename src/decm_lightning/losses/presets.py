"""DE-CM and its rivals: each a row of the same table (edge, left, right, weighting)."""

from decm_lightning.losses.dual_end import DualEndLoss, Objective
from decm_lightning.losses.weighting import NormalizationName
from decm_lightning.triangle import DataEdge, Diagonal, LogitNormal, NoiseEdge, Triangle


def paper(
    n2n_every: int = 3,
    r_start: float = 0.1,
    r_decay_steps: int = 20_000,
    batch_fractions: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Objective:
    """DE-CM near to its publication (arXiv 2602.10764): unit weights, N2N with ends (1, 0.5) at every third step.

    The clamp of the residual is FACM's: what the paper normalizes by is not public. The flow-matching loss has the
    paper's cosine term over the channels, which has no gradient where there is one channel.

    Args:
        n2n_every: steps between two N2N losses (the paper: 3; 1 is unstable, 5 worse at few steps).
        r_start: start time of the noise edge at step 0, in [0, 1).
        r_decay_steps: steps until the noise edge has reached the noise.
        batch_fractions: parts of the batch for consistency, flow matching and N2N; the paper gives each the whole.
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
    normalization: NormalizationName = "tangent_norm",
    n2n_every: int = 1,
    batch_fractions: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Objective:
    """DE-CM as we would train it: N2N by its end identity alone, at t = 0, and one normalization for all losses.

    The end identity is a well-posed equation in s that stays inside its own edge; the start end at t = 0 asks for
    derivatives in x and t there, which no loss trains (see docs/method.md).

    Args:
        normalization: N(g) of all three losses.
        n2n_every: steps between two N2N losses.
        batch_fractions: parts of the batch for consistency, flow matching and N2N; (0.5, 0.25, 0.25) costs about two
            fifths of all ones.
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


def consistency_only(normalization: NormalizationName = "tangent_norm") -> Objective:
    """Continuous-time consistency distillation: the data edge alone."""
    return Objective({"consistency": DualEndLoss(DataEdge())}, normalization=normalization)


def flow_matching_only(normalization: NormalizationName = "tangent_norm") -> Objective:
    """Flow matching to the guided teacher: the diagonal alone, which only burns guidance in."""
    return Objective({"flow_matching": DualEndLoss(Diagonal())}, normalization=normalization)


def consistency_and_flow_matching(
    normalization: NormalizationName = "tangent_norm", batch_fractions: tuple[float, float] = (1.0, 1.0)
) -> Objective:
    """The data edge and the diagonal, without N2N.

    Args:
        normalization: N(g) of both losses.
        batch_fractions: parts of the batch for consistency and flow matching.
    """
    consistency, flow_matching = batch_fractions
    return Objective(
        {
            "consistency": DualEndLoss(DataEdge(), batch_fraction=consistency),
            "flow_matching": DualEndLoss(Diagonal(), batch_fraction=flow_matching),
        },
        normalization=normalization,
    )


def facm() -> Objective:
    """FACM's two edges (arXiv 2507.03738): data edge weighted by cos(pi t / 2), and the diagonal; clamped residual.

    FACM itself also scales the residual by 1 - t^0.5, takes a normalized L2 of the clamped residual, and draws t by a
    law of its own.
    """
    return Objective(
        {
            "consistency": DualEndLoss(DataEdge(), time_weight="cosine"),
            "flow_matching": DualEndLoss(Diagonal(), cosine_weight=1.0),
        },
        normalization="clamp",
    )


def mean_flow() -> Objective:
    """MeanFlow's equation (arXiv 2505.13447) with a teacher: the whole triangle by its start end; adaptive L2.

    Its own law of t is kept: logit-normal(-0.4, 1) on a clock where 1 is noise. It differs from MeanFlow in that s is
    uniform over [t, 1] instead of a second draw, and that every row has both losses instead of 75 % flow matching.
    """
    return Objective(
        {"mean_flow": DualEndLoss(Triangle()), "flow_matching": DualEndLoss(Diagonal())},
        normalization="adaptive_l2",
        times=LogitNormal(0.4, 1.0),
    )


def lagrangian() -> Objective:
    """Lagrangian flow-map distillation (arXiv 2406.07507): the whole triangle by its end identity."""
    return Objective(
        {
            "lagrangian": DualEndLoss(Triangle(), start_weight=0.0, end_weight=1.0),
            "flow_matching": DualEndLoss(Diagonal()),
        }
    )
