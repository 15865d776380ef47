"""Why a loss is not finite: what a second look at the last images tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.recipe import Recipe
from bnfinetune.training.network.optim import rate_of


def likely_cause(
    recipe: Recipe, model: nn.Module, accelerator: Accelerator, group: Sequence[Tensor], *, never: bool
) -> str:
    """The likely cause and its remedy, for the end of a message.

    The network looks at the images again in evaluation mode: with the precision that was used, in float32, and image
    by image. What only float32 computes is lost to precision; what fails for single images is theirs; the rest is
    blamed on weights that were bad from the start (where `never` an update was good) or that too high a learning rate
    has driven off.
    """
    last = "the last state saved before is kept; go on from it with train.resume and the key in train.resume_allow"
    used, exact = (_finite_images(model, accelerator, group, exact=exact) for exact in (False, True))
    precision = accelerator.mixed_precision
    if precision != "no" and exact > used:
        return (
            f"train.mixed_precision={precision} overflows, float32 does not: "
            f"use {'bf16 or ' if precision == 'fp16' else ''}no; {last}"
        )
    images = sum(map(len, group))
    if 0 < exact < images:
        return f"{images - exact} of the last {images} images alone give it: look for broken images; {last}"
    if never:
        return "no update has ever gone through: look at the weights it starts from (model.checkpoint) and at the data"
    return f"most likely optim.lr={rate_of(recipe.optim):g} is too high: lower it, or set optim.clip_grad; {last}"


@torch.no_grad()
def _finite_images(model: nn.Module, accelerator: Accelerator, group: Sequence[Tensor], *, exact: bool) -> int:
    """Of how many images the network's outputs are finite, in float32 or in the precision that was used."""
    device = accelerator.device
    finite = 0
    with evaluation_mode(model), accelerator.autocast():
        for images in group:
            with torch.autocast(device.type, enabled=False) if exact else torch.no_grad():
                finite += int(model(images.to(device)).float().isfinite().all(1).sum())
    return finite
