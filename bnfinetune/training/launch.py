"""Starting a run: devices and ranks through Accelerate, seeds, trackers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)

from bnfinetune.errors import BnFinetuneError, RecipeError, TrainingError
from bnfinetune.recipe import Recipe, Run

_REFUSED = {
    DistributedType.FSDP: "FSDP shards the statistics' owners",
    DistributedType.DEEPSPEED: "DeepSpeed replaces the loop that keeps the statistics right",
    DistributedType.MEGATRON_LM: "Megatron-LM trains other kinds of models",
}
TIMEOUT_MINUTES = 10.0  # torch's own for NCCL; for gloo it would be 30
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|"
    r"Timed out waiting|timed out after|Application timeout|Socket Timeout"
)
_LAUNCHERS = "start several processes by torchrun or accelerate launch"
T = TypeVar("T")


def start_accelerator(
    mixed_precision: str = "no", tracking: str | None = None, timeout_minutes: float = TIMEOUT_MINUTES
) -> Accelerator:
    """Accelerate's view of devices and ranks; on a machine without an accelerator the ranks talk over gloo.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`.
        tracking: Names of Accelerate's trackers, comma-separated.
        timeout_minutes: How long a rank waits for the others before it gives up.

    Raises:
        RecipeError: The launcher asks for FSDP or DeepSpeed, or the device cannot compute in this precision.
    """
    _check_environment()
    # Accelerate keeps its settings for the life of the process; a second run in it may want other ones
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.accelerator.is_available(),
            log_with=None if tracking is None else [name.strip() for name in tracking.split(",")],
            project_config=ProjectConfiguration(project_dir="."),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))],
        )
    except (ValueError, ImportError) as error:
        raise RecipeError(f"train.mixed_precision={mixed_precision}, run.tracking={tracking}: {error}") from error
    if (reason := _REFUSED.get(accelerator.distributed_type)) is not None:
        kind = accelerator.distributed_type.value
        raise RecipeError(
            f"the launcher asks for {kind}, but {reason}: launch plain data-parallel processes (--multi_gpu)"
        )
    return accelerator


def _check_environment() -> None:
    """Make sure that what launchers leave in the environment is whole."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise RecipeError(f"the environment says {name}={os.environ[name]}, which is no number; {_LAUNCHERS}")
    ranks = os.environ.get("WORLD_SIZE", "1")
    for name in ("RANK", "MASTER_ADDR"):
        if int(ranks) > 1 and name not in os.environ:
            raise RecipeError(f"the environment says WORLD_SIZE={ranks} without {name}; {_LAUNCHERS}")


def seed_ranks(run: Run, *, same_on_all: bool) -> None:
    """Seed Python, NumPy and torch; alike on all ranks while the network is built, apart once it trains."""
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    set_seed(run.seed, device_specific=not same_on_all)


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and give every rank its result, or its error."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except BnFinetuneError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


@contextmanager
def lost_ranks(minutes: float) -> Iterator[None]:
    """Say of a collective that fails because another rank is gone or hangs where the first error is to be found.

    Raises:
        TrainingError: Another rank was lost.
    """
    try:
        yield
    except RuntimeError as error:
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if alone or isinstance(error, BnFinetuneError) or not _LOST.search(str(error)):
            raise
        raise TrainingError(
            f"another process has ended, or gave no answer for train.timeout_minutes={minutes:g}: what it said is the "
            "cause; the last saved state is whole"
        ) from error


def leave_ranks() -> None:
    """Close the process group of a program that is about to exit; a library must not, since others may use it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: Path) -> None:
    """Open the trackers of `run.tracking`, which log into the run folder where they log to files."""
    if recipe.run.tracking is None:
        return
    accelerator.project_configuration.logging_dir = str(folder)
    flat = {
        f"{section}.{key}": str(value)
        for section, values in recipe.model_dump().items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    accelerator.init_trackers(f"bnfinetune-{recipe.name}", config=flat)
