"""Population statistics within a run: which images they are computed from."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from bnfinetune.bn.precise import precise_bn
from bnfinetune.bn.precise_report import PreciseBNReport
from bnfinetune.recipe import Recalibrate
from bnfinetune.training.data.loaders import ImageLoader, Loaders


def recalibrate(
    model: nn.Module, loaders: Loaders, section: Recalibrate, accelerator: Accelerator, **selection: Any
) -> PreciseBNReport:
    """Recompute the running statistics of `model` as a recipe's `recalibrate` section says; all ranks together.

    Frozen statistics are recomputed too: a recipe that asks for it means them.

    Args:
        model: The bare network.
        loaders: The run's loaders.
        section: Which images, at most how many, and which estimator.
        accelerator: For the autocast precision.
        **selection: `layers` and `exclude` of `precise_bn`.

    Raises:
        StatisticsError: The pass failed; the network is as it was.
    """
    loader = _loader(loaders, section)
    enough = section.samples is not None and (loader.images is None or section.samples < loader.images)
    with accelerator.autocast():
        return precise_bn(
            model,
            (batch[0] for batch in loader),
            num_samples=section.samples if enough else None,
            tolerance=section.tolerance,
            variance=section.variance,
            include_frozen=True,
            **selection,
        )


def _loader(loaders: Loaders, section: Recalibrate) -> ImageLoader:
    if section.data == "target":
        return loaders.val if loaders.test is None else loaders.test
    return loaders.stats if section.preprocessing == "eval" else loaders.train
