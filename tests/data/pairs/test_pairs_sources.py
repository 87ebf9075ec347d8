"""Sources of pairs: folders with links and hidden files, several kinds of files, and patterns."""

import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from decm_lightning.data.pairs.cache import prepare
from decm_lightning.data.pairs.sources import find_pairs
from tests.data.pairs.pair_files import levels, pairs_tar, png, read, write_images


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def test_links_are_followed_once_and_hidden_files_are_skipped(source, tmp_path):
    pairs_tar(source / "a.tar", range(2))
    pairs_tar(tmp_path / "elsewhere/deep/b.TAR", range(2, 4))
    pairs_tar(tmp_path / "c.tar", range(4, 6))
    (source / "more").symlink_to(tmp_path / "elsewhere")
    (source / "linked.tar").symlink_to(tmp_path / "c.tar")
    (source / "back").symlink_to(source)
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "elsewhere")
    (source / "self").symlink_to(source / "self")
    (source / "._a.tar").write_bytes(b"junk")
    pairs_tar(source / ".hidden/d.tar", range(6, 8))
    assert sorted(levels(read(source))) == [0, 1, 2, 3, 4, 5]
    (source / "gone.tar").symlink_to(tmp_path / "gone")
    (source / "again.tar").symlink_to(source / "a.tar")
    found = read(source)
    assert sorted(levels(found)) == [0, 1, 2, 3, 4, 5]
    assert found.unread["broken links"] == 2
    assert found.unread["links to files that are read"] == 1
    assert found.unread["hidden"] == 2


@pytest.mark.parametrize("through", ["source", "link"])
def test_a_changed_file_is_read_again_through_links_too(through, source, tmp_path):
    pairs_tar(tmp_path / "elsewhere/a.tar", range(2))
    (source / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(source)
    assert levels(read(tmp_path / through)) == [0, 1]
    pairs_tar(tmp_path / "elsewhere/a.tar", range(2, 4))
    assert levels(read(tmp_path / through)) == [2, 3]


def test_files_that_are_not_read_leave_the_prepared_pairs_as_they_are(source):
    pairs_tar(source / "a.tar", range(2))
    folder = read(source).folder
    (source / "README.md").write_text("x")
    (source / "preview.png").write_bytes(png(1))
    assert read(source).folder == folder
    assert read(source).unread == {".md": 1, ".png": 1}


def test_the_tables_of_img2dataset_describe_its_tars(source):
    for name in ("00000", "00001"):
        pairs_tar(source / f"{name}.tar", range(2))
        parquet.write_table(pa.table({"url": ["x", "y"], "caption": ["a", "b"]}), source / f"{name}.parquet")
    (source / "00000_stats.json").write_text(json.dumps({"count": 2}))
    found = read(source)
    assert levels(found) == [0, 1, 0, 1]
    assert found.unread == {".json": 1, ".parquet": 2}


def test_several_kinds_of_files_are_refused_with_their_numbers_and_a_pattern_chooses(source):
    pairs_tar(source / "a.tar", range(2))
    pairs_tar(source / "b.tar", range(2, 4))
    parquet.write_table(pa.table({"image": [png(7)], "text": ["x"]}), source / "c.parquet")
    (source / "d.csv").write_text("file_name,text\n")
    message = r"source has 2 tars \(such as a.tar\) and 1 tables \(such as c.parquet\) and 1 lists \(such as d.csv\)"
    with pytest.raises(ValueError, match=message):
        find_pairs(source)
    assert levels(read(source / "*.tar")) == [0, 1, 2, 3]
    assert levels(read(source / "c.*")) == [7]
    assert levels(read(source / "b.tar")) == [2, 3]


@pytest.mark.parametrize("name", ["a.tar.zst", "a.zip", "a.parquet.gz"])
def test_files_that_must_be_decompressed_are_named(name, source):
    (source / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no pairs in .*source: expected .*it has .* \(1\) \(decompress"):
        find_pairs(source)
    pairs_tar(source / "b.tar", range(1))
    assert sum(find_pairs(source).unread.values()) == 1


def test_an_empty_pattern_or_an_unknown_file_is_refused(source):
    with pytest.raises(FileNotFoundError, match=r"train-\*.tar"):
        find_pairs(source / "train-*.tar")
    (source / "a.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no pairs in .*a.txt"):
        find_pairs(source / "a.txt")


def test_two_lists_are_refused_by_name(source):
    write_images(source, 1)
    for name in ("a.csv", "b.jsonl"):
        (source / name).write_text("file_name,text\n0.png,x\n")
    with pytest.raises(ValueError, match=r"has 2 lists of images \(.*a\.csv, .*b\.jsonl"):
        find_pairs(source)
    assert levels(read(source / "a.csv")) == [0]


@pytest.mark.parametrize(
    ("name", "split", "package"), [("a.parquet", None, "pyarrow"), ("a.parquet", "train", "datasets")]
)
def test_a_package_that_is_missing_is_named(name, split, package, source, monkeypatch):
    parquet.write_table(pa.table({"image": [png(7)], "text": ["x"]}), source / name)
    for module in ("decm_lightning.data.pairs.tables", "decm_lightning.data.pairs.hugging_face"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}.*'text'"):
        prepare(source, source.parent / "cache", 4, None, 2000, split)
