"""The files of a table: both are written completely, or neither."""

import json
from pathlib import Path

import pytest
import torch

from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.evaluation.table import Row, Table

IMAGES = torch.zeros(1, 1, 1, 8, 8, dtype=torch.uint8)


def table(value: float) -> Table:
    return Table("digits", {"samples": 10}, [Row(SamplingSpec.parse("student/mix/1"), 1.0, {"fid": value})])


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    files = table(1.0).write(tmp_path / "quality.json", IMAGES)
    before = {file: file.read_bytes() for file in files}
    plain = Path.write_text

    def full(self, content, **options):
        if "json" in self.name:
            raise OSError(28, "No space left on device")
        return plain(self, content, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/quality.json'"):
        table(2.0).write(tmp_path / "quality.json", IMAGES)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    table(2.0).write(tmp_path / "quality.json", IMAGES)
    assert json.loads((tmp_path / "quality.json").read_text())["rows"][0]["fid"] == 2.0
    assert "| student | mix | 1 | 1 | 2 |" in (tmp_path / "quality.md").read_text()
