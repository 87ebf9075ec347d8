import lightning as L
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset

from decm_lightning import TeacherTraining
from decm_lightning.data import Digits
from decm_lightning.data.images.in_memory import LabelledImages
from decm_lightning.data.resumable import as_it_is
from decm_lightning.errors import NonFiniteError
from decm_lightning.evaluation.sample_writer import SampleWriter
from decm_lightning.networks import DiT, TextDiT
from decm_lightning.types import Batch, Captions


class Negatives(Digits):
    """Digits of which pictures are the negatives, as if decoded."""

    def decode(self, x):
        return -x

    def predict_dataloader(self):
        return DataLoader([Batch(torch.zeros(1, 8, 8), torch.tensor(3))] * 2, batch_size=2)


def written(folder, data, cell="teacher/euler/2", std=0.1, network=None) -> list:
    L.seed_everything(0, verbose=False)
    module = TeacherTraining(network or DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10))
    torch.nn.init.normal_(module.average.final_layer.linear.weight, std=std)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[SampleWriter(str(folder), cell)],
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
    assert [file.name for file in plain] == ["000000_class3.png", "000001_class3.png", "settings.json"]
    for first, second in zip(plain[:2], decoded[:2], strict=True):
        levels = torch.tensor([list(Image.open(file).getdata()) for file in (first, second)])
        # x and -x round to levels that add up to 255, or to 256 at a half.
        assert ((levels.sum(0) - 255).abs() <= 1).all()
        assert levels.float().std() > 10


def test_samples_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Positives, "decode", lambda self, x: x / 0)
    with pytest.raises(NonFiniteError, match="images are not finite"):
        written(tmp_path, Positives())
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]


def test_conditions_that_are_no_labels_are_left_out_of_the_names(tmp_path):
    class Captioned(Positives):
        def predict_dataloader(self):
            return DataLoader(range(3), batch_size=2, collate_fn=captioned)

    network = TextDiT(8, 1, 2, patch_size=4, width=16, depth=1, heads=2)
    names = [file.name for file in written(tmp_path, Captioned(), network=network)]
    assert names == ["000000.png", "000001.png", "000002.png", "settings.json"]


def captioned(rows):
    return Batch(torch.zeros(len(rows), 1, 8, 8), Captions(torch.zeros(len(rows), 5, 2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_numbered_by_their_rows_in_any_order(tmp_path, workers):
    class Backwards(Positives):
        def predict_dataloader(self):
            rows = [Batch(torch.zeros(1, 8, 8), torch.tensor(label)) for label in range(4)]
            return DataLoader(rows, batch_size=3, sampler=[3, 2, 1, 0], num_workers=workers)

    names = [file.name for file in written(tmp_path, Backwards())]
    assert names[:4] == [f"00000{number}_class{number}.png" for number in range(4)]


def test_a_stream_is_numbered_as_it_comes(tmp_path):
    class Rows(IterableDataset):
        def __iter__(self):
            return iter([Batch(torch.zeros(1, 8, 8), torch.tensor(3))] * 3)

    class Streamed(Positives):
        def predict_dataloader(self):
            return DataLoader(Rows(), batch_size=2)

    assert [file.name[:6] for file in written(tmp_path, Streamed())[:3]] == ["000000", "000001", "000002"]


def test_a_folder_with_other_samples_is_refused(tmp_path):
    written(tmp_path, Positives())
    # The same once more is no other.
    before = [file.read_bytes() for file in written(tmp_path, Positives())]
    for options, named in (({"cell": "teacher/euler/3"}, "teacher/euler/2"), ({"std": 0.2}, "weights_sha256")):
        with pytest.raises(ValueError, match=named):
            written(tmp_path, Positives(), **options)
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"000000_class3\.png"):
        written(tmp_path, Positives())


class Labelled(Positives):
    def __init__(self, labels, batch_size=2):
        super().__init__()
        self.rows, self.at_once = LabelledImages(torch.zeros(len(labels), 1, 8, 8), torch.tensor(labels)), batch_size

    def predict_dataloader(self):
        rows = Subset(self.rows, range(len(self.rows)))
        return DataLoader(rows, batch_size=self.at_once, collate_fn=as_it_is)


def test_a_folder_of_other_labels_or_batches_is_refused(tmp_path):
    # All depend on them: the names on the labels, the noise on the rows that are sampled together.
    first = [file.name for file in written(tmp_path, Labelled([3, 5]))]
    assert first == [file.name for file in written(tmp_path, Labelled([3, 5]))]
    for data, named in ((Labelled([3, 4]), "labels"), (Labelled([3, 5, 7]), "labels"), (Labelled([3, 5], 1), "batch")):
        with pytest.raises(ValueError, match=named):
            written(tmp_path, data)
    assert [file.name for file in sorted(tmp_path.iterdir())] == first


def test_a_folder_of_other_captions_is_refused(tmp_path):
    class Captioned(Positives):
        def predict_dataloader(self):
            return DataLoader(range(2), batch_size=2, collate_fn=captioned)

    def network():
        return TextDiT(8, 1, 2, patch_size=4, width=16, depth=1, heads=2)

    data = Captioned()
    data.texts = ["a cat", "a dog"]
    written(tmp_path, data, network=network())
    data.texts = ["a cat", "a cow"]
    with pytest.raises(ValueError, match="captions"):
        written(tmp_path, data, network=network())
