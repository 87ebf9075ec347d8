"""Pairs that Hugging Face's `datasets` reads, from local folders in place of names on the hub."""

import os

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from decm_lightning.data.pairs.cache import PreparedPairs, prepare
from tests.data.pairs.pair_files import levels, pairs_tar, png, write_images, write_tar


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def read(source, split, column=None) -> PreparedPairs:
    return prepare(source, source.parent / "cache", 4, column, 2000, split)


def write_parquet(folder, **splits):
    """Write data/train-00000-of-00001.parquet etc., as on the hub, with the rows as gray levels."""
    (folder / "data").mkdir()
    for split, rows in splits.items():
        images = [{"bytes": png(row), "path": f"{row}.png"} for row in rows]
        table = pa.table({"image": images, "text": [f"level {row}" for row in rows]})
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")


def test_a_split_of_parquet_is_read_and_another_one_is_refused(source):
    write_parquet(source, train=range(5), test=range(5, 8))
    assert levels(read(source, "train")) == [0, 1, 2, 3, 4]
    found = read(source, "test")
    assert (levels(found), found.captions) == ([5, 6, 7], ["level 5", "level 6", "level 7"])
    assert found.names == ["test/0", "test/1", "test/2"]
    with pytest.raises(ValueError, match=r"dev.*train.*test"):
        read(source, "dev")


def test_a_changed_data_set_is_read_again_and_an_unchanged_one_is_not(source):
    write_parquet(source, train=range(2))
    folder = read(source, "train").folder
    assert read(source, "train").folder == folder
    file = source / "data" / "train-00000-of-00001.parquet"
    parquet.write_table(pa.table({"image": [png(9)], "text": ["x"]}), file)
    os.utime(file, (1, 1))
    assert levels(read(source, "train")) == [9]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_image_folder_with_metadata_is_read(name, source):
    write_images(source / "train", 3)
    lines = {"metadata.csv": "file_name,text\n2.png,two\n0.png,zero\n"}
    lines["metadata.jsonl"] = '{"file_name": "2.png", "text": "two"}\n{"file_name": "0.png", "text": "zero"}\n'
    (source / "train" / name).write_text(lines[name])
    found = read(source, "train")
    assert dict(zip(found.captions, levels(found), strict=True)) == {"zero": 0, "two": 2}


def test_webdataset_tars_have_their_keys_as_names(source):
    pairs_tar(source / "train-0.tar", range(2))
    pairs_tar(source / "train-1.tar", range(2, 4))
    found = read(source, "train")
    assert (levels(found), found.names) == ([0, 1, 2, 3], ["0", "1", "2", "3"])
    assert found.captions == [f"level {row}" for row in range(4)]


def test_the_caption_of_json_in_a_tar_is_that_of_the_requested_column(source):
    write_tar(source / "train.tar", {"0.png": png(0), "0.json": b'{"caption": "a", "better": "b"}'})
    assert read(source, "train").captions == ["a"]
    assert read(source, "train", "better").captions == ["b"]


def test_what_save_to_disk_writes_is_read(source):
    datasets.Dataset.from_dict({"image": [png(3)], "prompt": ["a"]}).save_to_disk(str(source / "saved"))
    found = read(source / "saved", "train")
    assert (levels(found), found.captions) == ([3], ["a"])


def test_bad_pairs_are_counted_with_their_rows_and_a_damaged_file_is_named(source):
    images = pa.array([png(1), b"no image", png(2), None], pa.binary())
    (source / "data").mkdir()
    file = source / "data" / "train.parquet"
    parquet.write_table(pa.table({"image": images, "text": ["a", "b", " ", "d"]}), file)
    found = read(source, "train")
    assert levels(found) == [1]
    assert [str(error).partition("train: ")[2].partition(":")[0] for error in found.errors] == [
        "row 1",
        "row 2",
        "row 3",
    ]
    latin = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"image": [png(1), png(2)], "text": latin}), file)
    with pytest.raises(ValueError, match=r"source train: row \d+ cannot be read \(.*utf-8"):
        read(source, "train")
    assert [path.suffix for path in (source.parent / "cache").iterdir() if path.is_dir()] == [""]


def test_a_name_that_is_not_on_the_hub_or_out_of_reach_is_refused(tmp_path):
    for name in ("user/name", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"no data set {name}: "):
            prepare(name, tmp_path / "cache", 4, None, 2000, "train")
