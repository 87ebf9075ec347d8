"""Tars of pairs: damage loses only the damaged members, and everything that is left out is counted."""

import io
import json
import tarfile

import pytest
from PIL import Image, features

from tests.data.pairs.pair_files import error_summary, levels, pairs_tar, png, read, write_tar


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def offset(file, name):
    with tarfile.open(file) as tar:
        return tar.getmember(name).offset


def overwrite(file, place, content):
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(content)


@pytest.mark.parametrize("name", ["0.png", "3.png", "9.txt"])
def test_a_damaged_header_costs_its_own_pair(name, source):
    file = pairs_tar(source / "a.tar", range(10))
    overwrite(file, offset(file, name), b"\xff" * 512)
    found = read(source)
    lost = int(name[0])
    assert levels(found) == [row for row in range(10) if row != lost]
    assert "1 of 10 pairs of source are bad, and an unknown number of pairs could not be read" in error_summary(found)
    assert f"{lost}.{'txt' if name.endswith('png') else 'png'}: has no" in error_summary(found)


def test_joined_tars_are_read_to_the_end(source):
    """cat a.tar b.tar > joined.tar has zeros in the middle, which are not damage."""
    first, second = pairs_tar(source / "a.tar", range(3)), pairs_tar(source / "b.tar", range(3, 6))
    joined = first.read_bytes() + second.read_bytes()
    second.unlink()
    first.write_bytes(joined)
    assert (levels(read(source)), read(source).errors) == (list(range(6)), [])


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100, bytes(10240)])
def test_a_file_that_is_not_a_tar_is_one_error_of_unknown_size(content, source):
    pairs_tar(source / "a.tar", range(2))
    (source / "b.tar").write_bytes(content)
    found = read(source)
    assert levels(found) == [0, 1]
    # A tar of zeros is an empty tar.
    assert [error.count for error in found.errors] == ([] if content == bytes(10240) else [None])
    assert all("b.tar: is" in str(error) for error in found.errors)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("gz", ".tar.gz"), ("gz", ".TGZ"), ("bz2", ".tar.bz2"), ("xz", ".tar.xz"), ("", ".TAR")]
)
def test_compressed_tars_are_read_and_a_cut_one_is_an_error(mode, suffix, source):
    file = pairs_tar(source / f"a{suffix}", range(40), f"w:{mode}")
    found = read(source)
    assert levels(found) == list(range(40))
    assert found.names[:2] == ["a/0", "a/1"]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 3 // 4])
    assert "an unknown number of pairs could not be read" in error_summary(read(source))


def with_json(source, *values):
    """Write a tar of a.png, a.txt, a.json etc. None leaves out the JSON file."""
    members = {}
    for row, value in enumerate(values):
        members |= {f"{row}.png": png(row), f"{row}.txt": b"alt text"}
        members |= (
            {} if value is None else {f"{row}.json": value if isinstance(value, bytes) else json.dumps(value).encode()}
        )
    write_tar(source / "a.tar", members)


def test_a_named_column_is_used_and_where_it_is_missing_the_pair_is_an_error(source):
    with_json(
        source, {"better": "zero"}, {"url": "x"}, None, {"better": ""}, {"better": None}, {"better": 5}, b"{", b"[]"
    )
    assert read(source).captions == ["alt text"] * 8
    found = read(source, "better")
    assert (levels(found), found.captions) == ([0], ["zero"])
    assert [str(error).partition("a.tar: ")[2] for error in found.errors] == [
        "1.json: has no caption column (expected 'better', found url)",
        "2.txt: has no .json file (for the caption column 'better')",
        "3.json: its caption is empty (column better)",
        "4.json: its caption is empty (column better)",
        "5.json: its caption is not text (5)",
        "6.json: is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "7.json: is not a JSON object",
    ]


def test_of_several_captions_the_first_that_is_not_empty_is_used(source):
    write_tar(source / "a.tar", {"0.png": png(0), "0.json": b'{"caption": " ", "text": null, "prompt": "used"}'})
    assert read(source).captions == ["used"]


def test_every_format_of_pillow_is_an_image_and_two_of_a_name_are_an_error(source):
    members = {}
    # Since Pillow 11.3.
    avif = ["avif"] if features.check("avif") else []
    kinds = ["bmp", "gif", "tiff", "tif", "ppm", "jp2", "tga", "ico", *avif]
    for row, suffix in enumerate(kinds):
        content = io.BytesIO()
        kind = {"tif": "tiff", "jp2": "jpeg2000"}.get(suffix, suffix)
        Image.new("RGB", (16, 16), (row,) * 3).save(content, kind)
        members |= {f"{row}.{suffix.upper()}": content.getvalue(), f"{row}.txt": b"x"}
    members |= {"two.png": png(1), "two.gif": png(2), "two.txt": b"x"}
    write_tar(source / "a.tar", members)
    found = read(source)
    assert len(found.captions) == len(kinds)
    assert "two.png: is one of several images with the same name (.png, .gif)" in error_summary(found)


def test_links_are_counted_and_hidden_members_are_not(source):
    file = write_tar(
        source / "a.tar", {"0.png": png(0), "0.txt": b"x", "._0.png": b"junk", "__MACOSX/._0.txt": b"junk"}
    )
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = read(source)
    assert levels(found) == [0]
    assert [str(error).partition("a.tar: ")[2] for error in found.errors] == [
        "1.png: is a link or a device, not a file"
    ]


def test_a_byte_order_mark_is_not_part_of_a_caption(source):
    mark = b"\xef\xbb\xbf"
    members = {"0.png": png(0), "0.txt": mark + b"a", "1.png": png(1), "1.json": mark + b'{"text": "b"}'}
    write_tar(source / "a.tar", members)
    assert read(source).captions == ["a", "b"]


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("content", "message"), [(b"version https://git-lfs", "a git-lfs pointer instead of the file"), (b"", "empty (0")]
)
def test_a_file_that_was_not_downloaded_is_named_with_the_cause(content, message, name, source):
    source.mkdir()
    (source / name).write_bytes(content)
    found = read(source)
    assert f"{name}: " in error_summary(found)
    assert message in error_summary(found)
