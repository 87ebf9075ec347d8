"""The distiller: its algorithm against the exact flow, its checkpoint, its teacher, and a resumed run."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save_file
from torch import nn

from decm_lightning import Distiller, TeacherTraining, load, losses, path
from decm_lightning.callbacks import GradientNorms
from decm_lightning.data import Digits, ImageNetLatents
from decm_lightning.errors import NonFiniteError
from decm_lightning.flows import Gaussian, GaussianMixture
from decm_lightning.guidance import Guidance
from decm_lightning.networks import MLP, DiT
from decm_lightning.samplers import euler
from decm_lightning.teachers import ExactTeacher, Teacher
from decm_lightning.types import Batch

OBJECTIVES = {
    "paper": losses.paper(r_decay_steps=5),
    "end_identity": losses.end_identity(),
    "facm": losses.facm(),
    "mean_flow": losses.mean_flow(),
    "lagrangian": losses.lagrangian(),
}


def tiny_teacher(seed: int = 0) -> Teacher:
    """A digits-sized DiT with random weights everywhere, so that no path through it is zero."""
    torch.manual_seed(seed)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Teacher(network)


def trainer(tmp_path, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )


class ExactStudent(MLP):
    """The flow map of a Gaussian, with one useless weight so that there is something to differentiate."""

    def __init__(self, flow: Gaussian) -> None:
        super().__init__(dimensions=3, width=4, depth=1)
        self.flow = flow
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x_t, t, s, condition):
        return self.flow(x_t, t, s) + self.bias


class GaussianTeacher(Teacher):
    """The velocity of the same Gaussian."""

    def __init__(self, flow: Gaussian) -> None:
        super().__init__(MLP(dimensions=3, width=4, depth=1))
        self.flow = flow

    def velocity(self, x_t, t, condition):
        return self.flow.velocity(x_t, t)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_zero_on_the_exact_flow_map(name, monkeypatch):
    flow = Gaussian(mean=torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), std=0.6)
    distiller = Distiller(GaussianTeacher(flow), ExactStudent(flow), OBJECTIVES[name]).double()
    monkeypatch.setattr(distiller, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(distiller, "log", lambda *a, **k: None)
    x_1 = flow.sample(64, 3, torch.Generator().manual_seed(0), torch.float64)
    # The zero step is the one at which every loss is active.
    loss = distiller.training_step(Batch(x_1, None), 0)
    loss.backward()
    assert set(distiller.terms) == set(OBJECTIVES[name].losses)
    assert all(term.residual_rms < 1e-12 for term in distiller.terms.values())
    assert distiller.student.bias.grad.abs().max() < 1e-12


def test_a_shifted_student_is_seen_by_every_loss(monkeypatch):
    flow = Gaussian(std=0.6)
    student = ExactStudent(flow)
    distiller = Distiller(GaussianTeacher(flow), student, losses.paper()).double()
    nn.init.constant_(student.bias, 0.1)
    monkeypatch.setattr(distiller, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(distiller, "log", lambda *a, **k: None)
    distiller.training_step(Batch(torch.randn(64, 3, dtype=torch.float64), None), 0)
    assert distiller.terms["consistency"].residual_rms == pytest.approx(0.1, abs=1e-12)
    assert distiller.terms["flow_matching"].residual_rms == pytest.approx(0.1, abs=1e-12)
    assert distiller.terms["noise_to_noisy"].residual_rms > 0.05


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(("engine", "checkpointed"), [("auto", False), ("auto", True), ("functional", True)])
def test_a_compiled_run_equals_a_plain_one(engine, checkpointed, tmp_path):
    """Weights and averages after five steps, in which N2N is active at two: the compiled blocks meet several shapes.

    At three steps each loss is also differentiated separately.
    """

    def fit(**options):
        L.seed_everything(0, verbose=False)
        objective = losses.paper(batch_fractions=(0.5, 0.25, 0.25))
        optimizer = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
        distiller = Distiller(
            tiny_teacher(),
            objective=objective,
            guidance=Guidance(2.0),
            optimizer=optimizer,
            derivative=engine,
            **options,
        )
        trainer(tmp_path, max_steps=5, callbacks=[GradientNorms(every_n_steps=2)]).fit(distiller, Digits(batch_size=32))
        return distiller.network.state_dict() | {f"average.{k}": v for k, v in distiller.average.state_dict().items()}

    torch.testing.assert_close(fit(compile=True, gradient_checkpointing=checkpointed), fit(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        losses.paper(batch_fractions=(0.5, 0.25, 0.25)),
        losses.end_identity(),
        losses.end_identity(batch_fractions=(0.5, 0.25, 0.25)),
        losses.end_identity(batch_fractions=(0.25, 0.25, 0.25)),
    ],
)
def test_the_passes_that_are_announced_are_made(objective, tmp_path):
    """Count the rows that teacher and student evaluate over six steps."""
    rows = {"teacher": 0, "student": 0}

    def counted(name, network):
        network.register_forward_hook(lambda module, args, u: rows.update({name: rows[name] + len(args[1])}))

    distiller = Distiller(tiny_teacher(), objective=objective, guidance=Guidance(2.0))
    counted("teacher", distiller.teacher.network)
    counted("student", distiller.student)
    trainer(tmp_path, max_steps=6).fit(distiller, Digits(batch_size=64))
    expected = losses.cost(objective, distiller.velocity.guidance.passes)
    assert rows["teacher"] == pytest.approx(6 * 64 * expected.teacher, rel=0.02)
    assert rows["student"] == pytest.approx(6 * 64 * expected.student, rel=0.02)


def test_a_run_says_which_derivative_it_takes_and_what_a_step_costs(tmp_path):
    distiller = Distiller(tiny_teacher(), objective=losses.end_identity(batch_fractions=(0.5, 0.25, 0.25)))
    trainer(tmp_path, max_steps=1).fit(distiller, Digits(batch_size=16))
    assert distiller.summary()["derivative"].startswith("dual: exact")
    passes = "4.75 forward passes per sample and step: teacher 1.00, student 1.00, derivative 0.75, backward 2.00"
    assert str(distiller.cost()) == passes


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda student: student.blocks[0].mlp.w3.weight.data.fill_(torch.nan), ["linear", "blocks.0.mlp.w3"]),
        (
            lambda student: student.final_layer.norm_final.weight.data.fill_(torch.inf),
            ["mul", "final_layer.norm_final"],
        ),
    ],
)
def test_a_derivative_that_is_not_finite_names_operation_and_layer(break_it, named, tmp_path):
    """The error names the origin of the first NaN, not only the loss."""
    distiller = Distiller(tiny_teacher())
    break_it(distiller.student)
    with pytest.raises(NonFiniteError) as error:
        trainer(tmp_path, max_steps=1).fit(distiller, Digits(batch_size=16))
    assert all(word in str(error.value) for word in ("loss/triangle", "batch 0", *named)), error.value


@pytest.mark.parametrize("engine", ["functional", "dual", "central"])
def test_a_run_is_the_same_with_every_engine(engine, tmp_path):
    def fit(name):
        L.seed_everything(0, verbose=False)
        distiller = Distiller(tiny_teacher(), derivative=name, optimizer=lambda p: torch.optim.SGD(p, 0.1))
        trainer(tmp_path, max_steps=5).fit(distiller, Digits(batch_size=32))
        return torch.cat([p.detach().flatten() for p in distiller.network.parameters()])

    torch.testing.assert_close(fit(engine), fit("functional"), rtol=0, atol=1e-4)


def test_the_student_begins_as_the_teacher_at_every_landing_time():
    teacher = tiny_teacher()
    student = Distiller(teacher).student
    x, t, labels = torch.randn(6, 1, 8, 8), torch.rand(6), torch.arange(6)
    for s in (t, torch.ones(6), (t + 1) / 2):
        torch.testing.assert_close(student(x, t, s, labels), teacher(x, t, labels), rtol=0, atol=0)


def test_the_teacher_never_trains_moves_with_the_module_and_stays_out_of_the_checkpoint(tmp_path):
    teacher = tiny_teacher()
    before = copy.deepcopy(teacher.network.state_dict())
    distiller = Distiller(teacher, guidance=Guidance(2.0))
    run = trainer(tmp_path, max_steps=5)
    run.fit(distiller, Digits(batch_size=16))
    assert not teacher.network.training
    assert all(not p.requires_grad for p in teacher.network.parameters())
    for name, value in teacher.network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    run.save_checkpoint(tmp_path / "run.ckpt")
    keys = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in keys} == {"network", "average"}
    assert next(distiller.double().teacher.network.parameters()).dtype == torch.float64


def test_the_average_follows_its_formula_and_is_what_load_returns(tmp_path):
    distiller = Distiller(tiny_teacher(), ema_decay=0.5)
    weights = [p.detach().clone() for p in distiller.average.parameters()]

    class Reference(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            n = trainer.global_step
            decay = min(0.5, (1 + n) / (10 + n))
            for mean, p in zip(weights, pl_module.network.parameters(), strict=True):
                mean.mul_(decay).add_(p.detach(), alpha=1 - decay)

    run = trainer(tmp_path, max_steps=4, callbacks=[Reference()])
    run.fit(distiller, Digits(batch_size=16))
    run.save_checkpoint(tmp_path / "run.ckpt")
    for expected, loaded in zip(weights, load(tmp_path / "run.ckpt").parameters(), strict=True):
        torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-6)


def test_the_average_waits_for_accumulated_batches(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.average.final_layer.linear.weight.clone())

    distiller = Distiller(tiny_teacher(), optimizer=lambda p: torch.optim.SGD(p, 0.1))
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, callbacks=[Watch()]).fit(distiller, Digits(16))
    # The average moves before any other callback sees it, at every second batch.
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_accumulated_batches_draw_their_own_noise(tmp_path):
    draws = []

    class Recorded(Distiller):
        def generator(self, batch_idx):
            generator = super().generator(batch_idx)
            draws.append(generator.initial_seed())
            return generator

    trainer(tmp_path, max_steps=2, accumulate_grad_batches=3).fit(Recorded(tiny_teacher()), Digits(16))
    assert len(set(draws)) == len(draws) == 6


def test_a_seed_set_after_building_is_used(tmp_path, caplog):
    """For the noise and for the order of the data, in each fit. A resumed run uses its checkpoint's, and says so."""

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen = pl_module.run_seed, pl_module.generator(batch_idx).initial_seed(), float(batch.x_1.sum())

    L.seed_everything(1, verbose=False)
    module, data, watch = Distiller(tiny_teacher()), Digits(batch_size=16), Watch()

    def fit(seed, own=None, checkpoint=None):
        L.seed_everything(seed, verbose=False)
        module.seed = data.seed = own
        saving = ModelCheckpoint(tmp_path, filename=f"{seed}-{own}")
        run = trainer(tmp_path, max_steps=2 if checkpoint else 1, callbacks=[saving, watch])
        run.fit(module, data, ckpt_path=checkpoint)
        return watch.seen

    first, second, third = fit(2), fit(3), fit(3, own=2)
    assert (first[0], second[0]) == (2, 3)
    assert first == third
    assert not set(first) & set(second)
    assert fit(5, own=4, checkpoint=tmp_path / "3-None.ckpt")[0] == 3
    assert "seed 3 of the checkpoint, not 4" in caplog.text


@pytest.mark.parametrize("what", ["teacher", "student"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(what, tmp_path):
    def fit(folder, steps, checkpoint=None):
        teacher = tiny_teacher()
        # A resumed run uses its checkpoint's seed, not the current one.
        L.seed_everything(4 if checkpoint else 3, verbose=False)
        options = {
            "optimizer": lambda p: torch.optim.AdamW(p, 1e-2),
            "lr_scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, 40, cycle_momentum=False),
            "ema_decay": 0.9,
        }
        if what == "student":
            module = Distiller(teacher, objective=losses.paper(r_decay_steps=30), **options)
        else:
            module = TeacherTraining(DiT(8, 1, 4, 16, 1, 2, num_classes=10), **options)
        saving = ModelCheckpoint(folder, every_n_train_steps=20, save_top_k=-1, filename="{step}")
        # 1,797 digits in batches of 96 are 18 steps: both stops are in the middle of an epoch.
        trainer(folder, max_steps=steps, callbacks=[saving]).fit(module, Digits(batch_size=96), ckpt_path=checkpoint)
        return torch.load(folder / f"step={steps}.ckpt", weights_only=True)

    whole = fit(tmp_path / "whole", 40)
    fit(tmp_path / "half", 20)
    resumed = fit(tmp_path / "resumed", 40, tmp_path / "half" / "step=20.ckpt")
    assert whole["global_step"] == resumed["global_step"] == 40
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert whole["lr_schedulers"] == resumed["lr_schedulers"]
    torch.testing.assert_close(whole["optimizer_states"], resumed["optimizer_states"], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(value, tmp_path):
    class Poisoned(Distiller):
        def end_velocity(self, loss, jump, u):
            v_end = super().end_velocity(loss, jump, u)
            return v_end * value if v_end is not None and self.global_step == 2 else v_end

    distiller = Poisoned(tiny_teacher())
    with pytest.raises(NonFiniteError, match=r"loss/triangle = (nan|inf) .* step 2, batch 2 of epoch 0"):
        trainer(tmp_path, max_steps=5).fit(distiller, Digits(batch_size=64))


@pytest.mark.parametrize(("scale", "goes_on"), [(2.0**40, True), (1.0, False)])
def test_a_gradient_scaler_may_overflow_while_it_can_still_shrink(scale, goes_on, tmp_path):
    """In 16-mixed the scaler skips such steps and halves its scale; at a scale of 1 the gradient itself is at fault."""
    distiller = Distiller(tiny_teacher(), optimizer=lambda p: torch.optim.SGD(p, 1e-3))
    if not goes_on:
        distiller.student.final_layer.linear.bias.register_hook(lambda gradient: gradient * torch.inf)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    before = distiller.student.final_layer.linear.weight.detach().clone()
    fit = trainer(tmp_path, max_steps=3, plugins=precision)
    if goes_on:
        fit.fit(distiller, Digits(batch_size=16))
        assert precision.scaler.get_scale() == scale / 8
        assert torch.equal(distiller.student.final_layer.linear.weight, before)
    else:
        with pytest.raises(NonFiniteError, match=r"gradient of final_layer.linear.bias"):
            fit.fit(distiller, Digits(batch_size=16))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    class Poisoned(Distiller):
        def on_after_backward(self):
            if self.global_step == 1:
                self.student.final_layer.linear.bias.grad[0] = float("nan")

    distiller = Poisoned(tiny_teacher())
    with pytest.raises(NonFiniteError, match=r"gradient of final_layer.linear.bias .* step 1, batch 1"):
        trainer(tmp_path, max_steps=5).fit(distiller, Digits(batch_size=64))
    assert all(p.isfinite().all() for p in distiller.parameters())


def test_the_teacher_is_evaluated_once_for_all_losses_that_start_at_the_same_point(monkeypatch):
    rows = []

    class Counting(GaussianTeacher):
        def velocity(self, x_t, t, condition):
            rows.append(len(t))
            return super().velocity(x_t, t, condition)

    def calls(objective):
        rows.clear()
        distiller = Distiller(Counting(Gaussian(std=0.5)), MLP(3, 8, 1), objective)
        monkeypatch.setattr(distiller, "log_dict", lambda *a, **k: None)
        monkeypatch.setattr(distiller, "log", lambda *a, **k: None)
        distiller.training_step(Batch(torch.randn(4, 3), None), 0)
        return len(rows)

    assert calls(losses.consistency_and_flow_matching()) == 1
    assert calls(losses.end_identity()) == 2  # and at the end point
    assert calls(losses.paper()) == 3  # and at the noise edge's own start


def test_sampling_a_teacher_by_one_euler_step_is_its_velocity():
    distiller = Distiller(tiny_teacher(), guidance=Guidance(1.5))
    x_0, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    expected = path.jump(x_0, distiller.velocity(x_0, torch.zeros(5), labels), torch.zeros(5), torch.ones(5))
    torch.testing.assert_close(euler(distiller.models()["teacher"], x_0, labels, 1), expected)


def test_an_exact_flow_has_no_student_of_its_own():
    with pytest.raises(ValueError, match=r"pass Distiller\(student="):
        Distiller(ExactTeacher(GaussianMixture.ring()))


def test_data_with_more_classes_than_the_network_are_refused(tmp_path):
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=5)
    with pytest.raises(ValueError, match=r"10 classes.* 5"):
        trainer(tmp_path, max_steps=1).fit(Distiller(Teacher(network)), Digits(batch_size=16))


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (8, 3)])
def test_data_of_another_shape_than_the_network_s_are_refused(size, channels, tmp_path):
    network = DiT(size, channels, patch_size=4, width=48, depth=1, heads=2, num_classes=10)
    shapes = rf"samples are \(1, 8, 8\) and the network's \({channels}, {size}, {size}\)"
    with pytest.raises(ValueError, match=shapes):
        trainer(tmp_path, max_steps=1).fit(TeacherTraining(network), Digits(batch_size=16))


def one_cycle(steps: int) -> Distiller:
    schedule = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, steps, pct_start=0.25)  # noqa: E731
    return Distiller(tiny_teacher(), lr_scheduler=schedule)


def test_a_schedule_that_ends_before_the_run_is_refused_before_its_first_step(tmp_path):
    run = trainer(tmp_path, max_steps=7)
    with pytest.raises(ValueError, match=r" 5 .* 7.*total_steps to 7"):
        run.fit(one_cycle(5), Digits(batch_size=16))
    assert run.global_step == 0
    # Two epochs of 17 batches, two of them a step.
    epochs = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match=r" 17 .* 18"):
        epochs.fit(one_cycle(17), Digits(batch_size=100))


def test_a_schedule_that_the_run_leaves_in_the_middle_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r" 9 .* 2.*total_steps to 2"):
        trainer(tmp_path, max_steps=2).fit(one_cycle(9), Digits(batch_size=16))


def test_a_schedule_with_a_phase_of_no_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler"):
        trainer(tmp_path, max_steps=4).fit(one_cycle(4), Digits(batch_size=16))


def test_an_engine_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="auto, dual, functional, central: got 'jvp'"):
        Distiller(tiny_teacher(), derivative="jvp")


def test_the_teacher_is_evaluated_only_where_a_loss_reads_it(monkeypatch):
    rows = []

    class Counting(GaussianTeacher):
        def velocity(self, x_t, t, condition):
            rows.append(len(t))
            return super().velocity(x_t, t, condition)

    distiller = Distiller(
        Counting(Gaussian(std=0.5)), MLP(3, 8, 1), losses.end_identity(batch_fractions=(0.5, 0.25, 0.25))
    )
    monkeypatch.setattr(distiller, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(distiller, "log", lambda *a, **k: None)
    distiller.training_step(Batch(torch.randn(16, 3), None), 0)
    # At 8 + 4 points of consistency and flow matching, and at the end points of N2N's 4 jumps.
    assert rows == [12, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_of_the_data_that_is_not_finite_is_named_with_its_file(workers, tmp_path):
    """It is outside of the 1,000 rows that are checked before training."""
    count, bad = 1100, 1003
    latents = torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents[bad, 0, 0, 0] = float("nan")
    labels = torch.zeros(count, dtype=torch.long)
    parts = {"latents": latents, "latents_flip": latents.clone(), "labels": labels}
    save_file({name: part[:600].contiguous() for name, part in parts.items()}, tmp_path / "a.safetensors")
    save_file({name: part[600:].contiguous() for name, part in parts.items()}, tmp_path / "b.safetensors")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, tmp_path / "latents_stats.pt")
    data = ImageNetLatents(str(tmp_path), batch_size=50, num_classes=1, num_workers=workers)
    module = TeacherTraining(DiT(2, 4, 1, 8, 1, 2, num_classes=1))
    with pytest.raises(NonFiniteError) as caught:
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, data)
    assert "b.safetensors: row 403 of latents" in str(caught.value)
    assert "learning rate" not in str(caught.value)
