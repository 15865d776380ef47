"""Folding within a run: while it trains, frozen BN layers are computed by the convolutions before them.

Pauses see the plain network: what is measured, recalibrated, averaged, saved and exported knows nothing of folding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bnfinetune.bn.fold import fold_bn, fold_report, unfold_bn, unfolded
from bnfinetune.bn.folded import is_foldable
from bnfinetune.bn.layers import bn_class, find_bn_layers, is_bn_layer
from bnfinetune.recipe import Recipe
from bnfinetune.training.backbone import input_config
from bnfinetune.training.phases import sections_of


class Folding:
    """Keeps a network folded while it trains, as `bn.fold` says.

    Args:
        model: The bare network under the recipe's policies; it is left unfolded until `training` is entered.
        recipe: Whether to fold, and the size of images.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        self.has_bn = any(is_bn_layer(module) for module in model.modules())
        self.wanted = self.has_bn and all(section.fold == "auto" for section in sections_of(recipe))
        self.image = torch.zeros(1, *input_config(model, recipe.data.image_size)["input_size"])

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
        if self.wanted and any(bn_class(layer) and is_foldable(layer) for layer in find_bn_layers(self.model).values()):
            fold_bn(self.model, self.image)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within `training`, a time in which the network is plain."""
        if not self.wanted:
            yield
            return
        with unfolded(self.model):
            yield

    def describe(self) -> str | None:
        """How many layers training will fold, as a line to print; None if none."""
        with self.training():
            report = fold_report(self.model) if self.has_bn else None
        if report is None or not report.folded:
            return None
        return f"{len(report.folded)} of {len(report)} BN layers are computed by the convolutions before them"
