"""Mixup and CutMix, the same in every run and after every resume."""

from __future__ import annotations

import numpy as np
import torch
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

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: int, batch: int, domains: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch in place.

        Args:
            images: Of shape `(size, channels, height, width)`; changed.
            labels: Class numbers, of shape `(size,)`, or labels of 0 and 1, of shape `(size, num_classes)`.
            epoch: Pass over the data that the batch belongs to.
            batch: Its number in the pass.
            domains: Domain number of each image, of shape `(size,)`; each domain is then mixed by itself, since what
                is half of another domain would enter the wrong statistics.

        Returns:
            The images, and soft targets of shape `(size, num_classes)`, of class numbers smoothed.
        """
        state = np.random.get_state()
        np.random.seed(derive_seed(self.seed, _MIXING, epoch, batch, self.rank) & 0xFFFFFFFF)
        try:
            if domains is None:
                return images, self._mix(images, labels)
            targets = images.new_zeros(len(images), self.mixup.num_classes)
            for number in domains.unique():
                rows = (domains == number).nonzero().flatten().to(images.device)
                mixed = images[rows]
                targets[rows] = self._mix(mixed, labels[rows]).to(targets.dtype)
                images[rows] = mixed
            return images, targets
        finally:
            np.random.set_state(state)

    def _mix(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mix images with their own reverse, in place, and give their targets."""
        share = self.mixup._mix_batch(images)
        if labels.ndim == 2:
            return torch.lerp(labels.flip(0).to(images.dtype), labels.to(images.dtype), share)
        targets: Tensor = mixup_target(labels, self.mixup.num_classes, share, self.mixup.label_smoothing)
        return targets


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
