import lightning as L
import pytest
import torch
from PIL import Image

from decm_lightning import TeacherTraining
from decm_lightning.data import Digits
from decm_lightning.errors import NonFiniteError
from decm_lightning.evaluation import SampleGenerator, SampleWriter, SamplingSpec
from decm_lightning.networks import DiT, TextDiT
from decm_lightning.types import Captions

SPEC = "teacher/euler/2"


class Negatives(Digits):
    """Digits whose images are the negatives, as if decoded."""

    def decode(self, x):
        return -x


class Captioned(L.LightningDataModule):
    texts = ("a cat", "a dog")

    def predict_dataloader(self):
        return [0]

    def condition(self, rows, seed):
        return Captions(torch.zeros(len(rows), 5, 2))


def module(std=0.1, network=None) -> TeacherTraining:
    L.seed_everything(0, verbose=False)
    made = TeacherTraining(network or DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10))
    torch.nn.init.normal_(made.average.final_layer.linear.weight, std=std)
    return made


def written(folder, data=None, std=0.1, network=None, **options) -> list[str]:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[SampleWriter(str(folder), **{"samples": 12, "spec": SPEC} | options)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module(std, network), datamodule=data or Digits(), return_predictions=False)
    return sorted(file.name for file in folder.iterdir())


def pixels(file) -> torch.Tensor:
    return torch.tensor(list(Image.open(file).getdata())).view(1, 8, 8)


@pytest.mark.parametrize("labels", ["balanced", "uniform"])
def test_the_images_are_those_of_a_test_with_the_same_seed(tmp_path, labels):
    data = Negatives()
    generator = SampleGenerator(module(), data, labels=labels, seed=5)
    rows = range(12)
    names = [f"{row:06d}_class{label}.png" for row, label in enumerate(generator.condition(rows).tolist())]
    assert written(tmp_path, data, labels=labels, seed=5, batch_size=5) == [*names, "settings.json"]
    images = generator.generate(SamplingSpec.parse(SPEC), rows)
    for name, image in zip(names, images, strict=True):
        # One level of 255 is left to the order in which a matrix product is summed.
        assert (pixels(tmp_path / name) - image).abs().max() <= 1
    assert images.float().std() > 10


def test_samples_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Negatives, "decode", lambda self, x: x / 0)
    with pytest.raises(NonFiniteError, match="images are not finite"):
        written(tmp_path, Negatives())
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]


def test_conditions_that_are_not_labels_are_left_out_of_the_names(tmp_path):
    network = TextDiT(8, 1, 2, patch_size=4, width=16, depth=1, heads=2)
    names = written(tmp_path, Captioned(), network=network, samples=3)
    assert names == ["000000.png", "000001.png", "000002.png", "settings.json"]


def test_a_folder_is_completed_and_one_with_other_samples_is_refused(tmp_path):
    written(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    # Neither the batch size nor the number of samples changes an image.
    written(tmp_path, batch_size=6, samples=20)
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(after) == len(before) + 8
    assert all(after[name] == content for name, content in before.items())
    others = [({"spec": "teacher/euler/3"}, "teacher/euler/2"), ({"std": 0.2}, "weights")]
    others += [({"seed": 1}, "seed: 0 in the folder, requested 1"), ({"labels": "uniform"}, "labels")]
    for options, named in others:
        with pytest.raises(ValueError, match=named):
            written(tmp_path, **options)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == after
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"000000_class0\.png"):
        written(tmp_path)


def test_a_folder_of_other_captions_or_networks_is_refused(tmp_path):
    class Others(Captioned):
        texts = ("a cat", "a cow")

    class Encoded(Captioned):
        def identity(self):
            return {"encoder": "another"}

    def network():
        return TextDiT(8, 1, 2, patch_size=4, width=16, depth=1, heads=2)

    written(tmp_path, Captioned(), network=network(), samples=2)
    for data, named in ((Others(), "captions"), (Encoded(), "encoder: None in the folder, requested another")):
        with pytest.raises(ValueError, match=named):
            written(tmp_path, data, network=network(), samples=2)


def test_nothing_is_skipped_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(Captioned, "predict_dataloader", lambda self: [])
    network = TextDiT(8, 1, 2, patch_size=4, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="predict_dataloader must have at least one batch"):
        written(tmp_path, Captioned(), network=network)


@pytest.mark.parametrize(("options", "named"), [({"samples": 0}, "samples"), ({"batch_size": 0}, "batch_size")])
def test_numbers_that_are_too_small_are_refused(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"{named} must be at least 1: got 0"):
        written(tmp_path, **options)
