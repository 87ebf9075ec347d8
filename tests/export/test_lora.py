"""LoRA files of students in the stock pipelines of diffusers, and by ComfyUI's key map, on tiny random models."""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SanaPipeline
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, safe_open
from torch import nn

import decm_lightning
from decm_lightning import cli
from decm_lightning.export import writer
from decm_lightning.export.lora import sigmas
from decm_lightning.networks import DiT, Network, save
from decm_lightning.networks.record import Record, Reference
from decm_lightning.samplers import consistency, sampler
from decm_lightning.seeds import generator_of
from decm_lightning.teachers import DiffusersPrompts, DiffusersTeacher
from tests.teachers.pipelines import flux, pixart, sana, sd3
from tests.teachers.test_pairs_for_teachers import decm as fit_sd35
from tests.teachers.test_pairs_for_teachers import source

__all__ = ["fit_sd35", "source"]
DOCS = Path(__file__).parents[2] / "docs/export-lora.md"
PROMPTS = ["a red cat", "a dog"]


def guided_flux():
    """Return a Flux that embeds guidance and has both kinds of blocks."""
    pipeline = flux()
    sizes = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "axes_dims_rope": (2, 2, 4)}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16, "pooled_projection_dim": 8}
    pipeline.register_modules(transformer=FluxTransformer2DModel(**heads, **sizes, guidance_embeds=True))
    return pipeline


FAMILIES = {"sd3": partial(sd3, layers=2), "flux": flux, "guided flux": guided_flux, "sana": sana, "pixart": pixart}


@dataclass
class Case:
    """A stock pipeline, its folder, and a student of it whose added weights are random."""

    pipeline: Any
    folder: Path
    student: Network

    def export(self, to="lora", dtype=torch.float32):
        """Return the path of the student's LoRA file."""
        return writer(to)(self.student, self.folder / "lora.safetensors", dtype)[0]

    def noise(self):
        """Return x_0 in the layout of the pipeline: a Flux packs 2 x 2 latents into one token."""
        x_0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        return pack(x_0) if isinstance(self.pipeline, FluxPipeline) else x_0

    def sample(self, steps):
        """Return our samples; all added noise is from torch's global generator, as in the pipelines."""
        packed = isinstance(self.pipeline, FluxPipeline)

        def u(x_t, t, s, condition):
            return pack(self.student(unpack(x_t), t, s, condition)) if packed else self.student(x_t, t, s, condition)

        captions = DiffusersPrompts(str(self.folder), max_tokens=6)(PROMPTS)
        torch.manual_seed(2)
        return consistency(u, self.noise(), captions, steps)

    def pipe(self, steps, sampling):
        """Return the pipeline's samples with the settings in a file's metadata."""
        self.pipeline.scheduler = getattr(diffusers, sampling["scheduler"])(shift=sampling["shift"])
        options = {"sigmas": sampling["sigmas"][str(steps)], "guidance_scale": sampling["guidance_scale"]}
        options |= {"max_sequence_length": 6, "output_type": "latent", "height": 4, "width": 4}
        if isinstance(self.pipeline, SanaPipeline):
            # It refuses smaller sizes, but uses those of the latents.
            options |= {"height": 32, "width": 32, "clean_caption": False, "use_resolution_binning": False}
        torch.manual_seed(2)
        latents = self.noise().to(self.pipeline.transformer.dtype)
        return self.pipeline(PROMPTS, latents=latents, **options).images


def pack(x):
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(x):
    return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=2, p=2, q=2)


@pytest.fixture
def case(request, tmp_path):
    """One of the families."""
    torch.manual_seed(0)
    pipeline = FAMILIES[request.param]()
    for parameter in pipeline.transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    return Case(pipeline, tmp_path, random(DiffusersTeacher(str(tmp_path), 2, latent_size=4, embedded_guidance=2.0)))


def random(teacher):
    """Return a student whose added weights are random."""
    student = teacher.student().eval()
    for name, parameter in student.named_parameters():
        if name in student.added:
            nn.init.normal_(parameter, std=0.3)
    return student


def sampling_of(file):
    """Return how the metadata of a file say to sample."""
    with safe_open(file, "pt") as content:
        return json.loads(content.metadata()["sampling"])


def error(actual, expected):
    return (actual - expected).abs().max().item()


@pytest.mark.parametrize("case", ["sd3", "flux", "guided flux", "sana"], indirect=True)
def test_a_stock_pipeline_generates_the_samples_of_the_consistency_sampler(case):
    file = case.export()
    base = case.pipe(4, sampling_of(file))
    case.pipeline.load_lora_weights(file)
    assert len(case.pipeline.get_active_adapters()) == 1
    for steps in (1, 2, 4):
        expected = case.sample(steps)
        assert error(case.pipe(steps, sampling_of(file)), expected) < 1e-5 * expected.abs().max()
    assert error(base, expected) > 0.1
    if isinstance(case.pipeline, SanaPipeline):
        with pytest.raises(RuntimeError, match="no bias"):
            case.pipeline.fuse_lora()
    else:
        case.pipeline.fuse_lora()
        assert error(case.pipe(4, sampling_of(file)), expected) < 1e-4


@pytest.mark.parametrize("case", ["sd3", "sana"], indirect=True)
def test_the_time_embedding_itself_may_be_adapted(case):
    """Its matrices and the embedding of s then share a layer."""
    targets = ["to_q", "linear_1", "linear_2"]
    case.student = random(DiffusersTeacher(str(case.folder), lora_rank=2, targets=targets))
    file = case.export()
    case.pipeline.load_lora_weights(file)
    expected = case.sample(2)
    assert error(case.pipe(2, sampling_of(file)), expected) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", ["sd3", "sana"], indirect=True)
def test_a_narrow_file_or_pipeline_only_rounds(case):
    expected = case.sample(2)
    case.pipeline.load_lora_weights(case.export(dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in load_file(case.folder / "lora.safetensors").values()} == {torch.bfloat16}
    sampling = sampling_of(case.folder / "lora.safetensors")
    assert error(case.pipe(2, sampling), expected) < 0.05 * expected.abs().max()
    case.pipeline.unload_lora_weights()
    case.pipeline.to(dtype=torch.bfloat16)
    case.pipeline.load_lora_weights(case.export())
    assert error(case.pipe(2, sampling).float(), expected) < 0.1 * expected.abs().max()


ATTENTION = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}


def comfyui_name(name, kind):
    """Return ComfyUI's name of a layer of diffusers, and its place in a fused layer; None if it is not mapped.

    From `mmdit_to_diffusers` and `flux_to_diffusers` in comfy/utils.py.
    """
    block, _, layer = name.partition(".attn")
    number = block.rpartition(".")[2]
    if layer:
        attention, _, layer = layer.partition(".")
        context = layer.startswith("add_") or layer == "to_add_out"
        if block.startswith("single_transformer_blocks"):
            return f"single_blocks.{number}.linear1", ATTENTION[layer]
        if kind == "sd3":
            inside = f"joint_blocks.{number}.{'context' if context else 'x'}_block.attn{attention}"
        else:
            inside = f"double_blocks.{number}.{'txt' if context else 'img'}_attn"
        return (f"{inside}.qkv", ATTENTION[layer]) if layer in ATTENTION else (f"{inside}.proj", None)
    if name == "time_text_embed.timestep_embedder.linear_2":
        return "t_embedder.mlp.2" if kind == "sd3" else "time_in.out_layer", None
    return None


def as_comfyui(model, kind, file):
    """Apply a file to a transformer of diffusers by the rules of ComfyUI's `load_lora`; return the keys it used.

    For each name of its key map, ComfyUI looks for `transformer.<name in diffusers>` with .lora_A.weight and
    .lora_B.weight, whose product is added to the rows of the fused weight, scaled by alpha / rank or 1 without alpha,
    and .diff_b, which is added to the bias of a whole layer.
    """
    lora, used = load_file(file), set()
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    mapped = {name: comfyui_name(name, kind) for name in linear if comfyui_name(name, kind)}
    fused = {}
    for name, (target, _) in sorted(mapped.items(), key=lambda item: (item[1][0], item[1][1] or 0)):
        fused.setdefault(target, []).append(linear[name])
    weights = {target: torch.cat([layer.weight.data for layer in layers]) for target, layers in fused.items()}
    for name, (target, place) in mapped.items():
        a, b, diff = (f"transformer.{name}.{ending}" for ending in ("lora_A.weight", "lora_B.weight", "diff_b"))
        if b in lora:
            rows = slice(None) if place is None else slice(place * len(lora[b]), (place + 1) * len(lora[b]))
            weights[target][rows] += lora[b] @ lora[a]
            used |= {a, b}
        if diff in lora:
            assert place is None
            linear[name].bias.data += lora[diff]
            used.add(diff)
    for target, layers in fused.items():
        for layer, weight in zip(layers, weights[target].chunk(len(layers)), strict=True):
            layer.weight.data = weight
    return used


@pytest.mark.parametrize("case", ["sd3", "flux", "guided flux"], indirect=True)
def test_comfyui_reads_the_file_as_the_same_network(case, request):
    file = case.export("lora-comfyui")
    base = case.pipe(4, sampling_of(file))
    used = as_comfyui(case.pipeline.transformer, "sd3" if "[sd3]" in request.node.name else "flux", file)
    assert used == load_file(file).keys()
    # FlowMatchLCMScheduler's step is that of ComfyUI's sampler lcm.
    expected = case.sample(4)
    assert error(case.pipe(4, sampling_of(file)), expected) < 1e-4
    assert error(base, expected) > 0.1


@pytest.mark.parametrize("case", ["guided flux"], indirect=True)
def test_metadata_say_what_the_file_belongs_to_and_how_to_sample(case):
    teacher = Reference(str(case.folder), "0123", license="other")
    case.student.record = Record(teacher=teacher, sampling={2: "mix?s1=0.6", 3: "consistency?times=[0.5, 0.8]"})
    with safe_open(case.export(), "pt") as content:
        found = content.metadata()
    assert found["base_model"] == str(case.folder)
    assert found["base_identity"] == DiffusersTeacher(str(case.folder)).identity()
    assert found["base_license"] == "other"
    assert (found["rank"], found["alpha"]) == ("2", "2")
    assert found["library"] == f"decm-lightning {decm_lightning.__version__}"
    sampling = json.loads(found["sampling"])
    assert (sampling["guidance_scale"], sampling["shift"]) == (2.0, 1.0)
    assert {steps: sampling["sigmas"][steps] for steps in "1234"} == {
        "1": [1.0],
        "2": [1.0, 0.3],
        "3": [1.0, 0.5, 0.2],
        "4": [1.0, 0.3, 0.2, 0.1],
    }


def test_a_sampler_with_other_end_times_has_no_sigmas():
    with pytest.raises(ValueError, match=r"s = 1: got 0\.6"):
        sigmas(sampler("mix?s1=0.6"), 2)


@pytest.fixture
def decm(monkeypatch, capsys):
    """A function from arguments to the exit code and the standard error of a command."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["decm", *map(str, argv)])
        code = cli.main()
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("case", ["sd3", "pixart", "sana"], indirect=True)
def test_what_cannot_be_a_lora_file_is_refused_in_one_line(case, decm, tmp_path):
    save(case.student, tmp_path / "student")
    save(DiffusersTeacher(str(case.folder), latent_size=4).network, tmp_path / "teacher")
    save(DiT(8, 1, patch_size=2, width=16, depth=1, heads=2, num_classes=4), tmp_path / "dit")
    student, out = tmp_path / "student", tmp_path / "lora.safetensors"
    kind = type(case.pipeline.transformer).__name__
    faults = [
        (tmp_path / "teacher", out, "lora", "DiffusersNetwork without adapters"),
        (tmp_path / "dit", out, "lora", "DiT without adapters"),
    ]
    if kind.startswith("PixArt"):
        faults += [(student, out, to, f"{kind} predicts noise") for to in ("lora", "lora-comfyui")]
    if kind.startswith("Sana"):
        faults += [(student, out, "lora-comfyui", f"got {kind}")]
    if kind.startswith("SD3"):
        faults += [
            (student, tmp_path / "lora", "lora", f"must end in .safetensors: got {tmp_path / 'lora'}"),
            # The student's own weights.
            (student, student / "model.safetensors", "lora", f"{student / 'model.safetensors'} is not a LoRA file"),
        ]
    for network, target, to, message in faults:
        code, err = decm("export", network, target, "--to", to)
        assert code == 2
        assert message in err.removeprefix("decm: error: ").rstrip("\n")
        assert err.count("\n") == 1
    assert not out.exists()
    if kind.startswith("SD3"):
        assert decm("export", student, out, "--to", "lora-comfyui")[0] == 0
        assert decm("export", student, out, "--to", "lora")[0] == 0
        assert load_file(out).keys() == load_file(case.export()).keys()
        (tmp_path / "transformer").rename(tmp_path / "gone")
        code, err = decm("export", student, out, "--to", "lora")
        assert (code, err.count("\n")) == (2, 1)
        assert str(case.folder) in err


def test_the_route_of_sd35_ends_in_a_process_without_this_package(fit_sd35, decm, tmp_path):
    """The five lines of the documentation generate the image of `decm sample-prompts`, noise included."""
    exact = ["--model.init_args.teacher.init_args.dtype=float32", "--trainer.precision=32-true"]
    fast = ["--model.init_args.optimizer.lr=0.1", "--model.init_args.lr_scheduler.warmup=0"]
    assert fit_sd35("run", 3, *exact, *fast) == 0
    checkpoint = tmp_path / "run/step=3.ckpt"
    assert decm("export", checkpoint, tmp_path / "student.safetensors", "--to", "lora")[0] == 0
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    sampling = ["--sampler", "consistency", "--steps", 4, "--per_prompt", 1, "--seed", 5]
    places = ["--prompts", tmp_path / "prompts.txt", "--vae", tmp_path / "sd3", "--out", tmp_path / "images"]
    assert decm("sample-prompts", checkpoint, *sampling, *places)[0] == 0
    lines = DOCS.read_text().partition("```python\n")[2].partition("```")[0]
    lines = lines.replace("stabilityai/stable-diffusion-3.5-medium", str(tmp_path / "sd3")).replace("512", "8")
    lines = lines.replace("manual_seed(0)", f"manual_seed({generator_of(5, 0).initial_seed()})")
    assert 'pipeline.load_lora_weights("student.safetensors")\n' in lines
    seed, image = lines.splitlines()[-2:]
    base = ["pipeline.unload_lora_weights()", seed, image.replace("cat.png", "base.png")]
    # Imports of this package would fail.
    code = "\n".join(["import sys", "sys.modules['decm_lightning'] = None", lines, *base])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    names = ("images/00000/samples/0000.png", "cat.png", "base.png")
    expected, image, base = (torch.from_numpy(np.array(Image.open(tmp_path / name))).int() for name in names)
    assert error(image, expected) <= 1
    assert error(base, expected) > 20
