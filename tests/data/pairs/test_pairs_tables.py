"""Tables of pairs: a damaged row group or record batch loses only its own rows, which are counted."""

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from tests.data.pairs.pair_files import error_summary, levels, png, read, write_images

COUNT = 200
GROUP = 40


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def table(count=COUNT, **columns):
    images = [{"bytes": png(row), "path": f"{row}.png"} for row in range(count)]
    return pa.table({"image": images, "text": [f"level {row}" for row in range(count)]} | columns)


def write_arrow(file, content, kind="stream", rows=GROUP, **options):
    make = {"stream": ipc.new_stream, "file": ipc.new_file}[kind]
    with make(str(file), content.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=rows)


def damage(file, place, length=16):
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"\xff" * length)


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
@pytest.mark.parametrize("column", ["image.bytes", "text"])
@pytest.mark.parametrize("group", [0, 2, 4])
def test_a_damaged_block_of_parquet_costs_its_own_row_group(group, column, compression, source):
    file = source / "a.parquet"
    parquet.write_table(table(), file, row_group_size=GROUP, compression=compression, use_dictionary=False)
    metadata = parquet.ParquetFile(file).metadata.row_group(group)
    chunk = next(
        metadata.column(number)
        for number in range(metadata.num_columns)
        if metadata.column(number).path_in_schema == column
    )
    damage(file, chunk.data_page_offset, 24)
    found = read(source)
    lost = range(GROUP * group, GROUP * group + GROUP)
    assert levels(found) == [row for row in range(COUNT) if row not in lost]
    assert found.names[-1] == ("a/159" if group == 4 else "a/199")
    assert f"{GROUP} of {COUNT} pairs of source are bad: " in error_summary(found)
    assert (
        f"a.parquet: row group {group} (rows {lost[0]} to {lost[-1]}, {GROUP} rows): cannot be read"
        in error_summary(found)
    )
    assert f"({GROUP} x cannot be read)" in error_summary(found)


def test_a_table_without_its_footer_is_an_unknown_number(source):
    parquet.write_table(table(3), source / "a.parquet")
    parquet.write_table(table(3), source / "b.parquet")
    (source / "a.parquet").write_bytes((source / "a.parquet").read_bytes()[:-100])
    found = read(source)
    assert levels(found) == [0, 1, 2]
    assert "0 of 3 pairs of source are bad, and an unknown number of pairs could not be read" in error_summary(found)


@pytest.mark.parametrize(("kind", "suffix"), [("stream", ".arrow"), ("file", ".arrow"), ("file", ".FEATHER")])
def test_both_formats_of_arrow_are_read(kind, suffix, source):
    write_arrow(source / f"a{suffix}", table(), kind)
    found = read(source)
    assert (levels(found), found.errors) == (list(range(COUNT)), [])


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_damaged_batch_of_arrow_costs_its_own_rows(kind, source):
    """Its offsets point outside of the file. Arrow itself would follow them."""
    file = source / "a.arrow"
    write_arrow(file, table(), kind)
    content = file.read_bytes()
    # In the third batch, the offsets of the captions come before the captions.
    damage(file, content.index(b"level 80level 81") - 40, 8)
    found = read(source)
    assert levels(found) == [*range(80), *range(120, COUNT)]
    assert f"{GROUP} of {COUNT} pairs" in error_summary(found)
    assert "a.arrow: rows 80 to 119: cannot be read" in error_summary(found)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_batch_that_cannot_be_decompressed_is_an_unknown_number(kind, source):
    file = source / "a.arrow"
    write_arrow(file, table(), kind, compression="zstd")
    content = file.read_bytes()
    magic = b"\x28\xb5\x2f\xfd"
    third = [place for place in range(len(content)) if content.startswith(magic, place)]
    damage(file, third[len(third) // 2], 8)
    found = read(source)
    assert len(found.captions) == COUNT - GROUP
    assert "an unknown number of rows cannot be read" in error_summary(found)


@pytest.mark.parametrize("keep", ["batch", "half"])
def test_a_stream_that_is_cut_short_is_an_error(keep, source):
    file = source / "a.arrow"
    write_arrow(file, table())
    content = file.read_bytes()
    file.write_bytes(content[:-8] if keep == "batch" else content[: len(content) // 2])
    found = read(source)
    assert levels(found) == list(range(COUNT if keep == "batch" else len(found.captions)))
    assert "an unknown number of pairs could not be read" in error_summary(found)
    assert 0 < len(found.captions) <= COUNT


def test_text_that_is_not_utf_8_costs_its_own_row(source):
    latin = pa.array([b"caf\xe9", b"good"], pa.binary()).view(pa.string())
    parquet.write_table(table(2, text=latin), source / "a.parquet")
    write_arrow(source / "b.arrow", table(2, text=latin))
    found = read(source)
    assert levels(found) == [1, 1]
    assert all(f"{name}: row 0: is not UTF-8" in error_summary(found) for name in ("a.parquet", "b.arrow"))


@pytest.mark.parametrize("kind", ["bytes and path", "path", "file_name", "large", "dictionary"])
def test_images_may_be_named_instead_of_stored(kind, source, tmp_path):
    """Hugging Face's datasets writes such tables. The image files are next to the table or have absolute paths."""
    write_images(source / "images", 3)
    names = ["images/0.png", str(source / "images/1.png"), "images/nowhere.png"]
    text = pa.array(["a", "b", "c"])
    columns = {
        "bytes and path": {"image": [{"bytes": None, "path": name} for name in names], "text": text},
        "path": {"image": names, "text": text},
        "file_name": {"file_name": names, "text": text},
        "large": {"image": pa.array(names, pa.large_string()), "text": text.cast(pa.large_string())},
        "dictionary": {"image": names, "text": text.dictionary_encode()},
    }[kind]
    parquet.write_table(pa.table(columns), source / "a.parquet")
    found = read(source)
    assert (levels(found), found.captions) == ([0, 1], ["a", "b"])
    assert "row 2, images/nowhere.png: its image cannot be read (No such file or directory)" in error_summary(found)
    (source / "images/0.png").write_bytes(png(9) + b" ")
    (source / "images/nowhere.png").write_bytes(png(8))
    assert levels(read(source)) == [9, 1, 8]


@pytest.mark.parametrize("column", ["file_name", "path"])
def test_bytes_come_before_the_name_of_the_file_that_they_came_from(column, source):
    names = ["original/0.jpg", "original/1.jpg", None]
    parquet.write_table(table(3, **{column: names}), source / "a.parquet")
    assert levels(read(source)) == [0, 1, 2]


def test_a_column_that_is_not_there_is_an_error_of_all_rows_and_names_those_that_are(source):
    parquet.write_table(table(3), source / "a.parquet")
    parquet.write_table(table(2, better=["x", ""]), source / "b.parquet")
    parquet.write_table(table(2).drop(["image"]), source / "c.parquet")
    found = read(source, "better")
    assert found.captions == ["x"]
    assert "6 of 7 pairs" in error_summary(found)
    assert "a.parquet: has no caption column (expected 'better', found image, text)" in error_summary(found)
    assert "b.parquet: row 1: its caption is empty (column better)" in error_summary(found)
    assert "c.parquet: has no column image (its columns are text)" in error_summary(found)


def test_a_column_that_is_there_twice_is_an_error(source):
    twice = pa.table([pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])], names=["image", "text", "text"])
    parquet.write_table(twice, source / "a.parquet")
    assert "1 of 1 pairs of source are bad: " in error_summary(read(source))
    assert "a.parquet: has a column twice (text)" in error_summary(read(source))
