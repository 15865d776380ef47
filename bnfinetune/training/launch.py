"""Starting a run: devices and ranks through Accelerate, seeds, trackers; and leaving the process as it was."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)

from bnfinetune.errors import BnFinetuneError, RecipeError, did_you_mean
from bnfinetune.recipe import Recipe, Run

_REFUSED = {
    DistributedType.FSDP: "FSDP shards the statistics' owners",
    DistributedType.DEEPSPEED: "DeepSpeed replaces the loop that keeps the statistics right",
    DistributedType.MEGATRON_LM: "Megatron-LM trains other kinds of models",
}
_SHARED = (AcceleratorState, GradientState)  # their settings are one for the whole process
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_EXTRAS = ("tensorboard", "wandb", "mlflow")  # of our own package
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
TIMEOUT_MINUTES = 10.0  # torch's own for NCCL; for gloo it would be 30
_LAUNCHERS = "start several processes by torchrun or accelerate launch"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for options of mallopt
T = TypeVar("T")


class GlobalBatch(NamedTuple):
    """The batch of one update: of how many processes, images of each per forward, and forwards."""

    ranks: int
    size: int
    accumulated: int

    @staticmethod
    def of(recipe: Recipe, ranks: int) -> GlobalBatch:
        """The batch of a recipe on so many ranks."""
        return GlobalBatch(ranks, recipe.train.batch_size, recipe.train.grad_accum)

    @property
    def images(self) -> int:
        """Images of an update, over all ranks."""
        return prod(self)

    def __str__(self) -> str:
        return " x ".join(str(number) for number in self if number > 1) or "1"


def keep_freed_memory() -> None:
    """Tell glibc to give no freed memory back to the kernel, for a process that does nothing but train.

    Otherwise the kernel hands out and clears the pages of every large activation anew, in every step. Other allocators
    are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # glibc before 2.35 takes no more; with the second option alone, it would map and unmap every larger block
    if mallopt is not None and (mallopt(_MMAP_THRESHOLD, 2**31 - 1) or mallopt(_MMAP_THRESHOLD, 2**25)):
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


class OwnAccelerator(Accelerator):  # type: ignore[misc]
    """An `Accelerator` whose settings are its own, where Accelerate keeps one set for the life of a process.

    Neither does what a caller has set (a precision, an open `accumulate` block) reach a run, nor the other way round.
    """

    @contextmanager
    def autocast(self, autocast_handler: Any = None) -> Iterator[None]:
        """As of `Accelerator`."""
        with ExitStack() as stack:
            with self._settings():
                stack.enter_context(super().autocast(autocast_handler))
            yield

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, **options: Any) -> AcceleratedOptimizer:
        """As of `Accelerator`; a run prepares one, since the gradients of each that was ever prepared are unscaled."""
        with self._settings():
            return super().prepare_optimizer(optimizer, **options)

    def _settings(self) -> AbstractContextManager[None]:
        return _shared_state({AcceleratorState: self.state, GradientState: self.gradient_state})


def start_accelerator(
    mixed_precision: str | None = None, timeout_minutes: float = TIMEOUT_MINUTES, *, trains: bool = False
) -> Accelerator:
    """Accelerate's view of devices and ranks; on a machine without an accelerator the ranks talk over gloo.

    Args:
        mixed_precision: `no`, `fp16` or `bf16`; None follows what the launcher says, else it is `no`.
        timeout_minutes: How long a rank waits for the others before it gives up.
        trains: Refuse a precision that the device cannot train in; what only measures uses float32 there.

    Raises:
        RecipeError: The launcher asks for FSDP or DeepSpeed, or the device cannot compute in this precision.
    """
    _check_environment()
    asked = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    says = "train.mixed_precision" if mixed_precision else "the launcher's mixed precision"
    if asked not in ("no", "fp16", "bf16"):
        raise RecipeError(f"{says}={asked} is not supported: use bf16, fp16 or no")
    try:
        with _shared_state({}):
            accelerator = OwnAccelerator(
                mixed_precision=asked,
                cpu=not torch.accelerator.is_available(),
                project_config=ProjectConfiguration(project_dir="."),
                # which also keeps Accelerate from reading a number of steps from the environment
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))],
            )
    except (ValueError, ImportError) as error:
        raise RecipeError(f"{says}={asked}: {error}") from error
    if trains and asked == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError(f"{says}=fp16 needs a GPU, and this is a CPU: set train.mixed_precision=bf16 or no")
    if (reason := _REFUSED.get(accelerator.distributed_type)) is not None:
        kind = accelerator.distributed_type.value
        raise RecipeError(
            f"the launcher asks for {kind}, but {reason}: launch plain data-parallel processes (--multi_gpu)"
        )
    return accelerator


@contextmanager
def _shared_state(states: dict[type, Any]) -> Iterator[None]:
    """Within this context Accelerate shares the given states, or new ones, and those of the process afterwards."""
    before = {kind: vars(kind)["_shared_state"] for kind in _SHARED}
    for kind in _SHARED:
        kind._shared_state = vars(states[kind]) if kind in states else {}
    try:
        yield
    finally:
        for kind in _SHARED:
            kind._shared_state = before[kind]


@contextmanager
def as_it_was() -> Iterator[None]:
    """Within this context deterministic kernels may be asked for; afterwards the process is as it was."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_CUBLAS)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


def launcher_notes(recipe: Recipe) -> list[str]:
    """What the launcher has said that a run does not do, a line each."""
    steps = os.environ.get(_ACCUMULATION, "1")
    if steps in ("1", str(recipe.train.grad_accum)):
        return []
    return [f"warning: the launcher's {steps} accumulation steps are not used: train.grad_accum says how many"]


def _check_environment() -> None:
    """Make sure that what launchers leave in the environment is whole."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise RecipeError(f"the environment says {name}={os.environ[name]}, which is no number; {_LAUNCHERS}")
    ranks = os.environ.get("WORLD_SIZE", "1")
    for name in ("RANK", "MASTER_ADDR"):
        if int(ranks) > 1 and name not in os.environ:
            raise RecipeError(f"the environment says WORLD_SIZE={ranks} without {name}; {_LAUNCHERS}")


def seed_ranks(run: Run, rank: int = 0) -> None:
    """Seed Python, NumPy and torch: alike on all ranks while the network is built, by rank once it trains."""
    if run.deterministic:
        os.environ.setdefault(_CUBLAS, ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    set_seed(run.seed + rank)


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
        outcome[1].rank = 0
        raise outcome[1]
    result: T = outcome[0]
    return result


def on_all(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on one, all of them end, and say on which.

    Raises:
        BnFinetuneError: On this rank, or on another one.
    """
    result, failure = None, None
    try:
        result = action()
    except BnFinetuneError as error:
        failure = error
        failure.rank = accelerator.process_index
    failures: list[BnFinetuneError | None] = gather_object([failure])
    first = failure or next(filter(None, failures), None)
    if first is not None:
        raise first
    return result  # type: ignore[return-value]


def leave_ranks() -> None:
    """Close the process group of a program that is about to exit; a library must not, since others may use it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_trackers(tracking: str | None) -> list[str]:
    """The trackers that `run.tracking` names, before anything is trained without them.

    Raises:
        RecipeError: Accelerate does not know one, or its package is not installed.
    """
    names = [] if tracking is None else [name.strip() for name in tracking.split(",")]
    known = ("all", *LOGGER_TYPE_TO_CLASS)
    installed = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in known:
            raise RecipeError(f"run.tracking: Accelerate has no tracker {name!r}{did_you_mean(name, known)}")
        if name in set(LoggerType.list()) - {"all"} and name not in installed:
            package = f"'bnfinetune[{name}]'" if name in _EXTRAS else name.replace("_", "-")
            raise RecipeError(f"run.tracking={name}: its package is not installed: pip install {package}, or unset it")
    return names


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: Path) -> None:
    """Open the trackers of `run.tracking`, which log into the run folder where they log to files."""
    names = check_trackers(recipe.run.tracking)
    if not names:
        return
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.log_with = filter_trackers(names, str(folder))
    flat = {
        f"{section}.{key}": str(value)
        for section, values in recipe.model_dump().items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    accelerator.init_trackers(f"bnfinetune-{recipe.name}", config=flat)
