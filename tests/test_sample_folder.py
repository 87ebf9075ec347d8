"""Folders of samples: one set of settings each, no other images, and whole files only."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from decm_lightning.sample_folder import SampleFolder, sample_name

SETTINGS = {"sampler": "mix", "steps": 2, "seed": 0}
NAMES = [sample_name(number, number % 3) for number in range(4)]
IMAGE = torch.randint(256, (3, 6, 4), dtype=torch.uint8)


def filled(folder: Path, settings=SETTINGS) -> SampleFolder:
    samples = SampleFolder(folder, settings, NAMES)
    samples.begin()
    for name in NAMES:
        samples.write(name, IMAGE)
    return samples


def test_a_folder_resumes_by_name(tmp_path: Path) -> None:
    """Lost, truncated and resized images are missing; complete images are not."""
    samples = SampleFolder(tmp_path / "new" / "samples", SETTINGS, NAMES)
    samples.check()
    assert not samples.folder.exists()
    assert samples.missing(NAMES) == NAMES
    samples = filled(samples.folder)
    assert sorted(os.listdir(samples.folder)) == [*NAMES, "settings.json"]
    assert json.loads((samples.folder / "settings.json").read_text()) == SETTINGS
    assert samples.missing(NAMES, (4, 6)) == []
    assert samples.missing(NAMES, (6, 4)) == NAMES
    whole = (samples.folder / NAMES[1]).read_bytes()
    (samples.folder / NAMES[1]).write_bytes(whole[:-1])
    (samples.folder / NAMES[2]).write_bytes(b"")
    (samples.folder / NAMES[3]).unlink()
    assert samples.missing(NAMES, (4, 6)) == NAMES[1:]
    samples.check()
    assert filled(samples.folder).missing(NAMES) == []
    assert torch.equal(torch.tensor(list(Image.open(samples.folder / NAMES[1]).getdata())), IMAGE.flatten(1).t())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            SETTINGS | {"steps": 4, "seed": 1},
            r"other settings \(steps: 2 in the folder, requested 4; seed: 0 in the folder, requested 1\)",
        ),
        (SETTINGS | {"s1": 0.5}, r"other settings \(s1: None in the folder, requested 0.5\)"),
        ({"seed": 0, "steps": 2}, r"other settings \(sampler: mix in the folder, requested None\)"),
        (dict.fromkeys("abcdefg", 1), r"other settings \(a: None in the folder, requested 1; .* and 6 more\)"),
    ],
)
def test_samples_of_other_settings_are_refused(settings, message, tmp_path: Path) -> None:
    filled(tmp_path)
    for method in ("check", "begin"):
        with pytest.raises(ValueError, match=f"^{tmp_path} has samples of {message}"):
            getattr(SampleFolder(tmp_path, settings, NAMES), method)()


def test_settings_are_compared_as_json(tmp_path: Path) -> None:
    filled(tmp_path, SETTINGS | {"classes": (3, 5)})
    SampleFolder(tmp_path, SETTINGS | {"classes": [3, 5]}, NAMES).check()


@pytest.mark.parametrize("name", ["photo.png", "deeper/photo.JPG", "000004_class0.png", "000000_class5.png"])
@pytest.mark.parametrize("begun", [True, False])
def test_other_images_are_refused(name, begun, tmp_path: Path) -> None:
    """Metrics of the folder would count them."""
    if begun:
        filled(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"^{tmp_path} has other images .{name} .*choose another folder"):
        SampleFolder(tmp_path, SETTINGS, NAMES).check()
    if begun and "photo" not in name:
        SampleFolder(tmp_path, SETTINGS).check()
    else:
        with pytest.raises(ValueError, match="has other images"):
            SampleFolder(tmp_path, SETTINGS).check()


def test_files_that_are_not_images_do_not_matter(tmp_path: Path) -> None:
    for name in ("notes.txt", ".thumb.png", "000000_class0.png.partial", "paper.pdf"):
        (tmp_path / name).touch()
    SampleFolder(tmp_path, SETTINGS, NAMES).check()


@pytest.mark.parametrize("content", [b"", b'{"a"', b"[1]", b"\xff"])
def test_damaged_settings_are_named_with_what_to_do(content, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    for method in ("check", "begin"):
        with pytest.raises(ValueError, match=f"^{tmp_path}/settings.json is damaged .*remove the folder"):
            getattr(SampleFolder(tmp_path, SETTINGS, NAMES), method)()


def test_one_of_several_that_begin_at_once_wins(tmp_path: Path) -> None:
    """Processes with the same settings continue, and those with other settings are refused."""

    def begin(number: int) -> bool:
        name = sample_name(number % 8)
        samples = SampleFolder(tmp_path / str(number // 8), {"seed": number % 2}, [sample_name(i) for i in range(8)])
        try:
            samples.begin()
        except ValueError:
            return False
        samples.write(name, IMAGE)
        return True

    with ThreadPoolExecutor(8) as pool:
        began = list(pool.map(begin, range(80)))
    for folder in range(10):
        seed = json.loads((tmp_path / str(folder) / "settings.json").read_text())["seed"]
        assert began[8 * folder : 8 * folder + 8] == [number % 2 == seed for number in range(8)]
        assert not list((tmp_path / str(folder)).glob("settings.json?*"))
