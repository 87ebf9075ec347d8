"""Image files: the crop, the content and order of folders and tars, and the errors of damaged files."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from decm_lightning.data.images.image_files import ImageFiles, center_crop
from tests.data.photos import encoded, photos, write_folder, write_tar


def pixels(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height", "box"), [(7, 4, (1, 0)), (4, 9, (0, 2)), (4, 4, (0, 0))])
def test_an_image_of_the_right_height_is_only_cut(width, height, box):
    image = pixels(width, height)
    left, top = box
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), 4), image[top : top + 4, left : left + 4])


def test_an_image_twice_as_large_is_averaged_over_boxes():
    image = pixels(20, 16)
    mean = image.reshape(8, 2, 10, 2, 3).mean((1, 3))
    found = center_crop(Image.fromarray(image), 8)
    # PIL rounds after either axis.
    assert np.abs(found - mean[:, 1:9]).max() <= 1


def test_other_sizes_are_resized_bicubically():
    # A cubic filter is exact on a ramp, except at the borders: 12 pixels become 8, each 1.5 wide.
    ramp = np.repeat(np.arange(12, dtype=np.uint8)[None, :, None] * 20, 12, 0).repeat(3, 2)
    found = center_crop(Image.fromarray(ramp), 8)
    expected = ((np.arange(8) + 0.5) * 1.5 - 0.5) * 20
    np.testing.assert_allclose(found[4, 2:6, 0], expected[2:6], atol=0.5)


def test_a_smaller_image_is_enlarged():
    assert center_crop(Image.fromarray(np.full((3, 5, 3), 77, np.uint8)), 16).tolist() == [[[77] * 3] * 16] * 16


def test_a_long_strip_costs_no_more_than_its_middle():
    strip = Image.new("RGB", (1, 40_000), "red")
    strip.paste("blue", (0, 19_990, 1, 20_010))
    assert (center_crop(strip, 64) == [0, 0, 255]).all()
    wide = Image.new("RGB", (30_000, 2), "red")
    wide.paste("blue", (14_900, 0, 15_100, 2))
    assert (center_crop(wide, 64) == [0, 0, 255]).all()


def test_class_folders_are_numbered_by_their_sorted_names(tmp_path):
    write_folder(tmp_path, 6)
    (tmp_path / "LICENSE").touch()
    (tmp_path / "flower" / "notes.md").touch()
    files = ImageFiles(str(tmp_path))
    assert [file.name for file in files.files] == [
        *("china/0000.png", "china/0002.png", "china/0004.png"),
        *("flower/0001.png", "flower/0003.png", "flower/0005.png"),
    ]
    assert [file.label for file in files.files] == [0, 0, 0, 1, 1, 1]
    assert files.num_classes == 2
    image, _ = photos(6)[3]
    expected = torch.from_numpy(center_crop(image, 16)).permute(2, 0, 1)
    assert torch.equal(files.read(4, 16), expected)


def test_other_modes_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (4, 4), 9).save(tmp_path / "a" / "grey.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "a" / "palette.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "a" / "cmyk.JPEG", "JPEG")
    files = ImageFiles(str(tmp_path))
    assert [files.read(number, 4).shape for number in range(3)] == [(3, 4, 4)] * 3
    assert files.read(1, 4).unique().tolist() == [9]


def labeled(count, labels):
    """Return the members of a tar: images in all formats, with labels in all formats in turn."""
    members = {}
    for number, (image, _) in enumerate(photos(count)):
        suffix = ("jpg", "png", "webp")[number % 3]
        members[f"train/{number:03d}.{suffix}"] = encoded(image, suffix)
        form = ("cls", "txt", "json")[number % 3]
        text = f'{{"label": {labels[number]}, "from": "here"}}' if form == "json" else f"{labels[number]}\n"
        members[f"train/{number:03d}.{form}"] = text.encode()
    return members


def test_tars_are_read_in_order_in_every_format_and_with_every_kind_of_label(tmp_path):
    write_tar(tmp_path / "b.tar", labeled(3, [4, 0, 2]))
    write_tar(tmp_path / "a.tar", labeled(2, [1, 1]) | {"train/readme.md": b"not of a sample"})
    for source in (tmp_path, tmp_path / "*.tar"):
        files = ImageFiles(str(source))
        assert [file.name for file in files.files][1:3] == ["a.tar: train/001.png", "b.tar: train/000.jpg"]
        assert [file.label for file in files.files] == [1, 1, 4, 0, 2]
        assert files.num_classes == 5
    image, _ = photos(2)[1]
    assert torch.equal(files.read(1, 16), torch.from_numpy(center_crop(image, 16)).permute(2, 0, 1))
    assert len(ImageFiles(str(tmp_path / "b.tar"), 1000)) == 3


def identities(source):
    files = ImageFiles(str(source))
    return [files.identity(file) for file in files.files]


def test_the_identity_is_of_name_label_size_and_time(tmp_path):
    write_folder(tmp_path / "a", 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert identities(tmp_path / "a") == identities(tmp_path / "b")
    image = tmp_path / "b" / "flower" / "0001.png"
    os.utime(image, ns=(0, 0))
    assert [x == y for x, y in zip(identities(tmp_path / "a"), identities(tmp_path / "b"), strict=True)] == [
        *(True, True, False, True),
    ]
    time = (tmp_path / "a" / "flower" / "0001.png").stat().st_mtime_ns
    image.write_bytes(b"another size")
    os.utime(image, ns=(time, time))
    assert identities(tmp_path / "a")[2] != identities(tmp_path / "b")[2]
    (tmp_path / "b" / "a new first class").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "a new first class" / "x.png")
    assert not set(identities(tmp_path / "a")) & set(identities(tmp_path / "b"))


def test_all_images_of_a_tar_differ_after_it_was_replaced(tmp_path):
    tar = write_tar(tmp_path / "x.tar", labeled(3, [0, 1, 2]))
    before = identities(tmp_path)
    assert identities(tmp_path) == before
    os.utime(tar, ns=(0, 0))
    assert not set(before) & set(identities(tmp_path))


def test_every_suffix_links_and_deep_folders_are_read_and_the_rest_is_counted(tmp_path):
    write_folder(tmp_path / "source", 2)
    for suffix in ("BMP", "gif", "tiff", "JPG", "jp2"):
        Image.new("RGB", (4, 4)).save(tmp_path / "source" / "china" / f"x.{suffix}")
    write_folder(tmp_path / "other", 2)
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "other" / "china")
    deep = tmp_path / "source" / "flower" / "deep" / "er"
    deep.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(deep / "x.webp")
    Image.new("RGB", (4, 4)).save(tmp_path / "source" / "flat.png")
    for name in ("china/._0.png", ".hidden/x.png", "notes.txt", "china/a.TXT", "china/old.tar", "more.tar.gz"):
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / name).touch()
    files = ImageFiles(str(tmp_path / "source"))
    assert [file.name for file in files.files] == [
        *("china/0000.png", "china/x.BMP", "china/x.JPG", "china/x.gif", "china/x.jp2", "china/x.tiff"),
        *("flower/0001.png", "flower/deep/er/x.webp", "linked/0000.png"),
    ]
    assert [file.label for file in files.files] == [0] * 6 + [1] * 2 + [2]
    assert files.left_out == {
        **{"images outside of class folders": 1, "hidden": 2, ".txt": 2, ".tar": 1, ".tar.gz": 1},
    }
    assert all(files.read(number, 4).shape == (3, 4, 4) for number in range(len(files)))
    assert [file.order for file in files.files] == sorted(file.order for file in files.files)


def test_a_folder_of_tars_counts_what_is_next_to_them(tmp_path):
    members = labeled(2, [0, 1])
    hidden = {
        "train/._000.jpg": b"mac",
        "PaxHeaders.7/train/001.png": b"pax",
        "train/000.mask.png": b"x",
        "README": b"",
    }
    write_tar(tmp_path / "x.tar", members | hidden)
    (tmp_path / "deep").mkdir()
    write_tar(tmp_path / "deep" / "x.TAR", labeled(1, [2]))
    write_folder(tmp_path / "classes", 2)
    (tmp_path / "list.csv").touch()
    files = ImageFiles(str(tmp_path))
    assert [file.name for file in files.files] == [
        "deep/x.TAR: train/000.jpg",
        "x.tar: train/000.jpg",
        "x.tar: train/001.png",
    ]
    assert files.left_out == {"hidden": 2, ".mask.png": 1, "no suffix": 1, "images next to tars": 2, ".csv": 1}
    assert [file.order for file in files.files] == sorted(file.order for file in files.files)


def test_tars_of_one_name_in_two_folders_are_two(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "x.tar", labeled(1, [0]))
    names = [file.name for file in ImageFiles(str(tmp_path / "*" / "x.tar")).files]
    assert names == ["a/x.tar: train/000.jpg", "b/x.tar: train/000.jpg"]


def test_links_and_second_images_of_a_name_in_a_tar_are_counted(tmp_path):
    write_tar(tmp_path / "x.tar", {"1.png": b"old", "1.png ": b"", "1.cls": b"1"})
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for name, kind in (("1.png", None), ("2.png", tarfile.LNKTYPE), ("3.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.size = len(IMAGE) if kind is None else 0
            if kind:
                member.type, member.linkname = kind, "1.png"
            tar.addfile(member, io.BytesIO(IMAGE))
    files = ImageFiles(str(tmp_path))
    assert files.left_out == {"images with a duplicate name": 1, ".png ": 1, "links and sparse files": 2}
    assert files.read(0, 4).shape == (3, 4, 4)


def test_skip_leaves_out_what_has_no_valid_label_and_the_rest_of_a_cut_tar(tmp_path):
    members = labeled(3, [0, 1, 2])
    bad = {"a.png": IMAGE, "b.cls": b"1", "c.png": IMAGE, "c.cls": b"cat", "d.png": IMAGE, "d.cls": b"9"}
    tar = write_tar(tmp_path / "x.tar", members | bad)
    files = ImageFiles(str(tmp_path), 3, "skip")
    assert [file.label for file in files.files] == [0, 1, 2]
    assert files.left_out == {"no label": 1, "no image": 1, "no class number": 1, "label not from 0 to 2": 1}
    whole = write_tar(tmp_path / "x.tar", members).read_bytes()
    tar.write_bytes(whole[: len(whole.rstrip(b"\0")) - 1000])
    files = ImageFiles(str(tmp_path), 3, "skip")
    assert files.left_out["damaged places in tars"] == 1
    assert len(files) == 2


def test_a_damaged_header_costs_its_own_image_and_joined_tars_are_whole(tmp_path):
    tar = write_tar(tmp_path / "x.tar", labeled(5, range(5)))
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        name, place = next((member.name, member.offset) for member in opened if member.name.startswith("train/001."))
    content[place + 100] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tar is damaged \(\d+ bytes before"):
        ImageFiles(str(tar))
    files = ImageFiles(str(tar), None, "skip")
    assert [file.label for file in files.files] == [0, 2, 3, 4]
    assert files.left_out == {"damaged places in tars": 1, "no label" if name.endswith("cls") else "no image": 1}
    joined = write_tar(tmp_path / "a.tar", labeled(2, [0, 1])).read_bytes()
    other = {f"b{name}": content for name, content in labeled(2, [5, 6]).items()}
    tar.write_bytes(joined + write_tar(tmp_path / "b.tar", other).read_bytes())
    assert [file.label for file in ImageFiles(str(tar)).files] == [0, 1, 5, 6]


@pytest.mark.parametrize(("mark", "name"), [(b"\x1f\x8b", "gzip"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz")])
def test_a_compressed_tar_is_refused_by_name(mark, name, tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(mark + bytes(1000))
    with pytest.raises(ValueError, match=rf"x\.tar\.gz is compressed \({name}\)"):
        ImageFiles(str(tmp_path / "x.tar.gz"))
    with pytest.raises(FileNotFoundError, match=r"\.tar\.gz \(1\)"):
        ImageFiles(str(tmp_path))


def test_names_that_are_not_utf_8_are_escaped(tmp_path):
    (tmp_path / "c").mkdir()
    name = os.fsencode(tmp_path / "c") + b"/na\xefve\n.png"
    with open(name, "wb") as file:
        file.write(IMAGE)
    files = ImageFiles(str(tmp_path))
    assert files.files[0].name == "c/na\\xefve\\n.png"
    assert files.read(0, 4).shape == (3, 4, 4)
    assert files.identity(files.files[0]).encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "is cut short"),
        (
            lambda whole: whole[: -(-len(whole.rstrip(b"\0")) // 512) * 512],
            r"x.tar is cut short: it does not end as a tar \(after train/008.json\)",
        ),
        (lambda whole: b"", r"x.tar is .*empty \(0 bytes\)"),
        (lambda whole: b"x" * 100 + whole, r"x.tar is not a tar \(no member can be read\)"),
    ],
)
def test_a_tar_that_is_not_whole_is_refused(damage, message, tmp_path):
    file = write_tar(tmp_path / "x.tar", labeled(9, range(9)))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        ImageFiles(str(file))


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path):
    file = write_tar(tmp_path / "x.tar", labeled(3, range(3)))
    whole = file.read_bytes()
    for length in range(0, len(whole.rstrip(b"\0")), 256):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.tar"):
            ImageFiles(str(file))


IMAGE = encoded(Image.new("RGB", (4, 4)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": IMAGE, "1.cls": b"10"}, "x.tar: the label of 1.png is 10: expected from 0 to 9"),
        ({"1.png": IMAGE, "1.cls": b"-1"}, "x.tar: the label of 1.png is -1: expected from 0 to 9"),
        ({"1.png": IMAGE, "1.cls": b"cat"}, "x.tar: 1.cls does not hold a class number: got 'cat'"),
        ({"1.png": IMAGE, "1.cls": b"9" * 30}, "x.tar: 1.cls does not hold a class number: got '999999"),
        ({"1.png": IMAGE, "1.json": b'{"label": 3.7}'}, "1.json does not hold a class number: got '3.7'"),
        ({"1.png": IMAGE, "1.json": b'{"name": 3}'}, "1.json does not hold a class number"),
        ({"1.png": IMAGE, "1.json": b"[3]"}, "1.json does not hold a class number"),
        ({"1.png": IMAGE, "2.png": IMAGE, "1.cls": b"1"}, "x.tar: 2.png has no label next to it"),
        ({"1.png": IMAGE, "1.cls": b"1", "2.cls": b"1"}, "x.tar: 2.cls has no image next to it"),
    ],
)
def test_a_label_that_does_not_fit_is_named_with_its_tar(members, message, tmp_path):
    file = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=message) as refused:
        ImageFiles(str(file), 10)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "place"),
    [(b"no image", "a/1.jpg"), (b"", "a/1.jpg"), (encoded(photos(1)[0][0], "jpg")[:400], "a/1.jpg")],
)
def test_a_broken_image_is_named(content, place, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=f"{place} cannot be read as an image "):
        ImageFiles(str(tmp_path)).read(0, 16)
    file = write_tar(tmp_path / "x.tar", {place: content, "a/1.cls": b"0"})
    with pytest.raises(ValueError, match=f"x.tar: {place} cannot be read as an image ") as refused:
        ImageFiles(str(file)).read(0, 16)
    assert "BytesIO" not in str(refused.value)


def test_a_class_folder_named_like_a_tar_is_not_a_tar(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "china").rename(tmp_path / "china.tar")
    assert len(ImageFiles(str(tmp_path))) == 2


def test_sources_without_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        ImageFiles(str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="no image"):
        ImageFiles(str(tmp_path))
    write_folder(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image .*empty"):
        ImageFiles(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no image in"):
        ImageFiles(str(write_tar(tmp_path / "x.tar", {})))


def test_folders_and_classes_must_agree(tmp_path):
    write_folder(tmp_path, 2)
    with pytest.raises(ValueError, match="has 2 class folders: num_classes is 1000"):
        ImageFiles(str(tmp_path), 1000)
