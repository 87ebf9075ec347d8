"""Data of conditions alone: students that learn from labels or prompts without images, and losses that are refused."""

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import BertConfig, BertModel, BertTokenizerFast

from decm_lightning import Distiller, TeacherTraining, losses
from decm_lightning.data import Conditions
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.flows import GaussianMixture
from decm_lightning.losses import FlowMapLoss, Objective
from decm_lightning.networks import MLP, DiT, TextDiT, save
from decm_lightning.teachers import ExactTeacher, PretrainedTeacher
from decm_lightning.text import TextEncoder
from decm_lightning.training import WarmupCosine
from decm_lightning.triangle import NoiseEdge
from decm_lightning.types import Batch

FLOW = GaussianMixture.ring()
PREDICTOR = Objective({"predictor": FlowMapLoss(NoiseEdge(), start_weight=0.0, end_weight=1.0)})
PROMPTS = ["a red cat", "a blue dog", "two green birds"]


def fit(module, data, steps, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        **({"enable_checkpointing": False} | options),
    )  # fmt: skip
    trainer.fit(module, data)
    return module


def student_of_labels(objective=PREDICTOR):
    adam = functools.partial(torch.optim.Adam, lr=5e-3)
    network = MLP(2, 64, 3, num_classes=len(FLOW.means))
    return Distiller(
        ExactTeacher(FLOW), network, objective, optimizer=adam, lr_scheduler=functools.partial(WarmupCosine, floor=0.0)
    )


def one_step_error(network):
    labels = torch.arange(1000) % len(FLOW.means)
    x_0 = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    t = torch.zeros(1000)
    with torch.no_grad():
        x_1 = x_0 + network(x_0, t, t + 1, labels)
    return (x_1 - FLOW.flow_map(x_0, t, t + 1, labels, tolerance=1e-5)).square().mean().sqrt().item()


def test_a_student_learns_the_exact_flow_from_labels_alone():
    L.seed_everything(0, verbose=False)
    distiller = student_of_labels()
    before = one_step_error(distiller.network)
    fit(distiller, Conditions(batch_size=128), 300)
    assert before > 1.5
    assert one_step_error(distiller.average) < 0.1


def test_labels_occur_equally_often_in_an_order_of_the_seed():
    L.seed_everything(0, verbose=False)
    data = Conditions(batch_size=16)
    fit(student_of_labels(), data, 1)
    loader = data.train_dataloader()
    first = torch.cat([batch.condition for batch in loader])
    assert torch.equal(first.bincount(), torch.full((8,), 200))
    assert torch.equal(first, torch.cat([batch.condition for batch in data.train_dataloader()]))
    loader.sampler.set_epoch(1)
    assert not torch.equal(first, torch.cat([batch.condition for batch in loader]))
    assert data.condition([0, 9, 17]).tolist() == [0, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_does_not_depend_on_the_samples(dtype, monkeypatch):
    distiller = student_of_labels(losses.free_flow()).to(dtype)
    monkeypatch.setattr(distiller, "log_dict", lambda *a, **k: None)
    monkeypatch.setattr(distiller, "log", lambda *a, **k: None)
    labels = torch.arange(32) % 8
    zeros, others = (
        distiller.training_step(Batch(x_1, labels), 0)
        for x_1 in (torch.zeros(32, 2, dtype=dtype), torch.randn(32, 2, dtype=dtype))
    )
    assert torch.equal(zeros, others)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        (losses.end_identity(), "consistency, flow_matching read"),
        (losses.paper(), "consistency, flow_matching, noise_to_noisy read"),
        (Objective({"late": FlowMapLoss(NoiseEdge(0.1), start_weight=0.0, end_weight=1.0)}), "late read"),
    ],
)
def test_losses_that_read_data_are_refused(objective, named):
    with pytest.raises(ValueError, match=f"Conditions.*{named}"):
        fit(student_of_labels(objective), Conditions(), 1)


def test_teachers_need_data():
    with pytest.raises(ValueError, match=r"Conditions.*flow_matching"):
        fit(TeacherTraining(DiT(8, 1, 4, 16, 1, 2, num_classes=3)), Conditions(), 1)


@pytest.fixture
def encoder(tmp_path):
    """A real, tiny, random BERT with one token for each letter."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    letters = sorted(set("".join(PROMPTS)) - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained(folder)
    return TextEncoder(str(folder), max_tokens=32)


@pytest.mark.parametrize("captions", ["cached", "on_the_fly"])
def test_a_text_student_trains_on_a_file_of_prompts_and_is_sampled(captions, encoder, tmp_path):
    L.seed_everything(0, verbose=False)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    teacher = TextDiT(8, 3, caption_width=8, patch_size=4, width=48, depth=1, heads=2)
    save(teacher, tmp_path / "teacher")
    distiller = Distiller(PretrainedTeacher(str(tmp_path / "teacher")), objective=losses.free_flow())
    before = {name: value.clone() for name, value in distiller.network.state_dict().items()}
    data = Conditions(str(file), encoder, str(tmp_path / "cache"), captions, batch_size=4)
    fit(distiller, data, 3)
    changed = [name for name, value in distiller.network.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("blocks.0") for name in changed)
    generator = SampleGenerator(distiller, data)
    assert generator.captions(range(4)) == [*PROMPTS, PROMPTS[0]]
    own = data.condition([0, 3, 1]).tokens
    assert torch.equal(own[0], own[1])
    assert not torch.equal(own[0], own[2])
    assert list(data.identity()) == ["encoder"]


def test_missing_prompts_and_networks_without_classes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
        fit(student_of_labels(), Conditions(str(tmp_path / "gone.txt")), 1)
    distiller = Distiller(ExactTeacher(FLOW), MLP(2, 16, 1), PREDICTOR)
    with pytest.raises(ValueError, match="prompts"):
        fit(distiller, Conditions(), 1)


def test_a_run_resumes_exactly(tmp_path):
    def run(folder: Path, steps: int, checkpoint: Path | None = None) -> dict:
        L.seed_everything(1 if checkpoint else 0, verbose=False)
        saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        module = student_of_labels()
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, callbacks=[saving], enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, Conditions(batch_size=8), ckpt_path=checkpoint)
        return module.network.state_dict()

    whole = run(tmp_path / "whole", 5)
    resumed = run(tmp_path / "resumed", 5, tmp_path / "whole/step=2.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
