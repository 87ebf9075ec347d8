"""Text-image pairs: all formats give the same pixels, all errors are counted and named, and captions use any script."""

import csv
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import lightning as L
import pytest
import torch
from filelock import FileLock
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from decm_lightning import TeacherTraining
from decm_lightning.data.held_out import is_held_out
from decm_lightning.data.pairs import cache as pairs_cache
from decm_lightning.data.pairs.cache import prepare
from decm_lightning.data.pairs.captioned_images import Pairs
from decm_lightning.data.pairs.text_image_pairs import TextImagePairs
from decm_lightning.data.resumable import EpochSampler
from decm_lightning.image_reader import pixels_of
from decm_lightning.networks import TextDiT
from decm_lightning.text import EncodedCaptions, TextEncoder

SCRIPTS = ["a red cat", "кошка", "猫が寝ている", "قطة حمراء", "बिल्ली", "γάτα", "🐱 emoji", "  two \n lines  "]
COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250), (0, 250, 250), (9, 9, 9), (99, 9, 9)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A real, tiny, random BERT with one token for each letter."""
    folder = tmp_path_factory.mktemp("encoder")
    letters = sorted({letter for text in SCRIPTS for letter in text.lower() if not letter.isspace()})
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=5 + len(pieces), **sizes)).save_pretrained(folder)
    return TextEncoder(str(folder), max_tokens=32)


def image(color, kind="png", size=(12, 8)):
    """Return the bytes of an image file of one color."""
    content = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
    Image.new("RGB", size, color).save(content, kind, **options)
    return content.getvalue()


def write_tar(file, members):
    """Write a tar of (name, bytes)."""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_tars(folder):
    """Four pairs in each of two tars: .txt and .json captions, all image formats."""
    kinds = [("png", "png"), ("webp", "webp"), ("jpeg", "jpg"), ("jpeg", "jpeg")]
    members = []
    for row, (caption, color) in enumerate(zip(SCRIPTS, COLORS, strict=True)):
        kind, ending = kinds[row % 4]
        is_json = row % 2
        text = json.dumps({"caption": caption, "id": row}).encode() if is_json else caption.encode()
        members.append((f"part/{row:04d}.{ending}", image(color, kind)))
        members.append((f"part/{row:04d}.{'json' if is_json else 'txt'}", text))
    write_tar(folder / "000.tar", members[:8])
    write_tar(folder / "001.tar", members[8:])


def as_parquet(folder):
    """A data set of the Hugging Face hub: data/*.parquet, images as structs."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "data").mkdir()
    for part in range(2):
        rows = range(4 * part, 4 * part + 4)
        images = [{"bytes": image(COLORS[row]), "path": f"{row}.png"} for row in rows]
        table = pa.table({"image": images, "text": [SCRIPTS[row] for row in rows], "other": [None] * 4})
        parquet.write_table(table, folder / "data" / f"train-{part:05d}-of-00002.parquet")


def as_arrow(folder):
    """The format of datasets' save_to_disk: an Arrow stream."""
    import pyarrow as pa
    from pyarrow import ipc

    table = pa.table({"image": [image(color) for color in COLORS], "prompt": SCRIPTS})
    with ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)


def as_csv(folder):
    """A folder of images, some in subfolders, with metadata.csv."""
    (folder / "sub").mkdir()
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened)
        rows.writerow(["file_name", "text"])
        for row, (caption, color) in enumerate(zip(SCRIPTS, COLORS, strict=True)):
            name = f"sub/{row}.png" if row % 2 else f"{row}.png"
            (folder / name).write_bytes(image(color))
            rows.writerow([name, caption])


FORMATS = {"tars": as_tars, "parquet": as_parquet, "arrow": as_arrow, "csv": as_csv}


def ready(source, encoder, tmp_path, **arguments):
    """Return the data module, set up."""
    arguments = {"size": 8, "batch_size": 2, "held_out": 0.3, "cache": str(tmp_path / "cache")} | arguments
    module = TextImagePairs(str(source), encoder=encoder, **arguments)
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_pairs(kind, source, encoder, tmp_path):
    """Pixels agree to 2 of 255 (JPEG), and captions in all scripts agree exactly and belong to the right images."""
    FORMATS[kind](source)
    module = ready(source, encoder, tmp_path, held_out=0)
    assert len(module.train) == len(SCRIPTS)
    x_1, captions = module.train.__getitems__(range(len(SCRIPTS)))
    expected = torch.tensor(COLORS)[:, :, None, None].expand(-1, -1, 8, 8) / 127.5 - 1
    torch.testing.assert_close(x_1, expected, rtol=0, atol=2.1 / 127.5)
    for row, caption in enumerate(SCRIPTS):
        alone = encoder([" ".join(caption.split())])
        found = captions.tokens[row][captions.mask[row]]
        torch.testing.assert_close(found, alone.tokens[0], rtol=1e-3, atol=1e-3)
        assert len(found) > 3


def test_a_second_run_reads_nothing_again(source, encoder, tmp_path):
    """Pixels and tokens come from the cache. A changed source is read again."""
    as_tars(source)
    first = ready(source, encoder, tmp_path)
    broken = TextEncoder(encoder.path, max_tokens=encoder.max_tokens)
    broken.__dict__["_loaded"] = None
    again = ready(source, broken, tmp_path)
    assert torch.equal(again.train.__getitems__([0]).x_1, first.train.__getitems__([0]).x_1)
    write_tar(source / "002.tar", [("new.png", image((7, 7, 7))), ("new.txt", b"a")])
    assert len(ready(source, encoder, tmp_path, held_out=0).train) == len(SCRIPTS) + 1


FAULTS = {
    "a broken image": (
        [("a.png", image((1, 1, 1))[:40]), ("a.txt", b"x")],
        r"000.tar: a.png: cannot be read as an image",
    ),
    "no image at all": (
        [("a.jpg", b"<html>"), ("a.txt", b"x")],
        r"000.tar: a.jpg: cannot be read as an image \(a web page instead of the file",
    ),
    "an empty caption": ([("a.png", image((1, 1, 1))), ("a.txt", b" \n ")], r"000.tar: a.png: its caption is empty"),
    "nothing to see": (
        [("a.png", image((1, 1, 1))), ("a.txt", "\ufeff\u200b \x07\n".encode())],
        r"000.tar: a.png: its caption is empty",
    ),
    "half a character": (
        [("a.png", image((1, 1, 1))), ("a.json", b'{"caption": "cut \\ud83d"}')],
        r"000.tar: a.png: its caption has .* \('\\ud83d'\)",
    ),
    "a name in Latin-1": (
        [("caf\udce9.png", image((1, 1, 1))), ("caf\udce9.txt", b"x")],
        r"000.tar: caf\\udce9.png: its name is not UTF-8",
    ),
    "another format": ([("h.svg", b"<svg/>")], r"000.tar: h.svg: is neither"),
    "a name with a dot": ([("a.v1.jpg", image((1, 1, 1), "jpeg"))], r"000.tar: a.v1.jpg: is neither"),
    "5,000 words": (
        [("a.png", image((1, 1, 1))), ("a.txt", b"word " * 5000)],
        r"000.tar: a.png: its caption is too long \(24999 .*2000\)",
    ),
    "no caption": ([("a.webp", image((1, 1, 1), "webp"))], r"000.tar: a.webp: has no caption \(.txt, .json\)"),
    "no image": ([("a.txt", b"x")], r"000.tar: a.txt: has no image \(.jpg"),
    "another key": (
        [("a.png", image((1, 1, 1))), ("a.json", b'{"title": "x"}')],
        r"a.json: has no caption column .*found title",
    ),
    "no text": ([("a.png", image((1, 1, 1))), ("a.json", b'{"text": ["x"]}')], r"its caption is not text \(\['x'\]\)"),
    "no JSON": ([("a.png", image((1, 1, 1))), ("a.json", b"{")], r"000.tar: a.json: is not JSON"),
    "no UTF-8": ([("a.png", image((1, 1, 1))), ("a.txt", b"\xff\xfe")], r"000.tar: a.txt: is not UTF-8"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_in_a_tar_is_named_and_fatal_or_left_out(kind, source, encoder, tmp_path):
    members, message = FAULTS[kind]
    as_tars(source)
    good = [
        (f"good{row}.{ending}", part)
        for row in range(2)
        for ending, part in (("png", image((row,) * 3)), ("txt", b"a"))
    ]
    write_tar(source / "000.tar", [*good[:2], *members, *good[2:]])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=rf"^1 of 7 pairs of .*source are bad: .*{message}.*on_error: skip"):
            ready(source, encoder, tmp_path)
    with pytest.warns(UserWarning, match=rf"1 of 7 pairs of .*{message}.*left out"):
        assert len(ready(source, encoder, tmp_path, on_error="skip", held_out=0).train) == 6


def test_what_a_tar_leaves_out_is_counted_but_for_what_webdataset_passes_over(source, encoder, tmp_path):
    """Of two members of one name, the pair uses the first."""
    jpeg = image((1, 1, 1), "jpeg")
    members = [
        ("a.png", image((2, 2, 2))),
        ("a.png", image((3, 3, 3))),
        ("a.txt", b"x"),
        ("a.cls", b"1"),
        ("README", b""),
    ]
    members += [("a.mask.png", b""), ("photo.v1.jpg", jpeg), ("photo.v1.txt", b"x"), (".hidden.jpg", jpeg)]
    write_tar(source / "a.tar", members)
    with pytest.raises(ValueError, match=r"^3 of 4 pairs") as raised:
        ready(source, encoder, tmp_path)
    for expected in ("a.tar: a.png: is in the tar twice", "photo.v1.jpg: is neither", "photo.v1.txt: is neither"):
        assert expected in str(raised.value)
    with pytest.warns(UserWarning, match="left out"):
        images = ready(source, encoder, tmp_path, on_error="skip", held_out=0).train.images
    assert images.unique().tolist() == [2]


@pytest.mark.parametrize("kind", ["tars", "parquet", "arrow", "csv"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_caption_column_that_is_nowhere_is_refused_with_the_columns_that_are_there(
    on_error, kind, source, encoder, tmp_path
):
    FORMATS[kind](source)
    found = {"tars": "caption, id", "parquet": "image, text, other", "arrow": "image, prompt", "csv": "file_name, text"}
    for column in ("recaption", ""):
        with pytest.raises(ValueError, match=rf"no caption column .*'{column}'.*(found|are) {found[kind]}\b"):
            ready(source, encoder, tmp_path, caption_column=column, on_error=on_error)


def test_rows_that_are_lost_are_counted_and_files_that_are_not_read(source, encoder, tmp_path):
    """Three of four row groups of 64 rows are lost, and an image lies next to the tar of a table."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"image": [image((1, 1, 1))] * 256, "text": ["a"] * 256})
    parquet.write_table(table, source / "a.parquet", row_group_size=64, compression="none", use_dictionary=False)
    metadata = parquet.ParquetFile(source / "a.parquet").metadata
    content = bytearray((source / "a.parquet").read_bytes())
    for group in (0, 1, 3):
        place = metadata.row_group(group).column(1).data_page_offset
        content[place : place + 16] = b"\xff" * 16
    (source / "a.parquet").write_bytes(content)
    (source / "notes.md").write_text("x")
    with pytest.raises(
        ValueError, match=r"^192 of 256 pairs of .*row group 0 \(rows 0 to 63, 64 rows\).*\(192 x cannot"
    ):
        ready(source, encoder, tmp_path)
    with pytest.warns(UserWarning, match="192 of 256 pairs") as warned:
        assert len(ready(source, encoder, tmp_path, on_error="skip", held_out=0).train) == 64
    said = "\n".join(str(warning.message) for warning in warned)

    assert "files that are not read: .md (1)" in said


def test_a_tar_with_a_broken_header_is_named(source, encoder, tmp_path):
    """Only its member is lost, and reading resumes at the next one."""
    as_tars(source)
    file = source / "001.tar"
    with tarfile.open(file) as tar:
        place = tar.getmembers()[4].offset
    content = bytearray(file.read_bytes())
    content[place : place + 512] = b"\xff" * 512
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^1 of 8 pairs .*unknown number .*001.tar: is damaged \(1536 bytes before part/0006.txt"
    ):
        ready(source, encoder, tmp_path)


@pytest.mark.parametrize("keep", [0.4, 0.75, "end"])
def test_a_tar_that_is_cut_short_is_named(keep, source, encoder, tmp_path):
    """The cut is in the middle of a member, or exactly after one, where only the end marker is missing."""
    as_tars(source)
    file = source / "001.tar"
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + (last.size + 511) // 512 * 512
    file.write_bytes(content[: end if keep == "end" else int(keep * end)])
    with pytest.raises(ValueError, match=r"001.tar: is (damaged or )?cut short"):
        ready(source, encoder, tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        count = len(ready(source, encoder, tmp_path, on_error="skip", held_out=0).train)
    assert count == 8 if keep == "end" else 4 < count < 8


def test_faults_of_tables_are_named_by_their_rows(source, encoder, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    images = [image((1, 1, 1)), None, b"not an image", image((2, 2, 2))]
    table = pa.table({"image": pa.array(images, pa.binary()), "text": ["a", "a", "a", None]})
    parquet.write_table(table, source / "a.parquet")
    with pytest.raises(ValueError, match=r"^3 of 4 pairs") as raised:
        ready(source, encoder, tmp_path)
    for expected in ("row 1: has no image", "row 2: cannot be read as an image", "row 3: its caption is empty"):
        assert f"a.parquet: {expected}" in str(raised.value)
    (source / "a.parquet").write_bytes((source / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a.parquet: cannot be read"):
        ready(source, encoder, tmp_path)
    latin = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"image": images[:1], "text": latin}), source / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: row 0: is not UTF-8"):
        ready(source, encoder, tmp_path)


def test_faults_of_a_csv_are_named_by_line_and_file(source, encoder, tmp_path):
    as_csv(source)
    with (source / "metadata.csv").open("a") as opened:
        opened.write("nowhere.png,a cat\n0.png,\n,a cat\n")
    (source / "lonely.png").write_bytes(image((1, 1, 1)))
    with pytest.raises(ValueError, match=r"^4 of 12 pairs") as raised:
        ready(source, encoder, tmp_path)
    # The last caption before them spans two lines.
    for expected in (
        "line 11, nowhere.png: its image cannot be read",
        "line 12, 0.png: its caption is empty",
        "line 13: has no image",
    ):
        assert expected in str(raised.value)
    with pytest.warns(UserWarning, match="left out"):
        assert len(ready(source, encoder, tmp_path, on_error="skip", held_out=0).train) == 8


def test_a_csv_with_a_comma_too_many_a_long_name_and_an_image_of_another_format(source, encoder, tmp_path):
    as_csv(source)
    with (source / "metadata.csv").open("a") as opened:
        opened.write(f"new.png,a cat, black\n{'x' * 300}.png,a cat\n")
    (source / "new.png").write_bytes(image((1, 1, 1)))
    (source / "sub/h.gif").write_bytes(image((1, 1, 1), "gif"))
    with pytest.raises(ValueError, match=r"^3 of 11 pairs") as raised:
        ready(source, encoder, tmp_path)
    for expected in (
        "metadata.csv: line 11, new.png: has another number of fields than the header (3, ",
        f"line 12, {'x' * 200}: its image cannot be read (File name too long)",
        "sub/h.gif: has no caption in metadata.csv",
    ):
        assert expected in str(raised.value)


def test_an_image_that_is_replaced_is_read_anew(source, encoder, tmp_path):
    """The source is the CSV file that names the image. It does not change."""
    as_csv(source)
    ready(source / "metadata.csv", encoder, tmp_path)
    (source / "sub/1.png").write_bytes(image((77, 77, 77), size=(8, 8)))
    images = ready(source / "metadata.csv", encoder, tmp_path).train.images
    assert images[1].unique().tolist() == [77]


def test_of_two_that_prepare_at_once_the_second_waits(source, tmp_path, monkeypatch):
    as_tars(source)
    reading, go_on, calls = Event(), Event(), []

    def slow(*args):
        reading.set()
        assert go_on.wait(60)
        calls.append(args)
        return pixels_of(*args)

    monkeypatch.setattr(pairs_cache, "pixels_of", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare, source, tmp_path / "cache", 8, None, 2000)
        assert reading.wait(60)
        second = pool.submit(prepare, source, tmp_path / "cache", 8, None, 2000)
        # Long enough for the other process to reach the lock.
        with pytest.raises(TimeoutError):
            second.result(0.3)
        go_on.set()
        assert torch.equal(first.result(60).images, second.result(60).images)
    assert len(calls) == len(SCRIPTS)


def test_what_killed_runs_have_left_is_removed(source, encoder, tmp_path):
    """Files that another process is writing are not removed."""
    as_tars(source)
    stale, live = (tmp_path / "cache" / f"pairs-{name}.partial" for name in ("stale", "live"))
    for folder in (stale, live):
        folder.mkdir(parents=True)
        (folder / "pixels.bin").write_bytes(b"1")
    with FileLock(live.with_suffix(".lock")):
        ready(source, encoder, tmp_path)
    assert not stale.exists()
    assert live.exists()


def test_folders_with_the_suffix_of_a_file_are_not_read(source, encoder, tmp_path):
    as_csv(source)
    for name in ("a.tar", "a.parquet", "a.csv"):
        (source / name).mkdir()
    assert len(ready(source, encoder, tmp_path, held_out=0).train) == len(SCRIPTS)
    with pytest.raises(FileNotFoundError, match=r"no pairs in .*a.tar"):
        ready(source / "a.tar", encoder, tmp_path)


def test_where_all_pairs_are_bad_the_faults_are_counted_by_their_kind(source, encoder, tmp_path):
    write_tar(source / "a.tar", [("a.txt", b"x"), ("b.png", image((1, 1, 1))), ("b.txt", b""), ("c.txt", b"x")])
    message = r"no good pair in .*source: 3 of 3 pairs .*a.tar: a.txt: has no image \(.*\(2 x has no image, 1 x its"
    with pytest.raises(ValueError, match=message):
        ready(source, encoder, tmp_path, on_error="skip")


def test_an_invalid_source_is_refused(source, encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ready(source / "nowhere", encoder, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no pairs in .*expected \*.tar, .*\*.parquet"):
        ready(source, encoder, tmp_path)
    for name in ("a.csv", "b.csv"):
        (source / name).write_text("file_name,text\n")
    with pytest.raises(ValueError, match="has 2 lists"):
        ready(source, encoder, tmp_path)
    with pytest.raises(ValueError, match="no good pair"):
        ready(source / "a.csv", encoder, tmp_path)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"max_characters": 0}, {"batch_size": 0}, {"held_out": 1.0}])
def test_values_out_of_range_are_refused(arguments, encoder, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}.*got"):
        TextImagePairs("source", encoder=encoder, **{"size": 8} | arguments)


def test_a_split_depends_on_names_alone():
    names = [f"image {i}" for i in range(2000)]
    held = is_held_out(names, 0.1)
    assert abs(held.float().mean() - 0.1) < 0.02
    assert torch.equal(is_held_out(names[::-1], 0.1), held.flip(0))
    assert (is_held_out(names, 0.2) | ~held).all()


def test_conditions_are_the_held_out_captions_in_turn(source, encoder, tmp_path):
    """Sample i uses held-out pair i mod n, which is in no training batch."""
    as_csv(source)
    module = ready(source, encoder, tmp_path)
    held = len(module.reference)
    assert 0 < held < len(SCRIPTS)
    [batch] = module.val_dataloader()
    assert torch.equal(module.condition([held, 0, 2 * held + 1]).tokens, batch.condition.tokens[[0, 0, 1 % held]])
    assert len(module.train) + held == len(SCRIPTS)
    apart = torch.cdist(batch.x_1.flatten(1), module.train.__getitems__(range(len(module.train))).x_1.flatten(1))
    assert apart.min() > 0.5
    assert set(module.texts) <= {" ".join(caption.split()) for caption in SCRIPTS}
    nothing = ready(source, encoder, tmp_path, held_out=0)
    with pytest.raises(ValueError, match="held_out, which is 0 of 8 pairs"):
        nothing.condition([0])


def test_a_loader_starts_at_its_position_with_the_same_captions(source, encoder, tmp_path):
    as_csv(source)
    data = ready(source, encoder, tmp_path, held_out=0, num_workers=0)
    whole = [batch.condition.tokens for batch in data.train_dataloader()]
    data._position = lambda: 1
    rest = [batch.condition.tokens for batch in data.train_dataloader()]
    assert len(rest) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_each_image_has_one_of_its_captions_another_in_each_epoch():
    count, variants = 50, 4
    captions = EncodedCaptions(torch.arange(200.0)[:, None].half(), torch.arange(1, 201), torch.arange(200))
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    pairs = Pairs(images, captions, torch.arange(10, count), variants)
    sampler = EpochSampler(pairs, variants, num_replicas=1, rank=0, seed=3)
    chosen = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        x_1, condition = pairs.__getitems__(list(sampler))
        image_row = ((x_1[:, 0, 0, 0] + 1) * 127.5).round().long()
        variant = condition.tokens[:, 0, 0].long() - variants * image_row
        assert sorted(image_row.tolist()) == list(range(10, 50))
        assert set(variant.tolist()) == {0, 1, 2, 3}
        chosen.append(variant[image_row.argsort()])
    assert not torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])
    parts = [item for rank in range(2) for item in EpochSampler(pairs, variants, num_replicas=2, rank=rank, seed=3)]
    assert sorted(parts) == sorted(EpochSampler(pairs, variants, num_replicas=1, rank=0, seed=3))


def test_a_teacher_trains_on_pairs_and_is_refused_images_of_another_size(source, encoder, tmp_path):
    """Train with Lightning and loading processes for several epochs. The flow-matching loss is finite and logged."""
    as_tars(source)
    network = TextDiT(8, 3, caption_width=8, patch_size=4, width=48, depth=1, heads=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=5, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    module = TextImagePairs(str(source), 8, encoder, str(tmp_path / "cache"), batch_size=3, held_out=0)
    trainer.fit(TeacherTraining(network), datamodule=module)
    assert trainer.global_step == 5
    assert trainer.callback_metrics["loss/flow_matching"].isfinite()
    small = TextDiT(4, 3, caption_width=8, patch_size=4, width=48, depth=1, heads=2)
    trainer = L.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    with pytest.raises(ValueError, match=r"pairs are images \(3, 8, 8\) and the network's \(3, 4, 4\)"):
        trainer.fit(TeacherTraining(small), datamodule=module)
