import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decm_lightning.demo import DigitsFeatures
from decm_lightning.demo.features import EfficientNetLite0Features
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.metrics.reference import read
from tests.metrics.networks import COLUMNS, Small, uint8_images


@pytest.fixture
def images(generator) -> np.ndarray:
    """Gray images in the layout of files, uint8 (n, h, w, c)."""
    return uint8_images(50, 8, generator, channels=1).permute(0, 2, 3, 1).numpy()


def moments(images: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of the features of Small in the format of ADM."""
    views = Small()(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = {}
    for view, (mean, covariance) in {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
        found |= {mean: views[view].numpy().mean(0), covariance: np.cov(views[view].numpy().T)}
    return found


def measured(path: Path | None, real: np.ndarray, generated: torch.Tensor) -> FeatureMetrics:
    """The metrics computed with a reference file, or with the images themselves."""
    reference = None if path is None else read(path)
    quality = FeatureMetrics(Small(), reference=reference)
    if reference is None:
        quality.update(torch.from_numpy(real).permute(0, 3, 1, 2), real=True)
    elif reference.images and quality.needs_real:
        for batch in reference.images.batches([range(0, 20), range(20, 20), range(20, len(reference.images))]):
            quality.update(batch, real=True)
    quality.update(generated, real=False)
    return quality


def write(folder: Path, kind: str, images: np.ndarray) -> Path:
    """Write a reference in one of the public formats."""
    file = folder / f"{kind}.npz"
    known = moments(images)
    if kind == "adm":
        np.savez(file, arr_0=images, **known)
    elif kind == "facm":
        np.savez(file, mu=known["mu"], sigma=known["sigma"])
    elif kind == "compressed":
        np.savez_compressed(file, arr_0=images)
    else:
        file = folder / "pictures"
        for number, image in enumerate(images):
            (file / str(number // 20)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(file / str(number // 20) / f"{number:04d}.png")
    return file


@pytest.mark.parametrize("kind", ["adm", "compressed", "folder"])
def test_files_and_folders_give_what_the_images_give(tmp_path, generator, images, kind):
    generated = uint8_images(60, 8, generator, channels=1) // 2
    expected = measured(None, images, generated)
    found = measured(write(tmp_path, kind, images), images, generated)
    assert found.columns == COLUMNS
    assert found.counts() == expected.counts()
    assert found.compute() == pytest.approx(expected.compute(), rel=1e-9)


def test_moments_alone_give_the_distances_and_say_what_they_cannot(tmp_path, generator, images):
    generated = uint8_images(60, 8, generator, channels=1) // 2
    file = write(tmp_path, "facm", images)
    found = measured(file, images, generated)
    expected = measured(None, images, generated).compute()
    assert found.compute() == pytest.approx({name: expected[name] for name in ("fid", "inception_score")}, rel=1e-9)
    assert set(found.unavailable) == {"sfid", "precision", "recall", "kid"}
    assert found.unavailable["kid"] == f"{file} has no images"
    assert found.unavailable["sfid"] == f"{file} has no images, and its moments are of other features"


def test_the_moments_of_the_file_win_over_its_images(tmp_path, images):
    # ADM's moments include all training images, its images are 10,000 of them.
    known = moments(images)
    np.savez(tmp_path / "shifted.npz", arr_0=images, mu=known["mu"] + 1, sigma=known["sigma"])
    quality = measured(tmp_path / "shifted.npz", images, torch.from_numpy(images).permute(0, 3, 1, 2))
    values = quality.compute()
    assert values["fid"] == pytest.approx(6, rel=1e-6)
    assert abs(values["sfid"]) < 1e-6
    assert quality.describe()["fid"] == "real mean and covariance from the reference file"


def test_moments_are_no_use_to_another_network(tmp_path, images):
    facm, adm = write(tmp_path, "facm", images), write(tmp_path, "adm", images)
    with pytest.raises(ValueError, match=r"fd .*facm.npz"):
        FeatureMetrics(DigitsFeatures(), reference=read(facm))
    quality = FeatureMetrics(DigitsFeatures(), reference=read(adm))
    assert quality.needs_real
    assert quality.unavailable == {}


def test_moments_of_another_dimension_are_refused(tmp_path):
    np.savez(tmp_path / "clip.npz", mu=np.zeros(512), sigma=np.eye(512))
    with pytest.raises(ValueError, match=r"clip.npz.* 512 .*fid .* 6"):
        FeatureMetrics(Small(), reference=read(tmp_path / "clip.npz"))


def test_files_are_known_by_their_hash(tmp_path, images):
    file = write(tmp_path, "adm", images)
    assert read(file).sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    folder = write(tmp_path, "folder", images)
    before = read(folder).sha256
    Image.fromarray(images[1][..., 0]).save(folder / "0" / "0000.png")
    assert read(folder).sha256 != before


def read_all(path: Path) -> None:
    images = read(path).images
    list(images.batches([range(len(images))]))


def refused(path: Path, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_other_files_are_refused(tmp_path, images):
    assert "expected mu and sigma, images arr_0, or both" in refused(tmp_path / "none.npz", FileNotFoundError)
    (tmp_path / "text.npz").write_text("mu")
    assert "text instead of tensors" in refused(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", samples=images)
    assert "has samples: expected mu and sigma" in refused(tmp_path / "other.npz")
    np.savez(tmp_path / "half.npz", mu=np.zeros(4))
    assert "has mu but lacks sigma" in refused(tmp_path / "half.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(4), sigma=np.eye(5))
    assert "mu must be (d,) and sigma (d, d): got (4,) and (5, 5)" in refused(tmp_path / "shape.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    assert "must be finite" in refused(tmp_path / "nan.npz")
    np.savez(tmp_path / "skew.npz", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    assert "sigma must be symmetric" in refused(tmp_path / "skew.npz")
    np.savez(tmp_path / "float.npz", arr_0=images / 255)
    assert "arr_0 must be uint8 (n, h, w, 1 or 3): got float64 (50, 8, 8, 1)" in refused(tmp_path / "float.npz")
    np.savez(tmp_path / "first.npz", arr_0=images.transpose(0, 3, 1, 2))
    assert "got uint8 (50, 1, 8, 8)" in refused(tmp_path / "first.npz")
    np.savez(tmp_path / "empty.npz", arr_0=images[:0])
    assert "got uint8 (0, 8, 8, 1)" in refused(tmp_path / "empty.npz")


def test_other_folders_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images in" in refused(empty)
    Image.new("RGB", (8, 6)).save(empty / "a.png")
    Image.new("L", (9, 6)).save(empty / "b.jpg")
    assert f"{empty / 'b.jpg'} is 9 x 6, and {empty / 'a.png'} 8 x 6" in refused(empty)
    (empty / "b.jpg").write_text("not an image")
    assert f"{empty / 'b.jpg'} cannot be read as an image" in refused(empty)
    Image.effect_noise((64, 64), 50).save(empty / "a.png")
    (empty / "b.jpg").unlink()
    (empty / "c.png").write_bytes((empty / "a.png").read_bytes()[:900])
    assert f"{empty / 'c.png'} cannot be read as an image" in refused(empty)


def first_pixels(folder: Path) -> list[list[int]]:
    images = read(folder).images
    (batch,) = images.batches([range(len(images))])
    return batch[:, :, 0, 0].tolist()


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_grey_images_among_colored_ones_have_three_channels(order, tmp_path):
    colored, grey = (tmp_path / f"{name}.png" for name in order)
    Image.new("RGB", (2, 2), (10, 20, 30)).save(colored)
    Image.new("L", (2, 2), 40).save(grey)
    found = {order[0]: [10, 20, 30], order[1]: [40, 40, 40]}
    assert first_pixels(tmp_path) == [found["a"], found["b"]]


def test_grey_images_alone_have_one_channel(tmp_path):
    Image.new("L", (2, 2), 40).save(tmp_path / "a.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "b.png")
    Image.fromarray(np.full((2, 2), 257 * 7, np.uint16)).save(tmp_path / "c.tiff")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "d.webp")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "e.gif")
    (tmp_path / "d.webp").unlink()
    assert first_pixels(tmp_path) == [[40], [255], [7], [9]]
    palette.putpalette([0, 0, 0, 9, 9, 8])
    palette.save(tmp_path / "e.gif")
    assert first_pixels(tmp_path) == [[40] * 3, [255] * 3, [7] * 3, [9, 9, 8]]


def test_transparency_orientation_links_and_hidden_files_are_as_for_other_images(tmp_path, caplog):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (2, 2), (1, 2, 3, 0)).save(folder / "a.PNG")
    lying = Image.new("RGB", (2, 2), "black")
    lying.putpixel((0, 1), (255, 0, 0))
    lying.save(elsewhere / "b.png", exif=exif)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "._a.png").write_bytes(b"Mac OS X")
    (folder / "notes.txt").touch()
    assert first_pixels(folder) == [[255] * 3, [255, 0, 0]]
    assert "hidden (1)" in caplog.text
    assert ".txt (1)" in caplog.text


def test_all_broken_headers_are_found_at_once(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    for name in "bcde":
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    message = refused(tmp_path)
    assert message.startswith(f"4 broken images: {tmp_path / 'b.png'} cannot be read as an image")
    assert message.endswith("; and 1 more")


@pytest.mark.parametrize(("real", "made"), [(1, 3), (3, 1)])
def test_grey_and_colored_images_can_be_compared(real, made, tmp_path):
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (32, 32, real), dtype=np.uint8)
        Image.fromarray(noise.squeeze()).save(tmp_path / f"{number}.png")
    found = read(tmp_path)
    quality = FeatureMetrics(EfficientNetLite0Features(32, 2), reference=found)
    for batch in found.images.batches([range(4)]):
        assert batch.shape[1] == real
        quality.update(batch, real=True)
    quality.update(torch.randint(0, 255, (4, made, 32, 32), dtype=torch.uint8), real=False)
    assert np.isfinite(quality.compute()["fd"])


def test_a_damaged_file_is_named(tmp_path, images):
    """np.load raises BadZipFile without the name of the file."""
    file = tmp_path / "a.npz"
    for arrays in ({"arr_0": images}, {"arr_0": np.concatenate([images] * 9)}, {"mu": np.zeros(9), "sigma": np.eye(9)}):
        np.savez(file, **arrays)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
        assert "a.npz is damaged or not an .npz file of numbers (Bad CRC-32" in refused(file)
        file.write_bytes(content[:100])
        assert "a.npz: cut short at 100 bytes" in refused(file)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.array([None, 1], dtype=object), "sigma": np.eye(2)}, "numbers (Object arrays"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "must be real numbers: got <U1, float64"),
        ({"mu": np.zeros(2) + 1j, "sigma": np.eye(2)}, "must be real numbers: got complex128, float64"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "the diagonal of sigma"),
    ],
)
def test_arrays_that_are_not_moments_are_refused(arrays, said, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    assert "a.npz" in refused(tmp_path / "a.npz")
    assert said in refused(tmp_path / "a.npz")


def test_members_that_are_not_arrays_are_refused(tmp_path):
    for number, name in enumerate(("mu.npy", "arr_0.npy", "arr_0")):
        file = tmp_path / f"{number}.npz"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, b"garbage")
            archive.writestr("sigma.npy", b"garbage")
        assert f"{number}.npz" in refused(file)
