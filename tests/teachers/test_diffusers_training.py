"""Distill SD3 with LoRA end to end, on a tiny random instance loaded from a folder."""

from functools import partial

import lightning as L
import pytest
import torch
from diffusers import SD3Transformer2DModel
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from decm_lightning import Distiller, load, losses
from decm_lightning.guidance import Guidance
from decm_lightning.networks import save
from decm_lightning.samplers import euler
from decm_lightning.teachers import DiffusersTeacher
from decm_lightning.training import WarmupCosine
from decm_lightning.types import Batch, Captions

ROWS = 32


@pytest.fixture
def folder(tmp_path):
    """A tiny SD3 with nonzero weights."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4, "patch_size": 2}
    widths = {"joint_attention_dim": 6, "pooled_projection_dim": 7, "caption_projection_dim": 16}
    extras = {"in_channels": 4, "out_channels": 4, "pos_embed_max_size": 6, "qk_norm": "rms_norm"}
    model = SD3Transformer2DModel(**sizes, **widths, **extras)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def captions(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return Captions(torch.randn(rows, 3, 6, generator=generator), None, torch.randn(rows, 7, generator=generator))


class Pairs(L.LightningDataModule):
    """Random latents with random captions."""

    def train_dataloader(self):
        x_1 = torch.randn(ROWS, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        texts = captions(ROWS, 2)

        def collate(rows):
            return Batch(x_1[rows], Captions(texts.tokens[rows], None, texts.pooled[rows]))

        return DataLoader(range(ROWS), batch_size=8, collate_fn=collate)


def make(folder, **options):
    """A distiller of a teacher with a given empty prompt."""
    L.seed_everything(0, verbose=False)
    teacher = DiffusersTeacher(str(folder), lora_rank=2)
    teacher.empty = captions(1, 3)
    return Distiller(
        teacher,
        objective=losses.paper(r_decay_steps=10),
        guidance=Guidance(1.75, limit=1.0),
        optimizer=lambda p: torch.optim.AdamW(p, 5e-3),
        # The default schedule depends on the length of the run, which is extended here.
        lr_scheduler=partial(WarmupCosine, warmup=0.0, floor=1.0),
        ema_decay=0.9,
        **options,
    )


def train(module, folder, steps, checkpoint=None):
    """Train, and return the checkpoint of the last step."""
    saving = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[saving], **quiet)
    trainer.fit(module, Pairs(), ckpt_path=checkpoint)
    return folder / f"step={steps}.ckpt"


def test_run_is_resumed_loaded_and_sampled(folder, tmp_path):
    """It is bit-identical to an uninterrupted run; only the added parameters are trained, averaged and saved."""
    module = make(folder)
    v = module.teacher(torch.ones(2, 4, 4, 4), torch.tensor([0.1, 0.6]), captions(2, 4))
    whole = train(module, tmp_path / "whole", 8)
    added = module.student.added
    assert {n for n, p in module.student.named_parameters() if p.requires_grad} == added
    again = module.teacher(torch.ones(2, 4, 4, 4), torch.tensor([0.1, 0.6]), captions(2, 4))
    torch.testing.assert_close(again, v, rtol=0, atol=1e-6)
    state = torch.load(whole, weights_only=True)["state_dict"]
    assert state.keys() == {f"{which}.{name}" for which in ("network", "average") for name in added}
    train(make(folder), tmp_path / "half", 4)
    resumed = train(make(folder), tmp_path / "resumed", 8, tmp_path / "half" / "step=4.ckpt")
    for name, value in torch.load(resumed, weights_only=True)["state_dict"].items():
        assert torch.equal(value, state[name]), name

    inputs = (torch.randn(3, 4, 4, 4), torch.tensor([0.0, 0.3, 0.8]), torch.tensor([1.0, 0.9, 0.8]), captions(3, 5))
    loaded = load(whole)
    save(loaded, tmp_path / "student")
    with torch.no_grad():
        u = module.average(*inputs)
        for network in (loaded, load(tmp_path / "student")):
            assert all(torch.equal(value, state[f"average.{name}"]) for name, value in network.state_dict().items())
            # Kernels may round differently depending on the memory layout of their inputs.
            torch.testing.assert_close(network(*inputs), u, rtol=0, atol=1e-6)
        assert (module.student(*inputs) - u).abs().max() > 1e-3
    noise = torch.randn(3, 4, 4, 4)
    for model in ("student", "teacher"):
        with torch.no_grad():
            samples = euler(module.models()[model], noise, captions(3, 5), 2)
        assert samples.shape == noise.shape
        assert samples.isfinite().all()


def test_average_moves_by_its_formula(folder, tmp_path):
    """The folder only contains the added parameters."""
    module = make(folder)
    names = sorted(module.student.added)
    expected = {name: module.average.get_parameter(name).clone() for name in names}

    class Reference(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            decay = min(0.9, (1 + trainer.global_step) / (10 + trainer.global_step))
            for name in names:
                expected[name].lerp_(pl_module.student.get_parameter(name).detach(), 1 - decay)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=3, callbacks=[Reference()], enable_checkpointing=False, **quiet)
    trainer.fit(module, Pairs())
    for name in names:
        torch.testing.assert_close(module.average.get_parameter(name), expected[name], rtol=1e-5, atol=1e-6)
    base = {name: p for name, p in module.student.named_parameters() if name not in module.student.added}
    assert all(module.average.get_parameter(name) is p for name, p in base.items())


def test_checkpointed_run_is_the_plain_one(folder, tmp_path):
    plain = torch.load(train(make(folder), tmp_path / "plain", 4), weights_only=True)["state_dict"]
    module = make(folder, gradient_checkpointing=True)
    assert module.student.model.gradient_checkpointing
    other = torch.load(train(module, tmp_path / "other", 4), weights_only=True)["state_dict"]
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_another_base_is_refused(folder, tmp_path):
    """A checkpoint needs the model that it was trained on."""
    checkpoint = train(make(folder), tmp_path / "run", 4)
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"in the checkpoint, .* in the config"):
        train(make(moved), tmp_path / "again", 8, checkpoint)
    with pytest.raises(OSError, match="sd3"):
        load(checkpoint)


def test_sharding_is_refused(folder):
    """The three networks share weights, but each would shard them separately."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        module = make(folder)
        module._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        with pytest.raises(ValueError, match=r"a student with LoRA .* --trainer.strategy ddp"):
            module.configure_model()
    finally:
        torch.distributed.destroy_process_group()


def test_config_names_it(folder, fit, capsys):
    """The command line needs class path and folder; data that do not match the latents are reported in one line."""
    assert fit("DiffusersTeacher", {"model": str(folder), "lora_rank": "2"}) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("decm: error: the data's samples are (1, 8, 8) and the network's (4, 4, 4): ")
