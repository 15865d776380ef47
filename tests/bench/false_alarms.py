"""How often a rule that judges by statistics accuses training that is sound, by chance alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from tqdm import tqdm

from tests.bench.loops import PAGE
from tests.bench.pages import put_table
from tests.bench.results import record, recorded
from tests.diagnose.sound_watches import KINDS, WAYS

PACKAGES = ("torch", "timm")


def count(name: str, seeds: int) -> dict[str, int]:
    """Watches of one way to train, over kinds of images and of layers: how many, judged by its rule, and accused."""
    way, found = WAYS[name], {"watches": 0, "judged": 0, "false_alarms": 0}
    for seed in range(seeds):
        for kind in KINDS:
            for fused in (False, True):
                findings = way.run(kind, fused, seed)
                found["watches"] += 1
                found["judged"] += way.rule not in findings.unjudged
                found["false_alarms"] += any(each.code == way.rule for each in findings)
    return found


def page_table() -> str:
    """What is recorded, in Markdown."""
    lines = ["| rule | sound training | watches | false alarms |", "| --- | --- | ---: | ---: |"]
    figures = recorded("false_alarms")
    for name, way in WAYS.items():
        entry = figures[name]
        share = entry["false_alarms"] / entry["judged"]
        lines.append(f"| [{way.rule}]({way.rule}.md) | {name} | {entry['judged']:,} | {share:.2%} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Watches sound training, and puts the rates into docs/checks/loops.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench false_alarms", description=__doc__)
    parser.add_argument("--seeds", type=int, default=125, help="of each kind of images, on plain and fused layers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in tqdm(WAYS, unit="way"):
        source = record("false_alarms", name, count(name, options.seeds), PACKAGES)
    put_table(PAGE, source, page_table(), "watches of four kinds of images, on plain and fused layers")
    print(page_table())
