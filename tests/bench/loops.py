"""False alarms of the doctor on ordinary training loops, and the planted fault that it finds in each."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from tests.bench.pages import put_table
from tests.bench.results import record, recorded
from tests.diagnose.loops.registry import Loop, all_loops

PAGE = Path(__file__).parents[2] / "docs" / "checks" / "loops.md"
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "transformers", "lightning", "schedulefree")


def false_alarms(loop: Loop, seeds: Iterable[int]) -> int:
    """Seeds with which the sound loop is accused of anything but its notes."""
    return sum(any(each.code not in loop.notes for each in loop.run(seed, False)) for seed in seeds)


def detected(loop: Loop, seeds: Iterable[int]) -> int:
    """Seeds with which the rule that is named finds the planted fault."""
    return sum(any(each.code == loop.rule for each in loop.run(seed, True)) for seed in seeds)


def page_table() -> str:
    """What is recorded, in Markdown, in the order of the loops."""
    found, lines = recorded("loops"), ["| loop | false alarms | planted fault | found by | found |"]
    lines.append("| --- | ---: | --- | --- | ---: |")
    for loop in all_loops().values():
        entry = found[loop.name]
        notes = "".join(f"; says [{code}]({code}.md): {why}" for code, why in loop.notes.items())
        lines.append(
            f"| **{loop.name}**<br>{loop.source}{notes} | {entry['false_alarms']} of {entry['seeds']} | {loop.fault} | "
            f"[{loop.rule}]({loop.rule}.md) | {entry['found']} of {entry['planted_seeds']} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Runs the loops, and puts the figures into docs/checks/loops.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench loops", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--planted", type=int, default=5, help="seeds with which the fault is planted")
    parser.add_argument("--only", nargs="+", default=list(all_loops()), metavar="NAME")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in tqdm(options.only, unit="loop"):
        loop = all_loops()[name]
        figures = {
            "seeds": options.seeds,
            "false_alarms": false_alarms(loop, range(options.seeds)),
            "planted_seeds": options.planted,
            "found": detected(loop, range(options.planted)),
        }
        source = record("loops", name, figures, PACKAGES)
    put_table(PAGE, source, page_table(), "sound loops and planted faults, each with several seeds")
    print(page_table())
