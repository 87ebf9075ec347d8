"""Guidance against its closed form, and its cost."""

import pytest
import torch

from decm_lightning.flows import Gaussian, GaussianMixture
from decm_lightning.guidance import Guidance, GuidedField

MIXTURE = GaussianMixture.ring(components=4, radius=1.5, std=0.4, dtype=torch.float64)


class Recorder:
    """A field that records the rows of its calls."""

    def __init__(self, field=MIXTURE):
        self.field = field
        self.calls = []

    def __call__(self, x_t, t, condition):
        self.calls.append((x_t, t, condition))
        return self.field(x_t, t, condition)


def guided(guidance: Guidance, field=MIXTURE) -> GuidedField:
    """Return the mixture's guided velocity."""
    return GuidedField(field, MIXTURE.null, guidance)


@pytest.fixture
def rows(generator):
    """Points, times that include 0 and 1, and classes."""
    x_t = 1.5 * torch.randn(64, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    return x_t, t, torch.randint(0, 4, (64,), generator=generator)


@pytest.fixture
def ends(rows):
    """The class's velocity, from the closed form of its Gaussian, and the whole mixture's."""
    x_t, t, _ = rows
    v_cond = torch.stack(
        [Gaussian(MIXTURE.means[k], MIXTURE.std).velocity(x[None], u[None])[0] for x, u, k in zip(*rows, strict=True)]
    )
    return v_cond, MIXTURE(x_t, t)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.75, 4.0])
def test_guided_velocity_is_its_closed_form(scale, rows, ends):
    """v = v_cond + (scale - 1) (v_cond - v_null); 0 gives the null velocity and 1 the conditional one."""
    v_cond, v_null = ends
    v = guided(Guidance(scale))(*rows)
    torch.testing.assert_close(v, v_cond + (scale - 1) * (v_cond - v_null), rtol=0, atol=1e-12)


def test_limit_bounds_the_rms_of_the_difference(rows, ends):
    """Rows with rms(dv) above the limit are scaled to the limit, others are unchanged; both kinds occur."""
    v_cond, v_null = ends
    dv = v_cond - v_null
    rms = dv.square().mean(1).sqrt()
    limit = rms.median().item()
    factor = torch.where(rms > limit, limit / rms, torch.ones_like(rms))
    v = guided(Guidance(3.0, limit))(*rows)
    torch.testing.assert_close(v, v_cond + 2 * factor[:, None] * dv, rtol=0, atol=1e-12)
    added = ((v - v_cond) / 2).square().mean(1).sqrt()
    assert added.max() <= limit + 1e-12
    assert (factor < 1).sum() > 10
    assert (factor == 1).sum() > 10


def test_limit_does_not_depend_on_the_resolution():
    """The same field at twice the height and width has the same guidance: the limit is on the rms, not the norm."""
    table = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.5, 0.0]], dtype=torch.float64)

    def field(x_t, t, condition):
        return table[condition][:, :, None, None].expand_as(x_t)

    def at(side):
        x_t, t = torch.zeros(1, 3, side, side, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
        guidance = GuidedField(field, torch.ones_like, Guidance(2.0, 0.7))
        return guidance(x_t, t, torch.tensor([0]))[0, :, 0, 0]

    torch.testing.assert_close(at(4), at(8), rtol=0, atol=1e-12)
    added = at(4) - table[0]
    assert added.square().mean().sqrt() == pytest.approx(0.7)


def test_all_channels_are_guided():
    """All channels are guided: each changes by (scale - 1) times its own difference."""
    table = torch.stack([torch.arange(1.0, 9.0, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)])

    def field(x_t, t, condition):
        return table[condition][:, :, None, None].expand_as(x_t)

    x_t, t = torch.zeros(2, 8, 2, 2, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    v = GuidedField(field, torch.ones_like, Guidance(1.5))(x_t, t, torch.tensor([0, 0]))
    torch.testing.assert_close(v, 1.5 * field(x_t, t, torch.tensor([0, 0])), rtol=0, atol=1e-12)


def test_limit_leaves_equal_velocities_alone(rows):
    """If v_cond = v_null the rms is 0, and the result is exactly v_cond."""
    x_t, t, labels = rows
    null = torch.full_like(labels, 4)
    assert torch.equal(guided(Guidance(2.0, 0.1))(x_t, t, null), MIXTURE(x_t, t, null))


def test_interval_guides_inside_its_bounds_and_nowhere_else(rows, ends):
    """Outside the interval v is v_cond; the bounds are inside."""
    v_cond, v_null = ends
    t = rows[1]
    first, last = t[10].item(), t[40].item()
    v = guided(Guidance(2.0, interval=(first, last)))(*rows)
    inside = torch.arange(64).ge(10) & torch.arange(64).le(40)
    torch.testing.assert_close(v[inside], (2 * v_cond - v_null)[inside], rtol=0, atol=1e-12)
    torch.testing.assert_close(v[~inside], v_cond[~inside], rtol=0, atol=1e-12)
    assert (v - v_cond)[inside].abs().sum(1).min() > 1e-6


def test_interval_order_of_rows_does_not_matter(rows):
    """Shuffled rows give shuffled velocities."""
    x_t, t, labels = rows
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    field = guided(Guidance(2.0, 0.5, (0.2, 0.6)))
    torch.testing.assert_close(
        field(x_t[order], t[order], labels[order]), field(x_t, t, labels)[order], rtol=0, atol=1e-12
    )


def test_field_sees_null_rows_only_inside_the_interval(rows):
    """One call with all conditional rows, then one null row per time inside the interval."""
    x_t, t, labels = rows
    recorder = Recorder()
    guided(Guidance(2.0, interval=(0.125, 0.5)), recorder)(*rows)
    inside = (t >= 0.125) & (t <= 0.5)
    assert len(recorder.calls) == 1
    x_seen, t_seen, labels_seen = recorder.calls[0]
    assert torch.equal(x_seen, torch.cat([x_t, x_t[inside]]))
    assert torch.equal(t_seen, torch.cat([t, t[inside]]))
    assert torch.equal(labels_seen, torch.cat([labels, torch.full((int(inside.sum()),), 4)]))


@pytest.mark.parametrize("interval", [(0.1, 0.3), (0.4, 0.41), (0.0, 0.99), (0.02, 1.0)])
def test_null_rows_are_filled_up_to_a_multiple_of_eight_and_change_nothing(interval, rows, ends):
    """Padding uses rows outside the interval, whose velocity stays exactly conditional, and never exceeds the batch."""
    x_t, t, labels = rows
    v_cond, v_null = ends
    recorder = Recorder()
    v = guided(Guidance(2.0, interval=interval), recorder)(x_t, t, labels)
    inside = (t >= interval[0]) & (t <= interval[1])
    null_rows = len(recorder.calls[0][1]) - 64
    assert null_rows in {-(-int(inside.sum()) // 8) * 8, 64}
    torch.testing.assert_close(v[inside], (2 * v_cond - v_null)[inside], rtol=0, atol=1e-12)
    assert torch.equal(v[~inside], MIXTURE(x_t, t, labels)[~inside])


def test_rows_that_fill_up_may_have_no_finite_null_velocity(rows):
    """Their null pass is computed but ignored, even if it is NaN."""
    x_t, t, labels = rows

    def field(x_t, t, condition):
        return torch.where(((condition == 4) & (t < 0.3))[:, None], torch.nan, MIXTURE(x_t, t, condition))

    v = guided(Guidance(2.0, 0.5, interval=(0.3, 0.9)), field)(x_t, t, labels)
    assert torch.equal(v, guided(Guidance(2.0, 0.5, interval=(0.3, 0.9)))(x_t, t, labels))


def test_times_of_another_device_than_the_sample_s_decide_there():
    """Times on the CPU and samples on the meta device, where reading a value fails; [0, 1] reads no times."""
    x_t, labels = torch.zeros(16, 2, device="meta"), torch.zeros(16, dtype=torch.long, device="meta")
    sizes = []

    def field(x_t, t, condition):
        assert t.device == condition.device == x_t.device
        sizes.append(len(t))
        return x_t

    t = torch.linspace(0, 1, 16)
    some = GuidedField(field, torch.ones_like, Guidance(2.0, interval=(0.5, 0.9)))
    assert some(x_t, t, labels).shape == x_t.shape
    everywhere = GuidedField(field, torch.ones_like, Guidance(2.0, 0.1))
    everywhere(x_t, t.to("meta"), labels)
    GuidedField(field, torch.ones_like, Guidance(1.0, interval=(0.5, 0.9)))(x_t, t.to("meta"), labels)
    assert sizes == [16 + 8, 16 + 16, 16]


@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(2.0, interval=(0.003, 0.004))], ids=["scale 1", "no row"])
def test_without_guidance_there_is_one_call_and_no_null_row(guidance, rows):
    """Scale 1, or no time inside the interval, gives a plain call."""
    recorder = Recorder()
    v = guided(guidance, recorder)(*rows)
    assert [len(t) for _, t, _ in recorder.calls] == [64]
    assert torch.equal(v, MIXTURE(*rows))


def test_unconditional_rows_are_not_guided(rows):
    """Without a condition there is no guidance."""
    x_t, t, _ = rows
    recorder = Recorder()
    assert torch.equal(guided(Guidance(2.0), recorder)(x_t, t, None), MIXTURE(x_t, t))
    assert len(recorder.calls) == 1


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"scale": -0.5}, "-0.5"),
        ({"limit": 0.0}, "0.0"),
        ({"limit": -1.0}, "-1.0"),
        ({"interval": (0.6, 0.4)}, r"\(0.6, 0.4\)"),
        ({"interval": (-0.1, 1.0)}, r"\(-0.1, 1.0\)"),
        ({"interval": (0.0, 1.5)}, r"\(0.0, 1.5\)"),
    ],
)
def test_guidance_refuses_what_is_out_of_range(arguments, value):
    """The message contains the value."""
    with pytest.raises(ValueError, match=f"got {value}$"):
        Guidance(**arguments)
