"""Why a loss is not finite: what a second look at the last images tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.training.loop.gradients import Batch

if TYPE_CHECKING:
    from bnfinetune.training.loop.trainer import Trainer


def likely_cause(trainer: Trainer, group: Sequence[Batch]) -> str:
    """The likely cause and its remedy, for the end of a message.

    The network looks at the images again in evaluation mode: with the precision that was used, in float32, and image
    by image. What only float32 computes is lost to precision; what fails for single images is theirs; the rest is
    blamed on weights that were bad from the start or that too high a learning rate has driven off.
    """
    recipe, progress = trainer.recipe, trainer.progress
    last = "the last state saved before is kept; go on from it with train.resume and the key in train.resume_allow"
    used, exact = _finite_images(trainer, group, exact=False), _finite_images(trainer, group, exact=True)
    if recipe.train.mixed_precision != "no" and exact > used:
        return (
            f"train.mixed_precision={recipe.train.mixed_precision} overflows, float32 does not: "
            f"use {'bf16 or ' if recipe.train.mixed_precision == 'fp16' else ''}no; {last}"
        )
    images = sum(len(batch[0]) for batch in group)
    if 0 < exact < images:
        return f"{images - exact} of the last {images} images alone give it: look for broken images; {last}"
    if progress.skipped == progress.update:
        return "no update has ever gone through: look at the weights it starts from (model.checkpoint) and at the data"
    return f"most likely optim.lr={recipe.optim.lr:g} is too high: lower it, or set optim.clip_grad; {last}"


@torch.no_grad()
def _finite_images(trainer: Trainer, group: Sequence[Batch], *, exact: bool) -> int:
    """Of how many images the network's outputs are finite, in float32 or in the precision that was used."""
    device = trainer.accelerator.device
    finite = 0
    with evaluation_mode(trainer.model), trainer.accelerator.autocast():
        for images, *_ in group:
            with torch.autocast(device.type, enabled=False) if exact else torch.no_grad():
                finite += int(trainer.model(images.to(device)).float().isfinite().all(1).sum())
    return finite
