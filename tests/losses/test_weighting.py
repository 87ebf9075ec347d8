"""Normalizations and time weights on small examples, and the two losses by their gradients."""

import math

import pytest
import torch

from decm_lightning.losses.weighting import (
    NORMALIZATIONS,
    TIME_WEIGHTS,
    Normalize,
    cosine_loss,
    normalized,
    stopgrad_mse,
    time_weights,
    warm_up,
)


def by_name(name):
    """Return a normalization as a function of g alone."""
    return lambda g: normalized(g, torch.zeros(len(g), dtype=g.dtype), name)


plain, clamp, tangent_norm, adaptive_l2 = map(by_name, NORMALIZATIONS)


def test_plain_is_the_residual_itself():
    """N(g) = g."""
    g = torch.tensor([[3.0, -40.0]])
    assert torch.equal(plain(g), g)


def test_clamp_cuts_each_element():
    """N(g) lies in [-1, 1], and values inside are unchanged."""
    assert clamp(torch.tensor([[3.0, -40.0, 0.25]])).tolist() == [[1.0, -1.0, 0.25]]


def test_tangent_norm_divides_by_the_rms_plus_a_tenth():
    """rms(3, 4) = sqrt(12.5)."""
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.stack([g[0] / (math.sqrt(12.5) + 0.1), torch.zeros(2, dtype=torch.float64)])
    torch.testing.assert_close(tangent_norm(g), expected, rtol=0, atol=1e-14)


def test_adaptive_l2_divides_by_the_root_of_the_mean_square():
    """mean(9, 16) = 12.5."""
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    expected = torch.stack([g[0] / math.sqrt(12.501), torch.zeros(2, dtype=torch.float64)])
    torch.testing.assert_close(adaptive_l2(g), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalization", [tangent_norm, adaptive_l2])
def test_normalisers_take_the_mean_over_all_elements_of_a_sample(normalization, generator):
    """An image is normalized as one vector of its elements, and rows do not mix."""
    g = (
        torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
        * torch.tensor([0.01, 1, 10, 1e3])[:, None, None, None]
    )
    torch.testing.assert_close(normalization(g).flatten(1), normalization(g.flatten(1)), rtol=0, atol=1e-14)
    torch.testing.assert_close(normalization(g)[2:3], normalization(g[2:3]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalization", [tangent_norm, adaptive_l2])
def test_normalised_residuals_are_bounded_and_keep_their_direction(normalization, generator):
    """For any large g the rms of N(g) is close to 1 and at most 1, and N(g) is parallel to g."""
    g = 1e4 * torch.randn(16, 8, generator=generator, dtype=torch.float64)
    normalized = normalization(g)
    rms = normalized.square().mean(1).sqrt()
    assert rms.max() <= 1
    assert rms.min() > 0.999
    cosine = torch.nn.functional.cosine_similarity(g, normalized)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("normalize", "size"),
    [
        (Normalize(power=0.3, constant=2.0), (12.5 + 2) ** 0.3),
        (Normalize(power=0.3, constant=2.0, outside=True), 12.5**0.3 + 2),
        (Normalize(power=1.0, constant=0.5, over="sum"), (25 + 0.5) / 2),
        (Normalize(limit=3.5, power=0.5), ((9 + 3.5**2) / 2) ** 0.5),
        (Normalize(factor=lambda t: 2 * t, power=0.5, constant=1.0), (12.5 / 4 + 1) ** 0.5 * 2),
    ],
)
def test_normalize_by_hand(normalize, size):
    """g = (3, 4) at t = 1/4, divided by a size computed by hand."""
    g, t = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    h = g.clamp(max=normalize.limit) if normalize.limit else g
    torch.testing.assert_close(normalize(g, t), h / size, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [{"limit": 0.0}, {"power": -1.0}, {"constant": -1.0}, {"over": "sum", "outside": True}],
)
def test_normalize_refuses_what_is_out_of_range(arguments):
    """The message contains the value."""
    with pytest.raises(ValueError, match="got"):
        Normalize(**arguments)


def test_weights_may_depend_on_the_length():
    """A function of two arguments gets the start and the end times."""
    t, s = torch.tensor([0.25]), torch.tensor([1.0])
    assert time_weights(t, s, lambda t, s: s - t).item() == 0.75
    assert time_weights(t, s, lambda t: 2 * t).item() == 0.5
    assert time_weights(t, s, "one_minus_root").item() == 0.5


def test_time_weights_are_one_or_a_quarter_of_a_cosine():
    """cos(pi t / 2) falls from 1 at the noise to 0 at data."""
    t = torch.tensor([0.0, 0.5, 2 / 3, 1.0], dtype=torch.float64)
    assert TIME_WEIGHTS["constant"](t).tolist() == [1, 1, 1, 1]
    expected = torch.tensor([1.0, math.sqrt(0.5), 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(TIME_WEIGHTS["cosine"](t), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("step", "steps", "factor"), [(0, 100, 0), (25, 100, 0.25), (100, 100, 1), (500, 100, 1), (0, 0, 1), (7, 0, 1)]
)
def test_warm_up_rises_linearly_from_0_to_1(step, steps, factor):
    """It stays at 1 after its steps, and is always 1 for 0 steps."""
    assert warm_up(step, steps) == factor


def test_pull_is_the_weighted_mean_square_with_gradient_2_g(generator):
    """The value is mean(w g^2) and the gradient 2 w g / number of elements: the target is constant."""
    u, g = torch.randn(2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    u.requires_grad_(True)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    value = stopgrad_mse(u, g, weight)
    w = weight[:, None, None, None]
    torch.testing.assert_close(value, (w * g**2).mean())
    (gradient,) = torch.autograd.grad(value, u)
    torch.testing.assert_close(gradient, 2 * w * g / g.numel(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("g", "value"), [([[0.5, 0.0]], 0.0), ([[1.0, -1.0]], 1.0), ([[2.0, 0.0]], 2.0)])
def test_direction_is_0_along_1_across_and_2_against(g, value):
    """With u = (1, 0), the targets u - g are (0.5, 0), (0, 1) and (-1, 0)."""
    u = torch.tensor([[1.0, 0.0]])
    assert cosine_loss(u, torch.tensor(g)).item() == pytest.approx(value)


def test_direction_compares_channels_at_each_place(generator):
    """For images the similarity is over axis 1 at each pixel, then averaged."""
    u, g = torch.randn(2, 2, 5, 3, 3, generator=generator, dtype=torch.float64)
    target = u - g
    by_place = (u * target).sum(1) / (u.norm(dim=1) * target.norm(dim=1))
    torch.testing.assert_close(cosine_loss(u, g), (1 - by_place).mean())


def test_direction_moves_u_alone(generator):
    """Its gradient is that of the cosine to a fixed target. It is orthogonal to u, so the length does not change."""
    u, g = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    target = u - g
    u.requires_grad_(True)
    (gradient,) = torch.autograd.grad(cosine_loss(u, g), u)
    length, reach = u.norm(dim=1, keepdim=True), target.norm(dim=1, keepdim=True)
    cosine = (u * target).sum(1, keepdim=True) / (length * reach)
    expected = -(target / (length * reach) - cosine * u / length**2) / 6
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-14)
    assert (gradient * u).sum(1).abs().max() < 1e-14


def test_direction_of_one_channel_has_no_gradient():
    """The similarity of scalars is a sign."""
    u = torch.tensor([[2.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cosine_loss(u, torch.tensor([[0.5], [-3.0]], dtype=torch.float64)), u)
    assert gradient.abs().max() < 1e-12
