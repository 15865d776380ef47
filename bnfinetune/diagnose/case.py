"""A training set-up as the rules see it: the model, what stands around it, and facts derived from both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from bnfinetune.bn.layers import find_bn_layers, unwrap
from bnfinetune.bn.policy.state import Switches
from bnfinetune.bn.policy.switched_layer import state_of, switches_of
from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.bn.statistics.recorder import forwards_replaced
from bnfinetune.diagnose.finding import as_globs
from bnfinetune.errors import LayerError, SelectionError

if TYPE_CHECKING:
    from bnfinetune.diagnose.trace import Trace

EXPECTED = "_bn_expected"
"""Attribute of a BN layer: codes of the rules that it breaks on purpose."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What stands around the model, as far as it is known; see `check_bn`."""

    grad_accum: int = 1
    steps: int | None = None
    batch_size: int | None = None
    input_size: tuple[int, ...] | None = None
    train_size: int | None = None
    eval_size: int | None = None
    ranks: int | None = None
    ranks_per_node: int | None = None
    process_group: Any = None
    source: nn.Module | None = None
    averaged: nn.Module | None = None
    saved: Mapping[str, Any] | str | Path | None = None
    exported: Any = None
    recipe_keys: bool = False


@dataclass(frozen=True)
class Case:
    """One set-up under examination.

    Attributes:
        model: the model as it was given, perhaps wrapped.
        optimizer: what trains it.
        loader: what feeds it in training.
        context: what else is known.
        trace: what was seen while some steps ran; None for a judgement of the set-up alone.
        passed_over: BN layers that are not judged, as they do on purpose what a rule looks for.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    loader: Any = None
    context: Context = field(default_factory=Context)
    trace: Trace | None = None
    passed_over: frozenset[str] = frozenset()

    def without(self, names: Iterable[str]) -> Case:
        """The same case as if it did not have these layers; globs still pass by them."""
        passed_over = frozenset(names)
        if not passed_over:
            return self
        trace = None if self.trace is None else self.trace.without(passed_over)
        return replace(self, trace=trace, passed_over=passed_over)

    def has(self, needs: Iterable[str]) -> bool:
        """Whether the evidence that a rule needs was given."""
        return all(
            getattr(self, need, None) is not None or getattr(self.context, need, None) is not None for need in needs
        )

    @cached_property
    def bare(self) -> nn.Module:
        """The model without DDP or `torch.compile` around it."""
        return unwrap(self.model)

    @cached_property
    def layers(self) -> dict[str, Any]:  # Any, because nn.Module has no `running_mean`
        """BN layers to judge, by name."""
        return {name: layer for name, layer in self.every_layer.items() if name not in self.passed_over}

    @cached_property
    def every_layer(self) -> dict[str, Any]:
        """BN layers by name; empty only where the model replaced those of a `source`."""
        try:
            return find_bn_layers(self.model)
        except SelectionError:
            if self.context.source is None:
                raise
            return {}

    @cached_property
    def switches(self) -> dict[str, Switches]:
        """What each layer does; layers of unknown classes are left out."""
        known: dict[str, Switches] = {}
        for name, layer in self.layers.items():
            try:
                known[name] = switches_of(layer)
            except LayerError:
                continue
        return known

    def globs(self, names: Iterable[str]) -> str:
        """Source text of an argument that selects exactly these BN layers, such as `["layer1.*", "bn1"]`."""
        globs = as_globs(list(names), list(self.every_layer))
        return f'"{globs[0]}"' if len(globs) == 1 else "[{}]".format(", ".join(f'"{glob}"' for glob in globs))

    def call(self, function: str, names: Iterable[str], *arguments: str) -> str:
        """Source text of `bnf.function(model, ..., layers=...)`, without `layers` where all are meant."""
        globs = self.globs(names)
        selected = [] if globs == '"*"' else [f"layers={globs}"]
        return f"bnf.{function}({', '.join(['model', *arguments, *selected])})"

    def policy(self, names: Iterable[str], *switches: str) -> str:
        """Source text that applies a `BNPolicy` to these layers."""
        globs = self.globs(names)
        selected = [] if globs == '"*"' else [f"layers={globs}"]
        return f"bnf.apply_policy(model, bnf.BNPolicy({', '.join([*switches, *selected])}))"

    # what a layer does in training

    def is_native(self, name: str) -> bool:
        """Whether no policy has taken the layer over, so that nobody has said what it shall do."""
        return state_of(self.layers[name]) is None

    def in_training(self, name: str) -> bool:
        """Whether the layer will be in training mode while the model trains."""
        return self.layers[name].training or (not self.bare.training and self.optimizer is not None)

    def set_apart(self, name: str) -> bool:
        """Whether an ordinary layer was put in evaluation mode while the model around it trains."""
        return self.is_native(name) and self.bare.training and not self.layers[name].training

    def normalises_by_batch(self, name: str) -> bool:
        """Whether training normalises with anything but the running statistics alone."""
        known = self.switches.get(name)
        return known is not None and known.train_stats != "running" and self.in_training(name)

    def updates(self, name: str) -> bool:
        """Whether training moves the running statistics."""
        known = self.switches.get(name)
        moves = known is not None and known.update_stats != "none" and self.in_training(name)
        return moves and getattr(self.layers[name], "momentum", None) != 0

    def is_fixed(self, name: str) -> bool:
        """Whether training normalises with running statistics that do not move."""
        known = self.switches.get(name)
        if known is None or self.layers[name].running_mean is None:
            return False
        return (known.train_stats, known.update_stats) == ("running", "none") or self.set_apart(name)

    @cached_property
    def live(self) -> list[str]:
        """Layers that normalise by the batch and keep running statistics."""
        return [name for name in self.switches if self.normalises_by_batch(name) and self.updates(name)]

    # what surrounds it

    @cached_property
    def head(self) -> set[int]:
        """Identities of the classifier's modules: timm's own, else the last child with parameters.

        Of a module that holds nothing but one network, as those of transformers and Lightning may, it is the network's.
        """
        network: Any = self.bare
        while not hasattr(network, "get_classifier"):
            children = [child for child in network.children() if any(True for _ in child.parameters())]
            if len(children) != 1 or any(True for _ in network.parameters(recurse=False)):
                heads = children[-1:] if len(children) > 1 else []
                break
            network = children[0]
        else:
            found = network.get_classifier()
            heads = list(found) if isinstance(found, tuple | list) else [found]
        return {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}

    @cached_property
    def batch_size(self) -> int | None:
        """Images per process and forward, if known."""
        if self.context.batch_size is not None:
            return self.context.batch_size
        size = getattr(self.loader, "batch_size", None)
        size = getattr(getattr(self.loader, "batch_sampler", None), "batch_size", None) if size is None else size
        return size if isinstance(size, int) else None

    @cached_property
    def ranks(self) -> int:
        """Processes that train together."""
        if self.context.ranks is not None:
            return self.context.ranks
        return dist.get_world_size(self.context.process_group) if dist.is_available() and dist.is_initialized() else 1

    @cached_property
    def ranks_per_node(self) -> int:
        """Processes on one machine."""
        return self.context.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))

    def sync_ranks(self, name: str) -> int:
        """Processes whose batches the layer joins into one."""
        layer, state = self.layers[name], state_of(self.layers[name])
        if self.switches[name].train_stats != "sync":
            return 1
        size = None if state is None else state.options.ranks.size
        group = getattr(layer, "process_group", None) if state is None else state.options.ranks.process_group
        if group is not None and dist.is_initialized():
            return dist.get_world_size(group)
        return min(size or self.ranks, self.ranks)

    def images_per_statistic(self, name: str) -> int | None:
        """Images whose activations make one mean and variance of a layer in training."""
        if self.batch_size is None:
            return None
        state = state_of(self.layers[name])
        if state is not None and state.train_stats == "ghost":
            return min(state.options.ghost_size, self.batch_size)
        return self.batch_size * self.sync_ranks(name)

    @cached_property
    def values_per_image(self) -> dict[str, int]:
        """Height times width of each layer's input for one image; empty where it cannot be told without data.

        Found by a forward on the meta device, which computes shapes only.
        """
        size = self.context.input_size or (getattr(self.bare, "pretrained_cfg", None) or {}).get("input_size")
        return {} if size is None else _values_per_image(self.bare, self.layers, tuple(size))


def expected_of(layer: nn.Module) -> frozenset[str]:
    """Codes of the rules that a layer breaks on purpose; see `expect`."""
    codes: Iterable[str] = layer.__dict__.get(EXPECTED, ())
    return frozenset(codes)


@torch.no_grad()
def _values_per_image(model: nn.Module, layers: Mapping[str, nn.Module], size: tuple[int, ...]) -> dict[str, int]:
    seen: dict[str, int] = {}

    def passing(name: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            seen[name] = x.numel() // (2 * x.shape[1])
            return x  # of the shape that normalising would give, which takes the meta device long

        return forward

    meta = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    replaced = {layer: passing(name) for name, layer in layers.items()}
    try:
        with evaluation_mode(model), forwards_replaced(replaced):
            functional_call(model, meta, (torch.empty(2, *size, device="meta"),))
    except Exception:  # a model may do anything with values that it cannot read on the meta device
        return {}
    return seen
