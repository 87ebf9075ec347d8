"""ImageFolder: class folders, flat folders, tars, data sets and latents, with splits and errors."""

import shutil

import datasets
import lightning as L
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from decm_lightning import TeacherTraining
from decm_lightning.data import ImageFolder
from decm_lightning.networks import DiT
from tests.autoencoders.tiny import save_kl
from tests.data.photos import encoded, photos, write_folder, write_tar

SIZE, COUNT = 16, 24
CLASSES = ("china", "flower")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "photos", COUNT)


def ready(folder, **options) -> ImageFolder:
    data = ImageFolder(str(folder), SIZE, **({"batch_size": 4} | options))
    data.prepare_data()
    data.setup("fit")
    return data


def batches(data):
    return list(data.train_dataloader())


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return len(pairs) > 0 and all(torch.equal(a.x_1, b.x_1) and torch.equal(a.condition, b.condition) for a, b in pairs)


def test_pixels_are_the_center_of_each_image_with_its_class(folder):
    data = ready(folder, held_out=0.0, flip=False)
    assert (data.num_classes, data.class_names, len(data.train)) == (2, CLASSES, COUNT)
    names = [data.train.place(row) for row in range(COUNT)]
    batch = data.train[list(range(COUNT))]
    for row, (image, label) in enumerate(photos(COUNT)):
        found = names.index(f"{CLASSES[label]}/{row:04d}.png")
        assert batch.condition[found] == label
        scale = SIZE / min(image.size)
        resized = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = [(side - SIZE) // 2 for side in resized.size]
        expected = np.array(resized.crop((left, top, left + SIZE, top + SIZE))).transpose(2, 0, 1)
        # Images of at least twice the size are halved first.
        if min(image.size) < 2 * SIZE:
            torch.testing.assert_close(batch.x_1[found], torch.from_numpy(expected).float() / 127.5 - 1)
    assert (batch.x_1.min(), batch.x_1.max()) >= (-1, 0.9)


def test_a_flat_folder_is_one_class(folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in folder.rglob("*.png"):
        shutil.copy(file, flat)
    data = ready(flat, held_out=0.0)
    assert (data.num_classes, data.class_names) == (1, ("flat",))
    assert torch.equal(data.train.labels, torch.zeros(COUNT, dtype=torch.long))


def test_a_folder_of_one_class_works(folder):
    shutil.rmtree(folder / "flower")
    assert (ready(folder).num_classes, ready(folder).class_names) == (1, ("china",))


def test_a_tar_and_a_class_folder_of_the_same_images_give_equal_batches(folder, tmp_path):
    members = {}
    for number, file in enumerate(sorted(folder.rglob("*.png"), key=lambda file: file.name, reverse=True)):
        members[f"{number}.cls"] = str(CLASSES.index(file.parent.name)).encode()
        members[f"{number}.png"] = file.read_bytes()
    tar = write_tar(tmp_path / "photos.tar", members)
    assert same(batches(ready(folder)), batches(ready(tar)))
    assert same(ready(folder).val_dataloader(), ready(tar).val_dataloader())


def rows_of(folder, number=slice(None)):
    files = sorted(folder.rglob("*.png"))[number]
    return [{"bytes": file.read_bytes(), "path": file.name} for file in files], [file.parent.name for file in files]


def test_data_sets_give_the_batches_of_the_class_folder(folder, tmp_path):
    images, names = rows_of(folder)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    labels = [CLASSES.index(name) for name in names]
    saved = datasets.Dataset.from_dict({"image": images, "label": labels}, features)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "tables").mkdir()
    saved.to_parquet(tmp_path / "tables/a.parquet")
    parquet.write_table(pa.table({"pixels": [image["bytes"] for image in images], "kind": names}), "b.parquet")
    expected = batches(ready(folder))
    for source in ("saved", "splits", "tables", "tables/a.parquet"):
        data = ready(tmp_path / source)
        assert (data.num_classes, data.class_names) == (2, CLASSES), source
        assert same(expected, batches(data)), source
    plain = ready("b.parquet", image_column="pixels", label_column="kind")
    assert plain.class_names == CLASSES
    assert same(expected, batches(plain))
    assert ready("b.parquet", image_column="pixels", label_column=None).num_classes == 1
    assert len(ready(tmp_path / "splits", split="test", held_out=0.0, batch_size=1).train) == 3


def test_errors_of_data_sets_name_columns_splits_and_rows(folder, tmp_path):
    images, _ = rows_of(folder)
    parquet.write_table(pa.table({"image": images, "kind": [0] * COUNT}), "a.parquet")
    with pytest.raises(ValueError, match=r"'label'.*image, kind.*label_column"):
        ready("a.parquet")
    with pytest.raises(ValueError, match=r"'img'.*image, kind.*image_column"):
        ready("a.parquet", image_column="img", label_column="kind")
    with pytest.raises(ValueError, match=r"'test'.*train"):
        ready("a.parquet", label_column="kind", split="test")
    parquet.write_table(pa.table({"image": images, "label": [None, -1, *[0] * (COUNT - 2)]}), "b.parquet")
    with pytest.raises(ValueError, match=r"2 .*row 0 has no label.*row 1 has no label"):
        ready("b.parquet")
    with pytest.warns(UserWarning, match="row 1 has no label"):
        assert len(ready("b.parquet", on_error="skip", held_out=0.0).train) == COUNT - 2
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        ready("nobody/nothing")


def test_one_and_two_workers_give_the_same_rows(folder):
    assert same(batches(ready(folder, num_workers=1)), batches(ready(folder, num_workers=2)))


def test_flips_are_reproducible_and_differ_between_epochs(folder):
    plain, flipped = ready(folder, flip=False, held_out=0.0), ready(folder, held_out=0.0)
    flipped.seed = plain.seed
    numbers = []
    for epoch in (0, 1, 0):
        loaders = plain.train_dataloader(), flipped.train_dataloader()
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        mirrored = []
        for a, b in zip(*loaders, strict=True):
            for image, other in zip(a.x_1, b.x_1, strict=True):
                assert torch.equal(image, other) or torch.equal(image.flip(-1), other)
                mirrored.append(not torch.equal(image, other))
        numbers.append(mirrored)
    assert numbers[0] == numbers[2] != numbers[1]
    assert 4 < sum(numbers[0]) < COUNT - 4
    assert torch.equal(flipped.reference[[0, 1]].x_1, plain.reference[[0, 1]].x_1)


def test_the_split_depends_on_the_content_alone(folder):
    def held(data):
        return {data.reference.place(row) for row in range(len(data.reference))}

    before = held(ready(folder, held_out=0.3))
    assert 2 < len(before) < 14
    extra = encoded(photos(COUNT + 1)[-1][0])
    (folder / "china/new.png").write_bytes(extra)
    assert held(ready(folder, held_out=0.3)) - {"china/new.png"} == before
    assert before < held(ready(folder, held_out=0.5))
    for name in sorted(before)[:2] + sorted({f"china/{row:04d}.png" for row in range(0, COUNT, 2)} - before)[:2]:
        shutil.copy(folder / name, folder / "flower" / f"copy-{name.replace('/', '-')}")
        copies = held(ready(folder, held_out=0.3))
        assert (f"flower/copy-{name.replace('/', '-')}" in copies) == (name in copies)


def test_the_reference_is_a_mix_of_the_classes_and_can_be_limited(folder):
    data = ready(folder, held_out=0.0, reference_size=8)
    (batch,) = data.val_dataloader()
    assert len(batch.x_1) == 8
    assert len(batch.condition.unique()) == 2
    with pytest.raises(ValueError, match=r"held_out.*1e-09"):
        ready(folder, held_out=1e-9).val_dataloader()


def test_stored_images_are_read_once_until_a_file_changes(folder, monkeypatch):
    first = ready(folder, held_out=0.0)
    monkeypatch.setattr("decm_lightning.data.images.pixels.read_image", None)
    assert same(batches(first), batches(ready(folder, held_out=0.0)))
    monkeypatch.undo()
    Image.new("RGB", (SIZE, SIZE), "red").save(folder / "china/0000.png")
    changed = ready(folder, held_out=0.0)
    names = [changed.train.place(row) for row in range(COUNT)]
    red = torch.tensor([1.0, -1, -1])[:, None, None].expand(3, SIZE, SIZE)
    assert torch.equal(changed.train[[names.index("china/0000.png")]].x_1[0], red)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("china/text.png", b"no image", r"1 .*china/text\.png cannot be read"),
        ("china/cut.png", encoded(photos(1)[0][0])[:200], r"china/cut\.png cannot be read"),
        ("china/small.png", encoded(Image.new("RGB", (15, 40))), r"china/small\.png .*16.*15 x 40"),
    ],
)
def test_broken_and_small_images_are_named_or_left_out(name, content, message, folder):
    (folder / name).write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            ready(folder)
    with pytest.warns(UserWarning, match=name):
        assert len(ready(folder, held_out=0.0, on_error="skip").train) == COUNT


def test_gray_and_color_together_need_a_choice(folder):
    photos(1)[0][0].convert("L").save(folder / "china/gray.png")
    with pytest.raises(ValueError, match=r"china/gray\.png is gray and china/0000\.png is in color: .*channels"):
        ready(folder)
    color, gray = ready(folder, channels=3, held_out=0.0), ready(folder, channels=1, held_out=0.0)
    assert (color.train.images.shape, gray.train.images.shape) == ((COUNT + 1, 3, 16, 16), (COUNT + 1, 1, 16, 16))
    names = [color.train.place(row) for row in range(COUNT + 1)]
    row = names.index("china/gray.png")
    assert torch.equal(color.train[[row]].x_1[:, :1], gray.train[[row]].x_1)


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        ready(tmp_path / "empty")
    (tmp_path / "empty/notes.md").write_text("none")
    with pytest.raises(FileNotFoundError, match=r"empty.*\.md \(1\)"):
        ready(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="gone"):
        ready(tmp_path / "gone")
    (tmp_path / "empty/a.png").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"a\.png"):
        ready(tmp_path / "empty", on_error="skip")


def test_damaged_stored_files_are_named(folder):
    data = ready(folder)
    file = next(data.cache.glob("images-*/pixels.bin"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"pixels\.bin has \d+ bytes, expected \d+\): delete"):
        ready(folder)
    (file.parent / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json.*delete"):
        ready(folder)


@pytest.mark.parametrize("options", [{"size": 0}, {"held_out": 1.0}, {"batch_size": 0}, {"reference_size": 0}])
def test_numbers_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} .*got {next(iter(options.values()))}"):
        ImageFolder("photos", **({"size": 8} | options))


def test_latents_of_a_vae_are_encoded_once_and_decoded(folder, tmp_path, monkeypatch):
    vae = str(save_kl(tmp_path / "vae"))
    data = ready(folder, vae=vae, held_out=0.0)
    assert data.train.images.shape == (COUNT, 2, SIZE // 2, SIZE // 2)
    pixels = ready(folder, held_out=0.0).train
    rows = list(range(5))
    for items in (rows, [row + COUNT for row in rows]):
        expected = data.coder.encode(pixels[items].x_1)
        torch.testing.assert_close(data.train[items].x_1, expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(data.train[rows].x_1, data.train[[row + COUNT for row in rows]].x_1)
    assert data.decode(data.train[rows].x_1).shape == (5, 3, SIZE, SIZE)
    assert list(data.identity()) == ["VAE"]
    monkeypatch.setattr("decm_lightning.data.latents.cached._write", None)
    assert same(batches(data), batches(ready(folder, vae=vae, held_out=0.0)))


def run(folder, steps, name, resume=None):
    torch.manual_seed(3)
    network = DiT(SIZE, 3, patch_size=4, width=48, depth=1, heads=2, num_classes=2)
    data = ImageFolder(str(folder), SIZE, batch_size=4)
    module = TeacherTraining(network)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[checkpoint], enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return module.network.state_dict()


def test_a_run_resumes_exactly_within_an_epoch_with_its_flips(folder):
    whole = run(folder, 8, "whole")
    resumed = run(folder, 8, "resumed", resume="whole/step=3.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["final_layer.linear.weight"], run(folder, 7, "short")["final_layer.linear.weight"])


def test_a_network_of_another_shape_is_refused(folder):
    network = DiT(8, 3, patch_size=4, width=48, depth=1, heads=2, num_classes=2)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*\(3, 8, 8\)"):
        trainer.fit(TeacherTraining(network), ImageFolder(str(folder), SIZE, batch_size=4))
