"""What a result may depend on besides the recipe: versions, devices, threads, variables. No torch until it is asked."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("bnfinetune", "torch", "torchvision", "timm", "accelerate", "datasets", "numpy", "safetensors")
NEIGHBOURS: Final = ("transformers", "lightning", "pillow", "pillow-heif", "schedulefree", "distributed")
VARIABLES: Final = (
    "ACCELERATE_MIXED_PRECISION",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "TORCH_COMPILE_DISABLE",
    "TORCH_HOME",
    "TORCH_LOGS",
    "WORLD_SIZE",
)
"""Variables that change what a run does. None of them holds a secret; proxies and tokens are not among them."""

_MISSING: Final = "not installed"


def software() -> dict[str, Any]:
    """Python, platform and the versions that runs write down."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def describe_machine() -> dict[str, Any]:
    """All of it, for a report of a fault. Imports torch; where that fails, the reason stands in its place."""
    found = software()
    found["packages"] |= {name: version for name in NEIGHBOURS if (version := version_of(name)) != _MISSING}
    return {
        **found,
        "installed in": str(Path(__file__).parent),
        "CPU": _cpu(),
        "memory": _memory(),
        "GPU driver": _driver(),
        **_seen_by_torch(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def version_of(package: str) -> str:
    """The version of an installed package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _seen_by_torch() -> dict[str, Any]:
    try:
        import torch

        built_for = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"
        return {
            "threads": torch.get_num_threads(),
            "torch is built for": built_for,
            "cuDNN": _dotted(torch.backends.cudnn.version()),
            "GPUs": [_gpu(torch.cuda.get_device_properties(number)) for number in range(torch.cuda.device_count())],
            "MPS": torch.backends.mps.is_available(),
        }
    except Exception as error:  # a broken install or driver is what such a report is often about
        return {"torch": " ".join(f"fails with {type(error).__name__}: {error}".split())}


def _gpu(properties: Any) -> str:
    gibibytes = properties.total_memory / 2**30
    return f"{properties.name}, {gibibytes:.1f} GiB, compute capability {properties.major}.{properties.minor}"


def _dotted(version: int | None) -> str:
    """cuDNN's number: 91002 is 9.10.2, and before version 9, 8902 was 8.9.2."""
    if version is None:
        return "none"
    major, rest = divmod(version, 10_000 if version >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    try:
        if found := re.search(
            r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        ):
            name = found[1]
    except OSError:
        pass  # no Linux
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} of {os.cpu_count()} cores usable"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, OSError, ValueError):
        return "unknown"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "none found"
    found = re.search(r"\b\d{3,}\.\d[\d.]*", text)
    return f"NVIDIA {found[0]}" if found else " ".join(text.split())[:80]
