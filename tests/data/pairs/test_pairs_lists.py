"""Lists of images: a damaged line loses only its own row, and all other rows are read."""

import csv
import io
import json
import random
import time

import pytest

from decm_lightning.data.pairs.csv_records import MAX_LINES, records
from tests.data.pairs.pair_files import error_summary, levels, png, read, write_images

COUNT = 8


@pytest.fixture
def source(tmp_path):
    """A folder with 0.png to 7.png."""
    write_images(tmp_path / "source", COUNT)
    return tmp_path / "source"


def write(source, rows, header="file_name,text", end="\n", encoding="utf-8"):
    """Write a list of all images, with some rows replaced."""
    lines = [header, *(rows.get(row, f"{row}.png,the digit {row}") for row in range(COUNT))]
    (source / "list.csv").write_bytes("".join(line + end for line in lines).encode(encoding))


DAMAGE = {
    "an open quote": ('3.png,"five inch nail', "line 5, 3.png: the quote of line 5 is not closed"),
    "a field beyond csv's limit": ("3.png," + "x" * 140_000, "line 5, 3.png: cannot be read (field larger than"),
    "a quoted field beyond it": ('3.png,"' + "x" * 140_000 + '"', "line 5, 3.png: cannot be read (field larger than"),
    "text after a quote": ('3.png,"five" nails', "line 5, 3.png: text follows a closing quote"),
    "too few fields": ("3.png", "line 5, 3.png: has another number of fields than the header (1, "),
    "too many fields": ("3.png,a,b", "line 5, 3.png: has another number of fields than the header (3,"),
    "a NUL byte": ("3.png,a\0b", "line 5, 3.png: has a NUL byte"),
    "an empty caption": ('3.png," "', "line 5, 3.png: its caption is empty"),
    "no image": ("nowhere.png,x", "line 5, nowhere.png: its image cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_row_costs_itself_alone(kind, end, source):
    row, message = DAMAGE[kind]
    write(source, {3: row}, end=end)
    found = read(source)
    assert levels(found) == [0, 1, 2, 4, 5, 6, 7]
    assert found.captions == [f"the digit {row}" for row in levels(found)]
    assert message in str(found.errors[0])
    # The image that is named by the damaged row is not counted again.
    assert len(found.errors) == (2 if kind == "no image" else 1)


def test_a_name_that_no_file_can_have_costs_its_own_row(source):
    """os.path.realpath raises ValueError for such a name."""
    write(source, {3: "3\0.png,x"})
    found = read(source)
    assert levels(found) == [0, 1, 2, 4, 5, 6, 7]
    assert "line 5, 3\0.png: has a NUL byte" in error_summary(found)
    (source / "list.csv").unlink()
    lines = [{"file_name": "\ud800.png", "text": "x"}, {"file_name": "1.png", "text": "b"}]
    (source / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read(source)
    assert levels(found) == [1]
    assert "list.jsonl: line 1, \\ud800.png: its image cannot be read" in str(found.errors[0])


def as_csv(rows):
    content = io.StringIO(newline="")
    csv.writer(content, lineterminator="\n").writerows(rows)
    return list(io.StringIO(content.getvalue(), newline=""))


def read_records(lines):
    return list(records(lines, ",", ["file_name", "text"], lambda fields: fields[0].endswith(".png")))


def test_what_the_csv_module_writes_is_read_and_one_more_quote_costs_its_own_row():
    """Captions are random commas, quotes and line breaks. Another quote is inserted at a random place."""
    chance = random.Random(0)
    for _ in range(2500):
        rows = [[f"{row}.png", "".join(chance.choices('ab ,"\n', k=9)) + "z"] for row in range(6)]
        assert [record.fields for record in read_records(as_csv(rows))] == rows
        rows = [[f"{row}.png", "".join(chance.choices("ab ,", k=9)) + "z"] for row in range(6)]
        lines, bad = as_csv(rows), chance.randrange(6)
        place = chance.randrange(len(lines[bad]) - 1)
        lines[bad] = lines[bad][:place] + '"' + lines[bad][place:]
        found = {record.line: (record.fields, record.error) for record in read_records(lines)}
        for row in {*range(6)} - {bad}:
            assert found.get(row + 1) == (rows[row], None), lines


@pytest.mark.parametrize(
    "next_row", ['4.png,the 5"', '4.png,"', '4.png,""', '4.png,"a, b"', '4.png,"a" b', '"4.png",x']
)
def test_an_open_quote_swallows_no_row_whose_own_quotes_could_close_it(next_row, source):
    write(source, {3: '3.png,"five inch nail', 4: next_row})
    found = read(source)
    good = next_row in ('4.png,the 5"', '4.png,"a, b"', '"4.png",x')
    assert levels(found) == [0, 1, 2, *([4] if good else []), 5, 6, 7]
    assert "line 5, 3.png: the quote of line 5 is not closed" in str(found.errors[0])


def test_an_open_quote_in_the_last_line_and_one_in_a_caption_before_its_file(source):
    write(source, {7: '7.png,"open'})
    assert "the quote of line 9 is not closed" in str(read(source).errors[0])
    rows = {row: f"the digit {row},{row}.png" for row in range(COUNT)}
    write(source, rows | {3: '"five inch nail,3.png', 4: 'the 5",4.png'}, header="text,file_name")
    found = read(source)
    assert levels(found) == [0, 1, 2, 4, 5, 6, 7]
    assert found.captions[3] == 'the 5"'


@pytest.mark.parametrize("header", ["file_name,text", "text,file_name"])
def test_captions_with_line_breaks_commas_and_quotes_are_read(header, source):
    texts = {3: 'one,\nthe "second", line\r\n\nfoo, bar', 5: "\nalone", 6: 'a "quote"'}
    rows = {}
    for row, text in texts.items():
        quoted = '"' + text.replace('"', '""') + '"'
        rows[row] = f"{row}.png,{quoted}" if header.startswith("file") else f"{quoted},{row}.png"
    if header.startswith("text"):
        rows = {row: f"the digit {row},{row}.png" for row in range(COUNT)} | rows
    write(source, rows, header)
    found = read(source)
    assert not found.errors
    assert levels(found) == list(range(COUNT))
    assert [found.captions[row] for row in texts] == [" ".join(text.split()) for text in texts.values()]


def test_many_open_quotes_take_no_quadratic_time():
    lines = [f'{row}.png,"open {row}\n' for row in range(20_000)]
    start = time.perf_counter()
    found = list(records(lines, ",", [], lambda fields: False))
    assert time.perf_counter() - start < 10
    assert [record.line for record in found] == list(range(1, 20_001))
    assert all(record.error for record in found)


def test_a_quote_may_stay_open_for_a_hundred_lines_and_no_longer():
    for length, errors in ((MAX_LINES, 0), (MAX_LINES + 1, MAX_LINES + 1)):
        lines = ['a,"x\n', *["x\n"] * (length - 2), 'x"\n']
        found = list(records(lines, ",", [], lambda fields: False))
        assert len(found) == (errors or 1)


def test_letters_of_another_encoding_cost_their_own_row(source):
    write(source, {3: "3.png,caf\xe9"}, encoding="latin-1")
    found = read(source)
    assert levels(found) == [0, 1, 2, 4, 5, 6, 7]
    assert "list.csv: line 5, 3.png: is not UTF-8" in str(found.errors[0])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_list_in_another_encoding_is_refused(encoding, source):
    write(source, {}, encoding=encoding)
    with pytest.raises(ValueError, match=r"list\.csv .*UTF-8"):
        read(source)


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_a_mark_of_utf_8_blank_lines_and_other_separators_are_read(mark, source):
    lines = ["", f'"file_name"{mark} text ', *(f"{row}.png{mark}the digit {row}" for row in range(COUNT)), ""]
    (source / "list.CSV").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    found = read(source)
    assert not found.errors
    assert found.captions == [f"the digit {row}" for row in range(COUNT)]


HEADERS = {
    "no image column": ("name,text", r"line 1: the header has no column of image files .*its columns are name, text"),
    "no caption column": ("file_name,label", r"line 1: the header has no caption column .*its columns are file_name"),
    "no header": ("0.png,zero", r"the header has no column of image files .*its columns are 0.png, zero"),
    "twice": ("file_name,text,text", r"the header has the column 'text' 2 times"),
    "an open quote": ('file_name,"text', r"the header cannot be read: the quote of line 1 is not closed"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_cannot_be_used_is_refused_with_its_columns(kind, source):
    header, message = HEADERS[kind]
    write(source, {}, header)
    with pytest.raises(ValueError, match=message):
        read(source)


def test_a_column_that_is_not_there_is_refused_and_an_empty_file(source):
    write(source, {})
    with pytest.raises(ValueError, match=r"'recaption'.*file_name, text"):
        read(source, "recaption")
    (source / "list.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"list.csv is empty"):
        read(source)


def test_the_first_caption_that_is_not_empty_is_used(source):
    write(source, {row: f"{row}.png,,the digit {row}" for row in range(COUNT)}, "file_name,caption,text")
    assert read(source).captions == [f"the digit {row}" for row in range(COUNT)]
    assert "8 x its caption is empty" in error_summary(read(source, "caption"))


def test_json_lines_are_read_and_a_damaged_line_costs_itself(source):
    lines = [json.dumps({"file_name": f"{row}.png", "text": f"the digit {row}"}) for row in range(COUNT)]
    lines[1] = '{"file_name": "1.png", "text": "cut'
    lines[2] = '["2.png"]'
    lines[4] = '{"file_name": "4.png"}'
    lines[5] = '{"file_name": "5.png", "text": 5}'
    content = "\n".join(lines).encode() + b'\n\n{"file_name": "6.png", "text": "caf\xe9"}\n'
    (source / "metadata.jsonl").write_bytes(content)
    found = read(source)
    assert found.captions == ["the digit 0", "the digit 3", "the digit 6", "the digit 7"]
    for expected in (
        "metadata.jsonl: line 2: is not JSON",
        "line 3: is not a JSON object",
        "line 5, 4.png: has no caption column (expected caption or text or prompt, found file_name)",
        "line 6, 5.png: its caption is not text (5)",
        "line 10, 6.png: is not UTF-8",
        "1.png: has no caption in metadata.jsonl",
    ):
        assert any(expected in str(error) for error in found.errors), expected


def test_images_in_linked_folders_and_under_other_names_are_the_same_files(source, tmp_path):
    """Rows name them through a link and a parent folder, and a link in the folder leads back to it."""
    write_images(tmp_path / "elsewhere", 2)
    (source / "more").symlink_to(tmp_path / "elsewhere")
    (source / "back").symlink_to(source)
    (source / "sub").mkdir()
    (source / "._0.png").write_bytes(b"hidden")
    rows = {0: "./0.png,a", 1: "sub/../1.png,a", 2: f"{source}/2.png,a"}
    write(source, rows)
    with (source / "list.csv").open("a") as lines:
        lines.write("more/0.png,more\n")
    found = read(source)
    assert [str(error).rpartition("source/")[2] for error in found.errors] == ["more/1.png: has no caption in list.csv"]


def test_an_image_outside_of_the_folder_is_read_again_when_it_changes_or_appears(source, tmp_path):
    write_images(tmp_path / "elsewhere", 2)
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere/0.png")
    write(source, {3: f"{tmp_path}/link.png,a", 4: f"{tmp_path}/late.png,a"})
    assert levels(read(source))[3:5] == [0, 5]
    (tmp_path / "elsewhere/0.png").write_bytes(png(77) + b" ")
    assert levels(read(source))[3:5] == [77, 5]
    (tmp_path / "late.png").write_bytes(png(78))
    assert levels(read(source))[3:5] == [77, 78]
    assert len(list((tmp_path / "cache").glob("pairs-????????????????????????????????"))) == 1
