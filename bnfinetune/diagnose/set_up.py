"""The set-up that a recipe leads to, judged with fixes that are recipe keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bnfinetune.bn.layers import is_bn_layer
from bnfinetune.diagnose.case import Case, Context
from bnfinetune.diagnose.finding import Findings
from bnfinetune.diagnose.registry import run_rules
from bnfinetune.diagnose.trace import Trace
from bnfinetune.recipe import Recipe


def check_set_up(
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    updates: int,
    ranks: int = 1,
    trace: Trace | None = None,
    ignore: Sequence[str] = (),
) -> Findings:
    """Judges a run before it starts: the network with its policies applied, and what the recipe plans for it.

    Args:
        recipe: the recipe; its own loaders shuffle and never end in a batch of one, so loaders are not judged.
        model: the network as it will train.
        optimizer: what will train it.
        updates: optimizer updates planned.
        ranks: processes.
        trace: steps that were watched; the dynamic rules then, instead of the static ones.
        ignore: codes of rules to leave out.

    Returns:
        Findings whose fixes are recipe keys where keys can mend them; none for a network without BN.
    """
    if not any(is_bn_layer(module) for module in model.modules()):
        return Findings()
    trains = updates > 0  # else no batch passes through BN, and no statistic has to warm up
    recomputed = bool({"eval", "end"} & set(recipe.recalibrate.at))  # before they are used: no need to warm up either
    context = Context(
        grad_accum=recipe.train.grad_accum if trains else 1,
        steps=updates if trains and not recomputed else None,
        batch_size=recipe.train.batch_size if trains else None,
        ranks=ranks,
        recipe_keys=True,
    )
    if "start" in recipe.recalibrate.at:
        ignore = (*ignore, "BN108")  # what is frozen then is no longer untrained
    model.train()
    return run_rules(Case(model, optimizer, context=context, trace=trace), ignore=ignore)
