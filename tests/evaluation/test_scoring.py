"""Images that were generated elsewhere are measured as `Evaluation` measures its own samples."""

import json
import sys

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from decm_lightning import Distiller, cli
from decm_lightning.data import Digits
from decm_lightning.demo import DigitsFeatures
from decm_lightning.evaluation import Evaluation, SampleWriter
from decm_lightning.evaluation.scoring import score
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import load
from decm_lightning.teachers import PretrainedTeacher
from tests.metrics.networks import Small

STUDENT = "weights/digits/student"
FEATURES = ("--features", "decm_lightning.demo.DigitsFeatures")


def digits(count: int | None = None) -> np.ndarray:
    data = Digits()
    data.setup("test")
    return to_uint8(data.reference.images[:count]).permute(0, 2, 3, 1).numpy()


@pytest.fixture
def real(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=digits())
    return tmp_path / "real.npz"


@pytest.fixture
def decm(monkeypatch, capsys):
    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *map(str, argv)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def distances(file) -> dict[str, float]:
    (row,) = json.loads(file.read_text())["rows"]
    return {name: row[name] for name in ("fd", "kid")}


def test_written_samples_have_the_values_that_a_test_measures(tmp_path, real, decm):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    student = load(STUDENT)
    module = Distiller(PretrainedTeacher("weights/digits/teacher"), student=student)
    spec = "student/mix/2"
    writer = SampleWriter(str(tmp_path / "predicted"), 40, spec, seed=3)
    evaluation = Evaluation(DigitsFeatures(), [spec], test_samples=40, seed=3)
    L.Trainer(callbacks=[writer], **quiet).predict(module, datamodule=Digits())
    trainer = L.Trainer(callbacks=[evaluation], default_root_dir=tmp_path, **quiet)
    trainer.test(module, datamodule=Digits(), verbose=False)
    options = ("--sampler", "mix", "--steps", 2, "--seed", 3, "--per_class", 4)
    code, *_ = decm("sample", STUDENT, *options, "--out", tmp_path / "sampled")
    assert code == 0

    expected = distances(tmp_path / "quality.json")
    for folder in ("predicted", "sampled"):
        options = ("--reference", real, *FEATURES, "--seed", 3, "--out", tmp_path / f"{folder}-score")
        code, out, _ = decm("score", "--samples", tmp_path / folder, *options)
        assert code == 0
        assert distances(tmp_path / f"{folder}-score/quality.json") == pytest.approx(expected, abs=1e-6)
        assert out.count("| fd ") == 1


def test_a_folder_and_an_npz_file_of_the_same_images_have_the_same_table(tmp_path, real):
    images = digits(40)[..., 0]
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number:03}.png")
    np.savez(tmp_path / "samples.npz", arr_0=images[..., None])
    tables = [score(tmp_path / name, real, [DigitsFeatures()]) for name in ("folder", "samples.npz")]
    first, second = [dict(table.rows[0].values) for table in tables]
    assert first == second
    assert tables[0].protocol["generated images"] == 40
    assert tables[0].protocol["real images"] == 1797
    assert tables[0].protocol["generated size"] == "8 x 8, gray"
    assert tables[0].protocol["reference sha256"] == tables[1].protocol["reference sha256"]


def test_statistics_alone_give_the_columns_that_they_suffice_for(tmp_path, generator):
    images = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    pool = Small(192)(images)["pool"].numpy()
    np.savez(tmp_path / "statistics.npz", mu=pool.mean(0), sigma=np.cov(pool.T))
    np.savez(tmp_path / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    table = score(tmp_path / "samples.npz", tmp_path / "statistics.npz", [Small(192)])
    assert table.rows[0].values["fid"] == pytest.approx(0, abs=1e-5)
    assert "precision" not in table.rows[0].values
    assert "statistics.npz has no images" in table.protocol["precision"]


@pytest.fixture
def bad(tmp_path, real):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("none")
    np.savez(tmp_path / "other.npz", images=digits(4))
    np.savez(tmp_path / "one.npz", arr_0=digits(1))
    np.savez(tmp_path / "two.npz", arr_0=digits(2))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "floats.npz", arr_0=digits(4) / 255)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 9, 9, 1), np.uint8))
    (tmp_path / "sizes").mkdir()
    for size in (8, 9):
        Image.new("L", (size, size)).save(tmp_path / f"sizes/{size}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("samples", "reference", "said"),
    [
        ("empty", "real.npz", ["empty", ".txt (1)"]),
        ("other.npz", "real.npz", ["other.npz", "arr_0"]),
        ("statistics.npz", "real.npz", ["statistics.npz", "arr_0"]),
        ("floats.npz", "real.npz", ["floats.npz", "uint8", "float64"]),
        ("sizes", "real.npz", ["8 x 8", "9 x 9"]),
        ("one.npz", "real.npz", ["one.npz", "at least 2"]),
        ("two.npz", "one.npz", ["at least 2", "1 real, 2 generated"]),
        ("two.npz", "statistics.npz", ["statistics.npz", "other features"]),
        ("large.npz", "real.npz", ["1, 8, 8", "9, 9", "large.npz"]),
        ("two.npz", "large.npz", ["1, 8, 8", "9, 9", "large.npz"]),
        ("missing", "real.npz", ["missing"]),
        ("two.npz", "missing.npz", ["missing.npz"]),
    ],
)
def test_bad_input_is_one_line(samples, reference, said, bad, decm):
    code, out, err = decm("score", "--samples", bad / samples, "--reference", bad / reference, *FEATURES)
    (line,) = [line for line in err.splitlines() if line.startswith("decm: error")]
    assert (code, out) == (2, "")
    assert all(word in line for word in said), line
    assert not list(bad.glob("*-quality"))


def test_two_networks_with_a_column_of_the_same_name_are_refused(real):
    with pytest.raises(ValueError, match="'fd'"):
        score(real, real, [DigitsFeatures(), DigitsFeatures()])
