"""Parameter groups chosen by the owning module, timm's optimizers, and timm's schedules counted in updates."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import timm.layers
import timm.optim
import torch
from timm.models import group_parameters
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from bnfinetune.bn.layers import is_bn_layer, unwrap
from bnfinetune.errors import PolicyError, RecipeError, did_you_mean
from bnfinetune.recipe import DEMO_MODEL, Optim, Recipe, Schedule
from bnfinetune.training.network.backbone import has_bn
from bnfinetune.training.network.head import head_parameters

PLAIN_RATE = 1e-3
"""What `optim.lr=auto` is where nothing pretrained is at stake."""

_TUNING_RATE, _TUNING_IMAGES = 3e-4, 16  # of docs/transfer.md

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers that torch steps by one kernel."""

_TORCH_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


@cache
def _norm_classes() -> tuple[type, ...]:
    """Normalisation classes of torch and timm; timm keeps a factory map of its own, so new ones are found too."""
    named = (getattr(timm.layers, name) for name in dir(timm.layers) if "Norm" in name)
    return _TORCH_NORMS + tuple(c for c in named if isinstance(c, type) and issubclass(c, nn.Module))


def is_norm_layer(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer: any BatchNorm, or one of torch's or timm's other norms."""
    return is_bn_layer(module) or isinstance(module, _norm_classes())


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (name, kind, parameter) once per trainable parameter; kind is `norm`, `bias` or `weight`.

    The kind follows the module that owns the parameter. A parameter shared by several modules belongs to its first.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{local}" if prefix else local
            if is_norm_layer(module):
                kind = "norm"
            elif parameter is getattr(module, "bias", None):
                kind = "bias"
            else:
                kind = "weight"
            yield name, kind, parameter


def _layer_scales(model: Any, layer_decay: float | None) -> dict[str, float]:
    """Learning-rate factor per parameter name: `layer_decay ** (last group - group)` over timm's layer groups."""
    if layer_decay is None:
        return {}
    if not hasattr(model, "group_matcher"):
        raise PolicyError(
            f"layer_decay needs timm's group_matcher, which {type(model).__name__} lacks: leave layer_decay unset"
        )
    groups: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(groups.values())
    return {name: layer_decay ** (last - group) for name, group in groups.items()}


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    norm_decay: bool = False,
    bias_decay: bool = False,
    lr: float | None = None,
    layer_decay: float | None = None,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer, with normalisation layers and biases out of weight decay.

    What decays is decided by the module that owns a parameter, never by its name or number of dimensions. A bias of a
    normalisation layer counts as norm, not as bias. Names that a timm model lists in `no_weight_decay()` never decay.

    Args:
        model: The network; wrappers of DDP and `torch.compile` are looked through. Frozen parameters are left out.
        weight_decay: Decay of everything that decays.
        norm_decay: Let weights and biases of normalisation layers decay too.
        bias_decay: Let the other biases decay too.
        lr: Peak learning rate. Where given, each group carries its own `lr`; otherwise groups carry timm's `lr_scale`.
        layer_decay: Learning-rate factor from each of timm's layer groups to the one before it.
        head_lr_scale: Learning-rate factor of the classifier.

    Returns:
        One dict per combination of decay and learning rate: `params`, `param_names`, `weight_decay`, `name`, and `lr`
        or `lr_scale`. Every trainable parameter is in exactly one.

    Raises:
        PolicyError: The model has no trainable parameter, or `layer_decay` is asked of a model without layer groups.
    """
    model = unwrap(model)
    scales = _layer_scales(model, layer_decay)
    head = head_parameters(model)
    listed: Any = getattr(model, "no_weight_decay", set)
    never = set(listed())
    decays = {"norm": norm_decay, "bias": bias_decay, "weight": True}
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, kind, parameter in _owned_parameters(model):
        decay = weight_decay if decays[kind] and name not in never else 0.0
        scale = scales.get(name, 1.0) * (head_lr_scale if id(parameter) in head else 1.0)
        label = "head" if id(parameter) in head else "norm" if kind == "norm" else "other"
        group = groups.setdefault((label, decay, scale), _new_group(label, decay, scale, lr))
        group["params"].append(parameter)
        group["param_names"].append(name)
    check_groups(model, groups.values())
    return list(groups.values())


def _new_group(label: str, decay: float, scale: float, lr: float | None) -> dict[str, Any]:
    rate = {"lr_scale": scale} if lr is None else {"lr": lr * scale}
    return {"name": label, "params": [], "param_names": [], "weight_decay": decay, **rate}


def check_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> None:
    """Prove that every trainable parameter of `model` is in exactly one group.

    Raises:
        PolicyError: Names the first parameter that is in none or in several, or that nothing is trainable.
    """
    counts: dict[int, int] = {}
    for group in groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    trainable = {name: id(p) for name, p in unwrap(model).named_parameters() if p.requires_grad}
    if not trainable:
        raise PolicyError("no parameter is trainable: every one is frozen; set model.trainable or bn.affine")
    for name, identity in trainable.items():
        if counts.get(identity, 0) != 1:
            raise PolicyError(
                f"parameter {name} is in {counts.get(identity, 0)} optimizer groups: put it in exactly one"
            )


def describe_groups(groups: Iterable[dict[str, Any]]) -> list[str]:
    """One line per group: what it holds, its learning rate and its decay."""
    return [
        f"{group['name']:<5} {len(group['params']):>4} tensors {sum(p.numel() for p in group['params']):>11,} values"
        f"  lr {group.get('initial_lr', group.get('lr', float('nan'))):.3g}  weight decay {group['weight_decay']:g}"
        for group in groups
    ]


def rate_of(optim: Optim) -> float:
    """The peak learning rate of a section."""
    return PLAIN_RATE if optim.lr == "auto" else optim.lr


def with_rate(recipe: Recipe, ranks: int) -> Recipe:
    """A recipe with a number in the place of `optim.lr=auto`.

    Steps of Adam are as long as the rate, however small the gradient, and the noisier the fewer images an update has: a
    pretrained network with fixed statistics does not survive many of 3e-4 by two images, or of 1e-3 by eight. Where BN
    normalises by the batch it does, and learns better at 3e-4 than below, however small the batch.

    Args:
        recipe: As it was written.
        ranks: Processes, whose images together make an update.
    """
    optim, train, model = recipe.optim, recipe.train, recipe.model
    if optim.lr != "auto":
        return recipe
    rate = PLAIN_RATE
    if (model.pretrained or model.checkpoint is not None) and model.name != DEMO_MODEL and "adam" in optim.name.lower():
        images = train.batch_size * train.grad_accum * ranks
        if images < _TUNING_IMAGES and _normalises_by_batch(recipe):
            images = _TUNING_IMAGES
        rate = min(_TUNING_RATE * math.sqrt(images / _TUNING_IMAGES), PLAIN_RATE)
    settled = optim.model_copy(update={"lr": float(f"{rate:.3g}")})
    return recipe.model_copy(update={"optim": settled})


def _normalises_by_batch(recipe: Recipe) -> bool:
    """Whether a recipe leaves all BN layers of its network to the batch, and there are some."""
    fixed = any(section.train_stats == "running" or section.freeze_after == 0 for section in recipe.bn_sections)
    return not fixed and recipe.model.group_norm is None and has_bn(recipe.model)


def build_optimizer(model: nn.Module, optim: Optim, *, scaled: bool = False) -> torch.optim.Optimizer:
    """timm's optimizer of that name over `param_groups`.

    Args:
        model: The network.
        optim: The recipe's section.
        scaled: Whether a scaler of mixed precision decides on each step.

    Raises:
        RecipeError: timm knows no optimizer of that name, or it refuses one of `optim.kwargs`.
    """
    known = [str(name) for name in timm.optim.list_optimizers()]
    if optim.name.lower().removeprefix("lookahead_") not in known:
        hint = did_you_mean(optim.name.lower(), known)
        raise RecipeError(
            f"optim.name: timm has no optimizer {optim.name!r}{hint} ({len(known)} known, such as adamw, sgd, lamb)"
        )
    groups = param_groups(
        model,
        optim.weight_decay,
        norm_decay=optim.norm_decay,
        bias_decay=optim.bias_decay,
        lr=rate_of(optim),
        layer_decay=optim.layer_decay,
        head_lr_scale=optim.head_lr_scale,
    )
    try:
        options = _fused(optim, scaled) | optim.kwargs
        optimizer = timm.optim.create_optimizer_v2(
            groups, opt=optim.name, lr=rate_of(optim), weight_decay=optim.weight_decay, **options
        )
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"optim.name={optim.name} with optim.kwargs={optim.kwargs}: {error}") from error
    if (reason := _unfit(optimizer)) is not None:
        raise RecipeError(f"optim.name={optim.name} {reason}, which the loop does not give it: use adamw, sgd or lamb")
    return optimizer


def _fused(optim: Optim, scaled: bool) -> dict[str, Any]:
    """One kernel for all of a step, where torch has one and nobody asked for another way: a fifth of the time.

    Not under a scaler: it would leave the decision to the kernel, and nobody else would hear of a step left out.
    """
    plain = timm.optim.get_optimizer_class(optim.name.lower().removeprefix("lookahead_"), bind_defaults=False)
    others = {"fused", "foreach", "capturable", "differentiable"}
    return {"fused": True} if plain in _FUSED and not scaled and not others & set(optim.kwargs) else {}


def _unfit(optimizer: Any) -> str | None:
    """What an optimizer asks of a step beyond gradients, if anything."""
    if getattr(optimizer, "is_second_order", False):
        return "needs gradients of gradients"
    closure = inspect.signature(type(_stepped(optimizer)).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "needs a closure that computes the loss again"
    return None


def build_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, updates: int) -> Scheduler:
    """timm's schedule over `updates` optimizer updates; call `step_update(n)` before the n-th update, counted from 1.

    The warm-up begins one step above `warmup_lr`, so that its first update is not idle. The update after it has the
    peak learning rate, and the schedule's shape spans the updates from there.
    """
    warmup = min(round(schedule.warmup_fraction * updates), updates - 1)
    after = updates - warmup
    scheduler: Scheduler
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="poly" if schedule.name == "linear" else schedule.name,
        num_epochs=after,
        updates_per_epoch=1,
        step_on_epochs=False,
        warmup_epochs=warmup + 1,
        warmup_prefix=True,
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        decay_epochs=max(schedule.decay_fraction * after, 1),
        decay_milestones=[round(share * after) for share in schedule.milestones],
        # timm reads the exponent of a polynomial from decay_rate; an exponent of one is a straight line
        decay_rate=1.0 if schedule.name == "linear" else 2.0 if schedule.name == "poly" else schedule.decay_rate,
    )
    return scheduler


def regroup(optimizer: torch.optim.Optimizer, model: nn.Module, optim: Optim, *, scaled: bool = False) -> None:
    """Let an optimizer hold what trains now, in the groups that a new one would have.

    It stays the same object, which others have prepared and hold; state of what still trains is kept.
    """
    fresh, state = build_optimizer(model, optim, scaled=scaled), _stepped(optimizer).state
    members = {parameter for group in fresh.param_groups for parameter in group["params"]}
    for parameter in [parameter for parameter in state if parameter not in members]:
        del state[parameter]
    optimizer.param_groups[:] = fresh.param_groups


def match_formats(optimizer: torch.optim.Optimizer) -> None:
    """Store the state of every parameter in the memory format of the parameter, which fused steps rely on.

    Loaded state keeps the format that it was saved in, such as that of another device.
    """
    for parameter, state in _stepped(optimizer).state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def can_hold_back(optimizer: Any) -> bool:
    """Whether a number on the device can keep the optimizer's next step from being made, as `step_unless` does.

    Adam and SGD in one kernel can. The first step of SGD with momentum would leave its momentum undefined.
    """
    if type(optimizer) not in _FUSED or not all(group.get("fused") for group in optimizer.param_groups):
        return False
    momentum = [p for group in optimizer.param_groups if group.get("momentum") for p in group["params"]]
    return all(optimizer.state.get(parameter, {}).get("momentum_buffer") is not None for parameter in momentum)


@contextmanager
def step_unless(optimizer: Any, bad: torch.Tensor) -> Iterator[None]:
    """Steps within this context change nothing if a scalar on the device is 1, and all they should if it is 0."""
    optimizer.found_inf = bad
    try:
        yield
    finally:
        del optimizer.found_inf


def count_steps(optimizer: torch.optim.Optimizer, note: Callable[[], None]) -> None:
    """Call `note` after each step that an optimizer makes."""
    _stepped(optimizer).register_step_post_hook(lambda *_: note())


def _stepped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that moves the parameters and holds their state: timm's Lookahead wraps it."""
    inner: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return inner
