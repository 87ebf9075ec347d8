"""The stored pairs: written atomically, never left incomplete by a stopped process, and named if damaged."""

import json
import multiprocessing
import os
import resource
import time

import pytest

from decm_lightning.data.pairs import cache as pairs_cache
from decm_lightning.data.pairs.cache import prepare
from tests.data.pairs.pair_files import levels, pairs_tar, read


@pytest.fixture
def source(tmp_path):
    pairs_tar(tmp_path / "source/a.tar", range(5))
    return tmp_path / "source"


def damage(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGE = {
    "no record": lambda folder: (folder / "pairs.json").unlink(),
    "half a record": lambda folder: (folder / "pairs.json").write_text('{"captions": ["a'),
    "another record": lambda folder: (folder / "pairs.json").write_text("[1]"),
    "no names": lambda folder: (folder / "pairs.json").write_text('{"captions": []}'),
    "a name too few": lambda folder: damage(folder / "pairs.json", names=["a"]),
    "captions of another type": lambda folder: damage(folder / "pairs.json", captions=[None] * 5),
    "another list of errors": lambda folder: damage(folder / "pairs.json", errors=[{"x": 1}]),
    "no stamps": lambda folder: (folder / "stamps.json").unlink(),
    "other stamps": lambda folder: (folder / "stamps.json").write_text('{"a": 1}'),
    "no pixels": lambda folder: (folder / "pixels.bin").unlink(),
    "too few pixels": lambda folder: (folder / "pixels.bin").write_bytes(b"x"),
    "too many pixels": lambda folder: (folder / "pixels.bin").write_bytes(bytes(10**4)),
    "bytes": lambda folder: (folder / "pairs.json").write_bytes(b"\xff\xfe\0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_pairs_are_named_with_the_remedy(kind, source):
    folder = read(source).folder
    DAMAGE[kind](folder)
    with pytest.raises(ValueError, match=rf"the stored images in {folder} are damaged \(.*delete the folder"):
        read(source)


def test_a_full_disk_is_named(source, tmp_path):
    """A limit on the file size fails in the same place as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*cache/pairs-.*pixels.bin'"):
            read(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert levels(read(source)) == list(range(5))


def test_the_files_have_the_modes_of_the_umask(source):
    before = os.umask(0o027)
    try:
        folder = read(source).folder
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {
        "pairs.json": "0o640",
        "pixels.bin": "0o640",
        "stamps.json": "0o640",
    }
    assert oct(folder.stat().st_mode & 0o777) == "0o750"


def test_a_killed_process_leaves_nothing_that_looks_finished(source, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    reading = context.Event()

    def wait(*args):
        reading.set()
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(pairs_cache, "pixels_of", wait)
        process = context.Process(target=read, args=(source,))
        process.start()
        assert reading.wait(60)
        process.kill()
        process.join()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [".partial"]
    # Preparing other pairs removes it, too.
    prepare(source, tmp_path / "cache", 5, None, 2000)
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert levels(read(source)) == list(range(5))


def test_an_interrupt_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pairs_cache, "pixels_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(source)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert levels(read(source)) == list(range(5))


def test_sizes_columns_and_limits_are_prepared_apart(source, tmp_path):
    cache = tmp_path / "cache"
    folders = {prepare(source, cache, *settings).folder for settings in [(4, None, 9), (5, None, 9), (4, None, 8)]}
    assert len(folders) == 3
