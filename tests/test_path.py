"""The convention: which end is noise, and how jumps are defined."""

import pytest
import torch

from decm_lightning import path

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def test_time_0_is_noise_and_time_1_is_data(generator):
    """The path starts exactly at x_0 and ends exactly at x_1."""
    x_0, x_1 = torch.randn(2, 4, 3, 2, 2, generator=generator)
    assert torch.equal(path.interpolate(x_0, x_1, torch.zeros(4)), x_0)
    assert torch.equal(path.interpolate(x_0, x_1, torch.ones(4)), x_1)
    assert (path.NOISE, path.DATA) == (0.0, 1.0)


def test_each_row_is_interpolated_at_its_own_time():
    """Rows do not mix: row i is (1 - t_i) x_0 + t_i x_1."""
    x_0, x_1 = torch.zeros(3, 2, dtype=torch.float64), torch.full((3, 2), 10.0, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = torch.tensor([[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(path.interpolate(x_0, x_1, t), expected)


def test_velocity_is_the_time_derivative_of_the_path(generator):
    """A difference quotient of interpolate is velocity: the path is straight, so for any step."""
    x_0, x_1 = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    t = torch.rand(5, generator=generator, dtype=torch.float64) / 2
    quotient = (path.interpolate(x_0, x_1, t + 0.5) - path.interpolate(x_0, x_1, t)) / 0.5
    torch.testing.assert_close(quotient, path.velocity(x_0, x_1), rtol=0, atol=1e-12)


def test_jump_by_the_conditional_velocity_follows_the_path(generator):
    """With u = x_1 - x_0 a jump from x_t ends at x_s."""
    x_0, x_1 = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    t, s = torch.rand(2, 5, generator=generator, dtype=torch.float64).sort(0).values
    end = path.jump(path.interpolate(x_0, x_1, t), path.velocity(x_0, x_1), t, s)
    torch.testing.assert_close(end, path.interpolate(x_0, x_1, s), rtol=0, atol=1e-12)


def test_jump_of_no_length_stays_put(generator):
    """At s = t a jump returns exactly x_t for any u."""
    x_t, u = torch.randn(2, 5, 3, 2, 2, generator=generator)
    t = torch.rand(5, generator=generator)
    assert torch.equal(path.jump(x_t, u, t, t), x_t)


def test_expand_gives_times_the_axes_of_x():
    """Times broadcast along the batch axis only."""
    assert path.expand(torch.zeros(4), torch.zeros(4, 3, 2, 2)).shape == (4, 1, 1, 1)
    assert path.expand(torch.zeros(4), torch.zeros(4, 7)).shape == (4, 1)


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("times", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_points_have_the_dtype_of_their_sample_and_are_rounded_once(dtype, times, other, generator):
    """For any dtypes of times and velocities, the result is computed in the widest dtype and rounded once."""
    x, y = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    x, y = x.to(dtype), y.to(other)
    t, s = torch.rand(2, 5, generator=generator).sort(0).values.to(times)
    wide = [value.double() for value in (x, y, t, s)]
    for rounded, exact in (
        (path.interpolate(x, y, t), path.interpolate(wide[0], wide[1], wide[2])),
        (path.jump(x, y, t, s), path.jump(*wide)),
    ):
        assert rounded.dtype == dtype
        # Half a unit in the last place, plus the error of float32.
        unit = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((rounded.double() - exact).abs() <= 0.51 * unit + 4e-7).all()


@pytest.mark.parametrize(
    ("dtype", "times"), zip(DTYPES, [torch.float32, torch.float32, torch.float32, torch.float64], strict=True)
)
def test_times_are_float32_or_wider(dtype, times):
    """Times of half-precision samples are not rounded to their dtype."""
    assert path.time_dtype(torch.zeros(2, 3, dtype=dtype)) == times
