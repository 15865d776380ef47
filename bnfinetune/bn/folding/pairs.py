"""Which convolution feeds which BN layer, found by what really flows in one observed forward.

Neither names nor a traced graph are needed: every conv's output is followed through the operators that read it. A BN
layer can be taken in by the convs before it if each of its inputs is the output of one of them, and nobody else reads
that output, then or later.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from bnfinetune.bn.folding.arithmetic import CONVOLUTIONS, channel_axis, run_with
from bnfinetune.bn.functional import along
from bnfinetune.bn.layers import unwrap, walk_modules
from bnfinetune.errors import PolicyError

Example = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass
class Pairs:
    """What one observed forward has shown about some BN layers.

    Attributes:
        convs: for each BN layer that can be taken in, by its name, the convs before it by theirs.
        obstacles: for each other BN layer, by its name, why not.
    """

    convs: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    obstacles: dict[str, str] = field(default_factory=dict)


def find_pairs(model: nn.Module, layers: Mapping[str, nn.Module], example_input: Example | None = None) -> Pairs:
    """Finds the convs that can take BN layers in, by one forward in evaluation mode without gradient.

    Random state and modes are put back.

    Args:
        model: any module, wrapped (DDP, `torch.compile`) or not.
        layers: BN layers by qualified name.
        example_input: a tensor, a sequence of positional or a mapping of named arguments of the model; by default
            zeros of timm's `pretrained_cfg["input_size"]`.

    Raises:
        PolicyError: no example input and no `pretrained_cfg`, or the model's forward fails on it.
    """
    bare = unwrap(model)
    args, kwargs = example_arguments(bare, example_input)
    names: dict[nn.Module, str] = {m: name for name, m in walk_modules(bare) if isinstance(m, CONVOLUTIONS)}
    flow = _Flow()
    with ExitStack() as stack:
        stack.enter_context(evaluating(bare))
        for conv in names:
            stack.callback(conv.register_forward_hook(flow.left_conv).remove)
        for layer in layers.values():
            stack.callback(layer.register_forward_pre_hook(flow.entered_bn, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(flow.left_bn).remove)
        stack.enter_context(flow)
        try:
            returned = bare(*args, **kwargs)
        except Exception as error:
            shown = "the example input" if example_input is not None else "zeros of pretrained_cfg['input_size']"
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise PolicyError(
                f"{type(bare).__name__} fails on {shown} ({reason}); pass an example_input that it takes"
            ) from error
    flow.note_survivors()
    del returned
    pairs = Pairs()
    for name, layer in layers.items():
        obstacle = flow.obstacle(layer, names)
        if obstacle is None:
            pairs.convs[name] = {names[conv]: conv for conv in flow.sources[layer] if conv is not None}
        else:
            pairs.obstacles[name] = obstacle
    return pairs


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
        self.resting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.resting:
            return output
        for leaf in tree_leaves((args, kwargs)):
            if not (isinstance(leaf, Tensor) and leaf in self.made) or any(leaf is x for x in self.inside):
                continue
            conv = self.made[leaf]
            if func is torch.ops.aten.view.default and isinstance(conv, nn.Linear) and _same_rows(leaf, output):
                self.made[output] = conv
            else:
                self.readers[conv][None] = None
        return output

    def left_conv(self, conv: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
        self.inside.pop()

    def note_survivors(self) -> None:
        """Marks convs whose output outlives the forward: it was returned, or somebody keeps it."""
        before_bn = {conv for sources in self.sources.values() for conv in sources}
        if any(conv in before_bn for conv in self.made.values()):  # else, as for a classifier's output, it is no matter
            gc.collect()
        for conv in list(self.made.values()):
            self.readers[conv][None] = None

    def obstacle(self, bn: nn.Module, names: Mapping[nn.Module, str]) -> str | None:
        """Why a BN layer cannot be taken in; None if it can."""
        sources = self.sources.get(bn)
        if sources is None:
            return "not reached by the observed forward"
        if None in sources:
            return "an input of it comes from no convolution directly"
        if _is_watched(bn, inputs_too=True):
            return "it has hooks or a replaced forward"
        for conv in sources:
            reason = self._obstacle_in_conv(cast(nn.Module, conv), bn)
            if reason is not None:
                return f"{names[cast(nn.Module, conv)]!r} before it {reason}"
        return None

    def _obstacle_in_conv(self, conv: nn.Module, bn: nn.Module) -> str | None:
        checks: dict[str, Callable[[], bool]] = {
            "feeds something else as well": lambda: list(self.readers[conv]) != [bn],
            "has hooks or a replaced forward": lambda: _is_watched(conv, inputs_too=False),
            "computes its weight": lambda: conv._parameters.get("weight") is None or is_parametrized(conv),
            "is transposed and grouped": lambda: isinstance(conv, _ConvTransposeNd) and conv.groups > 1,
            "has its channels on another axis": lambda: conv in self.misfits,
            "does more than one convolution": lambda: self.odd[conv],
        }
        return next((reason for reason, holds in checks.items() if holds()), None)


def _same_rows(x: Tensor, view: Tensor) -> bool:
    """Whether a view has the vectors along the last axis of another tensor, as those of tokens laid side by side."""
    return view.ndim > 0 and view.shape[-1] == x.shape[-1]


def _is_watched(layer: nn.Module, *, inputs_too: bool) -> bool:
    """Whether somebody would see that a layer is folded: hooks on what is between conv and BN, or another forward."""
    hooks = [layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks]
    return any([*hooks, layer._forward_pre_hooks if inputs_too else None]) or "forward" in vars(layer)


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient, no compiled code; modes and random state are put back."""
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            yield
        finally:
            # Some modules drop what they cached in evaluation when they are told to train, and only then.
            model.train(modes[0][1])
            for module, mode in modes:
                module.training = mode


def example_arguments(model: nn.Module, example_input: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments for a model's forward, of its device and dtype.

    Args:
        model: a bare model.
        example_input: as in `find_pairs`; None for zeros of timm's `pretrained_cfg["input_size"]`, one image.

    Raises:
        PolicyError: no example input and no `pretrained_cfg`.
    """
    like = next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.zeros(()))
    if example_input is None:
        return (torch.zeros(1, *_input_size(model), device=like.device, dtype=like.dtype),), {}

    def fitted(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)

    if isinstance(example_input, Mapping):
        return (), {name: tree_map(fitted, value) for name, value in example_input.items()}
    args = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    return tree_map(fitted, args), {}


def _input_size(model: nn.Module) -> tuple[int, ...]:
    """Channels, height and width that a timm model takes; its first conv knows best how many channels.

    The exception is a stem that first moves blocks of 4x4 pixels into channels (TResNet's).
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    if size is None:
        raise PolicyError(
            f"{type(model).__name__} has no pretrained_cfg['input_size'] to make an input of; pass example_input"
        )
    first = config.get("first_conv")
    modules = dict(model.named_modules())
    channels = getattr(modules.get(first) if isinstance(first, str) else None, "in_channels", size[0])
    return (size[0] if channels == 16 * size[0] else channels, *size[1:])
