"""From BN to GroupNorm (Wu & He 2018), calibrated so that a pretrained network starts near what it computed before.

Weights trained around BN's statistics lose their meaning when each sample is normalised by its own. Where GroupNorm
turns a layer's input into `xhat`, and BN in evaluation gave `y`, the affine `y ~ weight * xhat + bias` of least squares
takes back what an affine per channel can: `weight = cov(xhat, y) / var(xhat)`, `bias = mean(y) - weight * mean(xhat)`.
Layers are calibrated in the order in which they run, each on what the ones before it now give.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bnfinetune.bn.layers import (
    Selection,
    _drop_and_act,
    _no_tail,
    computable_eps,
    eps_of,
    native_class,
    replace_modules,
    require_bare,
    require_known,
    select_layers,
    walk_modules,
)
from bnfinetune.bn.policy.apply import restore_bn
from bnfinetune.bn.policy.transition import carry_out
from bnfinetune.bn.saved_report import SavedReport
from bnfinetune.bn.statistics.batches import device_of, images_tensor
from bnfinetune.errors import LayerError, PolicyError, StatisticsError

_POSITIONS = 64  # pixels per image that a layer is calibrated on; neighbours tell little more
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupNormReport(SavedReport):
    """How far a network with GroupNorm starts from the BN network it was, on samples it was not calibrated on.

    Attributes:
        layers: how many BN layers became GroupNorm.
        standardised: how many convolutions now standardise their weights.
        samples: how many samples the gap was measured on.
        gap: norm of the difference of outputs, over the norm of the BN outputs' distance from their mean: 0 is the
            same function, 1 is as far off as a constant.
        uncalibrated_gap: the same with BN's own weight and bias in the GroupNorm layers.
        agreement: share of samples (of their positions, for maps) where the same class is largest in the first output.
    """

    layers: int
    standardised: int
    samples: int
    gap: float
    uncalibrated_gap: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"GroupNorm in place of {self.layers} BN layers: on {self.samples} held-out samples outputs differ by "
            f"{self.gap:.1%} (uncalibrated {self.uncalibrated_gap:.1%}) and agree on {self.agreement:.1%} of the "
            f"predictions; the network needs training to make up for it"
        )


@torch.no_grad()
def convert_group_norm(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    num_groups: int = 32,
    min_group_size: int = 16,
    weight_standardisation: bool = False,
    num_samples: int = 128,
    layers: Selection = "*",
    exclude: Selection = (),
    on_report: Callable[[GroupNormReport], None] | None = None,
) -> nn.Module:
    """Replaces BN layers by GroupNorm, which treats every sample alone, alike in training and evaluation.

    This is the one change that replaces layers: `state_dict` loses the running statistics. The Parameters of weight and
    bias stay the same objects with new values, so an optimizer built before stays valid. Policies on these layers
    are undone first. If anything fails, the model is as it was.

    Args:
        model: any bare module that takes a batch of images and gives a tensor with one entry per sample, or several in
            any nest of tuples, lists and dicts.
        data: batches (tensors, tuples with images first, or dicts) of the data to be trained on. Without it the layers
            keep BN's weight and bias, which suits training from scratch only.
        num_groups: most groups of channels that a layer gets; a smaller number where this does not divide its channels.
            Fewer groups start nearer to BN, as each group's statistics hide less; 1 is layer norm.
        min_group_size: fewest channels of a group, in layers that have so many.
        weight_standardisation: also standardise the filters, `(W - mean(W)) / std(W)`, of the convolutions whose
            output goes into these layers (Qiao et al. 2019); it needs `data`.
        num_samples: samples to read; one half calibrates, the other measures.
        layers: globs on qualified layer names, classes or functions of name and layer.
        exclude: the same, of layers to leave as they are.
        on_report: called with the measured gap; by default it is logged as a warning.

    Returns:
        The same model, or a new layer if the model itself is a BN layer.

    Raises:
        SelectionError: a selector matches no BN layer.
        LayerError: a layer whose tail GroupNorm cannot take over, or whose weight or bias others share, so that it
            cannot be calibrated alone.
        PolicyError: a model that is wrapped or holds a wrapper, or weight standardisation without data.
        StatisticsError: no data, or outputs without a tensor.
    """
    require_bare(model, "convert_group_norm")
    if weight_standardisation and data is None:
        raise PolicyError("weight_standardisation needs data to find the convolutions before BN layers; pass data=")
    selected = select_layers(model, layers, exclude)
    if data is not None:
        _refuse_tied(model, selected)
    fresh = {name: _group_norm_for(name, layer, num_groups, min_group_size) for name, layer in selected.items()}
    report = None
    if data is not None:
        batch = _read(data, num_samples).to(device_of(model))
        report, convolutions = _calibrate(model, fresh, batch, weight_standardisation)
        for name in convolutions:
            _standardise(model.get_submodule(name))
    carry_out(model, {}, undone=selected.values())
    for name, layer in selected.items():
        _keep_parameters(layer, fresh[name])
    model = replace_modules(model, {layer: fresh[name] for name, layer in selected.items()})
    if report is not None:
        (on_report or (lambda report: _log.warning("%s", report)))(report)
    return model


def _refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuses layers whose weight or bias other modules hold too: calibrating one would change the other."""
    held = [
        (module, f"{name}.{key}" if name else key, parameter)
        for name, module in walk_modules(model)
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    for name, layer in layers.items():
        for key in ("weight", "bias"):
            own = layer._parameters.get(key)
            others = [shown for module, shown, parameter in held if parameter is own and module is not layer]
            if others:
                raise LayerError(
                    f"BN layer {name!r} shares its {key} with {others[0]!r}, but would be calibrated to its own; "
                    f"untie them by layer.{key} = nn.Parameter(layer.{key}.detach().clone()), or leave out data"
                )


def _group_norm_for(name: str, layer: Any, num_groups: int, min_group_size: int) -> nn.GroupNorm:
    if require_known(layer, name).tail not in (_no_tail, _drop_and_act):
        raise LayerError(f"BN layer {name!r} is a {native_class(layer).__name__}, whose tail is its own; exclude it")
    channels = next(t.numel() for t in (layer.running_mean, layer.weight) if t is not None)
    most = max(min(num_groups, channels // min_group_size), 1)
    groups = max(divisor for divisor in range(1, most + 1) if channels % divisor == 0)
    affine = layer.weight is not None
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype} if affine else {}
    fused = {child: module for child, module in layer.named_children() if child in ("drop", "act")}
    eps = eps_of(layer, name)
    if not fused:
        norm = nn.GroupNorm(groups, channels, eps, affine, **like)
    else:
        from timm.layers import GroupNormAct  # here, as models without fused layers do not need timm

        norm = GroupNormAct(channels, groups, eps, affine, **like)
        for child, module in fused.items():
            setattr(norm, child, module)
    if affine:
        norm.weight.copy_(layer.weight)
        norm.bias.copy_(layer.bias if layer.bias is not None else torch.zeros_like(layer.weight))
    return norm.train(layer.training)


def _read(data: Iterable[Any], num_samples: int) -> Tensor:
    parts: list[Tensor] = []
    for batch in data:
        parts.append(images_tensor(batch, "convert_group_norm"))
        if sum(map(len, parts)) >= num_samples:
            break
    images = torch.cat(parts)[:num_samples] if parts else torch.empty(0)
    if len(images) < 2:
        raise StatisticsError(f"convert_group_norm got {len(images)} samples of data; give at least 2")
    return images


def _calibrate(
    model: nn.Module, fresh: dict[str, nn.GroupNorm], images: Tensor, standardise: bool
) -> tuple[GroupNormReport, list[str]]:
    """Sets weight and bias of the fresh layers on copies of the model; gives the report and the convolutions."""
    fit, held_out = images.tensor_split(2)
    reference = restore_bn(copy.deepcopy(model)).eval()
    draft = copy.deepcopy(reference)
    targets, convolutions = _observe(reference, fresh, fit)
    for name in convolutions if standardise else ():
        _standardise(draft.get_submodule(name))
    modules = dict(walk_modules(draft))
    draft = replace_modules(draft, {modules[name]: norm for name, norm in fresh.items()})
    modes = {norm: norm.training for norm in fresh.values()}
    draft.eval()
    wanted = _outputs(reference, held_out)
    uncalibrated = _gap(_outputs(draft, held_out), wanted)
    with ExitStack() as stack:
        for name in fresh.keys() & targets.keys():
            hook = fresh[name].register_forward_pre_hook(_Calibration(targets[name]), with_kwargs=True)
            stack.callback(hook.remove)
        draft(fit)
    got = _outputs(draft, held_out)
    for norm, training in modes.items():
        norm.train(training)
    changed = convolutions if standardise else []
    gap = _gap(got, wanted)
    agreement = _agreement(got[0], wanted[0])
    return GroupNormReport(len(fresh), len(changed), len(held_out), gap, uncalibrated, agreement), changed


def _observe(reference: nn.Module, names: Iterable[str], images: Tensor) -> tuple[dict[str, Tensor], list[str]]:
    """What BN gives at sampled positions (N, C, P) for each layer, and which plain convolutions feed such layers."""
    modules = dict(walk_modules(reference))
    targets: dict[str, Tensor] = {}
    outputs: dict[int, tuple[str, Tensor]] = {}
    feeding: dict[str, None] = {}

    def keep_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.update({id(output): (name, output)})

    def keep_target(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            if id(x) in outputs:
                feeding[outputs[id(x)][0]] = None
            if name not in targets:
                stats = (layer.running_mean, layer.running_var)
                training = layer.running_mean is None
                y = F.batch_norm(x, *stats, layer.weight, layer.bias, training, 0.0, computable_eps(layer, name))
                targets[name] = _sampled(y)

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            if type(module) is nn.Conv2d and module.weight[0].numel() > 1:
                stack.callback(module.register_forward_hook(keep_output(name)).remove)
        for name in names:
            stack.callback(modules[name].register_forward_pre_hook(keep_target(name), with_kwargs=True).remove)
        reference(images)
    return targets, list(feeding)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a layer is called with, by position or by name."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _sampled(y: Tensor) -> Tensor:
    flat = y.flatten(2) if y.ndim > 2 else y[..., None]
    if flat.shape[2] <= _POSITIONS:
        return flat
    return flat[:, :, torch.linspace(0, flat.shape[2] - 1, _POSITIONS, device=y.device).long()]


class _Calibration:
    """Before a layer's first call: fits its weight and bias to what BN gave at the same positions."""

    def __init__(self, target: Tensor) -> None:
        self._target: Tensor | None = target

    def __call__(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._target is None or norm.weight is None:
            return
        xhat = _sampled(F.group_norm(_input(args, kwargs), norm.num_groups, None, None, norm.eps)).double()
        y, self._target = self._target.double(), None
        mean_x, mean_y = xhat.mean((0, 2), keepdim=True), y.mean((0, 2), keepdim=True)
        covariance = ((xhat - mean_x) * (y - mean_y)).mean((0, 2))
        weight = covariance / (xhat - mean_x).square().mean((0, 2)).clamp_min(1e-12)
        norm.weight.copy_(weight)
        norm.bias.copy_(mean_y.flatten() - weight * mean_x.flatten())


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every floating tensor (N, ...) that a model gives, in float64."""
    found = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    leaves = [leaf for leaf in found if leaf.ndim and len(leaf) == len(images)]
    if not leaves:
        raise StatisticsError(
            f"convert_group_norm compares outputs, but {type(model).__name__} gives none with one entry for each of "
            f"{len(images)} samples; convert the backbone alone"
        )
    return [leaf.double() for leaf in leaves]


def _gap(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    spread = math.hypot(*((tensor - tensor.mean(0)).norm().item() for tensor in wanted))
    error = math.hypot(*((new - old).norm().item() for new, old in zip(got, wanted, strict=True)))
    return error / spread if spread else math.inf


def _agreement(got: Tensor, wanted: Tensor) -> float:
    """Share of samples, or of their positions, where the same channel (N, C, ...) is largest."""
    if wanted.ndim == 1:
        got, wanted = got[:, None], wanted[:, None]
    return (got.argmax(1) == wanted.argmax(1)).double().mean().item()


def _standardise(convolution: Any) -> None:
    from timm.layers import StdConv2d

    convolution.__class__ = StdConv2d
    convolution.eps = 1e-6


def _keep_parameters(old: nn.Module, new: nn.GroupNorm) -> None:
    """Hands a layer's own Parameters on, with the new layer's values; a frozen class has none."""
    for name in ("weight", "bias"):
        parameter = old._parameters.get(name)
        if parameter is not None:
            parameter.copy_(getattr(new, name))
            parameter.grad = None
            new.register_parameter(name, parameter)
