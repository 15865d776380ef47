"""What frozen BN costs in a training step, in time and in bytes kept for backward, against the same net without norm.

Peers: BN in training, native BN in evaluation mode, timm's `freeze_batch_norm_2d`, torchvision's `FrozenBatchNorm2d`
and mmengine's `turn_on_efficient_conv_bn_eval` (extra `bench`). A peer whose outputs differ from eval-mode BN is left
out and named. On a CUDA device, or with `--half`, everything runs under bf16 autocast and in channels_last.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bnfinetune.bn import find_bn_layers, freeze_bn
from bnfinetune.bn.folding.fold import fold_bn, fold_report
from bnfinetune.bn.layers import bn_tail
from tests.bench.harness import Lead, lead, run_in_turn, step_device, table, timings_of
from tests.bench.results import record
from tests.bn.folding.outcomes import bytes_kept, without_norm
from tests.bn.models import randomise

MODELS = ("resnet50", "resnet18", "efficientnet_b0", "regnety_008", "mobilenetv3_large_100", "densenet121")
NO_NORM = "no norm"
TRAINING = "training BN"
FOLDED = "folded"
FROZEN = ", affine frozen"
OTHERWISE = (NO_NORM, TRAINING)
"""What does not compute what eval-mode BN does, nor should."""


class TorchvisionFrozen(nn.Module):
    """torchvision's frozen layer in the place of a BN layer, with what follows normalising in the latter."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = FrozenBatchNorm2d(layer.num_features, layer.eps)
        self.norm.load_state_dict({key: value for key, value in layer.state_dict().items() if key in STATE})
        self.children_of_tail = nn.ModuleList(layer.children())
        self.tail = bn_tail(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.norm(x))


STATE = ("weight", "bias", "running_mean", "running_var")


def eval_mode(model: nn.Module, *, affine: bool = True) -> nn.Module:
    for layer in find_bn_layers(model).values():
        layer.eval()
        for parameter in (layer.weight, layer.bias):
            parameter.requires_grad_(affine)
    return model


def torchvision_frozen(model: nn.Module) -> nn.Module:
    for name, layer in find_bn_layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, TorchvisionFrozen(layer))
    return model


def mmengine_folded(model: nn.Module) -> nn.Module:
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model

    turn_on_efficient_conv_bn_eval_for_single_model(eval_mode(model))
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    NO_NORM: without_norm,
    TRAINING: nn.Module.train,
    "eval mode": eval_mode,
    "mmengine": mmengine_folded,
    FOLDED: lambda model: fold_bn(freeze_bn(model, affine=False)),
    f"eval mode{FROZEN}": lambda model: eval_mode(model, affine=False),
    f"timm freeze{FROZEN}": freeze_batch_norm_2d,
    f"torchvision{FROZEN}": torchvision_frozen,
    f"{FOLDED}{FROZEN}": lambda model: fold_bn(freeze_bn(model)),
}


def variants_of(
    model: nn.Module, images: torch.Tensor, names: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The variants that compute what eval-mode BN does, and why the others are left out."""
    with torch.no_grad():
        truth = eval_mode(copy.deepcopy(model))(images)
    built: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            variant = VARIANTS[name](copy.deepcopy(model))
            with torch.no_grad():
                error = float((variant(images) - truth).abs().max() / truth.abs().max())
        except Exception as reason:
            left_out[name] = f"{type(reason).__name__}: {reason}".splitlines()[0]
            continue
        if name in OTHERWISE or error < 1e-3:
            built[name] = variant
        else:
            left_out[name] = f"its outputs differ from those of eval-mode BN by {error:.0%}"
    return built, left_out


def step_of(model: nn.Module, images: torch.Tensor, half: bool = False) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            loss = model(images).square().mean()
        loss.backward()
        model.zero_grad()

    return step


def peak_memory(step: Callable[[], None]) -> int:
    """The most bytes that a step has allocated at once, beyond what lives before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(accumulate(count for _, count in events))


def leads_of(seconds: dict[str, list[float]]) -> dict[str, Lead]:
    """Folding against the fastest of its rivals, those whose affine learns and those that freeze it."""
    found = {}
    for kind in ("", FROZEN):
        rivals = [name for name in seconds if name not in (*OTHERWISE, FOLDED + kind) and is_frozen(name) == bool(kind)]
        if rivals:
            best = min(rivals, key=lambda name: statistics.median(seconds[name]))
            found[FOLDED + kind] = lead(seconds, FOLDED + kind, best)
    return found


def is_frozen(variant: str) -> bool:
    """Whether a variant freezes weight and bias too."""
    return variant.endswith(FROZEN)


def measure(
    name: str, batch: int, size: int, rounds: int, variants: Sequence[str], half: bool, device: torch.device
) -> dict[str, Any]:
    """Times and counts every variant of one model, and prints the table."""
    layout = torch.channels_last if half else torch.contiguous_format
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).to(device, memory_format=layout).train()
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    models, left_out = variants_of(model, images, variants)
    steps = {variant: step_of(module, images, half) for variant, module in models.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        kept = {variant: bytes_kept(module, images) for variant, module in models.items()}
    peaks = {variant: peak_memory(step) for variant, step in steps.items()}
    seconds = run_in_turn(steps, rounds=rounds, warmup=1)
    timings, leads = timings_of(seconds, NO_NORM), leads_of(seconds)
    report = fold_report(models[FOLDED])
    pairs = f"{len(report.folded)} of {len(report)} BN layers folded"
    print(table(f"{name}, batch {batch} of {size}x{size} on {device}, {rounds} rounds; {pairs}", timings))
    for variant in models:
        print(f"  {variant:34} kept {kept[variant] / 2**20:7.1f} MiB, peak {peaks[variant] / 2**20:7.1f} MiB")
    for variant, against in leads.items():
        print("  {}: {:.3f} ({:.3f} to {:.3f}) of the time of {}".format(variant, *against[1:], against.rival))
    for variant, reason in left_out.items():
        print(f"  left out: {variant} ({reason})")
    return {
        "model": name,
        "batch": batch,
        "size": size,
        "rounds": rounds,
        "folded": len(report.folded),
        "layers": len(report),
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "rows": [{**t._asdict(), "kept": kept[t.name], "peak": peaks[t.name]} for t in timings],
        "leads": {variant: against._asdict() for variant, against in leads.items()},
        "left_out": left_out,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench frozen_bn", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=160, help="side of the images")
    parser.add_argument("--rounds", type=int, default=25, help="at least six")
    parser.add_argument("--half", action="store_true", help="bf16 and channels_last on the CPU too")
    parser.add_argument("--peers", nargs="+", default=list(VARIANTS), help="of the candidates, only these")
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    parser.add_argument("--place", help="what the page calls the machine; by default cuda, cpu or cpu in bf16")
    options = parser.parse_args(arguments)
    torch.set_flush_denormal(True)  # without norm, activations shrink to where the CPU is slow
    device = step_device()
    half = options.half or device.type == "cuda"
    where = options.place or ("cuda" if device.type == "cuda" else "cpu in bf16" if half else "cpu")
    for model in options.models:
        chosen = [name for name in VARIANTS if name in (NO_NORM, FOLDED, *options.peers)]
        figures = measure(model, options.batch, options.size, options.rounds, chosen, half, device)
        if options.record:
            record("frozen_bn", f"{model} on {where}", figures)
