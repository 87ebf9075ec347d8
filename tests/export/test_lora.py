"""LoRA files of students in the stock pipelines of diffusers, on tiny random models of the real classes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from safetensors.torch import load_file, safe_open

import decm_lightning
from decm_lightning import cli
from decm_lightning.export.lora import sigmas
from decm_lightning.networks import DiT, save
from decm_lightning.networks.record import Record, Reference
from decm_lightning.samplers import sampler
from decm_lightning.seeds import generator_of
from decm_lightning.teachers import DiffusersTeacher
from tests.export.lora_cases import case, error, random, sampling_of
from tests.teachers.test_pairs_for_teachers import decm as fit_sd35
from tests.teachers.test_pairs_for_teachers import source

__all__ = ["case", "fit_sd35", "source"]
DOCS = Path(__file__).parents[2] / "docs/export-lora.md"


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


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_a_file_is_replaced_and_a_missing_base_is_said_in_one_line(case, decm, tmp_path):
    save(case.student, tmp_path / "student")
    export = ("export", tmp_path / "student", tmp_path / "lora.safetensors", "--to")
    assert decm(*export, "lora-comfyui")[0] == 0
    assert decm(*export, "lora")[0] == 0
    assert load_file(tmp_path / "lora.safetensors").keys() == load_file(case.export()).keys()
    (tmp_path / "transformer").rename(tmp_path / "gone")
    code, err = decm(*export, "lora")
    assert (code, err.count("\n")) == (2, 1)
    assert str(case.folder) in err


def test_the_route_of_sd35_ends_in_a_process_without_this_package(fit_sd35, decm, tmp_path):
    """The five lines of the documentation generate the image of `decm sample-prompts`, noise included."""
    exact = ["--model.init_args.teacher.init_args.dtype=float32", "--trainer.precision=32-true"]
    # The student is sampled with the recorded encoder, which must be that of the stock pipeline.
    exact.append("--model.init_args.teacher.init_args.max_tokens=256")
    exact += [f"--data.init_args.encoder.init_args.{value}" for value in ("dtype=float32", "max_tokens=256")]
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
    assert 'pipeline.load_lora_weights(".", weight_name="student.safetensors")\n' in lines
    seed, image = lines.splitlines()[-2:]
    base = ["pipeline.unload_lora_weights()", seed, image.replace("cat.png", "base.png")]
    # Imports of this package would fail.
    code = "\n".join(["import sys", "sys.modules['decm_lightning'] = None", lines, *base])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    names = ("images/00000/samples/0000.png", "cat.png", "base.png")
    expected, image, base = (torch.from_numpy(np.array(Image.open(tmp_path / name))).int() for name in names)
    assert error(image, expected) <= 1
    assert error(base, expected) > 20
