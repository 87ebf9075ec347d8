"""The image files that are found in a folder, and the counts of other files."""

import os

import pytest

from decm_lightning.image_listing import counted, kind, list_files


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_links_and_folders_are_followed_and_hidden_files_are_not(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    touch(source / "b" / "deep" / "er" / "1.PNG", source / "a.jpg", elsewhere / "2.png", tmp_path / "3.png")
    touch(source / ".a.png", source / ".git" / "b.png", source / "__MACOSX" / "c.png", source / "Thumbs.db")
    (source / "linked").symlink_to(elsewhere)
    (source / "b" / "3.png").symlink_to(tmp_path / "3.png")
    listing = list_files(source, {".png", ".jpg"})
    assert listing.files == [("a.jpg",), ("b", "3.png"), ("b", "deep", "er", "1.PNG"), ("linked", "2.png")]
    assert listing.folders == ["b", "linked"]
    assert listing.left_out == {"hidden": 4}


def test_links_in_a_loop_end(tmp_path):
    touch(tmp_path / "a" / "1.png", tmp_path / "b" / "2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_files(tmp_path, {".png"})
    assert listing.files == [
        *(("a", "1.png"), ("a", "b", "2.png"), ("b", "2.png"), ("b", "a", "1.png")),
    ]
    assert listing.left_out["broken links"] == 2
    assert listing.left_out["special files"] == 1
    assert listing.left_out["links to a folder above"] >= 3


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    touch(*(tmp_path / name for name in ("a.TXT", "b.txt", "LICENSE", "c.tar.gz", "d.v1.json")))
    listing = list_files(tmp_path, {".png"})
    assert listing.left_out == {".txt": 2, "no suffix": 1, ".tar.gz": 1, ".json": 1}
    assert counted(listing.left_out).startswith(".txt (2), ")
    assert kind("photo.old.TIF") == ".tif"


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        list_files(tmp_path / "gone", {".png"})
    assert str(error.value.filename).endswith("gone")
