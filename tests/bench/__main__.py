"""`python -m tests.bench NAME [OPTIONS]` runs the `main(arguments)` of the module tests/bench/NAME.py."""

import importlib
import pkgutil
import sys

import tests.bench


def benches() -> list[str]:
    return [
        module.name
        for module in pkgutil.iter_modules(tests.bench.__path__)
        if module.name not in ("__main__", "folders", "harness", "pages", "results", "trainers")
    ]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in benches():
        sys.exit(f"usage: python -m tests.bench NAME [OPTIONS], with NAME one of {', '.join(benches())}")
    importlib.import_module(f"tests.bench.{sys.argv[1]}").main(sys.argv[2:])
