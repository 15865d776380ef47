"""Rules about layers that something else has converted, replaced or taken apart since."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bnfinetune.bn.class_change import has_foreign_forward
from bnfinetune.bn.folding.layers import FoldedBN, FoldedConv
from bnfinetune.bn.layers import find_bn_layers, is_scripted, native_class, unwrap, walk_modules
from bnfinetune.bn.policy.marks import replaced_layers
from bnfinetune.bn.policy.state import Switches
from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.registry import Trouble, rule

_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


@rule(
    "BN112",
    "a converter replaced layers that were under a policy",
    "error",
    why="The new layers know nothing of the policy: they normalise, update and train as their own class does.",
)
def replaced_under_policy(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Statistics that were frozen move again, or what a policy set has no effect any more.

    **Cause.** Converters build new layers: `nn.SyncBatchNorm.convert_sync_batchnorm` makes live ones of frozen ones,
    timm's `freeze_batch_norm_2d` takes the optimizer's Parameters away. Policies belong to the layers that were there.

    **Found by.** A parent of BN layers remembers which of its children a policy took over; one of them is now a BN
    layer without a policy. `bnf.restore_bn` forgets.

    ```python
    bnf.freeze_bn(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)       # the pitfall: all statistics move again

    bnf.convert_sync_bn(model)                                   # repaired: frozen layers stay frozen
    ```
    """
    groups: dict[Switches, list[str]] = {}
    for name, switches in replaced_layers(case.model).items():
        if name in case.passed_over:
            continue
        groups.setdefault(switches, []).append(name)
    for switches, names in groups.items():
        settings = [f'{switch}="{value}"' for switch, value in switches._asdict().items()]
        yield Trouble(
            tuple(names),
            f"{len(names)} layers were under a policy ({', '.join(switches)}) and are now a "
            f"{type(case.layers[names[0]]).__name__} without one",
            case.policy(names, *settings),
        )


@rule(
    "BN114",
    "a replaced forward hides the policy",
    "warning",
    why="What the layer computes is the replacement's affair; whether the policy still holds, nobody can tell.",
)
def hidden_by_forward(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Statistics that a policy froze move, or what it set has no effect.

    **Cause.** `layer.forward = ...` on the layer itself, as profilers, pruners and patches for export do: it takes the
    place of whatever the layer's class computes, and a policy is a class. Policies refuse such layers; this one was
    patched afterwards.

    **Found by.** A layer under a policy that keeps a `forward` of its own, which is not accelerate's.

    ```python
    bnf.freeze_bn(model)
    model.bn1.forward = functools.partial(traced, model.bn1)     # the pitfall

    del model.bn1.forward                                        # repaired; a forward hook sees the output as well
    ```
    """
    hidden = [name for name, layer in case.layers.items() if not case.is_native(name) and has_foreign_forward(layer)]
    if hidden:
        yield Trouble(
            tuple(hidden),
            f"{len(hidden)} layers under a policy keep a forward of their own",
            f"[vars(model.get_submodule(name)).pop('forward') for name in {hidden!r}]",
        )


@rule(
    "BN403",
    "a conversion dropped the activations",
    "error",
    why="timm's BN layers hold their activation; converters that know only the base class leave it out without a word.",
)
def dropped_activation(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Nonsense outputs after a conversion to SyncBN or frozen BN; a ResNet is fine, an EfficientNet not.

    **Cause.** `BatchNormAct2d` normalises, drops out and activates. `nn.SyncBatchNorm.convert_sync_batchnorm`,
    detectron2's and open_clip's frozen converters match it as a `BatchNorm2d`.

    **Found by.** `SyncBatchNorm` layers that carry an activation as a child which they never call; with `source`, any
    layer whose source applies an activation and which does not.

    ```python
    model = nn.SyncBatchNorm.convert_sync_batchnorm(efficientnet)              # the pitfall

    model = bnf.convert_sync_bn(efficientnet)                                  # repaired
    ```
    """
    source = find_bn_layers(case.context.source) if case.context.source is not None else {}
    dropped = [
        name
        for name, layer in case.layers.items()
        if not _activates(layer) and (_holds_activation(layer) or _activates(source.get(name, layer)))
    ]
    if dropped:
        yield Trouble(
            tuple(dropped),
            f"{len(dropped)} layers no longer apply the activation that they held",
            "model = bnf.convert_sync_bn(source)  # the model from before the conversion",
        )


def _holds_activation(layer: nn.Module) -> bool:
    return not isinstance(getattr(layer, "act", None), nn.Identity | None)


def _activates(layer: nn.Module) -> bool:
    """Whether the layer applies the activation that it holds: the classes of torch and torchvision call no child."""
    plain = native_class(layer).__module__.partition(".")[0] in ("torch", "torchvision") and not is_scripted(layer)
    return _holds_activation(layer) and not plain


@rule(
    "BN502",
    "eps, momentum or statistics were lost in a conversion",
    "error",
    why="The converted layer normalises or averages otherwise than the weights were trained with.",
    needs=("source",),
)
def lost_settings(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Small or large differences in output after a conversion, freeze or port.

    **Cause.** Converters that forget attributes: timm's unfreeze resets momentum, early frozen layers had eps 0, ports
    from TensorFlow take its momentum for PyTorch's, half precision flushes tiny variances to 0.

    **Found by.** With `source`, the model from before: eps, momentum and running statistics of layers of equal name. A
    model that trained since differs in its statistics; compare right after the conversion.

    ```python
    frozen = timm.layers.freeze_batch_norm_2d(model)
    model = timm.layers.unfreeze_batch_norm_2d(frozen)               # the pitfall: momentum 0.01 is now 0.1

    bnf.freeze_bn(model); bnf.unfreeze_bn(model)                     # repaired: an exact round trip
    ```
    """
    assert case.context.source is not None
    lost: dict[str, str] = {}
    for name, before in find_bn_layers(case.context.source).items():
        layer = case.layers.get(name)
        changes = [] if layer is None else list(_changes(before, layer))
        if changes:
            lost[name] = ", ".join(changes)
    if lost:
        name, changes_of_first = next(iter(lost.items()))
        yield Trouble(
            tuple(lost),
            f"{len(lost)} layers differ from the source; {name}: {changes_of_first}",
            "for name, old in bnf.find_bn_layers(source).items(): new = bnf.find_bn_layers(model)[name]; "
            "new.eps, new.momentum = old.eps, getattr(old, 'momentum', 0.1); new.load_state_dict(old.state_dict())",
        )


def _changes(before: nn.Module, after: nn.Module) -> Iterator[str]:
    for key in ("eps", "momentum"):
        old, new = getattr(before, key, None), getattr(after, key, None)
        if hasattr(before, key) and hasattr(after, key) and old != new:
            yield f"{key} {old} became {new}"
    for key in ("running_mean", "running_var"):
        old, new = getattr(before, key), getattr(after, key)
        if old is not None and new is not None and not torch.equal(old.cpu().float(), new.cpu().float()):
            yield f"{key} changed by up to {float((old.cpu().float() - new.cpu().float()).abs().max()):.2g}"


@rule(
    "BN604",
    "pretrained BN was swapped for another norm",
    "warning",
    why="Weights that were trained around BN statistics are off under any other normalisation until they train anew.",
    needs=("source",),
)
def swapped_norm(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Accuracy of a pretrained network collapses after a swap of BN for GroupNorm.

    **Cause.** The other weights were trained with BN's statistics between them.

    **Found by.** With `source`: names where it has a BN layer and the model another norm, while other weights are still
    the source's.

    ```python
    model = with_group_norm(copy.deepcopy(source))            # the pitfall on pretrained weights and a short training

    model = bnf.freeze_bn(copy.deepcopy(source))              # repaired: small batches without a swap
    model = timm.create_model("resnet50_gn", pretrained=True) # or: weights that were trained with GroupNorm
    ```
    """
    source = case.context.source
    assert source is not None
    modules = dict(walk_modules(case.model))
    swapped = [name for name in find_bn_layers(source) if isinstance(modules.get(name), _OTHER_NORMS)]
    if swapped and _shares_weights(source, case.bare):
        yield Trouble(
            tuple(swapped),
            f"{len(swapped)} BN layers became {type(modules[swapped[0]]).__name__}; other weights are the source's",
            "model = bnf.freeze_bn(source)",
        )


def _shares_weights(source: nn.Module, model: nn.Module) -> bool:
    own = dict(model.named_parameters())
    return any(
        parameter.ndim > 1 and name in own and own[name].shape == parameter.shape and torch.equal(own[name], parameter)
        for name, parameter in unwrap(source).named_parameters()
    )


@rule(
    "BN607",
    "folded layers were taken apart",
    "info",
    why="Outputs stay right, but such a pair saves nothing, and the half that is left carries a class of this package.",
)
def parted_pair(case: Case) -> Iterator[Trouble]:
    """**Symptom.** A folded model is no faster any more, or a file of it asks for bnfinetune where it is read.

    **Cause.** It was given to a tool that replaces layers, such as a fuser, a quantiser or one that adds adapters: a
    new layer stands where the conv or its BN layer was, and the other half still waits for it.

    **Found by.** Convs that fold and whose BN layer is no longer in the model, and the other way round.

    ```python
    fuser(bnf.fold_bn(model))                              # the pitfall

    fuser(bnf.unfold_bn(model))                            # repaired; to deploy: bnf.fuse_bn(model)
    ```
    """
    modules = dict(walk_modules(case.model))
    awaited = {name: layer._fold_convs for name, layer in case.layers.items() if isinstance(layer, FoldedBN)}
    present, paired = set(modules.values()), {conv for convs in awaited.values() for conv in convs}
    convs = [name for name, module in modules.items() if isinstance(module, FoldedConv) and module not in paired]
    layers = [name for name, its in awaited.items() if not present.issuperset(its)]
    if convs or layers:
        yield Trouble(
            (*convs, *layers),
            f"{len(convs)} folding convs without their BN layer, {len(layers)} folded BN layers without their conv",
            "bnf.unfold_bn(model)",
        )
