"""The same tests for all supported diffusers transformers, on tiny random instances of the real classes."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LuminaNextDiT2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from decm_lightning import load
from decm_lightning.derivatives import Tangent, choose, dual, functional
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.networks import save
from decm_lightning.teachers import DiffusersTeacher, Teacher
from decm_lightning.teachers.diffusers_families import FAMILIES as ROWS
from decm_lightning.types import Captions

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PATCHES = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "num_layers": 2}
TEXT = {"joint_attention_dim": 6, "pooled_projection_dim": 7}


@dataclass
class Family:
    """A tiny model, and one step of its pipeline's sampler computed by diffusers.

    Attributes:
        make: makes the model.
        step: from (model, x_t, captions) to times t and s, and x_s by one step of the pipeline's scheduler.
        masked: whether it reads the captions' mask.
        labels: whether it reads class labels instead of captions.
    """

    make: Callable[[], nn.Module]
    step: Callable[[nn.Module, Tensor, Captions], tuple[float, float, Tensor]]
    masked: bool = False
    labels: bool = False


def euler(call: Callable[[Tensor], Tensor], x_t: Tensor) -> tuple[float, float, Tensor]:
    """One step of the flow-matching pipelines: from the third of seven sigmas to the fourth."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(2)
    now, after = scheduler.sigmas[2:4].tolist()
    timestep = scheduler.timesteps[2]
    x_s = scheduler.step(call(timestep.expand(len(x_t))), timestep, x_t).prev_sample
    return 1 - now, 1 - after, x_s


def sd3_step(model, x_t, captions):
    def call(timestep):
        return model(x_t, captions.tokens, captions.pooled, timestep, return_dict=False)[0]

    return euler(call, x_t)


def flux_step(model, x_t, captions):
    rows, channels, height, width = x_t.shape
    packed = FluxPipeline._pack_latents(x_t, rows, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32)

    def call(timestep):
        return model(
            hidden_states=packed,
            timestep=timestep / 1000,
            guidance=torch.full([1], 3.5).expand(rows),
            pooled_projections=captions.pooled,
            encoder_hidden_states=captions.tokens,
            txt_ids=torch.zeros(captions.tokens.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]

    t, s, x_s = euler(call, packed)
    return t, s, FluxPipeline._unpack_latents(x_s, 8 * height, 8 * width, 8)


def sana_step(model, x_t, captions):
    def call(timestep):
        timestep = timestep * model.config.timestep_scale
        return model(x_t, captions.tokens, timestep, None, captions.mask.long(), return_dict=False)[0]

    return euler(call, x_t)


def pixart_step(model, x_t, captions):
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    first, second = (scheduler.alphas_cumprod[k].item() for k in (600, 500))
    t, s = (signal**0.5 / (signal**0.5 + (1 - signal) ** 0.5) for signal in (first, second))
    z = x_t / (t**2 + (1 - t) ** 2) ** 0.5
    sizes = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        sizes = {"resolution": torch.tensor([[32.0, 32.0]] * len(x_t)), "aspect_ratio": torch.ones(len(x_t), 1)}
    text = {"encoder_hidden_states": captions.tokens, "encoder_attention_mask": captions.mask.long()}
    noise = model(z, timestep=torch.full((len(x_t),), 600), added_cond_kwargs=sizes, **text, return_dict=False)[0]
    after = scheduler.step(noise.chunk(2, dim=1)[0], 600, z).prev_sample
    return t, s, after * (s**2 + (1 - s) ** 2) ** 0.5


def dit_step(model, x_t, labels):
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    t, s = (kept**0.5 / (kept**0.5 + (1 - kept) ** 0.5) for kept in scheduler.alphas_cumprod[[600, 500]].tolist())
    z = x_t / (t**2 + (1 - t) ** 2) ** 0.5
    noise = model(z, timestep=torch.full((len(x_t),), 600), class_labels=labels, return_dict=False)[0]
    after = scheduler.step(noise.chunk(2, dim=1)[0], 600, z).prev_sample
    return t, s, after * (s**2 + (1 - s) ** 2) ** 0.5


def make_sd3():
    extras = {"pos_embed_max_size": 6, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    return SD3Transformer2DModel(**HEADS, **PATCHES, **TEXT, **extras, out_channels=4, caption_projection_dim=16)


def make_flux():
    sizes = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "axes_dims_rope": (2, 2, 4)}
    return FluxTransformer2DModel(**HEADS, **TEXT, **sizes, guidance_embeds=True)


def make_sana():
    crossing = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    extras = {"caption_channels": 6, "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
    return SanaTransformer2DModel(**HEADS, **PATCHES, **crossing, **extras, out_channels=4)


def make_pixart():
    return PixArtTransformer2DModel(**HEADS, **PATCHES, out_channels=8, cross_attention_dim=16, caption_channels=6)


def make_dit():
    return DiTTransformer2DModel(**HEADS, **PATCHES, out_channels=8, num_embeds_ada_norm=10, norm_num_groups=4)


def make_pixart_with_sizes():
    heads = {"num_attention_heads": 3, "attention_head_dim": 8, "cross_attention_dim": 24, "caption_channels": 6}
    return PixArtTransformer2DModel(**heads, **PATCHES, out_channels=8, use_additional_conditions=True)


FAMILIES = {
    "sd3": Family(make_sd3, sd3_step),
    "flux": Family(make_flux, flux_step),
    "sana": Family(make_sana, sana_step, masked=True),
    "pixart": Family(make_pixart, pixart_step, masked=True),
    "pixart-alpha": Family(make_pixart_with_sizes, pixart_step, masked=True),
    "dit": Family(make_dit, dit_step, labels=True),
}


@dataclass
class Case:
    """A model of a family in a folder, a teacher loaded from it, and inputs."""

    family: Family
    folder: Path
    model: nn.Module
    teacher: Teacher
    x_t: Tensor
    t: Tensor
    s: Tensor
    captions: Captions
    empty: Captions


@pytest.fixture(params=["sd3", "flux", "sana", "pixart", "dit"])
def case(request, tmp_path) -> Case:
    """One of the families, with nonzero weights."""
    family = FAMILIES[request.param]
    torch.manual_seed(0)
    model = family.make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "transformer")
    size = {"latent_size": 4} if request.param == "flux" else {}
    teacher = DiffusersTeacher(str(tmp_path), lora_rank=2, **size)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()

    def captions(rows):
        if family.labels:
            return torch.tensor([3, 0, 9])[:rows]
        pooled = None if family.masked else torch.randn(rows, 7)
        return Captions(torch.randn(rows, 3, 6), mask[-rows:] if family.masked else None, pooled)

    times = torch.tensor([0.1, 0.45, 0.9]), torch.tensor([0.5, 0.8, 1.0])
    return Case(family, tmp_path, model, teacher, torch.randn(3, 4, 4, 4), *times, captions(3), captions(1))


def changed(teacher: Teacher) -> nn.Module:
    """Return a student whose added parameters are nonzero."""
    student = teacher.student()
    for name, parameter in student.named_parameters():
        if name in student.added:
            nn.init.normal_(parameter, std=0.3)
    return student


def wide(values: Any) -> Any:
    """Return the values with all floating-point tensors in float64."""
    return tree_map_only(Tensor, lambda value: value.double() if value.is_floating_point() else value, values)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Compare relative to the largest element, by default up to float32 rounding: kernels depend on alignment."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_velocity_is_that_of_the_pipelines_own_sampler(case):
    """A step of the diffusers scheduler leads from x_t along v to x_s."""
    with torch.no_grad():
        t, s, x_s = case.family.step(case.model, case.x_t, case.captions)
    v = case.teacher(case.x_t, torch.full((3,), t), case.captions)
    assert v.abs().max() > 0.1
    assert_close(v, (x_s - case.x_t) / (s - t), 1e-5)


def test_captions_matter_and_only_where_their_mask_says(case):
    if case.family.labels:
        others = case.teacher(case.x_t, case.t, torch.tensor([3, 0, 8])) - case.teacher(case.x_t, case.t, case.captions)
        assert (others.abs().amax((1, 2, 3)) > 1e-3).tolist() == [False, False, True]
        return
    v = case.teacher(case.x_t, case.t, case.captions)
    tokens = case.captions.tokens.clone()
    tokens[2, 1:] += 1
    other = case.teacher(case.x_t, case.t, case.captions._replace(tokens=tokens))
    assert_close(other[:2], v[:2])
    assert ((other[2] - v[2]).abs().max() < 1e-6) == case.family.masked
    tokens[:, 0] += 1
    assert (case.teacher(case.x_t, case.t, case.captions._replace(tokens=tokens)) - v).abs().max() > 1e-3


def test_student_initially_equals_the_teacher_for_every_end_time(case):
    """The added parameters initially have no influence, and have one after they are changed."""
    student = case.teacher.student()
    v = case.teacher(case.x_t, case.t, case.captions)
    for s in (case.t, case.s, torch.ones(3)):
        assert_close(student(case.x_t, case.t, s, case.captions), v)
    assert not any(student.get_parameter(name).any() for name in student.added if "lora_B" in name or "mlp.2" in name)
    student = changed(case.teacher)
    u, later = (student(case.x_t, case.t, s, case.captions) for s in (case.t, case.s))
    assert (u - v).abs().max() > 1e-3
    assert (later - u).abs().max() > 1e-3


def test_weights_are_held_once(case):
    """Teacher, student and a copy of the student share the pretrained weights and have separate adapters."""
    student = case.teacher.student()
    average = copy.deepcopy(student)
    base = {name: value.data_ptr() for name, value in case.teacher.network.named_parameters()}
    for network in (student, average):
        held = {name: p for name, p in network.named_parameters() if name not in network.added}
        names = {name.replace(".base_layer", ""): p for name, p in held.items()}
        assert {name: p.data_ptr() for name, p in names.items()} == base
        assert not any(p.requires_grad for p in held.values())
    own = [{p.data_ptr() for name, p in n.named_parameters() if name in n.added} for n in (student, average)]
    assert own[0].isdisjoint(own[1])
    assert len(own[0]) == len(student.added) > 0
    assert all(p.requires_grad == (name in student.added) for name, p in student.named_parameters())
    buffers = [{b.data_ptr() for b in network.double().buffers()} for network in (case.teacher.network, average)]
    assert buffers[0] == buffers[1]


def test_adapters_are_on_every_attention(case):
    """Only the attention projections have adapters, two matrices of rank 2 each."""
    student = case.teacher.student()
    adapted = {name for name, module in student.named_modules() if hasattr(module, "lora_A")}
    attention = {
        n for n, m in student.named_modules() if ".attn" in n and isinstance(m, nn.Linear) and "lora_" not in n
    }
    assert adapted == {name.removesuffix(".base_layer") for name in attention}
    assert all(student.get_submodule(name).lora_A.default.weight.shape[0] == 2 for name in adapted)


def test_derivative_is_that_of_forward_mode_and_of_a_difference(case):
    """The selected engine agrees in one pass with a fourth-order difference (times are multiplied by 1000)."""
    student = changed(case.teacher).double()
    assert choose(student, student.example()).reason.startswith("derivative dual: exact")
    captions = wide(case.captions)
    point = (case.x_t.double(), case.t.double(), case.s.double())
    along = Tangent(
        torch.randn_like(point[0]), torch.tensor([1.0, -0.5, 0.7]).double(), torch.tensor([0.3, 1.0, -2.0]).double()
    )
    exact = functional(student, *point, captions, along)
    result = dual(student, *point, captions, along)
    assert_close(result.u, exact.u, 1e-12)
    assert_close(result.jvp, exact.jvp, 1e-9)

    def at(h):
        return student(*(p + h * d for p, d in zip(point, (along.x, along.t, along.s), strict=True)), captions)

    # Times are rounded to float32 before the sinusoids, which a smaller h would reveal.
    h = 5e-5
    with torch.no_grad():
        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    assert_close(difference, exact.jvp, 5e-3)


@pytest.mark.parametrize("argument", ["x", "t", "s"])
def test_derivative_along_each_argument_alone(argument, case):
    """None of the tangents is lost in the code of diffusers."""
    student = changed(case.teacher).double()
    captions = wide(case.captions)
    point = (case.x_t.double(), case.t.double(), case.s.double())
    parts = {"x": torch.ones_like(point[0]), "t": torch.ones(3).double(), "s": torch.ones(3).double()}
    along = Tangent(**{name: part * (name == argument) for name, part in parts.items()})
    exact = functional(student, *point, captions, along).jvp
    assert exact.abs().max() > 1e-3
    assert_close(dual(student, *point, captions, along).jvp, exact, 1e-9)


def test_derivative_is_finite_at_both_ends_of_time(case):
    student = changed(case.teacher)
    t, s = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    result = dual(student, case.x_t, t, s, case.captions, Tangent(case.x_t, torch.ones(3), torch.ones(3)))
    assert result.u.isfinite().all()
    assert result.jvp.isfinite().all()


def test_gradient_checkpointing_changes_nothing(case):
    """u, jvp and the gradients do not change; only the added parameters have gradients."""
    student = changed(case.teacher)
    runs = []
    student.units()[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def step():
        student.zero_grad()
        result = dual(student, case.x_t, case.t, case.s, case.captions, Tangent(case.x_t, case.t, case.s))
        result.u.square().sum().backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        return result, gradients

    result, gradients = step()
    assert gradients.keys() == student.added
    student.gradient_checkpointing = True
    checkpointed, others = step()
    assert len(runs) == 3
    assert_close(checkpointed.u, result.u, 1e-6)
    assert_close(checkpointed.jvp, result.jvp, 1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


def test_teacher_is_unchanged_by_its_students_training(case):
    before = case.teacher(case.x_t, case.t, case.captions)
    student = case.teacher.student()
    optimizer = torch.optim.AdamW(student.parameters(), 0.1)
    for _ in range(3):
        student(case.x_t, case.t, case.s, case.captions).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (student(case.x_t, case.t, case.s, case.captions) - before).abs().max() > 1e-2
    assert_close(case.teacher(case.x_t, case.t, case.captions), before)


def test_student_is_saved_without_its_base_and_comes_back_to_the_bit(case):
    student = changed(case.teacher).eval()
    save(student, case.folder / "student")
    saved = load_file(case.folder / "student" / "model.safetensors")
    assert saved.keys() == student.added
    loaded = load(case.folder / "student")
    assert type(loaded) is type(student)
    assert loaded.config == student.config
    assert loaded.sample_shape == (4, 4, 4)
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    inputs = (case.x_t, case.t, case.s, case.captions)
    assert_close(loaded(*inputs), student(*inputs))
    del saved[next(iter(saved))]
    save_file(saved, case.folder / "student" / "model.safetensors")
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)missing"):
        load(case.folder / "student")


def test_a_student_whose_base_was_replaced_is_refused_with_both_hashes(case):
    save(changed(case.teacher), case.folder / "student")
    before = json.loads((case.folder / "student" / "config.json").read_text())["base"]
    assert before == case.teacher.identity()
    with torch.no_grad():
        next(case.model.parameters()).view(-1)[0] += 1e-3
    case.model.save_pretrained(case.folder / "transformer")
    after = DiffusersTeacher(str(case.folder / "transformer")).identity()
    assert after != before
    with pytest.raises(ValueError, match=rf"weights {after}.*trained on {before}") as caught:
        load(case.folder / "student")
    assert str(case.folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_student_can_start_from_a_student(case):
    """The adapters are copied and stay trainable."""
    student = changed(case.teacher)
    again = Teacher(copy.deepcopy(student)).student()
    inputs = (case.x_t, case.t, case.s, case.captions)
    assert_close(again(*inputs), student(*inputs))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == student.added


def test_guided_velocity_has_the_empty_prompt(case):
    if case.teacher.network.embeds_guidance:
        with pytest.raises(ValueError, match="embedded_guidance"):
            case.teacher.null(case.captions)
        return
    case.teacher.empty = case.empty
    guided = GuidedField(case.teacher, case.teacher.null, Guidance(2.0))(case.x_t, case.t, case.captions)
    empty = torch.full((3,), 10)
    if not case.family.labels:
        empty = Captions(*(None if part is None else part.repeat_interleave(3, 0) for part in case.empty))
    v, v_null = (case.teacher(case.x_t, case.t, captions) for captions in (case.captions, empty))
    assert (v - v_null).abs().max() > 1e-2
    assert_close(guided, 2 * v - v_null, 1e-5)


def test_model_comes_from_a_folder_of_its_own_too(case):
    alone = DiffusersTeacher(str(case.folder / "transformer"))
    inputs = (case.x_t, case.t, case.captions)
    assert_close(alone(*inputs), case.teacher(*inputs))


def test_narrow_weights_leave_what_was_added_in_float32(case):
    teacher = DiffusersTeacher(str(case.folder), lora_rank=2, dtype="bfloat16")
    student = teacher.student()
    assert {p.dtype for n, p in student.named_parameters() if n in student.added} == {torch.float32}
    assert {p.dtype for n, p in student.named_parameters() if n not in student.added} >= {torch.bfloat16}
    v = teacher(case.x_t, case.t, case.captions)
    assert v.dtype == torch.float32
    assert_close(student(case.x_t, case.t, case.s, case.captions), v)
    assert_close(v, case.teacher(case.x_t, case.t, case.captions), 0.2)


@pytest.mark.parametrize("mixed", [True, False], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("argument", ["x", "t", "s"])
def test_derivative_in_bfloat16(mixed, argument, case):
    """The derivative in each argument is near that of float64; rounding times before multiplying would err by 100 %."""
    teacher = DiffusersTeacher(str(case.folder), lora_rank=2, dtype="float32" if mixed else "bfloat16")
    student = changed(teacher)
    point = (case.x_t, case.t, case.s, case.captions)
    parts = {"x": torch.randn_like(case.x_t), "t": torch.ones(3), "s": torch.ones(3)}
    along = Tangent(**{name: part * (name == argument) for name, part in parts.items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        result = dual(student, *point, along)
    exact = dual(student.double(), *wide(point), wide(along))
    for given, true in ((result.u.detach(), exact.u.detach()), (result.jvp, exact.jvp)):
        assert (given - true).norm() < 0.2 * true.norm()


@pytest.mark.parametrize(("fault", "message"), [("lose", "missing: "), ("add", "unexpected: odd")])
def test_tensors_that_do_not_fit_are_refused(fault, message, case):
    """diffusers would continue with random weights."""
    file = case.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if fault == "lose":
        del tensors[max(tensors)]
    else:
        tensors["odd"] = torch.zeros(1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        DiffusersTeacher(str(case.folder))


def test_labels_are_never_dropped(tmp_path):
    """This also holds in training mode, in which the DiT of diffusers would drop every tenth label."""
    make_dit().save_pretrained(tmp_path)
    student = changed(DiffusersTeacher(str(tmp_path), lora_rank=2))
    assert student.training
    inputs = (torch.randn(64, 4, 4, 4), torch.full((64,), 0.5), torch.ones(64), torch.full((64,), 3))
    assert_close(student(*inputs), student.eval()(*inputs))


def test_a_condition_of_another_kind_is_refused(case):
    if case.family.labels:
        for condition in (None, Captions(torch.zeros(3, 3, 6), None, None)):
            with pytest.raises(ValueError, match=r"use teacher.null\(labels\)"):
                case.teacher(case.x_t, case.t, condition)
        return
    with pytest.raises(ValueError, match=r"Captions.*teacher.null\(captions\).*: got labels \(3,\)"):
        case.teacher(case.x_t, case.t, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be \(b, n, 6\): got \(3, 3, 5\)"):
        case.teacher(case.x_t, case.t, case.captions._replace(tokens=case.captions.tokens[..., :5]))
    if not case.family.masked:
        with pytest.raises(ValueError, match=r"need a pooled vector \(b, 7\): got width None"):
            case.teacher(case.x_t, case.t, case.captions._replace(pooled=None))


def test_other_targets_and_ranks(case):
    teacher = DiffusersTeacher(
        str(case.folder), lora_rank=3, targets=["proj_out_2" if case.family.labels else "proj_out"]
    )
    student = teacher.student()
    # Two matrices, and the two layers of the end-time embedding.
    assert len(student.added) >= 6
    with pytest.raises(ValueError, match=r"targets .*'nothing'"):
        DiffusersTeacher(str(case.folder), targets=["to_q", "nothing"]).student()
    with pytest.raises(ValueError, match=r"lora_rank.*got 0"):
        DiffusersTeacher(str(case.folder), lora_rank=0)


def test_an_unknown_family_is_refused_with_the_known(tmp_path):
    LuminaNextDiT2DModel(
        sample_size=4, num_layers=1, num_attention_heads=2, num_kv_heads=2, hidden_size=16, cross_attention_dim=8
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"LuminaNextDiT2DModel: .*{', '.join(ROWS)}"):
        DiffusersTeacher(str(tmp_path))


def test_a_sprint_is_refused(tmp_path):
    crossing = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    model = SanaTransformer2DModel(**HEADS, **PATCHES, **crossing, caption_channels=6, guidance_embeds=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a SANA-Sprint"):
        DiffusersTeacher(str(tmp_path))
