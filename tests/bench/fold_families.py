"""How many BN layers fold in one network of each timm family, and how exactly: the table of docs/benchmarks.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.bench.results import record
from tests.bn.test_fold_families import FAMILIES, check


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench fold_families", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES))
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    for name in options.models:
        found = check(name)
        print(name, *(f"{key} {value:.2g}" for key, value in found.items()), flush=True)
        if options.record:
            record("fold_families", name, dict(found), ("torch", "timm"))
