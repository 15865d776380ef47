"""Which convolution feeds which BN layer, found by what really flows in observed forwards.

Neither names nor a traced graph are needed: every conv's output is followed through the operators that read it. A BN
layer can be taken in by the convs before it if each of its inputs is the output of one of them, and nobody else reads
that output, then or later. Evaluation and training are observed, since dropout, noise and auxiliary heads run only in
training. What is changed for good is observed at further image sizes too, since some paths depend on the size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from bnfinetune.bn.folding.arithmetic import CONVOLUTIONS, channel_axis, run_with
from bnfinetune.bn.folding.layers import is_watched
from bnfinetune.bn.folding.observed import Example, evaluating, example_arguments, training
from bnfinetune.bn.functional import along
from bnfinetune.bn.layers import unwrap, walk_modules
from bnfinetune.errors import PolicyError

Purpose = Literal["fold", "fuse", "absorb"]

_SIZE_STEPS = (1, 2, 4, 8, 16, 32)
"""Each makes the map behind as many halvings odd where it was even, and even where it was odd."""


@dataclass
class Pairs:
    """What observed forwards have shown about some BN layers.

    Attributes:
        convs: for each BN layer that can be taken in, by its name, the convs before it by theirs.
        obstacles: for each other BN layer, by its name, why not.
    """

    convs: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)


def find_pairs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    example_input: Example | None = None,
    *,
    purpose: Purpose = "fold",
) -> Pairs:
    """Finds the convs that can take BN layers in, by observed forwards without gradient.

    Random state, modes and buffers are put back. While training is observed BN layers stay in evaluation mode, so that
    one image will do.

    Args:
        model: any module, wrapped (DDP, `torch.compile`) or not.
        layers: BN layers by qualified name.
        example_input: a tensor, a sequence of positional or a mapping of named arguments of the model; by default
            zeros of timm's `pretrained_cfg["input_size"]`.
        purpose: fold: pairs are checked again in each forward, so a model that needs more than images in training is
            observed in evaluation alone. fuse: only evaluation counts, at several image sizes. absorb: both, likewise.

    Raises:
        PolicyError: no example input and no `pretrained_cfg`, or the model's forward fails on it.
    """
    bare = unwrap(model)
    args, kwargs = example_arguments(bare, example_input)
    names: dict[nn.Module, str] = {m: name for name, m in walk_modules(bare) if isinstance(m, CONVOLUTIONS)}
    flow = _Flow()
    with flow.watching(names, layers.values()):
        shown = "the example input" if example_input is not None else "zeros of pretrained_cfg['input_size']"
        with evaluating(bare):
            _observe(bare, flow, args, kwargs, shown)
        if purpose != "fuse":
            with training(bare):
                _observe(bare, flow, args, kwargs, f"{shown} in training" if purpose == "absorb" else None)
        for step in () if purpose == "fold" else _SIZE_STEPS:
            larger = tree_map(partial(_enlarged, step=step), (args, kwargs))
            with evaluating(bare):
                _observe(bare, flow, larger[0], larger[1], None)
    pairs = Pairs()
    for name, layer in layers.items():
        obstacle = flow.obstacle(layer, names, for_good=purpose != "fold")
        if obstacle is None:
            pairs.convs[name] = {names[conv]: conv for conv in flow.sources[layer] if conv is not None}
        else:
            pairs.obstacles[name] = obstacle
    return pairs


def _observe(model: nn.Module, flow: _Flow, args: Any, kwargs: Any, shown: str | None) -> None:
    """Lets a flow see one forward; without a name for what the model gets, its failure shows nothing."""
    try:
        with flow, torch.enable_grad():  # hooks on tensors, as Grad-CAM's, fail without
            flow.returned(model(*args, **kwargs))
    except Exception as error:
        flow.interrupted()
        if shown is None:
            return
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PolicyError(
            f"{type(model).__name__} fails on {shown} ({reason}); pass an example_input that it takes"
        ) from error
    flow.note_survivors()


def _enlarged(x: Any, step: int) -> Any:
    """A tensor of images, higher and wider by some pixels; anything else as it is."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3):
        return x
    higher = torch.cat([x, *[x[..., -1:, :]] * step], -2)
    return torch.cat([higher, *[higher[..., -1:]] * step], -1)


class _Flow(TorchDispatchMode):
    """Follows the outputs of convs: to which BN layers they go, and whether anything else reads them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = WeakIdKeyDictionary()
        self.inside: list[Tensor] = []
        self.sources: dict[nn.Module, dict[nn.Module | None, None]] = {}
        self.readers: dict[nn.Module, dict[nn.Module | None, None]] = {}
        self.misfits: set[nn.Module] = set()
        self.odd: dict[nn.Module, bool] = {}
        self.running: list[nn.Module] = []
        self.owners = WeakIdKeyDictionary()
        self.foreign: set[nn.Module] = set()
        self.resting = False

    @contextmanager
    def watching(self, convs: Iterable[nn.Module], layers: Iterable[nn.Module]) -> Iterator[None]:
        """Within this context the hooks that the flow needs are on convs and BN layers."""
        with ExitStack() as stack:
            for module in (*convs, *layers):
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None:
                        self.owners.setdefault(tensor, []).append(module)
                stack.callback(module.register_forward_pre_hook(self._entered, prepend=True).remove)
            for conv in convs:
                stack.callback(conv.register_forward_hook(self.left_conv).remove)
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(self.entered_bn, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(self.left_bn).remove)
            yield

    def _entered(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def interrupted(self) -> None:
        """Forgets what was going on in a forward that has failed."""
        self.inside.clear()
        self.running.clear()
        self.resting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.resting:
            return output
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf in self.owners:
                owners = self.owners[leaf]
                if not any(module in owners for module in self.running):
                    self.foreign.update(owners)
            if not (isinstance(leaf, Tensor) and leaf in self.made) or any(leaf is x for x in self.inside):
                continue
            conv = self.made[leaf]
            if func is torch.ops.aten.view.default and isinstance(conv, nn.Linear) and _same_rows(leaf, output):
                self.made[output] = conv
            else:
                self.readers[conv][None] = None
        return output

    def left_conv(self, conv: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.running.pop()
        self.readers.setdefault(conv, {})
        if isinstance(output, Tensor):
            self.made[output] = conv
        if conv not in self.odd:
            self.resting = True
            self.odd[conv] = _has_own_forward(conv) and not _is_linear_in_parameters(conv, args)
            self.resting = False

    def entered_bn(self, bn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        conv = self.made.get(x)
        self.sources.setdefault(bn, {})[conv] = None
        if conv is not None:
            self.readers[conv][bn] = None
            if x.ndim != cast(Tensor, conv.weight).ndim:
                self.misfits.add(conv)
        self.inside.append(x)

    def left_bn(self, *_: Any) -> None:
        self.running.pop()
        self.inside.pop()

    def returned(self, output: Any) -> None:
        """Marks convs whose output is part of the model's."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf in self.made:
                self.readers[self.made[leaf]][None] = None

    def note_survivors(self) -> None:
        """Marks convs whose output outlives the forward: it was returned, or somebody keeps it."""
        before_bn = {conv for sources in self.sources.values() for conv in sources}
        if any(conv in before_bn for conv in self.made.values()):  # else, as for a classifier's output, it is no matter
            gc.collect()
        for conv in list(self.made.values()):
            self.readers[conv][None] = None

    def obstacle(self, bn: nn.Module, names: Mapping[nn.Module, str], *, for_good: bool) -> str | None:
        """Why a BN layer cannot be taken in, or not for good; None if it can."""
        sources = self.sources.get(bn)
        if sources is None:
            return "not reached by the observed forward"
        if None in sources:
            return "an input of it comes from no convolution directly"
        if is_watched(bn) or bn._forward_pre_hooks:
            return "it has hooks or a replaced forward"
        if for_good and bn in self.foreign:
            return "its parameters or statistics are read outside of its forward"
        for conv in sources:
            reason = self._obstacle_in_conv(cast(nn.Module, conv), bn, for_good)
            if reason is not None:
                return f"{names[cast(nn.Module, conv)]!r} before it {reason}"
        return None

    def _obstacle_in_conv(self, conv: nn.Module, bn: nn.Module, for_good: bool) -> str | None:
        checks: dict[str, Callable[[], bool]] = {
            "feeds something else as well": lambda: list(self.readers[conv]) != [bn],
            "has hooks or a replaced forward": lambda: is_watched(conv),
            "computes its weight": lambda: conv._parameters.get("weight") is None or is_parametrized(conv),
            "is transposed and grouped": lambda: isinstance(conv, _ConvTransposeNd) and conv.groups > 1,
            "has its channels on another axis": lambda: conv in self.misfits,
            "does more than one convolution": lambda: self.odd[conv],
            "has a weight that is read outside of its forward": lambda: for_good and conv in self.foreign,
        }
        return next((reason for reason, holds in checks.items() if holds()), None)


def _same_rows(x: Tensor, view: Tensor) -> bool:
    """Whether a view has the vectors along the last axis of another tensor, as those of tokens laid side by side."""
    return view.ndim > 0 and view.shape[-1] == x.shape[-1]


def _has_own_forward(conv: nn.Module) -> bool:
    """Whether a conv's class computes otherwise than PyTorch's."""
    plain = next(cls for cls in type(conv).__mro__ if cls.__module__.startswith("torch.nn.modules"))
    return any(
        getattr(type(conv), name, None) is not getattr(plain, name, None) for name in ("forward", "_conv_forward")
    )


def _is_linear_in_parameters(conv: Any, args: tuple[Any, ...]) -> bool:
    """Tries on a random batch whether scaling weight and bias scales the output, and adding to the bias shifts it."""
    weight, bias = conv.weight, conv.bias
    try:
        probe = tree_map(lambda x: torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x, args)
        plain = run_with(conv, weight, bias, *probe)
        scale = torch.rand(plain.shape[1], device=plain.device, dtype=plain.dtype) + 0.5
        shift = torch.randn_like(scale)
        rows, columns = along(channel_axis(conv), weight.ndim), along(1, plain.ndim)
        folded = run_with(
            conv, weight * scale.view(rows), shift if bias is None else torch.addcmul(shift, bias, scale), *probe
        )
        wanted = plain * scale.view(columns) + shift.view(columns)
    except Exception:  # whatever a foreign forward raises, it cannot be run with other parameters
        return False
    return bool((folded - wanted).abs().max() <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max())
