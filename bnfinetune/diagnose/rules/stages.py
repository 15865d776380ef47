"""Rules about which layers a freeze reaches, and when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from bnfinetune.bn.layers import bn_class, native_class
from bnfinetune.bn.policy.switched_layer import trainable
from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.facts import bn_parameters, is_untouched, rebuilt_optimizer
from bnfinetune.diagnose.registry import Trouble, rule

_FREEZE = "bn.train_stats=running bn.update_stats=none bn.affine=frozen"


def _is_frozen(case: Case, name: str) -> bool:
    return case.is_fixed(name) and not any(trainable(case.layers[name]))


def _family(layer: nn.Module) -> str:
    """The kind of layer that a freezer may or may not know: frozen and live forms of it have one name."""
    return native_class(layer).__name__.replace("Frozen", "").replace("Sync", "")


@rule(
    "BN107",
    "the freeze missed a type of layer",
    "warning",
    why="Freezers that match by class pass over 1d, fused and custom BN layers, which go on updating in silence.",
)
def missed_type(case: Case) -> Iterator[Trouble]:
    """**Symptom.** The network is frozen, and still its features drift.

    **Cause.** Most freezers know `BatchNorm2d` only; timm's leaves the 48 `BatchNorm1d` of `levit_128s` live.

    **Found by.** All BN layers of one type are frozen, all of another type are live, and the live ones are not part of
    the classifier. Where all that surrounds the frozen layers is frozen too, and all that surrounds the live ones
    learns, a part was frozen and no type missed: a teacher beside its student.

    ```python
    model = timm.layers.freeze_batch_norm_2d(model)     # the pitfall, in a model with BatchNorm1d

    bnf.freeze_bn(model)                                # repaired: finds layers by what they do
    ```
    """
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name, layer in case.layers.items():
        kinds[_family(layer)].append(name)
    frozen = {kind: names for kind, names in kinds.items() if all(_is_frozen(case, name) for name in names)}
    by_hand = [name for names in frozen.values() for name in names if case.is_native(name)]
    for kind, names in kinds.items():
        body = [name for name in names if id(case.layers[name]) not in case.head]
        missed = [name for name in body if case.updates(name)]
        apart = _surroundings(case, by_hand) == {False} and _surroundings(case, missed) == {True}
        if by_hand and missed and len(missed) == len(body) and not apart:
            yield Trouble(
                tuple(missed),
                f"all {sum(map(len, frozen.values()))} layers of type {', '.join(frozen)} are frozen, "
                f"all {len(missed)} of type {kind} are live",
                case.call("freeze_bn", missed),
                _FREEZE,
            )


def _surroundings(case: Case, names: list[str]) -> set[bool]:
    """Whether the parameters beside these layers, in the modules that hold them, learn; some may and some not."""
    parents = [case.bare.get_submodule(name.rpartition(".")[0]) for name in names]
    affine = {id(parameter) for parameter in bn_parameters(case).values()}
    return {p.requires_grad for parent in parents for p in parent.parameters() if id(p) not in affine}


@rule(
    "BN108",
    "frozen at untrained statistics",
    "error",
    why="A layer pinned at mean 0 and variance 1 normalises nothing, and no weight was trained for that.",
)
def frozen_untrained(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Training from scratch, or with a new block, is weak or diverges.

    **Cause.** The layer was frozen before it had seen data: its running statistics are those of construction.

    **Found by.** Frozen layers whose running mean is 0 and variance 1 in every channel.

    ```python
    model = timm.create_model("resnet18")                                       # random weights
    bnf.freeze_bn(model)                                                        # the pitfall

    bnf.precise_bn(model, loader, num_batches=100, include_frozen=True)         # repaired: statistics first
    ```
    """
    pinned = [name for name, layer in case.layers.items() if case.is_fixed(name) and is_untouched(layer)]
    if pinned:
        yield Trouble(
            tuple(pinned),
            f"{len(pinned)} frozen layers have mean 0 and variance 1 in all channels",
            case.call("precise_bn", pinned, "loader", "num_batches=min(len(loader), 100)", "include_frozen=True"),
            "recalibrate.at=[start]",
        )


@rule(
    "BN109",
    "the optimizer does not hold trainable BN parameters",
    "error",
    why="Weights that require gradients but are in no optimizer group never learn, however long one trains.",
    needs=("optimizer",),
)
def not_in_optimizer(case: Case) -> Iterator[Trouble]:
    """**Symptom.** After unfreezing, BN weights and biases stay what they were.

    **Cause.** The optimizer was built while they were frozen, or a conversion of layers made new parameters and the
    optimizer still holds the old ones.

    **Found by.** Identities of parameters: those of BN layers that require gradients against those in the groups.

    ```python
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    bnf.unfreeze_bn(model)                                                      # the pitfall: too late

    optimizer = torch.optim.SGD(bnf.param_groups(model, weight_decay=0), lr=0.1)   # repaired
    ```
    """
    assert case.optimizer is not None
    held = {id(parameter) for group in case.optimizer.param_groups for parameter in group["params"]}
    lacking = [name for name, p in bn_parameters(case).items() if p.requires_grad and id(p) not in held]
    if lacking:
        own = {id(parameter) for parameter in case.bare.parameters()}
        strays = len(held - own)
        where = tuple(dict.fromkeys(name.rpartition(".")[0] for name in lacking))
        yield Trouble(
            where,
            f"{len(lacking)} trainable weights and biases of BN layers are in no optimizer group"
            + (f", which holds {strays} parameters that are not the model's" if strays else ""),
            rebuilt_optimizer(case.optimizer),
        )


@rule(
    "BN110",
    "a hole in the frozen part",
    "info",
    why="A live layer between frozen ones shifts the input of all that follow it, which stay tuned to the old one.",
)
def hole_in_freeze(case: Case) -> Iterator[Trouble]:
    """**Symptom.** The backbone is frozen, yet something in it moves: a stage, the stem, one branch.

    **Cause.** A freezer that was told its scope by stage numbers, attribute names or a leaf-only walk.

    **Found by.** By hand, some layers were frozen, and a live layer of the same type comes before a frozen one. A live
    end of the network, and whatever a policy's globs say, is taken as meant.

    ```python
    for stage in (model.layer1, model.layer3):
        stage.eval().requires_grad_(False)                 # the pitfall: layer2 in between is live

    bnf.freeze_bn(model, layers=["bn1", "layer1.*", "layer2.*", "layer3.*"])     # repaired
    ```
    """
    names = list(case.layers)
    frozen = [index for index, name in enumerate(names) if _is_frozen(case, name)]
    if not any(case.is_native(names[index]) for index in frozen):
        return
    kinds = {_family(case.layers[names[index]]) for index in frozen}
    before = names[: frozen[-1]]
    holes = [name for name in before if case.updates(name) and _family(case.layers[name]) in kinds]
    if holes:
        yield Trouble(
            tuple(holes),
            f"{len(frozen)} of {len(names)} layers are frozen up to {names[frozen[-1]]}, {len(holes)} before it live",
            case.call("freeze_bn", holes),
            _FREEZE,
        )


@rule(
    "BN111",
    "frozen by evaluation mode only",
    "info",
    why="BN in evaluation mode keeps its input for backward though nothing needs it, and the next train() undoes it.",
)
def unconverted_freeze(case: Case) -> Iterator[Trouble]:
    """**Symptom.** Freezing saves no memory; later the freeze is gone.

    **Cause.** PyTorch's batch norm keeps its input for the gradient of weight and bias even where these are frozen:
    conv, BN and ReLU kept 6.1 MiB in training mode, in evaluation mode, and in evaluation mode without gradients, and
    4.1 MiB once converted.

    **Found by.** Ordinary layers in evaluation mode, weight and bias frozen, inside a model in training mode.

    ```python
    model.layer1.eval().requires_grad_(False)      # the pitfall

    bnf.freeze_bn(model, layers="layer1.*")        # repaired: keeps no activations, holds through train()
    ```
    """
    idle = [
        name
        for name, layer in case.layers.items()
        if case.set_apart(name) and not any(trainable(layer)) and (known := bn_class(layer)) and not known.frozen
    ]
    if idle:
        yield Trouble(
            tuple(idle),
            f"{len(idle)} layers are frozen by their mode alone",
            case.call("freeze_bn", idle),
            _FREEZE,
        )
