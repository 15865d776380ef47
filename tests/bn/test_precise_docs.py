"""The examples of docs/precise_bn.md run as they stand, from first to last."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "precise_bn.md"


def test_every_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 8
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, PAGE.name, "exec"), names)
    printed = capsys.readouterr().out
    assert "precise BN (pooled): 20 layers from 128 samples in 4 batches" in printed
    assert "BN layer 'bn1' saw a batch with NaN" in printed
    assert (tmp_path / "precise_bn.json").is_file()
