"""Where a layer's weight and bias really live, and which of that learns.

Pruning, weight and spectral normalisation and parametrisations keep what learns under other names and compute weight or
bias from it: `weight_orig` behind a forward pre-hook, `parametrizations.weight.original`. To freeze means these.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import Parameter
from torch.nn.utils.parametrize import is_parametrized

from bnfinetune.bn.policy.added import added_affine, added_names, has_tensor
from bnfinetune.bn.policy.state import Learning
from bnfinetune.bn.population import AFFINE


def parameters_behind(layer: nn.Module, tensor: str) -> dict[str, Parameter]:
    """The Parameters that an affine tensor of a layer is, or is computed from, by their names within the layer."""
    parameters = dict(layer._parameters.items())  # those of scripted layers are no dict
    plain = parameters.get(tensor)
    if plain is not None:
        return {tensor: plain}
    if tensor in layer._buffers or not has_tensor(layer, tensor):
        return {}
    found = {name: own for name, own in parameters.items() if own is not None and name.startswith(f"{tensor}_")}
    for key, module in layer.get_submodule("parametrizations")._modules.items() if is_parametrized(layer) else ():
        if module is not None and (key == tensor or key.startswith(f"{tensor}_")):
            found |= {f"parametrizations.{key}.{name}": own for name, own in module.named_parameters()}
    return found or _everything_else(layer)


def _everything_else(layer: nn.Module) -> dict[str, Parameter]:
    """What a hook or property of another make can compute an affine tensor from."""
    known = (*AFFINE, *added_names(layer))
    return {name: own for name, own in layer._parameters.items() if own is not None and name not in known}


def affine_parameters(layer: nn.Module) -> list[Parameter]:
    """Every Parameter behind a layer's weight and bias, those of its domains included."""
    return [own for tensor in _affine_tensors(layer) for own in parameters_behind(layer, tensor).values()]


def learning_of(layer: nn.Module) -> Learning:
    """Which Parameters behind a layer's weight and bias learn."""
    return {
        tensor: {name: own.requires_grad for name, own in parameters_behind(layer, tensor).items()}
        for tensor in _affine_tensors(layer)
        if has_tensor(layer, tensor)
    }


def learns(learning: Learning) -> bool:
    """Whether anything learns."""
    return any(True in flags.values() for flags in learning.values())


def all_learning(learning: Learning, flag: bool) -> Learning:
    """The same tensors with everything behind them learning, buffers too, or nothing."""
    if not flag:
        return {tensor: dict.fromkeys(flags, False) for tensor, flags in learning.items()}
    return {tensor: dict.fromkeys(flags or [tensor], True) for tensor, flags in learning.items()}


def wanted_of(layer: nn.Module, learning: Learning) -> Iterator[tuple[Parameter, bool]]:
    """Each Parameter behind a layer's affine and whether it is to learn.

    What was not there when `learning` was noted does as the tensor did that it is behind; a domain's own tensor that
    was not there as the layer's.
    """
    for tensor, base in _affine_tensors(layer).items():
        flags = learning.get(tensor, learning.get(base))
        if flags is not None:
            for name, own in parameters_behind(layer, tensor).items():
                yield own, flags.get(name, True in flags.values())


def changes_learning(layer: nn.Module, learning: Learning) -> bool:
    """Whether `set_learning` would make any Parameter learn or not, or begin or cease to be one."""
    kinds = any(_turns(layer, tensor, learning) for tensor in AFFINE)
    return kinds or any(own.requires_grad != flag for own, flag in wanted_of(layer, learning))


def set_learning(layer: nn.Module, learning: Learning) -> None:
    """Makes the Parameters behind weight and bias learn or not.

    One that changes, or does not learn, loses its gradient, which would still move it. Where a class holds weight and
    bias as buffers, learning makes them Parameters, and none behind them makes them buffers again, of the same memory.
    """
    for tensor in AFFINE:
        turns = _turns(layer, tensor, learning)
        if turns == "parameter":
            buffer = layer._buffers.pop(tensor)
            assert buffer is not None
            layer.register_parameter(tensor, Parameter(buffer))
        elif turns == "buffer":
            parameter = layer._parameters.pop(tensor)
            assert parameter is not None
            layer.register_buffer(tensor, parameter.detach())
    for own, flag in wanted_of(layer, learning):
        if own.requires_grad != flag or not flag:
            own.requires_grad_(flag)
            own.grad = None


def _turns(layer: nn.Module, tensor: str, learning: Learning) -> str:
    """What a weight or bias is to become; empty where it stays what it is."""
    flags = learning.get(tensor)
    if flags is None:
        return ""
    if layer._buffers.get(tensor) is not None and True in flags.values():
        return "parameter"
    return "buffer" if layer._parameters.get(tensor) is not None and not flags else ""


def _affine_tensors(layer: nn.Module) -> dict[str, str]:
    """Names of a layer's affine tensors, its domains' own included, each with the name of the one it stands for."""
    return {**{tensor: tensor for tensor in AFFINE}, **added_affine(layer)}
