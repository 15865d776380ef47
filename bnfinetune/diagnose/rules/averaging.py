"""Rules about what outlives training: averaged models, checkpoints, exported graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bnfinetune.bn.layers import find_bn_layers, unwrap
from bnfinetune.diagnose.case import Case
from bnfinetune.diagnose.facts import is_untouched
from bnfinetune.diagnose.registry import Trouble, rule
from bnfinetune.errors import CheckpointError

_BUFFERS = ("running_mean", "running_var")


@rule(
    "BN601",
    "averaged weights with another model's statistics",
    "warning",
    why="The statistics belong to the activations of the live weights; the averaged ones produce others.",
    needs=("averaged",),
)
def foreign_average(case: Case) -> Iterator[Trouble]:
    """**Symptom.** The averaged model is far below the live one.

    **Cause.** EMA or SWA averages parameters and copies buffers, or leaves them at construction.

    **Found by.** With `averaged`: its parameters differ from the model's while running statistics are bit for bit the
    model's, or untouched. Layers whose statistics are frozen, or before which no parameter differs, are left alone.
    Averaging buffers too, or re-estimating them, are both cures; which is better depends.

    ```python
    averaged = torch.optim.swa_utils.AveragedModel(model)           # the pitfall: use_buffers=False

    bnf.precise_bn(averaged, loader)                                # repaired
    ```
    """
    averaged = case.context.averaged
    assert averaged is not None
    theirs = find_bn_layers(averaged)
    own, other = dict(case.bare.named_parameters()), dict(unwrap(averaged).named_parameters())
    moved = [n for n, p in own.items() if n in other and not torch.equal(p.to(other[n].device), other[n])]
    order = {name: index for index, (name, _) in enumerate(case.bare.named_modules())}  # mostly as they run
    first = min((order[parameter.rpartition(".")[0]] for parameter in moved), default=len(order))
    foreign = [
        name
        for name, layer in case.layers.items()
        if name in theirs
        and layer.running_mean is not None
        and not case.is_fixed(name)
        and first < order[name]  # its input may depend on what has moved
        and (_same(layer, theirs[name]) or is_untouched(theirs[name]))
    ]
    if foreign:
        yield Trouble(
            tuple(foreign),
            f"the averaged parameters differ from the model's, {len(foreign)} layers' statistics do not",
            f"bnf.precise_bn(averaged, loader, include_frozen=True{_only(case, foreign)})",
        )


def _only(case: Case, names: list[str]) -> str:
    """The argument that selects these layers, where the model keeps others frozen."""
    return f", layers={case.globs(names)}" if any(map(case.is_fixed, case.every_layer)) else ""


@rule(
    "BN606",
    "an average re-estimated the statistics that training kept frozen",
    "warning",
    why="All weights were trained around the fixed statistics; with others the averaged network is one nobody trained.",
    needs=("averaged",),
)
def thawed_average(case: Case) -> Iterator[Trouble]:
    """**Symptom.** After SWA with frozen BN the averaged model is worse than any of those it is the mean of.

    **Cause.** `torch.optim.swa_utils.update_bn` resets every BN layer and puts it in training mode; it does not know
    which the model keeps frozen.

    **Found by.** With `averaged`: layers whose statistics are frozen in the model, and differ in the average.

    ```python
    for layer in bnf.find_bn_layers(model).values():
        layer.eval()                                                # frozen in training
    torch.optim.swa_utils.update_bn(loader, averaged)               # the pitfall

    bnf.freeze_bn(model)                                            # repaired: said to the layers, before averaging,
    averaged = torch.optim.swa_utils.AveragedModel(model)
    bnf.precise_bn(averaged, loader)                                # which leaves frozen ones alone
    ```

    The fix takes the statistics back from the model.
    """
    averaged = case.context.averaged
    assert averaged is not None
    theirs = find_bn_layers(averaged)
    thawed = [n for n in case.layers if n in theirs and case.is_fixed(n) and not _same(case.layers[n], theirs[n])]
    if thawed:
        yield Trouble(
            tuple(thawed),
            f"{len(thawed)} layers are frozen in the model, and have other statistics in the average",
            f"for name in {thawed!r}: old, new = (bnf.find_bn_layers(each)[name] for each in (model, averaged)); "
            "new.running_mean.copy_(old.running_mean); new.running_var.copy_(old.running_var)",
        )


def _same(first: Any, second: Any) -> bool:
    return all(
        torch.equal(getattr(first, key), getattr(second, key).to(getattr(first, key).device)) for key in _BUFFERS
    )


@rule(
    "BN602",
    "the checkpoint lacks running statistics",
    "error",
    why="Loading it gives the weights of this model with the statistics of another, and so other outputs.",
    needs=("saved",),
)
def missing_buffers(case: Case) -> Iterator[Trouble]:
    """**Symptom.** A saved model, adapter or resumed run gives other outputs than the one that was saved.

    **Cause.** Only parameters were saved: `named_parameters()`, an optimizer's view, or an adapter's.

    **Found by.** With `saved`, a state dict or the path of one (safetensors or a tensors-only pickle): names and shapes
    of BN statistics that the model has and it lacks. Prefixes of wrappers are looked through.

    ```python
    torch.save(dict(model.named_parameters()), "model.pt")        # the pitfall

    torch.save(model.state_dict(), "model.pt")                    # repaired
    ```
    """
    saved = case.context.saved
    assert saved is not None
    shapes = {_clean(name): shape for name, shape in _saved_shapes(saved).items()}
    tracked = {name: layer for name, layer in case.layers.items() if layer.running_mean is not None}
    lacking = [
        name
        for name, layer in tracked.items()
        if any(shapes.get(f"{name}.{key}" if name else key) != tuple(layer.running_mean.shape) for key in _BUFFERS)
    ]
    if lacking:
        path = repr(str(saved)) if isinstance(saved, str | Path) else '"model.pt"'
        yield Trouble(
            tuple(lacking),
            f"{len(lacking)} of {len(tracked)} layers have no running statistics of the right shape in it",
            f"torch.save(model.state_dict(), {path}); saved = model.state_dict()",
        )


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _saved_shapes(saved: Mapping[str, Any] | str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a state dict or of its file, by name."""
    if isinstance(saved, Mapping):
        inner = saved.get("state_dict", saved.get("model", saved))
        return {name: tuple(value.shape) for name, value in inner.items() if hasattr(value, "shape")}
    path = Path(saved)
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return _saved_shapes(torch.load(path, map_location="meta", weights_only=True))
    except Exception as error:  # safetensors, pickle, zip and the file system raise each their own
        raise CheckpointError(f"saved: {path} is neither safetensors nor a tensors-only pickle ({error})") from error


@rule(
    "BN603",
    "an exported graph has training mode baked in",
    "error",
    why="The graph cannot be switched: it normalises by whatever batch it gets, for ever.",
    needs=("exported",),
)
def baked_mode(case: Case) -> Iterator[Trouble]:
    """**Symptom.** The deployed model's answers depend on the batch; a batch of one fails.

    **Cause.** The model was exported in training mode.

    **Found by.** With `exported`, a `torch.export` program or an fx graph: nodes that normalise by the batch.

    ```python
    exported = torch.export.export(model.train(), (images,))         # the pitfall

    exported = torch.export.export(model.eval(), (images,))          # repaired
    ```
    """
    graph = getattr(case.context.exported, "graph_module", case.context.exported).graph
    baked = [_layer_of(node) for node in graph.nodes if node.op == "call_function" and _trains(node)]
    if baked:
        known = tuple(name for name in baked if name in case.layers)
        yield Trouble(
            known or tuple(baked),
            f"{len(baked)} batch-norm nodes of the graph normalise by their batch",
            "exported = torch.export.export(model.eval(), example_inputs)",
        )


_WITH_FLAG = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional")
_ALWAYS_TRAINING = ("_batch_norm_with_update", "_batch_norm_with_update_functional")


def _trains(node: torch.fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    name = str(packet or getattr(node.target, "__name__", "")).rpartition(".")[2]
    return name in _ALWAYS_TRAINING or (name in _WITH_FLAG and len(node.args) > 5 and node.args[5] is True)


def _layer_of(node: torch.fx.Node) -> str:
    """Qualified name of the module that a node was traced from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else node.name
    return str(path).removeprefix("L['self'].").replace("L__self___", "")


@rule(
    "BN605",
    "the optimizer's average is evaluated with statistics of other weights",
    "warning",
    why="optimizer.eval() puts averaged weights in; the running statistics are those of the weights that trained.",
    needs=("trace",),
)
def statistics_of_trained_weights(case: Case) -> Iterator[Trouble]:
    """**Symptom.** With a schedule-free optimizer validation is worse than the training loss promises.

    **Cause.** Schedule-free optimizers (Defazio et al. 2024) train weights y and evaluate their average x, which
    `optimizer.eval()` puts in the place of y. Running statistics were updated by forwards of y.

    **Found by.** A forward in evaluation mode after `optimizer.eval()`, when nobody had written to the running
    statistics since the last training forward. `precise_bn` gives x statistics of its own; training goes on from them.

    ```python
    optimizer = schedulefree.AdamWScheduleFree(model.parameters())
    optimizer.eval()
    validate(model.eval())                                            # the pitfall

    optimizer.eval()
    bnf.precise_bn(model, loader, num_samples=4096)                   # repaired
    validate(model.eval())
    ```
    """
    assert case.trace is not None
    count = sum(forward.foreign for forward in case.trace.forwards)
    moving = [name for name, calls in case.trace.layers.items() if calls.updating]
    if count and moving:
        yield Trouble(
            tuple(moving),
            f"{count} evaluation forwards after optimizer.eval(), with statistics of the weights before it",
            case.call("precise_bn", moving, "loader"),
        )
