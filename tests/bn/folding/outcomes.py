"""What the tests of folding share: outcomes to compare, and counts of what they cost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bnfinetune.bn import find_bn_layers
from bnfinetune.bn.layers import bn_tail


def outcome(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradient of the input and of every Parameter that trains, for a loss without symmetries."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    grads = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x.grad": x.grad, **grads}


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest error of any tensor against its own largest value; gradients that vanish count against the rest."""
    assert found.keys() == wanted.keys()
    sizes = {name: float(tensor.abs().max()) for name, tensor in wanted.items()}
    noise = 1e-4 * max((size for name, size in sizes.items() if name.endswith("grad")), default=0.0)
    return max(float((found[name] - wanted[name]).abs().max()) / max(sizes[name], noise, 1e-30) for name in wanted)


def bytes_kept(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for backward besides Parameters and buffers, each memory counted once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # alive while counting, so that no memory is counted for two tensors in turn
    assert output.requires_grad
    return sum(kept.values())


class TailOnly(nn.Module):
    """A BN layer without its BN: the same network with no norm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rest = nn.ModuleList(layer.children())
        self.tail: Callable[[torch.Tensor], torch.Tensor] = bn_tail(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(x)


def without_norm(model: nn.Module) -> nn.Module:
    for name, layer in find_bn_layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, TailOnly(layer))
    return model
