"""The image reader: all modes and formats as 8 bits, upright and on white, and the errors of broken files."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from decm_lightning.image_listing import broken, printable
from decm_lightning.image_reader import (
    NOT_READ,
    Location,
    formats,
    in_threads,
    pixels_of,
    read_image,
    read_mode,
    read_modes,
    suffixes,
)

RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
"""All 16-bit values that an 8-bit value represents exactly."""
EIGHT = (RAMP // 257).astype(np.uint8)


def file(image: Image.Image, kind: str = "png", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def values(source: bytes | Path) -> np.ndarray:
    return np.asarray(read_image(source))


def png(width: int, height: int, depth: int, color: int, rows: bytes, **chunks: bytes) -> bytes:
    """Return a PNG of these bits, because Pillow cannot write all depths and no 16-bit colors."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    others = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + head + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "tiff", "jpeg2000"])
def test_16_bits_are_divided_by_257(kind):
    assert (values(file(Image.fromarray(RAMP), kind)) == EIGHT).all()


def test_16_bits_are_rounded_to_the_nearest_value():
    deep = np.array([[128, 129, 257 + 128, 257 + 129, 65535, 0]], np.uint16)
    assert values(file(Image.fromarray(deep))).tolist() == [[0, 1, 1, 2, 255, 0]]


def test_16_bits_in_either_order_of_bytes_and_in_32():
    big = b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes()
    assert (values(big) == EIGHT).all()
    tiff = file(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "tiff")
    assert (values(tiff) == EIGHT).all()
    assert (values(file(Image.fromarray(RAMP.astype(np.int32)), "tiff")) == EIGHT).all()


def test_16_bits_of_color_and_alpha():
    pixel = struct.pack(">4H", 65535, 32896, 0, 65535)
    assert values(png(1, 1, 16, 6, b"\0" + pixel)).tolist() == [[[255, 128, 0]]]
    assert values(png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 51400, 0))).tolist() == [[255]]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_from_the_smallest_range_that_holds_them(top):
    found = values(file(Image.fromarray((EIGHT / 255 * top).astype(np.float32)), "tiff"))
    assert (found == EIGHT).all()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer instead of the file"),
        (b"<!DOCTYPE html><html>", "a web page instead of the file"),
        (bytes(1000), "all zeros at the beginning"),
        (b"not an image", "cannot identify image file"),
    ],
)
def test_a_file_that_is_not_an_image_is_named_with_the_cause(content, cause, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read, source in ((read_image, content), (read_image, path), (read_mode, Location(str(path)))):
        with pytest.raises(ValueError, match=re.escape(f"cannot be read as an image ({cause}")):
            read(source)


def test_12_bits_and_white_at_0_of_tiff():
    """Pillow does not scale 12 bits, and inverts 8 bits only."""
    for ramp in (RAMP, RAMP.astype(np.float32)):
        plain = file(Image.fromarray(ramp), "tiff")
        inverted = plain.replace(struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0))
        assert inverted != plain
        assert (values(inverted) == 255 - EIGHT).all()
    bits = struct.pack("<HHIHH", 258, 3, 1, 12, 0)
    twelve = file(Image.fromarray(np.zeros((1, 4), np.uint16)), "tiff")
    packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])
    start = twelve.replace(struct.pack("<HHIHH", 258, 3, 1, 16, 0), bits).replace(
        struct.pack("<HHII", 279, 4, 1, 8), struct.pack("<HHII", 279, 4, 1, 6)
    )
    with Image.open(io.BytesIO(start)) as opened:
        at = opened.tile[0][2]
    assert values(start[:at] + packed + start[at + 6 :]).tolist() == [[255, 0, 128, 0]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0.0, np.nan]], np.float32), "NaN or infinite"),
        (np.array([[0.0, np.inf]], np.float32), "NaN or infinite"),
        (np.array([[-0.5, 1.0]], np.float32), "from -0.5 to 1: expected 0 to 65535"),
        (np.array([[0.0, 70000.0]], np.float32), "from 0 to 70000: expected 0 to 65535"),
        (np.array([[-3, 70000]], np.int32), "from -3 to 70000: expected 0 to 65535"),
    ],
)
def test_values_without_a_known_range_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        read_image(file(Image.fromarray(array), "tiff"))


HALF = (9, 200, 77, 128)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_transparency_is_composited_on_white(kind):
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    found = values(file(Image.new("RGBA", (4, 4), HALF), kind, **options))
    expected = [round(value * 128 / 255 + 127) for value in HALF[:3]]
    assert np.abs(found - np.array(expected)).max() <= 1
    hidden = values(file(Image.new("RGBA", (4, 4), (9, 200, 77, 0)), kind, **options))
    assert (hidden == 255).all()


def test_gray_with_alpha_stays_gray():
    image = read_image(file(Image.new("LA", (4, 4), (0, 128))))
    assert (image.mode, np.unique(image).tolist()) == ("L", [127])


def test_premultiplied_colors_are_divided_by_their_opacity():
    tiff = file(Image.new("RGBA", (4, 4), (128, 64, 0, 128)), "tiff")
    premultiplied = tiff.replace(struct.pack("<HHIHH", 338, 3, 1, 2, 0), struct.pack("<HHIHH", 338, 3, 1, 1, 0))
    assert premultiplied != tiff
    assert values(premultiplied)[0, 0].tolist() == [255, 191, 127]


@pytest.mark.filterwarnings("error")
def test_palettes_keep_colors_and_transparency():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert values(file(palette))[0, 0].tolist() == [10, 20, 30]
    assert (values(file(palette, transparency=1)) == 255).all()
    assert (values(file(palette, "gif", transparency=1)) == 255).all()
    assert values(file(palette, transparency=b"\0\x80"))[0, 0].tolist() == [132, 137, 142]
    palette.putpalette([0, 0, 0, 10, 10, 10])
    assert read_image(file(palette)).mode == "L"


def test_a_single_transparent_color_is_known_in_every_depth():
    rgb = Image.new("RGB", (2, 1), (10, 20, 30))
    rgb.putpixel((1, 0), (1, 2, 3))
    assert values(file(rgb, transparency=(10, 20, 30))).tolist() == [[[255] * 3, [1, 2, 3]]]
    assert values(file(Image.new("L", (1, 1), 7), transparency=7)).tolist() == [[255]]
    assert values(file(Image.fromarray(RAMP), transparency=257 * 3))[0, :5].tolist() == [0, 1, 2, 255, 4]
    for depth, color, row, transparent, expected in (
        (1, 0, b"\x40", b"\0\1", [0, 255]),
        (1, 0, b"\x40", b"\0\0", [255, 255]),
        (2, 0, b"\x50", b"\0\1", [255, 255]),
        (4, 0, b"\x12", b"\0\1", [255, 34]),
        (16, 2, struct.pack(">6H", 257, 514, 771, 0, 0, 0), struct.pack(">3H", 257, 514, 771), [[255] * 3, [0] * 3]),
    ):
        found = values(png(2, 1, depth, color, b"\0" + row, tRNS=transparent))
        assert found.tolist() == [expected], depth


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255
    stored = Image.fromarray(upright).convert("RGB")
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(inverse[orientation]))
    found = values(file(stored, kind, exif=exif))[..., 0]
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() < 60


def test_damaged_exif_data_are_ignored():
    content = file(Image.new("RGB", (16, 8), (200, 0, 0)), "jpeg", exif=b"Exif\0\0not a TIFF header at all")
    assert read_image(content).size == (16, 8)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "1", "RGBX"])
def test_other_modes_become_8_bits_gray_or_rgb(mode, tmp_path):
    kind = "jpeg" if mode == "YCbCr" else "tiff"
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    image = image.convert(mode) if mode != "HSV" else image
    found = read_image(file(image, kind))
    assert found.mode == ("L" if mode == "1" else "RGB")
    assert np.asarray(found).min() >= 250


def test_of_an_animation_the_first_frame_is_read():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("gif", "png", "webp", "tiff"):
        found = values(file(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert found[0, 0, 0] > 250
        assert found[0, 0, 2] < 5


@pytest.mark.parametrize(
    "kind", ["bmp", "gif", "ico", "jpeg", "jpeg2000", "pcx", "png", "ppm", "sgi", "tga", "tiff", "webp"]
)
def test_every_format_that_pillow_decodes_is_read(kind, tmp_path):
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    assert np.abs(values(file(image, kind))[8, 8].astype(int) - [200, 100, 50]).max() < 12
    assert {".JPEG".lower(), ".tif", ".bmp", ".gif", ".mpo", ".jp2", ".pfm", ".qoi"} <= suffixes()
    # Since Pillow 11.3.
    assert (".avif" in suffixes()) == (features.check("avif") is True)


def test_formats_that_run_programs_or_have_no_pixels_are_not_read():
    assert not set(NOT_READ) & set(formats())
    assert not {".eps", ".ps", ".wmf", ".emf", ".h5", ".mpg", ".pdf", ".txt", ".json", ".cls"} & suffixes()
    postscript = file(Image.new("RGB", (4, 4)), "eps")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(postscript)


def test_a_broken_file_is_named_on_one_line(tmp_path, monkeypatch):
    place = tmp_path / "a.png"
    whole = file(Image.effect_noise((64, 64), 50))
    for content in (b"", b"text", whole[:100], whole[:900], b"P6 0 5 255\n"):
        place.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.png .*\(.+\)$") as error:
            read_image(place)
        assert "\n" not in str(error.value)
        assert str(error.value).count("a.png") == 1
    with pytest.raises(ValueError, match=r"b\.png .*\(No such file or directory\)"):
        read_image(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    place.write_bytes(whole)
    for read in (read_image, lambda path: read_mode(Location(str(path)))):
        with pytest.raises(ValueError, match="4096 pixels"):
            read(place)


def test_the_header_tells_the_mode(tmp_path):
    colored = Image.new("P", (2, 2), 1)
    colored.putpalette([0, 0, 0, 1, 2, 3])
    gray = Image.new("P", (2, 2), 1)
    gray.putpalette([0, 0, 0, 1, 1, 1])
    images = {
        "rgb.png": (Image.new("RGB", (2, 2)), "RGB"),
        "rgba.png": (Image.new("RGBA", (2, 2)), "RGB"),
        "cmyk.jpg": (Image.new("CMYK", (2, 2)), "RGB"),
        "colored.png": (colored, "RGB"),
        "gray.png": (gray, "L"),
        "deep.png": (Image.fromarray(RAMP), "L"),
        "float.tif": (Image.fromarray(np.zeros((2, 2), np.float32)), "L"),
        "alpha.png": (Image.new("LA", (2, 2)), "L"),
        "bits.png": (Image.new("1", (2, 2)), "L"),
    }
    for name, (image, _) in images.items():
        image.save(tmp_path / name)
    places = [Location(str(tmp_path / name)) for name in images]
    assert list(read_modes(places)) == [mode for _, mode in images.values()]
    assert [read_image(Path(place.file)).mode for place in places] == list(read_modes(places))
    (tmp_path / "rgb.png").write_bytes(b"broken")
    first, *others = read_modes(places)
    assert isinstance(first, ValueError)
    assert "RGB" in others


def test_a_header_behind_the_first_bytes_is_found(tmp_path):
    """A photo may have long EXIF data and profiles, and libtiff writes its header at the end."""
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg", icc_profile=bytes(200_000))
    Image.effect_noise((400, 400), 50).convert("RGB").save(tmp_path / "b.tif", compression="tiff_lzw")
    assert [read_mode(Location(str(tmp_path / name))) for name in ("a.jpg", "b.tif")] == ["RGB", "RGB"]
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "tar").write_bytes(b"x" * 1000 + whole + b"x" * 1000)
    assert read_mode(Location(str(tmp_path / "tar"), 1000, len(whole))) == "RGB"
    assert Location(str(tmp_path / "tar"), 1000, len(whole)).read() == whole


def test_threads_keep_the_order_and_end_early():
    assert list(in_threads(lambda item: item * 2, list(range(1000)))) == list(range(0, 2000, 2))
    seen = []
    results = in_threads(seen.append, list(range(100_000)))
    next(results)
    results.close()
    assert len(seen) < 100_000


def test_broken_images_are_counted_and_three_named():
    assert broken({"a": "x"}) == "1 broken image: a x"
    assert broken(dict.fromkeys("abcde", "is bad")) == ("5 broken images: a is bad; b is bad; c is bad; and 2 more")


def test_names_are_printable():
    assert printable("caf\u00e9.png") == "caf\u00e9.png"
    assert printable("na\udcefve\n.png") == "na\\xefve\\n.png"


def test_pixels_are_cropped_about_the_center_and_have_three_channels():
    wide = Image.new("RGB", (48, 16), "red")
    wide.paste("blue", (16, 0, 32, 16))
    # The filter also uses pixels outside of the crop.
    assert (pixels_of(file(wide), 8)[:, :, 2:6] == torch.tensor([0, 0, 255])[:, None, None]).all()
    assert pixels_of(file(Image.new("L", (4, 4), 5)), 4).unique().tolist() == [5]
    assert pixels_of(file(Image.fromarray(RAMP)), 16).shape == (3, 16, 16)
