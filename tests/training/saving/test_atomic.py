"""Folders that are whole or absent, and whose damage is noticed."""

import json

import pytest

from bnfinetune.errors import CheckpointError
from bnfinetune.training.saving import atomic as folders


def write(target, text):
    folders.write_folder(target, lambda path: (path / "a.txt").write_text(text))


def test_a_folder_is_replaced_whole(tmp_path):
    write(tmp_path / "best", "one")
    write(tmp_path / "best", "two")
    assert folders.complete_folder(tmp_path / "best") == tmp_path / "best"
    assert (tmp_path / "best/a.txt").read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"]


def test_a_failed_write_leaves_the_folder_that_was_there(tmp_path):
    write(tmp_path / "best", "one")

    def fail(path):
        (path / "a.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folders.write_folder(tmp_path / "best", fail)
    assert (folders.complete_folder(tmp_path / "best") / "a.txt").read_text() == "one"


def test_a_crash_between_the_renames_leaves_the_old_folder(tmp_path):
    write(tmp_path / "best", "one")
    (tmp_path / "best").rename(tmp_path / "best.old")
    assert folders.complete_folder(tmp_path / "best") == tmp_path / "best.old"


@pytest.mark.parametrize("damage", ["changed", "missing", "manifest", "foreign manifest"])
def test_damage_is_noticed(tmp_path, damage):
    write(tmp_path / "best", "one")
    if damage == "changed":
        (tmp_path / "best/a.txt").write_text("onf")
    elif damage == "missing":
        (tmp_path / "best/a.txt").unlink()
    elif damage == "manifest":
        (tmp_path / "best" / folders.MANIFEST).write_text("{")
    else:
        (tmp_path / "best" / folders.MANIFEST).write_text("[1]")
    with pytest.raises(CheckpointError, match="is damaged"):
        folders.complete_folder(tmp_path / "best")


def test_text_and_lines(tmp_path):
    folders.write_json(tmp_path / "x.json", {"ü": 1})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ü": 1}
    folders.append_line(tmp_path / "m.jsonl", {"a": 1})
    folders.append_line(tmp_path / "m.jsonl", {"a": 2})
    assert [json.loads(line)["a"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "x.json"]
