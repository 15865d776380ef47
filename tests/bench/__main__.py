"""`python -m tests.bench [NAME ...] [OPTIONS]` runs the `main(options)` of the modules tests/bench/NAME.py.

Without a name it runs what docs/benchmarks.md shows.
"""

import importlib
import pkgutil
import sys
from itertools import takewhile

import tests.bench

SUITE = (
    "frozen_bn",
    "fold_worth",
    "linear_probe",
    "run_time",
    "loop_overhead",
    "two_ranks",
    "fold_families",
)
HELPERS = ("__main__", "folders", "harness", "pages", "results", "timm_script", "trainers")


def benches() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(tests.bench.__path__) if module.name not in HELPERS]


if __name__ == "__main__":
    names = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    if unknown := set(names) - set(benches()):
        sys.exit(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(benches())}")
    for name in names or SUITE:
        importlib.import_module(f"tests.bench.{name}").main(sys.argv[1 + len(names) :])
