"""Exports for diffusers load without this package, and generate the images of `samplers`."""

import json
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file, save_file

from decm_lightning import cli, samplers
from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.export.diffusers import bundle
from decm_lightning.export.diffusers.flow_map_class_pipeline import FlowMapClassPipeline
from decm_lightning.export.diffusers.flow_map_sd3_pipeline import FlowMapSD3Pipeline
from decm_lightning.export.diffusers.flow_map_text_pipeline import FlowMapTextPipeline
from decm_lightning.export.diffusers.writing import write
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.networks import MLP, save
from decm_lightning.networks.record import Record, Reference
from decm_lightning.seeds import generator_of
from tests.autoencoders.tiny import save_kl
from tests.export.exports import dit, sd3_student, text_dit

if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
    pytest.skip("this version of diffusers has no scheduler for flow maps", allow_module_level=True)
CAPTIONS = ["a red fox", "two cats"]
OWN = {"class": FlowMapClassPipeline, "text": FlowMapTextPipeline, "sd3": FlowMapSD3Pipeline}
CONDITIONS = {"class": [1, 4], "text": CAPTIONS, "sd3": CAPTIONS}
SPECS = [
    ("mix", 1),
    ("mix", 2),
    ("mix?s1=0.6", 4),
    ("euler", 5),
    ("consistency", 3),
    ("flow_map", 3),
    ("mix?times=[0.3,0.9]", 3),
]
WITHOUT_PACKAGE = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("decm_lightning", "einops", "jaxtyping", "lightning"):
            raise ModuleNotFoundError(f"blocked {name}")


sys.meta_path.insert(0, Blocked())
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

noise, outputs = load_file("noise.safetensors"), {}
for kind, condition in CONDITIONS.items():
    pipeline = DiffusionPipeline.from_pretrained(kind, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    for sampler, steps in SPECS:
        outputs[f"{kind} {sampler} {steps}"] = pipeline(
            condition, steps, sampler, latents=noise[kind], generator=pipeline.generators(3, range(2)),
            output_type="latent",
        ).images
save_file(outputs, "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The networks and the folder with their exports."""
    folder = tmp_path_factory.mktemp("exported")
    networks = {
        "class": dit(),
        "text": text_dit(folder / "encoder"),
        "sd3": sd3_student(folder / "base"),
    }
    for kind, network in networks.items():
        write(network, folder / kind, torch.float32)
    return SimpleNamespace(networks=networks, folder=folder)


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """Keep the copies of remote code in a temporary folder."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def loaded(folder, **options):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    assert type(pipeline).__module__.startswith("diffusers_modules.local.")
    assert type(pipeline.transformer).__module__.startswith("diffusers_modules.local.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(network, rows=2):
    return torch.randn(rows, *network.sample_shape, generator=torch.Generator().manual_seed(5))


def sampled(network, condition, sampler, steps, seed=3):
    """The samples of this package."""
    condition = torch.tensor(condition) if isinstance(condition[0], int) else network.caption_encoder()(condition)
    x_0 = noise(network)
    generators = [generator_of(seed, row) for row in range(len(x_0))]
    return samplers.sampler(sampler)(network, x_0, condition, steps, generator=generators)


def test_folders_run_without_this_package(exported):
    save_file(
        {kind: noise(network) for kind, network in exported.networks.items()}, exported.folder / "noise.safetensors"
    )
    script = f"SPECS = {SPECS}\nCONDITIONS = {CONDITIONS}\n{WITHOUT_PACKAGE}"
    environment = {"HF_MODULES_CACHE": str(exported.folder / "modules"), "HOME": str(exported.folder)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=exported.folder, capture_output=True, text=True, check=False,
        env=environment | {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = load_file(exported.folder / "outputs.safetensors")
    for kind, network in exported.networks.items():
        for sampler, steps in SPECS:
            expected = sampled(network, CONDITIONS[kind], sampler, steps)
            found = outputs[f"{kind} {sampler} {steps}"]
            assert expected.abs().mean() > 0.1
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=f"{kind} {sampler} {steps}")


@pytest.mark.parametrize(
    "options",
    [{}, {"end_time": False}, {"norm": "layer", "mlp": "gelu", "rotary": False, "qk_norm": False, "learn_sigma": True},
     {"shift": False, "in_channels": 3, "patch_size": 4, "pixel_skip": True}],
)  # fmt: skip
def test_the_copied_dit_is_ours(options, tmp_path):
    network = dit(**options)
    write(network, tmp_path / "out", torch.float32)
    transformer = loaded(tmp_path / "out").transformer
    x_t, t, s, labels = noise(network, 3), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([1.0, 0.3, 1.0]), torch.arange(3)
    found = transformer(x_t, 1000 * (1 - t), 1000 * (1 - s), labels).sample
    with torch.no_grad():
        torch.testing.assert_close(-found, network(x_t, t, s, labels), atol=1e-6, rtol=0)
    assert transformer.config.depth == 2


@pytest.mark.parametrize("options", [{}, {"end_time": False, "features": 0, "patch_size": 2}])
def test_the_copied_text_dit_is_ours(options, tmp_path):
    network = text_dit(tmp_path / "encoder", **options)
    write(network, tmp_path / "out", torch.float32)
    transformer = loaded(tmp_path / "out").transformer
    x_t, t, s = noise(network, 3), torch.tensor([0.0, 0.3, 0.9]), torch.tensor([1.0, 0.3, 1.0])
    captions = network.example(3)[3]
    captions = captions._replace(tokens=torch.randn(3, 2, 16), mask=torch.tensor([[1, 1], [1, 0], [0, 0]]).bool())
    found = transformer(x_t, 1000 * (1 - t), 1000 * (1 - s), captions.tokens, captions.mask.long()).sample
    with torch.no_grad():
        torch.testing.assert_close(-found, network(x_t, t, s, captions), atol=1e-6, rtol=0)


def test_images_are_those_of_generate(exported):
    pipeline, network = loaded(exported.folder / "class"), exported.networks["class"]
    images = pipeline([1, 2, 3], generator=pipeline.generators(7, [0, 1, 2])).images
    assert [image.tobytes() for image in images] == [i.tobytes() for i in network.generate([1, 2, 3], seed=7)]
    assert images[0].size == (8, 8)


@pytest.mark.parametrize("kind", ["class", "text", "sd3"])
def test_arguments_of_a_call(exported, kind):
    pipeline, network = loaded(exported.folder / kind), exported.networks[kind]
    first = CONDITIONS[kind][0]
    x_0, seen = noise(network), []

    def callback(called, step, timestep, tensors):
        assert called is pipeline
        seen.append((step, round(float(timestep)), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    options = {"latents": x_0, "num_images_per_prompt": 2, "num_inference_steps": 3}
    outputs = {kind: pipeline(first, **options, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    size = outputs["pil"][0].size[0]
    assert outputs["np"].shape == (2, size, size, outputs["pt"].shape[1])
    assert [to_pil(image).tobytes() for image in to_uint8(2 * outputs["pt"] - 1)] == [
        image.tobytes() for image in outputs["pil"]
    ]
    rows = sampled(network, [first, first], "mix", 3)
    torch.testing.assert_close(outputs["latent"], rows, atol=1e-5, rtol=0)
    (zeros,) = pipeline(first, **options, output_type="latent", callback_on_step_end=callback, return_dict=False)
    assert seen == [(0, 1000, {"latents"}), (1, 250, {"latents"}), (2, 125, {"latents"})]
    assert not zeros.any()
    with pytest.raises(ValueError, match="noise"):
        pipeline(first, **options, callback_on_step_end_tensor_inputs=["noise"])
    with pytest.raises(ValueError, match="heun"):
        pipeline(first, sampler="heun")
    with pytest.raises(ValueError, match="got 0"):
        pipeline(first, num_inference_steps=0)
    with pytest.raises(ValueError, match=r"\(1, .*\(2, "):
        pipeline(first, latents=x_0)


def test_sd3_generates_other_sizes(exported):
    pipeline = loaded(exported.folder / "sd3")
    assert [image.size for image in pipeline(CAPTIONS, height=16, width=4).images] == [(4, 16)] * 2
    with pytest.raises(ValueError, match="4: got 10"):
        pipeline(CAPTIONS, height=10)


def test_progress_bar_counts_the_steps(exported, capsys):
    pipeline = loaded(exported.folder / "class")
    pipeline.set_progress_bar_config(disable=False)
    pipeline([1], num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


def test_schedulers_of_diffusers_can_replace_ours(exported):
    pipeline, network = loaded(exported.folder / "class"), exported.networks["class"]
    options = {"latents": noise(network), "output_type": "latent"}
    pipeline.scheduler = FlowMatchLCMScheduler(shift=1.0)
    found = pipeline([1, 4], 3, **options, generator=pipeline.generators(3, [0, 1])).images
    torch.testing.assert_close(found, sampled(network, [1, 4], "consistency", 3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="mix"):
        pipeline([1, 4], 3, "mix", **options)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    found = pipeline([1, 4], 4, "mix", **options).images
    torch.testing.assert_close(found, sampled(network, [1, 4], "mix", 4), atol=1e-5, rtol=0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = pipeline([1, 4], 4, "euler", **options).images
    torch.testing.assert_close(found, sampled(network, [1, 4], "euler?shift=3", 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["class", "text", "sd3"])
def test_a_saved_pipeline_keeps_code_and_weights(exported, kind, tmp_path):
    first = loaded(exported.folder / kind)
    plain, first.transformer = first.transformer, torch.compile(first.transformer)
    first.save_pretrained(tmp_path / "again")
    first.transformer = plain
    second = loaded(tmp_path / "again")
    for name, tensor in first.transformer.state_dict().items():
        assert torch.equal(tensor, second.transformer.state_dict()[name]), name
    options = {"latents": noise(exported.networks[kind]), "output_type": "latent"}
    images = [pipeline(CONDITIONS[kind], **options).images for pipeline in (first, second)]
    assert torch.equal(*images)
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    module = index["_class_name"][0]
    assert (tmp_path / f"again/{module}.py").read_text() == (exported.folder / kind / f"{module}.py").read_text()


@pytest.mark.parametrize("kind", OWN)
def test_the_package_loads_its_exports_without_remote_code(exported, kind, tmp_path):
    """Also after it saved them again, and the folder it writes is again complete."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(exported.folder / kind)
    own = OWN[kind].from_pretrained(exported.folder / kind)
    assert type(own.transformer).__module__.startswith("decm_lightning.export.diffusers.")
    own.save_pretrained(tmp_path / "again")
    options = {"latents": noise(exported.networks[kind]), "output_type": "latent"}
    expected = own(CONDITIONS[kind], **options).images
    for pipeline in (loaded(tmp_path / "again"), OWN[kind].from_pretrained(tmp_path / "again")):
        assert torch.equal(pipeline(CONDITIONS[kind], **options).images, expected)


@pytest.mark.parametrize("kind", ["class", "text", "sd3"])
def test_the_transformer_is_a_model_of_diffusers(exported, kind, tmp_path):
    model = loaded(exported.folder / kind).transformer
    inputs = {"class": {"class_labels": torch.tensor([1, 4])}}.get(
        kind, {"encoder_hidden_states": torch.randn(2, 3, 16)}
    )
    if kind == "sd3":
        inputs["pooled_projections"] = torch.randn(2, 16)
    x_t, timesteps = noise(exported.networks[kind]), (torch.tensor(800.0), torch.tensor([300.0, 0.0]))
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    expected = model(x_t, *timesteps, **inputs, return_dict=False)[0]
    assert torch.equal(again(x_t, *timesteps, **inputs).sample, expected)
    gradients = {}
    for checkpointing in (False, True):
        model.zero_grad()
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        assert model.is_gradient_checkpointing is checkpointing
        model.train()(x_t, *timesteps, **inputs).sample.square().mean().backward()
        named = model.named_parameters()
        gradients[checkpointing] = {name: part.grad.clone() for name, part in named if part.grad is not None}
    assert len(gradients[True]) > 20
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradient, gradients[False][name])
    half = again.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    inputs = {name: part.bfloat16() if part.is_floating_point() else part for name, part in inputs.items()}
    rounded = half(x_t.bfloat16(), *timesteps, **inputs).sample
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - expected).norm() / expected.norm() < 0.05


def test_narrow_weights_are_stored_and_run(tmp_path):
    network = dit()
    expected = sampled(network, [1, 4], "mix", 2)
    write(network, tmp_path / "out", torch.bfloat16)
    stored = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    narrow = {"torch_dtype": torch.bfloat16}
    for options in ({}, narrow, narrow | {"low_cpu_mem_usage": False}):
        pipeline = loaded(tmp_path / "out", **options)
        assert {part.dtype for part in pipeline.transformer.parameters()} == {options.get("torch_dtype", torch.float32)}
        found = pipeline([1, 4], latents=noise(network), output_type="latent").images
        assert (found - expected).norm() / expected.norm() < 0.05


def test_latents_are_decoded_with_their_statistics(tmp_path):
    save_kl(tmp_path / "vae")
    network = dit(in_channels=2, input_size=4)
    folder = tmp_path / "latents"
    folder.mkdir()
    mean, std = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1), torch.tensor([2.0, 3.0]).view(1, 2, 1, 1)
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    with pytest.raises(ValueError, match=r"2 channels.*--vae.*--latents"):
        write(network, tmp_path / "out", torch.float32)
    with pytest.raises(ValueError, match="--latents"):
        write(network, tmp_path / "out", torch.float32, vae=str(tmp_path / "vae"))
    write(network, tmp_path / "out", torch.float32, vae=str(tmp_path / "vae"), latents=str(folder))
    pipeline = loaded(tmp_path / "out")
    found = pipeline([1, 4], latents=noise(network), output_type="pt").images
    z = sampled(network, [1, 4], "mix", 2) * std + mean
    with torch.no_grad():
        images = pipeline.vae.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(found, images / 2 + 0.5, atol=1e-5, rtol=0)
    assert found.shape == (2, 3, 8, 8)


def test_the_record_gives_vae_names_and_samplers(tmp_path):
    vae = save_kl(tmp_path / "vae")
    identity = load_autoencoder(vae).identity
    network = dit(in_channels=2, input_size=4)
    scaling = {"mean": [0.5, -1.0], "std": [2.0, 3.0], "multiplier": 0.5, "has_statistics": True}
    network.record = Record(
        class_names=("tench, Tinca tinca", "dog", "cat", "owl"), vae=Reference(str(vae), identity), latents=scaling,
        sampling={1: "mix", 2: "mix?s1=0.6", 4: "consistency"},
    )  # fmt: skip
    write(network, tmp_path / "out", torch.float32)
    pipeline = loaded(tmp_path / "out")
    assert pipeline.get_label_ids(["Tinca tinca", "cat", 3]) == [0, 2, 3]
    with pytest.raises(ValueError, match=r"dog.*'fish'"):
        pipeline("fish")
    with pytest.raises(ValueError, match="got 5"):
        pipeline(5)
    options = {"latents": noise(network), "output_type": "latent", "generator": pipeline.generators(3, [0, 1])}
    for steps, sampler in ((None, "mix?s1=0.6"), (4, "consistency"), (3, "mix")):
        options["generator"] = pipeline.generators(3, [0, 1])
        expected = sampled(network, [1, 2], sampler, steps or 2)
        torch.testing.assert_close(pipeline(["dog", "cat"], steps, **options).images, expected, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "out/vae/config.json").read_text())
    assert [config[name] for name in ("latents_mean", "latents_std", "scaling_factor")] == [*scaling.values()][:3]
    other = save_kl(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=f"{identity}.*other"):
        write(network, tmp_path / "out", torch.float32, vae=str(other))


def test_a_teacher_is_a_pipeline_of_euler(tmp_path):
    network = dit(end_time=False)
    write(network, tmp_path / "out", torch.float32)
    pipeline = loaded(tmp_path / "out")
    found = pipeline([1, 4], latents=noise(network), output_type="latent").images
    torch.testing.assert_close(found, sampled(network, [1, 4], "euler", 50), atol=1e-5, rtol=0)
    network = dit(end_time=False, prediction="noise")
    with pytest.raises(ValueError, match="noise"):
        write(network, tmp_path / "other", torch.float32)


def test_what_cannot_be_exported_is_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="MLP"):
        write(MLP(2), tmp_path / "out", torch.float32)
    network = text_dit(tmp_path / "encoder", text_encoder=None)
    with pytest.raises(ValueError, match="--encoder"):
        write(network, tmp_path / "out", torch.float32)
    network = text_dit(tmp_path / "encoder", caption_width=12)
    with pytest.raises(ValueError, match=r"12.*16"):
        write(network, tmp_path / "out", torch.float32)
    network.record = Record(text_encoder=Reference(str(tmp_path / "encoder"), "0123"))
    with pytest.raises(ValueError, match="0123"):
        write(network, tmp_path / "out", torch.float32)
    student = exported.networks["sd3"]
    teacher = type(student)(student.config["model"])
    with pytest.raises(ValueError, match="not a student"):
        write(teacher, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_as_a_whole(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(dit(), out, torch.float32)
    card = {"README.md": "a card", "samples.png": "the images of the card"}
    for name, text in card.items():
        (out / name).write_text(text)
    network = dit(depth=1)
    write(network, out, torch.float32)
    assert {name: (out / name).read_text() for name in card} == card
    assert loaded(out).transformer.config.depth == 1
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlowMapClassPipeline, "save_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(dit(), out, torch.float32)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "modules"] == ["out"]
    assert len({file.stat().st_mode for file in out.rglob("*") if file.is_file()}) == 1
    out.rename(tmp_path / "out.previous")
    with pytest.raises(KeyboardInterrupt):
        write(dit(), out, torch.float32)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("occupant", ["mine.txt", "model_index.json", "transformer/config.json"])
def test_an_occupied_folder_is_refused(occupant, tmp_path):
    file = tmp_path / "out" / occupant
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(ValueError, match=rf"out contains {occupant.partition('/')[0]}"):
        write(dit(), tmp_path / "out", torch.float32)
    assert file.exists()
    with pytest.raises(NotADirectoryError, match=r"mine\.txt|\.json"):
        write(dit(), file, torch.float32)


def test_the_command(tmp_path, monkeypatch, capsys):
    save(dit(), tmp_path / "student")
    argv = ["decm", "export", str(tmp_path / "student"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, "--to", "diffusers"])
    assert cli.main() == 0
    assert "out/model_index.json" in capsys.readouterr().out
    for more, fault in ((["--vae", "x"], "--vae"), (["--to", "diffusers"], "mine.txt")):
        (tmp_path / "out/mine.txt").touch()
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        assert cli.main() == 2
        error = capsys.readouterr().err
        assert fault in error
        assert error.count("\n") == 1


def test_bundles_refuse_two_meanings_of_a_name(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("from decm_lightning.conditions import select\n\nCondition = 3\nfound = (select, Condition)\n")
    with pytest.raises(ValueError, match="Condition"):
        bundle.source(str(file))
    file.write_text("for x in range(3):\n    print(x)\n")
    with pytest.raises(ValueError, match="line 1"):
        bundle.source(str(file))
