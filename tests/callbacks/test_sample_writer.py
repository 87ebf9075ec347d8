import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from decm_lightning import TeacherTraining
from decm_lightning.callbacks.sample_writer import SampleWriter
from decm_lightning.data import Digits
from decm_lightning.errors import NonFiniteError
from decm_lightning.networks import DiT
from decm_lightning.types import Batch, Captions


class Negatives(Digits):
    """Digits of which pictures are the negatives, as if decoded."""

    def decode(self, x):
        return -x

    def predict_dataloader(self):
        return DataLoader([Batch(torch.zeros(1, 8, 8), torch.tensor(3))] * 2, batch_size=2)


def written(folder, data) -> list:
    L.seed_everything(0, verbose=False)
    module = TeacherTraining(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10))
    torch.nn.init.normal_(module.average.final_layer.linear.weight, std=0.1)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[SampleWriter(str(folder), "teacher/euler/2")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    return sorted(folder.iterdir())


class Positives(Negatives):
    def decode(self, x):
        return x


def test_pictures_are_decoded_and_named_by_their_labels(tmp_path):
    plain, decoded = written(tmp_path / "plain", Positives()), written(tmp_path / "decoded", Negatives())
    assert [file.name for file in plain] == ["000000_class3.png", "000001_class3.png"]
    for first, second in zip(plain, decoded, strict=True):
        levels = torch.tensor([list(Image.open(file).getdata()) for file in (first, second)])
        # x and -x round to levels that add up to 255, or to 256 at a half.
        assert ((levels.sum(0) - 255).abs() <= 1).all()
        assert levels.float().std() > 10


def test_samples_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Positives, "decode", lambda self, x: x / 0)
    with pytest.raises(NonFiniteError, match="images are not finite"):
        written(tmp_path, Positives())
    assert not list(tmp_path.iterdir())


def test_conditions_that_are_no_labels_are_left_out_of_the_names(tmp_path, generator):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.datamodule = Positives()
    writer = SampleWriter(str(tmp_path), "student/mix/1")
    x, captions = torch.randn(3, 1, 8, 8, generator=generator), Captions(torch.zeros(3, 5, 2))
    for _ in range(2):
        writer.write_on_batch_end(trainer, None, Batch(x, captions), None, None, 0, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"00000{number}.png" for number in range(6)]
