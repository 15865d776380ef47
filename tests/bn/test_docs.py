"""The examples of the pages on the BN core run as they stand, from first to last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
EXPECTED = {
    "precise_bn.md": [
        "precise BN (pooled): 20 layers from 128 samples in 4 batches",
        "BN layer 'bn1' saw a batch with NaN",
    ],
    "policies.md": ["layer4.1.bn2", "torchvision.ops.misc.FrozenBatchNorm2d"],
}


@pytest.mark.parametrize("page", EXPECTED)
def test_every_example_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(examples) >= 5
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, page, "exec"), names)
    printed = capsys.readouterr().out
    for text in EXPECTED[page]:
        assert text in printed
