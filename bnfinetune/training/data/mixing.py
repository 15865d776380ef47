"""Mixup and CutMix, the same in every run and after every resume."""

from __future__ import annotations

import numpy as np
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from bnfinetune.recipe import Augment
from bnfinetune.training.data.seeding import derive_seed

_MIXING = 3  # stream of random draws


class SeededMixup:
    """timm's Mixup, drawn from (seed, epoch, batch, rank) alone, for batches of any size.

    timm draws from NumPy's global generator, which is given back as it was. It also asks for an even number of images,
    which only its modes of pairs need: here, as in its mode `batch`, a batch is mixed with its own reverse.

    Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix", ICCV 2019.
    """

    def __init__(self, mixup: Mixup, seed: int, rank: int) -> None:
        self.mixup, self.seed, self.rank = mixup, seed, rank

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Mix a batch in place.

        Args:
            images: Of shape `(size, channels, height, width)`; changed.
            labels: Class numbers, of shape `(size,)`.
            epoch: Pass over the data that the batch belongs to.
            batch: Its number in the pass.

        Returns:
            The images, and soft targets of shape `(size, num_classes)`, smoothed.
        """
        state = np.random.get_state()
        np.random.seed(derive_seed(self.seed, _MIXING, epoch, batch, self.rank) & 0xFFFFFFFF)
        try:
            share = self.mixup._mix_batch(images)
        finally:
            np.random.set_state(state)
        targets: Tensor = mixup_target(labels, self.mixup.num_classes, share, self.mixup.label_smoothing)
        return images, targets


def build_mixup(
    augment: Augment, num_classes: int, label_smoothing: float, *, seed: int, rank: int = 0
) -> SeededMixup | None:
    """Mixup and CutMix as the recipe asks; None where both are off.

    Args:
        augment: The recipe's `data.augment` section.
        num_classes: Width of the soft targets.
        label_smoothing: Share of the target spread over all classes; the returned object does the smoothing.
        seed: Seed of the run.
        rank: Number of this process; ranks mix differently.
    """
    if augment.mixup == 0 and augment.cutmix == 0:
        return None
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )
    return SeededMixup(mixup, seed, rank)
