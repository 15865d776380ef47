"""Folding within a run: while it trains, frozen BN layers are computed by the convolutions before them.

Pauses see the plain network: what is measured, recalibrated, averaged, saved and exported knows nothing of folding.

A folded layer saves a pass over what it normalises and pays for some small operations on parameters, so that small
batches lose by it. `bn.fold=auto` decides by counting, not by a clock: a run that goes on computes what it did before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from bnfinetune.bn.folding.fold import fold_bn, fold_report, keep_folds, unfold_bn, unfolded
from bnfinetune.bn.folding.layers import is_foldable
from bnfinetune.bn.layers import bn_class, find_bn_layers, is_bn_layer
from bnfinetune.recipe import Recipe
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.network.shapes import normalised_values

WORTHWHILE = 150_000
"""Values per BN layer and batch, on average, from which folding saves time; `python -m tests.bench fold_worth`."""


class Folding:
    """Keeps a network folded while it trains, as `bn.fold` says.

    Args:
        model: The bare network under the recipe's policies; it is left unfolded until `training` is entered.
        recipe: Whether to fold, and the size of batches and images.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        has_bn = any(is_bn_layer(module) for module in model.modules())
        modes = {section.fold for section in recipe.bn_sections}
        self.wanted, self.always = has_bn and "off" not in modes, "always" in modes
        self.batch_size = recipe.train.batch_size
        self.image = torch.zeros(1, *input_config(model, recipe.data.image_size)["input_size"])

    @cached_property
    def values(self) -> float:
        """How many values a BN layer normalises of a batch, on average over the layers."""
        return self.batch_size * normalised_values(self.model, self.image.shape[1:])

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within this context the network is folded; afterwards it is not."""
        self.refresh()
        try:
            yield
        finally:
            if self.wanted:
                unfold_bn(self.model)

    def refresh(self) -> None:
        """Fold what can be folded now; call it after a change of policies."""
        if self._can_fold() and self._pays():
            fold_bn(self.model, self.image)
            keep_folds(self.model)  # between pauses the loop makes all updates, through the optimizer

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within `training`, a time in which the network is plain."""
        if not self.wanted:
            yield
            return
        with unfolded(self.model):
            yield

    def describe(self) -> str | None:
        """What training will do with frozen layers, as a line to print; None if there are none or nobody asked."""
        if not self._can_fold():
            return None
        if not self._pays():
            return (
                f"not folded into convolutions: {self.values:,.0f} values per layer and batch are too few to gain time "
                f"(bn.fold=always: less memory)"
            )
        with self.training():
            report = fold_report(self.model)
        return f"{len(report.folded)} of {len(report)} BN layers are computed by the convolutions before them"

    def _can_fold(self) -> bool:
        if not self.wanted:
            return False
        return any(bn_class(layer) and is_foldable(layer) for layer in find_bn_layers(self.model).values())

    def _pays(self) -> bool:
        return self.always or self.values >= WORTHWHILE
