"""Latents and captions for text-to-image teachers, with tiny pipelines of the real classes; configs/sd35.yaml."""

import colorsys
import io
import itertools
import logging
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from decm_lightning import cli
from decm_lightning.cli.trainer import build
from decm_lightning.data import TextImagePairs
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.teachers import DiffusersPrompts, DiffusersTeacher, diffusers_prompts
from tests.autoencoders.tiny import save_kl
from tests.teachers.pipelines import flux, pixart, sana, sd3

CONFIG = Path(__file__).parents[2] / "configs/sd35.yaml"
TEXTS = [first + second for first, second in itertools.product(("a red ", "my ", "no "), ("cat", "dog", "b", "snake"))]
FAMILIES = {"sd3": sd3, "flux": flux, "sana": sana, "pixart": pixart}


def save(pipeline, folder):
    """Write a pipeline and return its folder."""
    pipeline.save_pretrained(folder)
    return str(folder)


def color(row):
    """Return the color of image number `row`."""
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(row / len(TEXTS), 1, 1))


@pytest.fixture
def source(tmp_path):
    """A tar of captioned images, each of a single color."""
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for row, text in enumerate(TEXTS):
            image = io.BytesIO()
            Image.new("RGB", (8, 8), color(row)).save(image, "png")
            for ending, content in (("png", image.getvalue()), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{row:02d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(tmp_path / "pairs.tar")


class Recorder(L.LightningModule):
    """Store the batches that a network would receive."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)

    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("latents", ["cached", "on_the_fly"])
def test_latents_and_captions_arrive_in_their_pairs(latents, source, tmp_path):
    """Pairs are shuffled and loaded by Lightning in a worker process, each once in each of two epochs."""
    torch.manual_seed(0)
    folder = save(sd3(levels=2), tmp_path / "sd3")
    prompts = DiffusersPrompts(folder, max_tokens=6)
    fly = {"captions": "on_the_fly", "vae": folder, "latents": latents}
    data = TextImagePairs(source, 8, prompts, str(tmp_path), **fly, batch_size=4, held_out=0, num_workers=1)
    recorder = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_epochs=2, reload_dataloaders_every_n_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet
    )
    trainer.fit(recorder, datamodule=data)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    images = torch.tensor([color(row) for row in range(len(TEXTS))])[:, :, None, None].expand(-1, -1, 8, 8)
    with torch.no_grad():
        latents = (vae.encode(images / 127.5 - 1).latent_dist.mode() - 0.1) * vae.config.scaling_factor
    captions = prompts(TEXTS)
    orders = []
    for batch in recorder.batches:
        apart = torch.cdist(batch.x_1.flatten(1), latents.flatten(1))
        nearest, rows = apart.min(1)
        # Cached captions are in half precision.
        assert nearest.max() < (1e-4 if latents == "on_the_fly" else 5e-3) < apart.sort(1).values[:, 1].min()
        for found, expected in zip(batch.condition, captions, strict=True):
            assert found is expected is None or torch.allclose(found, expected[rows], rtol=0, atol=1e-5)
        orders.append(rows.tolist())
    first, second = (list(itertools.chain(*epoch)) for epoch in (orders[:3], orders[3:]))
    assert sorted(first) == sorted(second) == list(range(len(TEXTS)))
    assert first != second
    tokens = captions.tokens.flatten(1)
    assert torch.cdist(tokens, tokens).add(torch.eye(len(TEXTS))).min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_from_the_cache_are_those_on_the_fly(family, source, tmp_path):
    """They agree up to half precision, with mask or pooled vector and the length of the teacher's empty prompt."""
    torch.manual_seed(0)
    folder = save(FAMILIES[family](), tmp_path / family)
    found = {}
    for captions in ("cached", "on_the_fly"):
        data = TextImagePairs(
            source, 4, DiffusersPrompts(folder, max_tokens=20), str(tmp_path), captions, folder, held_out=0.4
        )
        data.prepare_data()
        data.setup("fit")
        found[captions] = data.condition(range(3))
    cached, live = found.values()
    assert (cached.mask is None) == (live.mask is None)
    assert (cached.pooled is None) == (live.pooled is None)
    assert cached.tokens.shape == live.tokens.shape
    there = torch.ones(live.tokens.shape[:2], dtype=torch.bool) if live.mask is None else live.mask
    torch.testing.assert_close(cached.tokens[there], live.tokens[there], rtol=2e-3, atol=2e-3)
    if live.mask is not None:
        assert torch.equal(cached.mask, live.mask)
        assert not live.mask.any(0).all()
    if live.pooled is not None:
        torch.testing.assert_close(cached.pooled, live.pooled, rtol=2e-3, atol=2e-3)
    null = DiffusersTeacher(folder, lora_rank=2, latent_size=4, max_tokens=20).null(cached)
    assert null.tokens.shape == cached.tokens.shape
    # Captions that are encoded on the fly are not written.
    assert len(list(tmp_path.glob("captions-*.safetensors"))) == 1


def test_encoders_are_known_by_their_files_and_settings(tmp_path):
    torch.manual_seed(0)
    folder = save(pixart(), tmp_path / "one")
    known = DiffusersPrompts(folder, max_tokens=6).identity
    assert DiffusersPrompts(folder, max_tokens=6).identity == known
    others = [DiffusersPrompts(folder, max_tokens=7), DiffusersPrompts(folder, max_tokens=6, dtype="bfloat16")]
    others += [DiffusersPrompts(folder), DiffusersPrompts(save(pixart(), tmp_path / "two"), max_tokens=6)]
    assert len({known, *(other.identity for other in others)}) == 5


def test_captions_that_are_cut_are_counted_and_not_repeated(tmp_path, caplog, monkeypatch):
    """The log lines of the pipeline at every step are suppressed."""
    torch.manual_seed(0)
    prompts = DiffusersPrompts(save(sd3(), tmp_path / "sd3"), max_tokens=6)
    # There is one token for each letter and space, one before the first word, and one at the end.
    assert prompts.measured(["a cat", "abc", "abcde"]) == [7, 5, 7]
    assert "2 of 3 captions were truncated to 6 tokens" in caplog.text
    prompts([""])
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.clear()
    prompts(["abcdefghijklmnop"])
    assert not caplog.records
    monkeypatch.setattr(diffusers_prompts, "_quiet", nullcontext)
    prompts(["abcdefghijklmnop"])
    assert "was truncated" in caplog.text


@pytest.fixture
def decm(source, tmp_path, monkeypatch):
    """A function that runs `decm fit` with configs/sd35.yaml on a tiny pipeline, and returns the exit code."""
    torch.manual_seed(0)
    pipeline = sd3(levels=2, layers=2)
    for parameter in pipeline.transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder = save(pipeline, tmp_path / "sd3")
    teacher, data = "--model.init_args.teacher.init_args", "--data.init_args"
    base = ["--config", str(CONFIG), f"{teacher}.model={folder}", f"{teacher}.lora_rank=2", f"{teacher}.latent_size=4"]
    base += [f"{teacher}.max_tokens=6", f"{data}.encoder.init_args.model={folder}"]
    base += [f"{data}.encoder.init_args.max_tokens=6", f"{data}.source={source}", f"{data}.size=8"]
    base += [f"{data}.vae={folder}", f"{data}.batch_size=3", f"{data}.held_out=0.3", f"{data}.num_workers=0"]
    base += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    monkeypatch.chdir(tmp_path)
    # Lightning's log handler still refers to the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def callbacks(into):
        found = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks"]
        kept = [callback for callback in found if "LearningRateMonitor" not in callback["class_path"]]
        saving = next(callback for callback in kept if "ModelCheckpoint" in callback["class_path"])
        saving["init_args"] |= {"every_n_train_steps": 1, "save_top_k": -1, "dirpath": str(tmp_path / into)}
        return yaml.safe_dump(kept, default_flow_style=True, width=10**6).strip()

    def run(into, steps, *argv):
        saving = [f"--trainer.callbacks={callbacks(into)}", f"--trainer.max_steps={steps}"]
        monkeypatch.setattr(sys, "argv", ["decm", "fit", *base, *saving, *argv])
        return cli.main()

    run.base = base
    return run


def test_the_config_trains_is_resumed_and_draws(decm, tmp_path, monkeypatch):
    """Two steps and one more are bit-identical to three, and the generated samples are images."""
    # The warm-up in the config is a fraction of the length of the run.
    constant = ("--model.init_args.lr_scheduler.warmup=0", "--model.init_args.objective.init_args.r_decay_steps=20000")
    assert decm("whole", 3, *constant) == 0
    assert decm("half", 2, *constant) == 0
    assert decm("resumed", 3, *constant, f"--ckpt_path={tmp_path / 'half' / 'step=2.ckpt'}") == 0
    states = {
        name: torch.load(tmp_path / name, weights_only=True)["state_dict"]
        for name in ("whole/step=2.ckpt", "whole/step=3.ckpt", "resumed/step=3.ckpt")
    }
    two, three, resumed = states.values()
    assert three.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in three.items())
    assert any(not torch.equal(value, two[name]) for name, value in three.items() if "network" in name)

    built = build(*decm.base)
    built.datamodule.prepare_data()
    built.datamodule.setup("fit")
    images = SampleGenerator(built.model, built.datamodule).generate(SamplingSpec.parse("student/euler/2"), range(2))
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8


BAD = {
    "channels": (["{data}.vae={kl}"], "the pairs are latents of {kl} (2, 4, 4) and the network's (4, 4, 4): "),
    "size": (["{data}.size=16"], "the pairs are latents of {folder} (4, 8, 8) and the network's (4, 4, 4): "),
    "odd size": (["{data}.size=9"], "size must be a multiple of 2, the VAE's downsampling: got 9"),
    "no VAE": (["{data}.vae=nowhere/at/all"], "VAE nowhere/at/all not found, "),
    "pixels": (["{data}.vae=null"], "the pairs are images (3, 8, 8) and the network's (4, 4, 4): "),
    "length": (
        ["{data}.encoder.init_args.max_tokens=4"],
        "the empty prompt and the captions must have the same number of tokens: got 15 and 13, ",
    ),
    "no encoders": (
        ["{data}.encoder.init_args.model={kl}"],
        "{kl} has no text encoders: ",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_the_teacher_is_said_in_one_line(kind, decm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"data": "--data.init_args", "kl": str(save_kl(tmp_path / "kl")), "folder": str(tmp_path / "sd3")}
    arguments, message = BAD[kind]
    assert decm("run", 1, *(argument.format(**names) for argument in arguments)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("decm: error: ")
    assert message.format(**names) in last
