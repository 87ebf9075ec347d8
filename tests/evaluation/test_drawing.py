from tempfile import TemporaryDirectory

import lightning as L
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from decm_lightning import Distiller
from decm_lightning.data import Digits
from decm_lightning.evaluation.generator import Drawing, pictures
from decm_lightning.evaluation.spec import Cell
from decm_lightning.even_split import split_evenly
from decm_lightning.guidance import Guidance
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import DiT
from decm_lightning.teachers import DiffusersTeacher, Teacher

MIX = Cell("student", "mix", 2)


def distiller(guidance: Guidance = Guidance(2.0), channels: int = 1) -> Distiller:  # noqa: B008 - frozen
    L.seed_everything(0, verbose=False)
    teacher = DiT(8, channels, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    # Some of its layers start at zero: all cells would be alike, and all labels.
    for parameter in teacher.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return Distiller(Teacher(teacher), guidance=guidance)


class Decoded(Digits):
    """Latents of four channels, whose decoder shows the negative of the first: a closed form to compare with."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def decode(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return -x[:, :1]


class Prompted(L.LightningDataModule):
    """Data without classes, which give the conditions themselves."""

    def condition(self, rows, seed) -> Tensor:
        return torch.tensor([(7 * row + seed) % 10 for row in rows])


def test_evaluations_are_counted_in_and_out_of_the_guidance_interval():
    cell = Cell("teacher", "euler", 4)

    def count(guidance: Guidance) -> float:
        return Drawing(distiller(guidance), Digits()).usage(cell).nfe

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
        drawing = Drawing(module, Digits())
        networks = [module.average, *given.evaluated_modules()]
        before = [dict(part._forward_pre_hooks) for part in networks]
        assert drawing.usage(Cell("teacher", "euler", 4)).nfe == expected * each
        assert drawing.usage(Cell("student", "mix", 3)).nfe == 3
        # Nothing that counts is left on the networks or the teacher.
        assert [dict(part._forward_pre_hooks) for part in networks] == before
        assert "velocity" not in vars(given)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (Cell("teacher", "euler", 4), ""),
        (Cell("student", "mix", 1), ""),
        (Cell("student", "mix", 2), "s1 = 0.75"),
        (Cell("student", "mix", 8), "s1 = 0.5"),
        (Cell("student", "consistency", 1), ""),
        (Cell("student", "consistency", 4), "re-noised at t = 0.7, 0.8, 0.9"),
        (Cell("student", "mix_renoised", 2), "s1 = 0.7"),
        (Cell("student", "mix_renoised", 4), "s1 = 0.7, re-noised at t = 0.8, 0.9"),
    ],
)
def test_sampler_options_are_those_that_were_used(cell, options):
    assert Drawing(distiller(), Digits()).usage(cell).options(cell) == options


def test_samples_do_not_depend_on_their_company_nor_change_modes():
    module = distiller()
    drawing = Drawing(module, Digits(), seed=3)
    module.train()
    module.average.final_layer.eval()
    modes = [part.training for part in module.modules()]
    before = torch.get_rng_state()
    together = drawing.draw(MIX, range(6))
    apart = torch.cat([drawing.draw(MIX, rows) for rows in ([0], [1, 2, 3], [4, 5])])
    # One level of 255 is left to the order in which a matrix product is summed.
    assert (together.int() - apart.int()).abs().max() <= 1
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in module.modules()] == modes


def test_balanced_labels_count_up_and_uniform_ones_follow_from_the_seed():
    module, data = distiller(), Digits()
    assert Drawing(module, data).condition(range(8, 23)).tolist() == [*range(8, 10), *range(10), *range(3)]
    uniform = Drawing(module, data, labels="uniform", seed=4)
    labels = uniform.condition(range(3000))
    parts = [uniform.condition(rows) for rows in (range(0, 7), range(7, 1000), range(1000, 3000))]
    assert torch.equal(torch.cat(parts), labels)
    assert not torch.equal(Drawing(module, data, labels="uniform", seed=5).condition(range(3000)), labels)
    counts = labels.bincount(minlength=10)
    # Five standard deviations of a binomial of 3,000 trials at 1/10; and not all equal, as balanced ones are.
    assert (counts - 300).abs().max() < 5 * 16.4
    assert counts.unique().numel() > 3


def test_uniform_labels_are_the_conditions_that_the_network_gets():
    drawing = Drawing(distiller(), Digits(), labels="uniform")
    row = next(row for row in range(20) if drawing.condition([row]).item() != row % 10)
    balanced = Drawing(drawing.module, drawing.data)
    assert not torch.equal(drawing.samples(MIX, [row]), balanced.samples(MIX, [row]))
    same = next(row for row in range(200) if drawing.condition([row]).item() == row % 10)
    assert torch.equal(drawing.samples(MIX, [same]), balanced.samples(MIX, [same]))


def test_a_datamodule_may_give_the_conditions():
    drawing = Drawing(distiller(), Prompted(), seed=2)
    drawing.check([MIX])
    assert drawing.condition([0, 3]).tolist() == [2, 3]
    assert drawing.grid([MIX], 12).shape == (1, 12, 1, 8, 8)


def test_a_grid_has_a_row_a_cell_and_a_column_a_class():
    drawing = Drawing(distiller(), Digits(), labels="uniform")
    cells = [MIX, Cell("teacher", "euler", 2)]
    assert drawing.grid(cells, 4).shape == (2, 4, 1, 8, 8)
    grid = drawing.grid(cells, 20)
    assert grid.shape == (2, 10, 1, 8, 8)
    # The classes in their order, whatever the labels are measured with.
    assert torch.equal(grid[1], Drawing(drawing.module, drawing.data).draw(cells[1], range(10)))


def test_latents_are_decoded_some_at_a_time(generator):
    data = Decoded()
    x = torch.randn(150, 4, 8, 8, generator=generator)
    assert torch.equal(pictures(x, data), to_uint8(-x[:, :1]))
    assert data.sizes == [64, 64, 22]
    drawing = Drawing(distiller(channels=4), data)
    drawing.check([MIX])
    assert torch.equal(drawing.draw(MIX, range(3)), to_uint8(-drawing.samples(MIX, range(3))[:, :1]))


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"the network makes \(4, 8, 8\), which needs a decoder: give the trainer a"):
        Drawing(distiller(channels=4), Prompted()).check([])
    with pytest.raises(ValueError, match="give the trainer a datamodule with num_classes"):
        Drawing(distiller(), None).check([])
    with pytest.raises(ValueError, match="cell tutor/mix/1: model must be one of student, teacher: got 'tutor'"):
        Drawing(distiller(), Digits()).check([Cell("tutor", "mix", 1)])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (5, 1), (10, 4), (9, 4), (17, 2), (8, 500), (50_000, 125)])
def test_processes_share_the_numbers_in_order_and_take_as_many_batches(world, count, batch_size):
    parts = [split_evenly(count, batch_size, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(rows) <= batch_size for part in parts for rows in part)
    # Batch by batch, the processes in their order: as torchmetrics gathers them.
    assert [row for batch in zip(*parts, strict=True) for rows in batch for row in rows] == list(range(count))
