"""Steps of more than one forward, and small ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.diagnose.loops.classifiers import evaluate
from tests.diagnose.loops.data import fresh, loaders, pretrained
from tests.diagnose.loops.registry import judged, loop


class SAM(torch.optim.SGD):
    """Sharpness-aware minimisation (Foret et al. 2021), in the two steps of davda54/sam."""

    @torch.no_grad()
    def first_step(self, rho: float = 0.05) -> None:
        pairs = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([grad.norm() for _, grad in pairs]).norm()
        self.climbed = [(p, grad * rho / (norm + 1e-12)) for p, grad in pairs]
        for p, step in self.climbed:
            p.add_(step)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, step in self.climbed:
            p.sub_(step)
        self.step()


def set_statistics(model: nn.Module, on: bool) -> None:
    """davda54/sam's enable_running_stats and disable_running_stats."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            if on and hasattr(layer, "backup_momentum"):
                layer.momentum = layer.backup_momentum
            elif not on:
                layer.backup_momentum, layer.momentum = layer.momentum, 0


@loop(
    "sharpness-aware minimisation",
    source="davda54/sam, README: disable_running_stats in the second forward",
    fault="both forwards update the statistics",
    rule="BN302",
)
def sharpness(seed: int, planted: bool) -> Findings:
    model, (train, test) = fresh("net", seed), loaders(seed)
    optimizer = SAM(model.parameters(), lr=0.05, momentum=0.9)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(3):
            model.train()
            for images, labels in train:
                set_statistics(model, True)
                F.cross_entropy(model(images), labels).backward()
                optimizer.first_step()
                optimizer.zero_grad()
                set_statistics(model, planted)
                F.cross_entropy(model(images), labels).backward()
                optimizer.second_step()
                optimizer.zero_grad()
            model.eval()
            evaluate(model, test)
    set_statistics(model, True)
    return judged(watch, model, optimizer, train)


@loop(
    "gradient accumulation",
    source="PyTorch, Automatic mixed precision examples: gradient accumulation",
    fault="micro-batches of 4 images taken for batches of 16",
    rule="BN207",
    also={"BN206": "4 images per statistic"},
)
def accumulation(seed: int, planted: bool) -> Findings:
    micro = 4 if planted else 32
    model, (train, test) = pretrained("net", seed), loaders(seed, batch_size=micro, train=256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(1 if planted else 2):
            model.train()
            for index, (images, labels) in enumerate(train):
                (F.cross_entropy(model(images), labels) / 4).backward()
                if (index + 1) % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            model.eval()
            evaluate(model, test)
    return judged(watch, model, optimizer, train, grad_accum=4)


@loop(
    "consistency of weak and strong views",
    source="FixMatch (Sohn et al. 2020), TorchSSL: labelled, weak and strong images in one forward",
    fault="strong views, darker ones, in a forward of their own",
    rule="BN209",
)
def consistency(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("net", seed), loaders(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    draw = torch.Generator().manual_seed(seed)
    with bnf.watch_bn(model, optimizer) as watch:
        model.train()
        for images, labels in train:
            weak = images.flip(-1)
            strong = images * 0.2 - 2 + 0.1 * torch.randn(images.shape, generator=draw)
            if planted:
                logits, of_weak, of_strong = model(images), model(weak), model(strong)
            else:
                logits, of_weak, of_strong = model(torch.cat([images, weak, strong])).chunk(3)
            sure, guess = of_weak.detach().softmax(1).max(1)
            loss = F.cross_entropy(logits, labels)
            loss = loss + (F.cross_entropy(of_strong, guess, reduction="none") * (sure > 0.9)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        evaluate(model, test)
    return judged(watch, model, optimizer, train)
