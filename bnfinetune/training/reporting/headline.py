"""What is about to be trained, in a few lines."""

from __future__ import annotations

from collections import Counter

from torch import nn

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.diagnose.finding import Findings, render
from bnfinetune.errors import SelectionError
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.launch import GlobalBatch
from bnfinetune.training.network.optim import describe_groups


def headline(setup: Assembly) -> list[str]:
    """Network, data, BN layers and optimizer groups, a line each."""
    trainer, recipe = setup.trainer, setup.trainer.recipe
    weights = recipe.model.checkpoint or ("pretrained" if recipe.model.pretrained else "random weights")
    batch = GlobalBatch.of(recipe, trainer.accelerator.num_processes)
    left_out = f"each epoch leaves out {setup.dropped} images, too few for a batch that BN can normalise"
    lines = [
        f"{recipe.name}  {recipe.model.name} ({weights}), {_length(setup)}",
        f"data   {setup.splits.describe()}",
        *([f"       {left_out}"] if setup.dropped else []),
        f"BN     {summarise_bn(trainer.model)}",
    ]
    if not trainer.updates:
        return lines
    precision = {"no": "float32"}.get(str(recipe.train.mixed_precision), recipe.train.mixed_precision)
    lines[0] += f", batches of {batch}, {precision} precision"
    rhythm = trainer.rhythm
    if rhythm.by_itself:
        lines.insert(
            2,
            f"       a stream has no epochs: measured every {rhythm.evaluate_every} updates (evaluate.every_steps), "
            f"saved every {rhythm.minutes:g} minutes besides (checkpoint.every_minutes)",
        )
    return [
        *lines,
        *([f"       {folded}"] if (folded := trainer.folding.describe()) else []),
        *(f"       after update {phase.update}: {phase}" for phase in trainer.phases),
        *(f"group  {line}" for line in describe_groups(trainer.optimizer.param_groups)),
    ]


def checked(findings: Findings) -> list[str]:
    """Findings of the doctor, a line each."""
    return [f"check  {line}" for line in render(list(findings), "lines").splitlines()]


def _length(setup: Assembly) -> str:
    train = setup.trainer.recipe.train
    if not setup.trainer.updates:
        return "no training: statistics alone change" if setup.trainer.recipe.recalibrate.at else "no training"
    return f"{train.steps} updates" if train.steps else f"{train.epochs} epochs"


def summarise_bn(model: nn.Module) -> str:
    """How many BN layers do what, such as `9 layers: statistics running (fixed), affine frozen`."""
    try:
        layers = find_bn_layers(model).values()
    except SelectionError:
        return "no BatchNorm layer"
    kinds = Counter(switches_of(layer) for layer in layers)
    return "; ".join(
        f"{count} layers: normalised by {kind.train_stats} statistics in training, updated by {kind.update_stats}, "
        f"affine {kind.affine}"
        for kind, count in kinds.most_common()
    )
