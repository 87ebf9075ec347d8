"""Other published methods as rows of one table, with their own weightings, times and schedules.

| preset | region | identity (weight) | N(g) and weight | times |
|---|---|---|---|---|
| `facm` | data edge, diagonal | start | clamp, 1 - t^0.5, normalized L2, cos(pi t / 2); plain | arctan-normal |
| `scm` | data edge | start | cos(pi t / 2) g, tangent normalization, learned weight | arctan-normal |
| `mean_flow` | triangle, diagonal | start | adaptive L2, power 1 | two logit-normal times |
| `ayf_emd` | triangle | start | tangent normalization | logit-normal length |
| `ayf_lmd` | triangle | end | tangent normalization | logit-normal length |
| `lagrangian` | triangle, diagonal | end | plain | uniform |
| `free_flow` | noise edge | end | g / (mean(g^2) + eps)^k | uniform end |
| `alpha_flow` | triangle, diagonal | middle, alpha -> 0 | alpha times adaptive L2 | two logit-normal times |
| `split_mean_flow` | triangle, diagonal | middle, alpha random | plain | two logit-normal times |
| `shortcut` | dyadic steps, shortest steps | middle, alpha = 1/2 | plain | grid |
| `discrete_consistency` | data edge | middle, fixed length | plain | grid |

t = 0 is noise here. Papers in which t = 1 is noise have our 1 - t, and -u for our u. A published mean over all rows is
the sum of two losses whose weights are their fractions of the rows. Reported values are the FID of class-conditional
ImageNet at 256 x 256 pixels with 1 step unless stated otherwise.
"""

from dataclasses import replace

from decm_lightning.losses.loss import FlowMapLoss
from decm_lightning.losses.middle import Fixed, FixedLength, Middle, Random, Sigmoid
from decm_lightning.losses.objective import Objective
from decm_lightning.losses.weighting import Normalization, NormalizationName, Normalize
from decm_lightning.time_laws import ArctanNormal, Grid, LogitNormal, SmallerOfTwo, TimeLaw
from decm_lightning.triangle import DataEdge, Diagonal, DyadicSteps, Edge, Lengths, NoiseEdge, Triangle

FACM_TIMES = ArctanNormal(-0.8, 1.6)
MEAN_FLOW_TIMES = LogitNormal(0.4, 1.0)
"""sigmoid(N(-0.4, 1)) in a clock in which 1 is noise."""


def facm(batch_fractions: tuple[float, float] = (1.0, 1.0)) -> Objective:
    """FACM (arXiv 2507.03738): consistency and flow matching on all rows. Reported: 1.76 and, at 2 steps, 1.32.

    Consistency: h = (1 - t^0.5) clamp(u - v - (1 - t) jvp, -1, 1), N = h / (mean(h^2) + 1e-3)^0.5, rows weighted by
    cos(pi t / 2). Flow matching: mean square plus 1 - cosine similarity over the channels. Guidance applies for t in
    [0.125, 1]: set it in the distiller.

    Args:
        batch_fractions: for consistency and flow matching.
    """
    consistency, flow_matching = batch_fractions
    normalization = Normalize(limit=1.0, factor="one_minus_root", power=0.5, constant=1e-3)
    losses = {
        "consistency": FlowMapLoss(
            DataEdge(), time_weight="cosine", normalization=normalization, batch_fraction=consistency
        ),
        "flow_matching": FlowMapLoss(Diagonal(), cosine_weight=1.0, batch_fraction=flow_matching),
    }
    return Objective(losses, times=FACM_TIMES)


def scm(warmup_steps: int | None = None, learned_weight: bool = True, times: TimeLaw = FACM_TIMES) -> Objective:
    """Continuous-time consistency, sCM (arXiv 2410.11081, algorithm 1), on the straight path. Reported by FACM: 3.34.

    h = cos(pi t / 2) (u - v - w (1 - t) jvp), N = h / (rms(h) + 0.1). The factor w rises from 0 to 1 over
    `warmup_steps`.

    Args:
        warmup_steps: steps of the tangent warm-up; None for a tenth of the run, but at most the published 10,000.
        learned_weight: learn the weight exp(w(t)) of each time.
        times: the law of t. The default is FACM's; `LogitNormal(0.307, 1.4)` has the ratios of noise to data of sCM's
            own law, P_mean = -1 and P_std = 1.4 with sigma_data = 0.5.
    """
    normalization = Normalize(factor="cosine", power=0.5, constant=0.1, outside=True)
    loss = FlowMapLoss(DataEdge(), normalization=normalization, learned_weight=learned_weight)
    return Objective({"consistency": loss}, times=times, warmup_steps=warmup_steps)


def mean_flow(
    diagonal: float = 0.75,
    power: float = 1.0,
    constant: float = 0.01,
    over_sum: bool = True,
    batch_fractions: tuple[float, float] | None = None,
) -> Objective:
    """MeanFlow (arXiv 2505.13447, eqs. 10 and 22, algorithm 1). Reported: 3.43 (XL/2, trained without a teacher).

    N = D g / (sum(g^2) + 0.01)^p with p = 1. t and s are the smaller and the larger of two logit-normal times, and
    s = t in 75 % of the rows. With `Distiller(teacher=None, student=...)` the velocity is x_1 - x_0, as published;
    with a teacher it is the guided teacher's.

    Args:
        diagonal: fraction of the rows with s = t, in (0, 1).
        power: p.
        constant: constant in the denominator.
        over_sum: add the constant to the sum of the squares; FACM's version adds 1e-3 to their mean.
        batch_fractions: rows of both losses, if other than 1 - diagonal and diagonal.
    """
    normalization = Normalize(power=power, constant=constant, over="sum" if over_sum else "mean")
    return _on_triangle("mean_flow", FlowMapLoss(Triangle(MEAN_FLOW_TIMES)), diagonal, normalization, batch_fractions)


def ayf_emd(warmup_steps: int | None = None, mean: float = -0.6, std: float = 1.6) -> Objective:
    """AYF-EMD (arXiv 2506.14603, algorithm 1): the start identity on the whole triangle. Reported on ImageNet 512 only.

    N = g / (rms(g) + 0.1), with the tangent warm-up of sCM. s - t is sigmoid(N(mean, std^2)), and t is uniform over
    [0, 1 - (s - t)]. The paper's autoguided teacher is not part of the objective. mean and std are a public
    reimplementation's; the paper's own text was not available.

    Args:
        warmup_steps: steps of the tangent warm-up; None for a tenth of the run, but at most the published 10,000.
        mean: mean of the logit of the length.
        std: standard deviation of the logit of the length.
    """
    loss = FlowMapLoss(Lengths(LogitNormal(mean, std)))
    return Objective({"ayf_emd": loss}, normalization="tangent_norm", warmup_steps=warmup_steps)


def ayf_lmd(warmup_steps: int | None = None, mean: float = -0.6, std: float = 1.6) -> Objective:
    """AYF-LMD (arXiv 2506.14603, section 3.1): the end identity on the whole triangle, otherwise like `ayf_emd`.

    Args:
        warmup_steps: steps of the tangent warm-up; None for a tenth of the run, but at most the published 10,000.
        mean: mean of the logit of the length.
        std: standard deviation of the logit of the length.
    """
    loss = FlowMapLoss(Lengths(LogitNormal(mean, std)), start_weight=0.0, end_weight=1.0)
    return Objective({"ayf_lmd": loss}, normalization="tangent_norm", warmup_steps=warmup_steps)


def lagrangian(batch_fractions: tuple[float, float] = (1.0, 1.0)) -> Objective:
    """Lagrangian flow-map distillation (arXiv 2406.07507, eq. 3.4): the whole triangle by the end identity.

    Args:
        batch_fractions: for the Lagrangian loss and flow matching.
    """
    triangle, flow_matching = batch_fractions
    return Objective(
        {
            "lagrangian": FlowMapLoss(Triangle(), start_weight=0.0, end_weight=1.0, batch_fraction=triangle),
            "flow_matching": FlowMapLoss(Diagonal(), batch_fraction=flow_matching),
        }
    )


def free_flow(power: float = 1.0, constant: float = 1e-3) -> Objective:
    """FreeFlow's predictor (arXiv 2511.19428): the end identity from pure noise, without data. Reported: 1.45.

    g = u + s du/ds - v(f(x_0, 0, s), s), N = g / (mean(g^2) + constant)^power. The reported value includes FreeFlow's
    corrector, which `CorrectedDistiller` adds to an objective.

    Args:
        power: the paper's k, at least 0.
        constant: constant in the denominator, at least 0.
    """
    loss = FlowMapLoss(NoiseEdge(), start_weight=0.0, end_weight=1.0)
    return Objective({"predictor": loss}, normalization=Normalize(power=power, constant=constant))


def alpha_flow(
    diagonal: float = 0.5,
    alpha: Sigmoid | Fixed = Sigmoid(),  # noqa: B008 - frozen
    batch_fractions: tuple[float, float] | None = None,
) -> Objective:
    """AlphaFlow (arXiv 2510.20771): from flow matching (alpha = 1) to MeanFlow (alpha = 0). Reported: 2.58.

    Target clamp(alpha v + (1 - alpha) u(x_m, m, s), -4, 4) with x_m = x_t + (m - t) v,
    N = alpha (u - target) / (mean((u - target)^2) + 1e-3). Where alpha is 0 the loss is the start identity with
    N = g / (mean(g^2) + 1e-3). In the rows with s = t, t is one logit-normal time.

    Args:
        diagonal: fraction of the rows with s = t, in (0, 1).
        alpha: the schedule of alpha; over the run's length by default (the paper: 400,000 steps).
        batch_fractions: rows of both losses, if other than 1 - diagonal and diagonal.
    """
    middle = Middle(alpha, first="teacher", divided=False, weighted=True, limit=4.0)
    loss = FlowMapLoss(Triangle(MEAN_FLOW_TIMES), start_weight=0.0, middle_weight=1.0, middle=middle)
    normalization = Normalize(power=1.0, constant=1e-3)
    return _on_triangle("alpha_flow", loss, diagonal, normalization, batch_fractions, Diagonal(MEAN_FLOW_TIMES))


def split_mean_flow(diagonal: float = 0.75, batch_fractions: tuple[float, float] | None = None) -> Objective:
    """SplitMeanFlow (arXiv 2507.16884, algorithm 1): a step split at a random time. No value on ImageNet is reported.

    Target alpha u(x_t, t, m) + (1 - alpha) u(x_m, m, s) with alpha uniform over (0, 1); mean square.

    Args:
        diagonal: fraction of the rows with s = t, in (0, 1).
        batch_fractions: rows of both losses, if other than 1 - diagonal and diagonal.
    """
    middle = Middle(Random(), divided=False)
    loss = FlowMapLoss(Triangle(MEAN_FLOW_TIMES), start_weight=0.0, middle_weight=1.0, middle=middle)
    return _on_triangle("split_mean_flow", loss, diagonal, "plain", batch_fractions)


def shortcut(finest: int = 128, bootstrapped: float = 0.25) -> Objective:
    """Shortcut models (arXiv 2410.12557, algorithm 1): a step equals two half steps. Reported: 10.6 (XL/2).

    Target clamp((u_1 + u_2) / 2, -4, 4) from the averaged network, with steps of length 1, 1/2, ..., 2 / finest; mean
    square. The other rows match the velocity with steps of length 1 / finest.

    Args:
        finest: number of the shortest steps, a power of 2.
        bootstrapped: fraction of the rows with the middle identity, in (0, 1).
    """
    middle = Middle(Fixed(0.5), network="average", divided=False, limit=4.0)
    loss = FlowMapLoss(DyadicSteps(finest), start_weight=0.0, middle_weight=1.0, middle=middle)
    return _on_triangle("shortcut", loss, 1 - bootstrapped, "plain", None, Diagonal(Grid(finest), 1 / finest))


def discrete_consistency(steps: int = 40, normalization: NormalizationName | Normalization = "plain") -> Objective:
    """Consistency distillation (arXiv 2303.01469, algorithm 2) with Euler steps of the teacher on a grid of times.

    Target alpha v + (1 - alpha) u(x_m, m, 1) from the averaged network with m = t + 1 / steps. The paper uses Heun
    steps, Karras's grid and LPIPS; its value (6.20 on ImageNet 64) is of another setting.

    Args:
        steps: number of grid times, at least 1 (the paper: 40 on ImageNet).
        normalization: N(g).
    """
    middle = Middle(FixedLength(1 / steps), first="teacher", network="average", divided=False)
    loss = FlowMapLoss(DataEdge(), start_weight=0.0, middle_weight=1.0, middle=middle)
    return Objective({"consistency": loss}, normalization=normalization, times=Grid(steps))


def _on_triangle(
    name: str,
    loss: FlowMapLoss,
    diagonal: float,
    normalization: NormalizationName | Normalization,
    batch_fractions: tuple[float, float] | None,
    edge: Edge = Diagonal(),  # noqa: B008 - frozen
) -> Objective:
    """Return a loss and flow matching as one mean over all rows, of which the fraction `diagonal` has s = t."""
    if not 0 < diagonal < 1:
        raise ValueError(f"the fraction of rows with s = t must be in (0, 1): got {diagonal}")
    first, second = batch_fractions or (1 - diagonal, diagonal)
    losses = {
        name: replace(loss, weight=1 - diagonal, batch_fraction=first),
        "flow_matching": FlowMapLoss(edge, weight=diagonal, batch_fraction=second),
    }
    times = SmallerOfTwo(MEAN_FLOW_TIMES)
    return Objective(losses, normalization, times=times)
