"""The run folder: which it is, and that nothing in it is overwritten."""

import pytest

from bnfinetune.errors import CheckpointError
from bnfinetune.training.saving import run_folder as folders


def test_a_new_run_takes_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(folders.choose_folder(None, "freeze_bn")) == "runs/freeze_bn"
    (tmp_path / "runs/freeze_bn").mkdir(parents=True)
    assert str(folders.choose_folder(None, "freeze_bn")) == "runs/freeze_bn-2"
    assert str(folders.choose_folder(None, "../up/../../x")) == "runs/___up_______x"
    assert not (tmp_path / "runs/freeze_bn-2").exists()


def test_a_folder_in_use_is_refused_with_the_ways_out(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"is not empty; choose another folder, or .*train.resume=auto"):
        folders.choose_folder(str(tmp_path / "run"), "x")
    with pytest.raises(CheckpointError, match="is not a writable folder"):
        folders.choose_folder(str(tmp_path / "run" / "metrics.jsonl" / "below"), "x")
