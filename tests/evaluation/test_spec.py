import re

import pytest
import torch

from decm_lightning.evaluation import SamplingSpec
from decm_lightning.samplers import consistency

OPTIONS = {
    "student/mix/2": {},
    "teacher/euler/100": {},
    "student/mix/2?s1=0.6": {"s1": 0.6},
    "student/mix/4?s1=1e-05": {"s1": 1e-5},
    "student/mix/4?s1=null": {"s1": None},
    "student/consistency/3?times=[0.2,0.6]": {"times": [0.2, 0.6]},
}


@pytest.mark.parametrize("text", OPTIONS)
def test_a_spec_is_what_it_was_read_from(text):
    spec = SamplingSpec.parse(text)
    assert spec.options == OPTIONS[text]
    assert str(spec) == text
    assert SamplingSpec.parse(str(spec)) == spec
    assert len({spec, SamplingSpec.parse(text)}) == 1


def test_values_may_be_written_in_other_ways():
    assert SamplingSpec.parse("student/consistency/3?times=[2e-1, .6]").options == {"times": [0.2, 0.6]}


@pytest.mark.parametrize(
    "text", ["", "student/mix", "student/mix/two", "student/mix/-1", "/mix/1", "a/b/c/d", "student//1"]
)
def test_a_bad_form_is_refused_with_the_form_expected(text):
    with pytest.raises(ValueError, match=r"model/sampler/steps, such as student/mix/2 .*got '.*'") as error:
        SamplingSpec.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("student/heun/2", "heun"),
        ("student/mix/0", "steps must be at least 1: got 0"),
        ("student/euler/4?s1=0.6", "'s1'"),
        ("student/mix/4?speed=2", "'speed'"),
        ("student/mix/2?s1=2", "s1 must be between 0 and 1"),
        ("student/mix/2?s1=early", "early"),
        ("student/consistency/3?times=[0.5]", "times must be 2 "),
        ("student/mix/2?s1", "name=value"),
        ("student/mix/2?s1=0.5&s1=0.6", "each name once"),
        ("student/mix/2?s1={a: 1}", "neither a scalar nor a list"),
        ("student/mix/2?s1=[", "YAML"),
    ],
)
def test_what_a_sampler_does_not_take_is_refused_in_one_line(text, named):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        SamplingSpec.parse(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_options_reach_the_sampler():
    """With u = 0 a sample is what re-noising makes of it: x_1 = (1 - t) noise + t x_0."""
    spec = SamplingSpec.parse("student/consistency/2?times=[0.3]")
    x_0 = torch.ones(4, 2)

    def still(x_t, t, s, condition):
        return torch.zeros_like(x_t)

    def seeded():
        return torch.Generator().manual_seed(0)

    expected = 0.7 * torch.randn(4, 2, generator=seeded()) + 0.3 * x_0
    torch.testing.assert_close(spec.function()(still, x_0, None, 2, generator=seeded()), expected)
    default = consistency(still, x_0, None, 2, generator=seeded())
    assert (default - expected).abs().max() > 0.1


def test_a_sampler_may_be_a_path_with_options(tmp_path, monkeypatch):
    (tmp_path / "my_samplers.py").write_text(
        "def scaled(student, x_0, condition, steps, generator=None, factor=1.0):\n    return factor * x_0\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = SamplingSpec.parse("student/my_samplers.scaled/3?factor=2.5")
    assert str(spec) == "student/my_samplers.scaled/3?factor=2.5"
    assert torch.equal(spec.function()(None, torch.ones(2, 1), None, 3), torch.full((2, 1), 2.5))
    with pytest.raises(ValueError, match="speed"):
        SamplingSpec.parse("student/my_samplers.scaled/3?speed=2")
    with pytest.raises(ValueError, match=r"my_samplers\.missing"):
        SamplingSpec.parse("student/my_samplers.missing/3")
