"""Rules about numbers: statistics that are not finite, what the optimizer does to BN, where the loss starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.facts import bn_parameters, rebuilt_optimizer
from bnfinetune.diagnose.registry import Lacking, Trouble, rule

LOUD = 1.25
"""Times ln C up to which a head that knows nothing may begin; as torch draws linear layers, it is about 1.05."""


@rule(
    "BN501",
    "running statistics are not finite",
    "error",
    why="Evaluation gives NaN although training goes on: one overflow in half precision stays in the average for ever.",
    rewatched=True,
)
def poisoned_statistics(case: Case) -> Iterator[Trouble]:
    """**Symptom.** NaN at validation only.

    **Cause.** In mixed precision one batch overflows. The gradient scaler skips that step, but the forward has already
    updated the running statistics, and an average with NaN is NaN from then on.

    **Found by.** Running means and variances that are NaN or infinite, and variances below 0.

    ```python
    scaler.step(optimizer)                       # skipped on overflow; the statistics are not

    bnf.precise_bn(model, loader)                # repaired; to prevent it: layers under any policy refuse such updates
    bnf.apply_policy(model, bnf.BNPolicy(update_stats="ema"))
    ```
    """
    tracked = {name: layer for name, layer in case.layers.items() if layer.running_mean is not None}
    bad = [name for name, is_bad in zip(tracked, _unsound(list(tracked.values())), strict=True) if is_bad]
    if bad:
        yield Trouble(
            tuple(bad),
            f"{len(bad)} layers hold NaN, infinity or a variance below 0",
            case.call("precise_bn", bad, "loader", "include_frozen=True"),
        )


@torch.no_grad()
def _unsound(layers: list[Any]) -> list[bool]:
    """Whether each layer's statistics are unsound; the device is asked once."""
    sums: list[Tensor] = []
    for layer in layers:
        mean, var = layer.running_mean, layer.running_var
        # A product with 0 is NaN for anything that is not finite, and so is the root of a negative number.
        sums.append((mean * 0 + var.sqrt() * 0).sum())
    return torch.stack([each.double() for each in sums]).isnan().tolist() if sums else []


@rule(
    "BN503",
    "weight decay on BN weights and biases",
    "info",
    why="Decay pulls a normalised channel's scale to 0 without limiting what the network can compute, only how fast.",
    needs=("optimizer",),
)
def decayed(case: Case) -> Iterator[Trouble]:
    """**Symptom.** None that is sure; strong decay shrinks BN weights, and many reference recipes exclude them.

    **Cause.** One parameter group for everything.

    **Found by.** Trainable BN weights and biases in groups with weight decay above 0. It is an option, not a law: some
    saw no gain from leaving them out.

    ```python
    torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)                    # the pitfall

    torch.optim.AdamW(bnf.param_groups(model, weight_decay=0.05), lr=1e-3)               # repaired
    ```
    """
    assert case.optimizer is not None
    decay = {
        id(parameter): group["weight_decay"]
        for group in case.optimizer.param_groups
        if group.get("weight_decay")
        for parameter in group["params"]
    }
    found = {name: decay[id(p)] for name, p in bn_parameters(case).items() if p.requires_grad and id(p) in decay}
    if found:
        yield Trouble(
            tuple(dict.fromkeys(name.rpartition(".")[0] for name in found)),
            f"{len(found)} weights and biases decay by {max(found.values()):g}",
            rebuilt_optimizer(case.optimizer),
            "optim.norm_decay=false",
        )


@rule(
    "BN504",
    "a frozen BN parameter still moves",
    "error",
    why="Optimizers skip parameters without a gradient, not those without requires_grad: a leftover one moves them.",
    needs=("optimizer",),
)
def leftover_gradient(case: Case) -> Iterator[Trouble]:
    """**Symptom.** A weight that was frozen between two steps changes once more, or for ever under momentum and decay.

    **Cause.** It was frozen after a backward, with its gradient still in place, and nothing clears it.

    **Found by.** BN parameters in the optimizer that do not require gradients and hold one.

    ```python
    loss.backward()
    model.bn1.requires_grad_(False)                 # the pitfall: .grad is still there
    optimizer.step()

    optimizer.zero_grad(set_to_none=True)           # repaired; bnf.freeze_bn clears it by itself
    ```
    """
    assert case.optimizer is not None
    held = {id(parameter) for group in case.optimizer.param_groups for parameter in group["params"]}
    moving = [n for n, p in bn_parameters(case).items() if id(p) in held and not p.requires_grad and p.grad is not None]
    if moving:
        yield Trouble(
            tuple(dict.fromkeys(name.rpartition(".")[0] for name in moving)),
            f"{len(moving)} frozen weights and biases hold a gradient in the optimizer",
            "optimizer.zero_grad(set_to_none=True)",
        )


@rule(
    "BN505",
    "a new head starts far above the loss of guessing",
    "warning",
    why="The head is sure of answers that it has not learned; the first updates send that error through all layers.",
    needs=("trace",),
)
def loud_head(case: Case) -> Iterator[Trouble | Lacking]:
    """**Symptom.** Fine-tuning from good features ends many points behind the same recipe with another new head.

    **Cause.** timm draws the new classifier of some twenty families, EfficientNets and MobileNets among them, with a
    deviation near 1 / sqrt(C) whatever its inputs: with 7 classes, losses began at 4 to 10, where ln 7 is 1.95.

    **Found by.** The first watched batch of 8 or more images, before any optimizer update: scores that cost more than
    1.25 times ln C, by two standard errors, whatever the labels, while the true labels fare no better than others. So
    a head that has learned something is left alone, however wrong it is here. The labels are read off the gradient
    of the scores, so that a loss of another kind, and mixed images, are not judged.

    ```python
    model = timm.create_model("efficientnet_b0", pretrained=True, num_classes=7)      # the pitfall

    bnf.reset_head(model)                                  # repaired: zeros, before the optimizer is built
    ```
    """
    assert case.trace is not None
    first = case.trace.first_loss
    if first is None:
        yield Lacking("no first batch of class scores, of images with one label each")
    elif first.knows_nothing and first.blind - 2 * first.blind_error > LOUD * first.chance:
        heads = _score_layers(case, first.classes)
        yield Trouble(
            heads,
            f"the first batch has a cross entropy of {first.value:.2f}; guessing costs ln {first.classes} = "
            f"{first.chance:.2f}",
            f"[torch.nn.init.zeros_(p) for name in {heads!r} for p in model.get_submodule(name).parameters()]",
        )


def _score_layers(case: Case, classes: int) -> tuple[str, ...]:
    """The layers that give the scores: in the classifier, or anywhere, the last that has a row of weights per class."""
    fitting = [
        (name, id(module) in case.head)
        for name, module in case.bare.named_modules()
        if (weight := getattr(module, "weight", None)) is not None and weight.ndim > 1 and len(weight) == classes
    ]
    return tuple(name for name, in_head in fitting if in_head) or tuple(name for name, _ in fitting[-1:])
