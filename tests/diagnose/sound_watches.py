"""Watches of training as it should be, on images that are drawn alike, to count how often a rule speaks by chance.

Each kind gives a rule what it judges by: small batches, few steps, statistics of a sample, heavy tails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings

SIZE, CLASSES = 8, 5


def pictures(kind: str, images: int, generator: torch.Generator) -> Tensor:
    """Images of one distribution; what those of a batch have in common differs by kind."""
    noise = torch.randn(images, 3, SIZE, SIZE, generator=generator)
    if kind == "brightness":
        return noise * 0.2 + torch.randn(images, 1, 1, 1, generator=generator)
    if kind == "heavy tails":
        scale = torch.randn(images, 3, 1, 1, generator=generator).exp()
        return noise * scale + torch.randn(images, 3, 1, 1, generator=generator).pow(3)
    if kind == "black or white":
        return noise * 1e-3 + torch.randint(0, 2, (images, 1, 1, 1), generator=generator)
    return noise


KINDS = ("noise", "brightness", "heavy tails", "black or white")


def network(*, fused: bool, generator: torch.Generator) -> nn.Module:
    """Two convs, each with BN and ReLU, and a head; weights are drawn."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, BatchNormAct2d(outputs)] if fused else [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    model = nn.Sequential(*block(3, 8), *block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.copy_(torch.empty_like(parameter).uniform_(-bound, bound, generator=generator))
    return model


@dataclass(frozen=True)
class Watched:
    """One way to train that is sound.

    Attributes:
        rule: the code of the rule that has something to judge here.
        run: gives what the watch says, for a kind of images, a kind of layer and a seed.
    """

    rule: str
    run: Callable[[str, bool, int], Findings]


WAYS: dict[str, Watched] = {}


def way(rule: str) -> Callable[[Callable[..., Findings]], Callable[..., Findings]]:
    def enter(run: Callable[..., Findings]) -> Callable[..., Findings]:
        def seeded(kind: str, fused: bool, seed: int) -> Findings:
            generator = torch.Generator().manual_seed(seed)
            model = network(fused=fused, generator=generator)
            return run(model, lambda count: pictures(kind, count, generator), generator)

        WAYS[run.__name__.replace("_", " ")] = Watched(rule, seeded)
        return run

    return enter


def _train(
    model: nn.Module,
    draw: Callable[[int], Tensor],
    generator: torch.Generator,
    *,
    images: int,
    steps: int,
    places: int = 1,
    lr: float = 0.01,
) -> Findings:
    """A few steps on batches with labels that are drawn."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=lr)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(places):
                labels = torch.randint(0, CLASSES, (images,), generator=generator)
                F.cross_entropy(model(draw(images)), labels).backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()(draw(images))
            model.train()
    return watch.findings


@way("BN201")
def live_statistics_of_256_images(model, draw, generator):  # type: ignore[no-untyped-def]
    bnf.precise_bn(model, [draw(64) for _ in range(4)])
    return _train(model.train(), draw, generator, images=8, steps=4)


@way("BN201")
def live_statistics_and_large_steps(model, draw, generator):  # type: ignore[no-untyped-def]
    bnf.precise_bn(model, [draw(64) for _ in range(4)])
    return _train(model.train(), draw, generator, images=16, steps=8, lr=0.1)


@way("BN203")
def frozen_at_statistics_of_64_images(model, draw, generator):  # type: ignore[no-untyped-def]
    bnf.precise_bn(model, [draw(64)])
    return _train(bnf.freeze_bn(model.train()), draw, generator, images=8, steps=4)


@way("BN203")
def frozen_statistics_weights_learn(model, draw, generator):  # type: ignore[no-untyped-def]
    bnf.precise_bn(model, [draw(64) for _ in range(4)])
    return _train(bnf.freeze_bn(model.train()), draw, generator, images=16, steps=8, lr=0.1)


@way("BN209")
def micro_batches_of_2(model, draw, generator):  # type: ignore[no-untyped-def]
    return _train(model.train(), draw, generator, images=2, steps=6, places=4)


@way("BN209")
def micro_batches_of_16(model, draw, generator):  # type: ignore[no-untyped-def]
    return _train(model.train(), draw, generator, images=16, steps=3, places=3)


@way("BN505")
def a_head_as_torch_draws_it(model, draw, generator):  # type: ignore[no-untyped-def]
    return _train(model.train(), draw, generator, images=8, steps=3)


def _adapt(model: nn.Module, draw: Callable[[int], Tensor], *, images: int, steps: int) -> Findings:
    """Entropy minimisation at a rate that changes next to nothing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(layer) for layer in bnf.find_bn_layers(model)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            torch.distributions.Categorical(logits=model(draw(images))).entropy().mean().backward()
            optimizer.step()
    return watch.findings


@way("BN204")
def adapting_to_batches_of_2(model, draw, _):  # type: ignore[no-untyped-def]
    return _adapt(model, draw, images=2, steps=30)


@way("BN204")
def adapting_to_batches_of_16(model, draw, _):  # type: ignore[no-untyped-def]
    return _adapt(model, draw, images=16, steps=12)
