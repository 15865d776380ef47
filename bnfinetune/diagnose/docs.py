"""Write docs/checks/ from the rules themselves: `python -m bnfinetune.diagnose.docs`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from bnfinetune.diagnose.registry import Rule, all_rules

FOLDER = Path(__file__).parents[2] / "docs" / "checks"

_NOTE = "<!-- Written by python -m bnfinetune.diagnose.docs from the rule itself. -->"
_NEEDS = {
    "optimizer": "the optimizer",
    "loader": "the training loader",
    "trace": "a few watched steps (`bnf.watch_bn`)",
    "process_group": "`process_group`, on every process",
    "source": "`source`, the model from before",
    "averaged": "`averaged`, the EMA or SWA copy",
    "saved": "`saved`, a state dict or its path",
    "exported": "`exported`, a program or graph",
}
_INTRODUCTION = """\
# Checks

{note}

{count} pitfalls of BatchNorm that the doctor looks for in any training set-up. Each has a stable code, a page, and a
line to paste that mends it.

```python
print(bnf.check_bn(model, optimizer, loader, steps=2000))     # the set-up as it stands

with bnf.watch_bn(model, optimizer) as watch:                 # a few steps of any loop
    train_some_steps()
print(watch.findings)
```

On the command line: `bnfinetune check recipe=full train.batch_size=2`.

`error`: results are wrong. `warning`: results suffer. `info`: worth knowing. Leave rules out by
`ignore=["BN503"]`, or for layers that break one on purpose, as key encoders and mean teachers do, by
`bnf.expect(model, ["BN102", "BN303"], layers="encoder_k.*")`. The last line says which rules had nothing to look at,
and why: silence is no all-clear. [Ordinary training loops](loops.md) are what the doctor is tried on: which it leaves
alone, and which fault in each it finds.

What the statistics are worth on given data is measured by `bnf.inspect_bn(model, data)` and
`bnfinetune inspect checkpoint=FOLDER page=report.html`, which writes a page like this one, here with a planted shift in
`layer2.0.bn1`. What its recommendations rest on is measured on
[photographs, drawings and cartoons](../transfer.md); what all of this [costs](cost.md) is measured too.

![The report: verdict, recommendation, checks, before and after re-estimation, causes, layers and channels](report.png)

A training run writes its own page, `report.html` in its folder, and follows the statistics at each evaluation
(`run.report=false` turns both off). Here `bnfinetune recipe=full train.epochs=8`:

![The page of a run: result, curves, confusion matrix](run.png)
"""


def pages() -> dict[str, str]:
    """Every page of docs/checks/ by file name."""
    rules = list(all_rules().values())
    return {"README.md": _table(rules)} | {f"{rule.code}.md": _page(rule) for rule in rules}


def _table(rules: Sequence[Rule]) -> str:
    parts = [_INTRODUCTION.format(note=_NOTE, count=len(rules))]
    for theme, group in groupby(rules, key=lambda rule: rule.theme):
        rows = "".join(
            f"| [{rule.code}]({rule.code}.md) | {rule.severity} | {_cell(rule.title)} | {_evidence(rule)} |\n"
            for rule in group
        )
        parts.append(f"## {theme}\n\n| code | severity | pitfall | looks at |\n| --- | --- | --- | --- |\n{rows}")
    return "\n".join(parts)


def _page(rule: Rule) -> str:
    return (
        f"# {rule.code}: {rule.title}\n\n{_NOTE}\n\n"
        f"{rule.theme}, {rule.severity}. Looks at {_evidence(rule)}.\n\n{rule.why}\n\n{rule.text}\n\n"
        f"[All checks](README.md)\n"
    )


def _evidence(rule: Rule) -> str:
    return ", ".join(["the model", *(_NEEDS[need] for need in rule.needs)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(folder: Path = FOLDER) -> None:
    """Writes all pages, and removes those of rules that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for old in folder.glob("BN*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
