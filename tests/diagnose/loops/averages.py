"""Averages of weights: EMA, SWA, schedule-free."""

from __future__ import annotations

import copy
from itertools import islice

import torch
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.diagnose.loops.classifiers import evaluate, train_epoch
from tests.diagnose.loops.data import fresh, loaders, pretrained
from tests.diagnose.loops.registry import judged, loop, said


@loop(
    "EMA of weights and buffers",
    source="PyTorch, torch.optim.swa_utils: AveragedModel(use_buffers=True) with EMA",
    fault="use_buffers left at False",
    rule="BN601",
)
def ema(seed: int, planted: bool) -> Findings:
    model, (train, test) = fresh("net", seed), loaders(seed)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=not planted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(3):
            model.train()
            for batch in train:
                train_epoch(model, optimizer, [batch])
                average.update_parameters(model)
            average.eval()
            evaluate(average, test)
    return said(watch.findings, bnf.check_bn(model, optimizer, train, averaged=average))


@loop(
    "stochastic weight averaging",
    source="PyTorch, torch.optim.swa_utils: SWALR, then update_bn",
    fault="update_bn left out",
    rule="BN601",
)
def swa(seed: int, planted: bool) -> Findings:
    model, (train, test) = fresh("net", seed), loaders(seed)
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = SWALR(optimizer, swa_lr=0.02)
    with bnf.watch_bn(model, optimizer) as watch:
        for epoch in range(4):
            model.train()
            train_epoch(model, optimizer, train)
            if epoch > 1:
                average.update_parameters(model)
                schedule.step()
        model.eval()
        evaluate(model, test)
    if not planted:
        update_bn(train, average)
    average.eval()
    evaluate(average, test)
    return judged(watch, model, optimizer, train, averaged=average)


@loop(
    "schedule-free",
    source="facebookresearch/schedule_free, README: statistics from 50 batches before evaluation",
    fault="evaluated without them",
    rule="BN605",
    needs="schedulefree",
)
def schedule_free(seed: int, planted: bool) -> Findings:
    import schedulefree

    model, (train, test) = fresh("net", seed), loaders(seed)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(3):
            model.train()
            optimizer.train()
            train_epoch(model, optimizer, train)
            optimizer.eval()
            if not planted:
                with torch.no_grad():
                    for images, _ in islice(train, 50):
                        model(images)
            model.eval()
            evaluate(model, test)
    model.train()
    optimizer.train()
    return said(watch.findings, bnf.check_bn(model, optimizer, train))


@loop(
    "mean teacher",
    source="Tarvainen and Valpola 2017, mean_teacher: EMA of parameters, teacher in training mode",
    fault="the teacher in evaluation mode, with statistics from before training",
    rule="BN601",
)
def mean_teacher(seed: int, planted: bool) -> Findings:
    model, (train, test) = fresh("net", seed), loaders(seed)
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    draw = torch.Generator().manual_seed(seed)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(3):
            model.train()
            teacher.train(not planted)
            for images, labels in train:
                with torch.no_grad():
                    target = teacher(images + 0.1 * torch.randn(images.shape, generator=draw)).softmax(1)
                logits = model(images)
                loss = F.cross_entropy(logits, labels) + F.mse_loss(logits.softmax(1), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    for kept, new in zip(teacher.parameters(), model.parameters(), strict=True):
                        kept.lerp_(new, 0.1)
            teacher.eval()
            evaluate(teacher, test)
    return said(watch.findings, bnf.check_bn(model, optimizer, train, averaged=teacher))


class ModelEMA:
    """Ultralytics' EMA: everything that is floating-point, by a decay that grows with the updates."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        self.updates += 1
        decay = 0.9999 * (1 - 2 ** (-self.updates / 200))
        new = model.state_dict()
        for name, kept in self.ema.state_dict().items():
            if kept.dtype.is_floating_point:
                kept.mul_(decay).add_(new[name], alpha=1 - decay)


@loop(
    "ultralytics-like trainer",
    source="Ultralytics, engine/trainer.py: warm-up, accumulation to 64 images, EMA, layers frozen by `freeze=`",
    fault="`freeze=` by requires_grad alone, as before BN was set to evaluation mode",
    rule="BN102",
    notes={"BN111": "layers stand still by their mode, set in every epoch anew"},
)
def ultralytics(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("net", seed), loaders(seed)
    average = ModelEMA(model)
    model.stem.requires_grad_(False)
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=0.01, momentum=0.9, nesterov=True)
    optimizer.add_param_group({"params": weights, "weight_decay": 5e-4})
    with bnf.watch_bn(model, optimizer) as watch:
        for epoch in range(3):
            model.train()
            if not planted:
                model.stem.eval()
            for index, (images, labels) in enumerate(train):
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 * min(1.0, (epoch * len(train) + index + 1) / 8)
                F.cross_entropy(model(images), labels).backward()
                if (index + 1) % 4 == 0:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    average.update(model)
            evaluate(fused_copy(average.ema), test)
    return said(watch.findings, bnf.check_bn(model, optimizer, train, averaged=average.ema))


def fused_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy for inference whose convolutions have taken their BN layers in."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = copy.deepcopy(model)
    for block in (model.stem, *model.body):
        block[0], block[1] = fuse_conv_bn_eval(block[0], block[1]), torch.nn.Identity()
    return model
