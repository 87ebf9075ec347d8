from tempfile import TemporaryDirectory

import lightning as L
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from decm_lightning import Distiller, samplers
from decm_lightning.data import Digits
from decm_lightning.evaluation.cost import SamplingCost
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.even_split import split_evenly
from decm_lightning.guidance import Guidance
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import DiT
from decm_lightning.teachers import DiffusersTeacher, Teacher

MIX = SamplingSpec("student", "mix", 2)


def distiller(guidance: Guidance = Guidance(2.0), channels: int = 1) -> Distiller:  # noqa: B008 - frozen
    L.seed_everything(0, verbose=False)
    teacher = DiT(8, channels, patch_size=4, width=16 * channels, depth=1, heads=2, num_classes=10)
    # Some of its layers start at zero: all specs would be alike, and all labels.
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return Distiller(Teacher(teacher), guidance=guidance)


class Decoded(Digits):
    """Latents of four channels, whose decoder returns the negative of the first channel."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def decode(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return -x[:, :1]


class Prompted(L.LightningDataModule):
    """Data without classes, which choose the conditions themselves."""

    def condition(self, rows, seed) -> Tensor:
        return torch.tensor([(7 * row + seed) % 10 for row in rows])


def cost_of(generator: SampleGenerator, spec: SamplingSpec, samples: int = 2) -> SamplingCost:
    cost = SamplingCost(samples)
    with cost.record(generator.source):
        generator.generate(spec, range(samples))
    return cost


def test_evaluations_are_counted_in_and_out_of_the_guidance_interval():
    spec = SamplingSpec("teacher", "euler", 4)

    def count(guidance: Guidance) -> float:
        return cost_of(SampleGenerator(distiller(guidance), Digits()), spec).nfe

    assert count(Guidance()) == 4
    assert count(Guidance(scale=2.0)) == 8
    # Of the starts 0, 1/4, 1/2, 3/4 two lie in the interval.
    assert count(Guidance(scale=2.0, interval=(0.2, 0.6))) == 6


class Formula(Teacher):
    """A velocity without a module."""

    def __init__(self) -> None:
        pass

    def velocity(self, x_t, t, condition):
        return -x_t

    def null(self, condition):
        return condition

    def networks(self):
        return []

    def apply(self, function, recurse=True):
        return self


class TwoNetworks(Formula):
    """A velocity that costs a pass of each of two modules."""

    def __init__(self) -> None:
        self.first, self.second = nn.Identity(), nn.Tanh()

    def velocity(self, x_t, t, condition):
        return self.second(self.first(x_t))

    def evaluated_modules(self):
        return [self.first, self.second]


def diffusers_dit() -> Teacher:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 1}
    model = DiTTransformer2DModel(
        **sizes, sample_size=8, patch_size=4, in_channels=1, out_channels=2, num_embeds_ada_norm=10
    )
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return DiffusersTeacher(folder)


@pytest.mark.parametrize(("teacher", "each"), [(diffusers_dit, 1), (Formula, 1), (TwoNetworks, 2)])
def test_evaluations_are_counted_for_every_kind_of_teacher(teacher, each):
    student = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, end_time=True)
    # Of the starts 0, 1/4, 1/2, 3/4 two lie in the interval.
    for guidance, expected in ((Guidance(), 4), (Guidance(2.0), 8), (Guidance(2.0, interval=(0.2, 0.6)), 6)):
        given = teacher()
        module = Distiller(given, student, guidance=guidance)
        generator = SampleGenerator(module, Digits())
        networks = [module.average, *given.evaluated_modules()]
        before = [dict(part._forward_pre_hooks) for part in networks]
        assert cost_of(generator, SamplingSpec("teacher", "euler", 4)).nfe == expected * each
        assert cost_of(generator, SamplingSpec("student", "mix", 3)).nfe == 3
        # Nothing that counts is left on the networks or the teacher.
        assert [dict(part._forward_pre_hooks) for part in networks] == before
        assert "velocity" not in vars(given)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (SamplingSpec("teacher", "euler", 4), ""),
        (SamplingSpec("student", "mix", 2), "0 -> 0.75, 0.75 -> 1"),
        (SamplingSpec("student", "mix", 2, {"s1": 0.6}), "0 -> 0.6, 0.6 -> 1"),
        (SamplingSpec("student", "consistency", 3), "0 -> 1, 0.7 -> 1, 0.85 -> 1"),
    ],
)
def test_times_are_those_that_were_used(spec, steps):
    assert cost_of(SampleGenerator(distiller(), Digits()), spec).steps == steps


def test_a_long_list_of_times_is_cut():
    steps = cost_of(SampleGenerator(distiller(), Digits()), SamplingSpec("student", "euler", 50)).steps
    assert steps.count("->") == 8
    assert steps.endswith("0.14 -> 0.14, ...")


def test_samples_do_not_depend_on_their_company_nor_change_modes():
    module = distiller()
    generator = SampleGenerator(module, Digits(), seed=3)
    module.train()
    module.average.final_layer.eval()
    modes = [part.training for part in module.modules()]
    before = torch.get_rng_state()
    together = generator.generate(MIX, range(6))
    apart = torch.cat([generator.generate(MIX, rows) for rows in (range(1), range(1, 4), range(4, 6))])
    # One level of 255 is left to the order in which a matrix product is summed.
    assert (together.int() - apart.int()).abs().max() <= 1
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in module.modules()] == modes


def test_noise_that_is_put_back_does_not_depend_on_the_batch():
    # In float64 rounding does not depend on the batch either.
    generator = SampleGenerator(distiller().double(), Digits(), labels="uniform", seed=3)
    spec = SamplingSpec("student", "consistency", 4)
    samples = [
        torch.cat([generator.samples(spec, range(i, min(i + size, 20))) for i in range(0, 20, size)]) for size in (3, 7)
    ]
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-10, atol=1e-12)
    assert (samples[0] - SampleGenerator(generator.source, Digits(), seed=4).samples(spec, range(20))).abs().max() > 0.1


def test_the_samples_are_those_of_the_rule():
    """Row i has noise generator_of(seed, i), as in `samplers.generate`, which every command uses."""
    module = distiller()
    found = SampleGenerator(module, Digits(), seed=3).samples(MIX, range(5, 9))
    expected = samplers.generate(
        module.average, samplers.mix, torch.arange(5, 9), 2, shape=(1, 8, 8), rows=range(5, 9), seed=3
    )
    assert torch.equal(found, expected)


def test_balanced_labels_count_up_and_uniform_ones_follow_from_the_seed():
    module, data = distiller(), Digits()
    assert SampleGenerator(module, data).condition(range(8, 23)).tolist() == [*range(8, 10), *range(10), *range(3)]
    uniform = SampleGenerator(module, data, labels="uniform", seed=4)
    labels = uniform.condition(range(3000))
    parts = [uniform.condition(rows) for rows in (range(0, 7), range(7, 1000), range(1000, 3000))]
    assert torch.equal(torch.cat(parts), labels)
    assert not torch.equal(SampleGenerator(module, data, labels="uniform", seed=5).condition(range(3000)), labels)
    counts = labels.bincount(minlength=10)
    # Five standard deviations of a binomial of 3,000 trials at 1/10; and not all equal, as balanced ones are.
    assert (counts - 300).abs().max() < 5 * 16.4
    assert counts.unique().numel() > 3


def test_uniform_labels_are_the_conditions_that_the_network_gets():
    module = distiller()
    generator = SampleGenerator(module, Digits(), labels="uniform")
    row = next(row for row in range(20) if generator.condition([row]).item() != row % 10)
    balanced = SampleGenerator(module, Digits())
    assert not torch.equal(generator.samples(MIX, [row]), balanced.samples(MIX, [row]))
    same = next(row for row in range(200) if generator.condition([row]).item() == row % 10)
    assert torch.equal(generator.samples(MIX, [same]), balanced.samples(MIX, [same]))
    assert generator.headings(range(12)) == [str(label) for label in generator.condition(range(12)).tolist()]


def test_a_datamodule_may_give_the_conditions():
    generator = SampleGenerator(distiller(), Prompted(), seed=2)
    generator.check([MIX])
    assert generator.condition([0, 3]).tolist() == [2, 3]
    assert generator.grid([MIX], 12).shape == (1, 12, 1, 8, 8)


def test_a_grid_has_a_row_per_spec_and_equally_many_columns_per_class():
    generator = SampleGenerator(distiller(), Digits())
    specs = [MIX, SamplingSpec("teacher", "euler", 2)]
    assert generator.grid(specs, 4).shape == (2, 4, 1, 8, 8)
    grid = generator.grid(specs, 25)
    assert grid.shape == (2, 20, 1, 8, 8)
    assert torch.equal(grid[1], generator.generate(specs[1], range(20)))


def test_latents_are_decoded_some_at_a_time(generator):
    data = Decoded()
    of_data = SampleGenerator(distiller(channels=4), data)
    x = torch.randn(150, 4, 8, 8, generator=generator)
    assert torch.equal(of_data.images(x), to_uint8(-x[:, :1]))
    assert data.sizes == [64, 64, 22]
    of_data.check([MIX])
    assert torch.equal(of_data.generate(MIX, range(3)), to_uint8(-of_data.samples(MIX, range(3))[:, :1]))


def test_a_plain_datamodule_with_classes_is_enough():
    class Plain(L.LightningDataModule):
        num_classes = 3

    generator = SampleGenerator(distiller(), Plain())
    generator.check([MIX])
    assert generator.condition(range(4)).tolist() == [0, 1, 2, 0]
    assert generator.generate(MIX, range(4)).shape == (4, 1, 8, 8)
    assert generator.captions(range(4)) is None
    assert generator.data.identity() == {}
    generator.data.release()


def test_no_rows_take_a_pass_and_give_no_image():
    generator = SampleGenerator(distiller(), Digits())
    cost = SamplingCost(1)
    with cost.record(generator.source):
        assert generator.generate(MIX, range(0)).shape == (0, 1, 8, 8)
    assert cost.rows == 2
    assert len(generator.prompts(range(0)).condition) == 0


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"the network generates \(4, 8, 8\)"):
        SampleGenerator(distiller(channels=4), Prompted()).check([])
    with pytest.raises(ValueError, match="num_classes"):
        SampleGenerator(distiller(), None).check([])
    with pytest.raises(ValueError, match="student, teacher: got 'tutor'"):
        SampleGenerator(distiller(), Digits()).check([SamplingSpec("tutor", "mix", 1)])
    with pytest.raises(ValueError, match="got LightningModule"):
        SampleGenerator(L.LightningModule(), Digits())


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (5, 1), (10, 4), (9, 4), (17, 2), (8, 500), (50_000, 125)])
def test_processes_share_the_numbers_in_order_and_take_as_many_batches(world, count, batch_size):
    parts = [split_evenly(count, batch_size, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(rows) <= batch_size for part in parts for rows in part)
    # Batch by batch, the processes in their order: as torchmetrics gathers them.
    assert [row for batch in zip(*parts, strict=True) for rows in batch for row in rows] == list(range(count))
