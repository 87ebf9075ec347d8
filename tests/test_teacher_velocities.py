"""The distiller's calls of its teacher: rows, dtype, and no synchronization with the device."""

import lightning as L
import pytest
import torch
from torch import nn

from decm_lightning import Distiller, losses
from decm_lightning.data import Digits
from decm_lightning.guidance import Guidance
from decm_lightning.losses import FlowMapLoss, Objective
from decm_lightning.networks import MLP, DiT
from decm_lightning.samplers import euler
from decm_lightning.teachers import Teacher
from decm_lightning.triangle import DataEdge, Diagonal, NoiseEdge, Triangle
from decm_lightning.types import Batch
from tests.test_distiller import tiny_teacher, trainer
from tests.test_triangle import strata


class Line(Teacher):
    """A velocity in one dtype, for captions or classes, that records rows and times."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        torch.manual_seed(0)
        super().__init__(MLP(dimensions=3, width=4, depth=1, num_classes=5))
        self.dtype = dtype
        self.seen: list[torch.Tensor] = []

    def velocity(self, x_t, t, condition):
        self.seen.append(t)
        assert len(t)
        v = super().velocity(x_t, t, condition)
        return v if self.dtype is None else v.to(self.dtype)


def quiet(distiller: Distiller, monkeypatch) -> Distiller:
    """A distiller whose steps run without a trainer."""
    monkeypatch.setattr(distiller, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(distiller, "log", lambda *a, **k: None)
    return distiller


def student() -> MLP:
    torch.manual_seed(1)
    network = MLP(dimensions=3, width=8, depth=2, num_classes=5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def batch(rows: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return Batch(torch.randn(rows, 3, generator=generator), torch.arange(rows) % 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, 0.3), Guidance(2.0, interval=(0.2, 0.7))], ids=repr)
def test_velocity_of_another_dtype_is_cast_to_the_sample_s(dtype, guidance, monkeypatch):
    """A float32 student trains with float32 terms, on velocities rounded to the teacher's dtype."""
    distiller = quiet(Distiller(Line(dtype), student(), losses.paper(), guidance), monkeypatch)
    reference = quiet(Distiller(Line(), student(), losses.paper(), guidance), monkeypatch)
    for module in (distiller, reference):
        module.training_step(batch(), 0).backward()
    for name, term in distiller.terms.items():
        assert term.value.dtype == torch.float32
        torch.testing.assert_close(term.value, reference.terms[name].value, rtol=3e-2, atol=1e-3)
    for actual, expected in zip(distiller.student.parameters(), reference.student.parameters(), strict=True):
        assert actual.grad.dtype == torch.float32
        torch.testing.assert_close(actual.grad, expected.grad, rtol=0.2, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_teacher_of_another_dtype_is_sampled_in_that_of_the_noise(dtype):
    distiller = Distiller(Line(dtype), student(), guidance=Guidance(2.0))
    x_0 = torch.randn(4, 3)
    with torch.no_grad():
        assert euler(distiller.models()["teacher"], x_0, torch.arange(4), 3).dtype == torch.float32


NEVER = {
    "free of the teacher's start": Objective({"predictor": FlowMapLoss(NoiseEdge(), start_weight=0.0, end_weight=1.0)}),
    "lagrangian": Objective({"lagrangian": FlowMapLoss(Triangle(), start_weight=0.0, end_weight=1.0)}),
    "both": Objective(
        {
            "n2n": FlowMapLoss(NoiseEdge(0.1), start_weight=0.0, end_weight=1.0, batch_fraction=0.5),
            "lagrangian": FlowMapLoss(Triangle(), start_weight=0.0, end_weight=1.0, batch_fraction=0.5),
        }
    ),
}


@pytest.mark.parametrize("name", NEVER)
def test_loss_without_a_start_weight_has_no_start_velocity(name, monkeypatch):
    """It is None for every loss, and the teacher is called only at end points, without empty calls."""
    teacher, objective = Line(), NEVER[name]
    distiller = quiet(Distiller(teacher, student(), objective), monkeypatch)
    tangents = []

    def recorded(loss, sample, *rest):
        jump, v_start = Distiller.make_jumps(distiller, loss, sample, *rest)
        tangents.extend([sample.v_t, v_start, jump.tangent.x])
        return jump, v_start

    monkeypatch.setattr(distiller, "make_jumps", recorded)
    distiller.training_step(batch(), 0)
    assert tangents == [None] * (3 * len(objective.losses))
    assert [len(t) for t in teacher.seen] == [len(rows) for rows in objective.rows(32).values()]


def test_rows_that_no_loss_reads_are_not_evaluated(monkeypatch):
    """Consistency reads a quarter of the rows at every second step, and the Lagrangian loss none at the start."""
    objective = Objective(
        {
            "lagrangian": FlowMapLoss(Triangle(), start_weight=0.0, end_weight=1.0, batch_fraction=0.25),
            "consistency": FlowMapLoss(DataEdge(), batch_fraction=0.25, every=2),
            "flow_matching": FlowMapLoss(Diagonal(), batch_fraction=0.25),
        }
    )
    teacher = Line()
    distiller = quiet(Distiller(teacher, student(), objective), monkeypatch)
    samples = []

    def recorded(loss, sample, *rest):
        samples.append(sample)
        return Distiller.make_jumps(distiller, loss, sample, *rest)

    monkeypatch.setattr(distiller, "make_jumps", recorded)
    for step, start_rows in ((0, 16), (1, 8)):
        monkeypatch.setattr(Distiller, "global_step", step)
        teacher.seen.clear()
        samples.clear()
        distiller.training_step(batch(), 0)
        assert [len(t) for t in teacher.seen] == [start_rows, 8]
        read = [sample.t for sample in samples if sample.v_t is not None]
        assert torch.equal(teacher.seen[0], torch.cat(read))
        # Each loss has the velocity of its own rows only.
        for sample, loss in zip(samples, objective.active_losses(step).values(), strict=True):
            if not loss.start_weight:
                assert sample.v_t is None
                continue
            torch.testing.assert_close(sample.v_t, teacher(sample.x_t, sample.t, sample.condition))


def test_times_of_each_loss_are_stratified_where_the_student_sees_them(monkeypatch):
    """Start times of consistency and flow matching, and end times of N2N where it is active, in a distiller's steps."""
    distiller = quiet(Distiller(Line(), student(), losses.paper(3, batch_fractions=(0.5, 0.25, 0.25))), monkeypatch)
    seen = []

    def recorded(loss, sample, *rest):
        jump, v_start = Distiller.make_jumps(distiller, loss, sample, *rest)
        seen.append((jump.t, jump.s))
        return jump, v_start

    monkeypatch.setattr(distiller, "make_jumps", recorded)
    for step in range(4):
        monkeypatch.setattr(Distiller, "global_step", step)
        seen.clear()
        distiller.training_step(batch(64), step)
        assert [strata(t) for t, _ in seen[:2]] == [list(range(32)), list(range(16))]
        assert len(seen) == (3 if step in (0, 3) else 2)
        for r, s in seen[2:]:
            assert strata((s - r) / (1 - r)) == list(range(16))


def shapes_over(steps: int, monkeypatch, interval=(0.25, 0.7)) -> list[int]:
    """Return the rows of every call of the teacher over the steps."""
    teacher = Line()
    distiller = quiet(
        Distiller(
            teacher, student(), losses.paper(batch_fractions=(0.5, 0.25, 0.25)), Guidance(2.0, interval=interval)
        ),
        monkeypatch,
    )
    for step in range(steps):
        monkeypatch.setattr(Distiller, "global_step", step)
        distiller.training_step(batch(128), step)
    return [len(t) for t in teacher.seen]


def test_guidance_in_an_interval_has_few_shapes(monkeypatch):
    """Over 100 steps the teacher sees at most four batch sizes, and on average few rows more than are guided."""
    rows = shapes_over(100, monkeypatch)
    starts = [count for count in rows if count >= 96]
    assert len(set(rows)) <= 4
    assert sum(starts) / len(starts) < 96 * 1.45 + 8


@pytest.mark.parametrize(
    "objective",
    [losses.paper(batch_fractions=(0.5, 0.25, 0.25)), losses.end_identity(), losses.mean_flow(), losses.lagrangian()],
)
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0, 0.3, (0.2, 0.7))], ids=repr)
def test_step_waits_for_no_device(objective, guidance, monkeypatch):
    """On the meta device, reading a value from a tensor, or a shape that depends on values, is an error."""
    distiller = quiet(Distiller(Line(), student(), objective, guidance), monkeypatch).to("meta")
    generator = torch.Generator()
    monkeypatch.setattr(distiller, "generator", lambda _: generator)
    noise = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, generator, **options: noise(*size, **options))
    x_1, labels = batch()
    total = distiller.training_step(Batch(x_1.to("meta"), labels.to("meta")), 0)
    total.backward()
    assert total.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        total.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_waits_for_no_gpu(monkeypatch):
    """Checked by CUDA's sync debug mode: no call of a step synchronizes."""
    distiller = quiet(Distiller(Line(), student(), losses.paper(), Guidance(2.0, 0.3, (0.2, 0.7))), monkeypatch).cuda()
    x_1, labels = batch()
    on_device = Batch(x_1.cuda(), labels.cuda())
    distiller.training_step(on_device, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        distiller.training_step(on_device, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_times_are_float32_in_a_run_in_bfloat16(precision, tmp_path):
    """Teacher and student see times that bfloat16 cannot represent, in their strata."""
    times = []

    class Watched(DiT):
        def forward(self, x_t, t, s, condition):
            times.append((t, s))
            return super().forward(x_t, t, s, condition)

    torch.manual_seed(0)
    teacher = Teacher(Watched(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10))
    objective = Objective({"lagrangian": FlowMapLoss(Triangle(), start_weight=1.0, end_weight=1.0)})
    L.seed_everything(0, verbose=False)
    distiller = Distiller(teacher, tiny_teacher().network.with_end_time(), objective, Guidance(2.0))
    trainer(tmp_path, max_steps=1, precision=precision).fit(distiller, Digits(batch_size=64))
    for t, s in times:
        assert t.dtype == s.dtype == torch.float32
        assert not torch.equal(t, t.bfloat16().float())
    start = times[0][0]
    assert strata(start[:64]) == list(range(64))
