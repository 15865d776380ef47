"""The pages of docs/checks/ are those that the rules would write."""

import re

import pytest

import bnfinetune as bnf
from bnfinetune.diagnose.docs import FOLDER, pages, write
from bnfinetune.diagnose.registry import THEMES, all_rules


def test_pages_are_current():
    written = [FOLDER / "README.md", *FOLDER.glob("BN*.md")]
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in written}
    assert on_disk == pages(), "run python -m bnfinetune.diagnose.docs"


def test_pages_of_rules_that_are_gone_disappear(tmp_path):
    (tmp_path / "BN000.md").write_text("gone")
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == pages().keys()


@pytest.mark.parametrize("code", all_rules())
def test_every_page_says_what_a_reader_needs(code):
    rule = all_rules()[code]
    for heading in ("**Symptom.**", "**Cause.**", "**Found by.**", "```python"):
        assert heading in rule.text
    assert code[2] in THEMES
    assert rule.why.endswith(".")
    for name in re.findall(r"bnf\.(\w+)", rule.text):
        assert hasattr(bnf, name), f"{code} speaks of bnf.{name}"


def test_there_are_at_least_thirty():
    assert len(all_rules()) >= 30
