"""Networks whose BatchNorm a recipe replaces by GroupNorm: at the start of a run, and when they are loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bnfinetune.bn.convert.group_norm import convert_group_norm
from bnfinetune.recipe import Model
from bnfinetune.training.data.loaders import Loaders

CONFIG_KEY = "bnfinetune"


def convert_recipe_norms(model: nn.Module, section: Model, loaders: Loaders, say: Callable[[str], None]) -> None:
    """Replace BN layers as `model.group_norm` asks, calibrated on training images, and say how near it starts.

    Raises:
        SelectionError: The network has no BN layer.
        LayerError: A layer that GroupNorm cannot take over.
    """
    if section.group_norm is None:
        return
    convert_group_norm(
        model,
        (batch[0] for batch in loaders.stats),
        num_groups=section.group_norm,
        weight_standardisation=section.weight_standardisation,
        on_report=lambda report: say(str(report)),
    )


def norm_config(section: Model) -> dict[str, Any]:
    """What an exported folder must tell of its norms beyond timm's own config; empty for a plain timm network."""
    if section.group_norm is None:
        return {}
    keys = ("group_norm", "weight_standardisation")
    return {CONFIG_KEY: {key: getattr(section, key) for key in keys}}


def rebuild_norms(model: nn.Module, config: Mapping[str, Any], input_size: tuple[int, int, int]) -> None:
    """Give a network fresh from timm the layers that `norm_config` told of, before its weights are loaded."""
    stated = config[CONFIG_KEY]
    standardised = bool(stated["weight_standardisation"])
    # what flows through only shows which convolutions come before the layers; the weights are loaded afterwards
    noise = [torch.randn(8, *input_size, generator=torch.Generator().manual_seed(0))]
    convert_group_norm(
        model,
        noise if standardised else None,
        num_groups=int(stated["group_norm"]),
        weight_standardisation=standardised,
        on_report=lambda report: None,
    )
