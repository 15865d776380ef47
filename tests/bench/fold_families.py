"""How many BN layers fold in one network of each timm family, and how exactly: the table of docs/benchmarks.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.bench.results import record
from tests.bn.families import FAMILIES
from tests.bn.folding.test_fold_families import FOLDED, check


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench fold_families", description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FOLDED))
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    for family in options.families:
        found, name = check(family), FAMILIES[family].model
        print(name, *(f"{key} {value:.2g}" for key, value in found.items()), flush=True)
        if options.record:
            record("fold_families", name, dict(found), ("torch", "timm"))
