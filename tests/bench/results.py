"""Figures of benches, kept as JSON beside the page that shows them: docs/benchmarks/NAME.json."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
_PACKAGES = ("torch", "torchvision", "timm", "mmengine", "fvcore", "accelerate")


def record(bench: str, key: str, figures: dict[str, Any], packages: Sequence[str] = _PACKAGES) -> Path:
    """Writes one result of a bench, such as one model's, and leaves its others as they are.

    Args:
        bench: the bench's name.
        key: what the figures are of.
        figures: numbers and texts.
        packages: distributions whose versions matter.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{bench}.json"
    setting = {"machine": machine(), "versions": _versions(packages), "date": time.strftime("%Y-%m-%d")}
    with FileLock(Path(tempfile.gettempdir()) / f"bnfinetune-bench-{bench}.lock"):
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[key] = {**figures, **setting}
        path.write_text(json.dumps(known, indent=1) + "\n")
    return path


def recorded(bench: str) -> dict[str, dict[str, Any]]:
    """The results of a bench by key; empty if it has not been run."""
    path = FOLDER / f"{bench}.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def machine() -> str:
    """The device that computes, and on a CPU how many threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
