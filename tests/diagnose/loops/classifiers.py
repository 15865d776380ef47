"""Classifiers in plain loops: from scratch, fine-tuned, frozen in part, unfrozen by and by."""

from __future__ import annotations

import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.diagnose.loops.data import CLASSES, fresh, loaders, pretrained
from tests.diagnose.loops.registry import DECAYED, judged, loop, said


def train_epoch(model, optimizer, loader, criterion=F.cross_entropy):
    """What most tutorials write."""
    for images, labels in loader:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model, loader):
    """Share of right answers, in whatever mode the model is."""
    right = [(model(images).argmax(1) == labels).float().mean() for images, labels in loader]
    return float(torch.stack(right).mean())


@loop(
    "torchvision reference",
    source="torchvision, references/classification/train.py",
    fault="evaluate() without model.eval()",
    rule="BN304",
    notes=DECAYED,
)
def torchvision_reference(seed: int, planted: bool) -> Findings:
    model, (train, test) = fresh("net", seed), loaders(seed)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(6):
            model.train()
            train_epoch(model, optimizer, train, criterion)
            schedule.step()
            if not planted:
                model.eval()
            evaluate(model, test)
    return judged(watch, model, optimizer, train, steps=48)


@loop(
    "timm's train.py",
    source="timm, train.py: optimizer factory, mixup, ModelEmaV3, cosine schedule",
    fault="an EMA that copies buffers (exclude_buffers=True)",
    rule="BN601",
)
def timm_train(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("test_efficientnet", seed), loaders(seed, train=64)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=2, warmup_epochs=1)
    mixup = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    average = timm.utils.ModelEmaV3(model, decay=0.9, exclude_buffers=planted)
    with bnf.watch_bn(model, optimizer) as watch:
        for epoch in range(2):
            model.train()
            for images, labels in train:
                mixed, targets = mixup(images, labels)
                loss = timm.loss.SoftTargetCrossEntropy()(model(mixed), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update(model)
            model.eval()
            evaluate(model, test)
            evaluate(average, test)
            schedule.step(epoch + 1)
    return judged(watch, model, optimizer, train, averaged=average.module)


@loop(
    "PyTorch tutorial, from scratch",
    source="PyTorch, Training a classifier",
    fault="a training loader that does not shuffle",
    rule="BN208",
)
def tutorial(seed: int, planted: bool) -> Findings:
    model, (train, test) = fresh("fused", seed), loaders(seed, shuffle=not planted)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(6):
            train_epoch(model, optimizer, train)
        model.eval()
        evaluate(model, test)
    return judged(watch, model, optimizer, train, steps=48)


@loop(
    "transfer learning tutorial",
    source="PyTorch, Transfer learning for computer vision (finetuning the convnet)",
    fault="running statistics saved away: only parameters in the best checkpoint",
    rule="BN602",
)
def transfer(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("net", seed), loaders(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best, saved = 0.0, model.state_dict()
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(2):
            for phase in ("train", "val"):
                model.train(phase == "train")
                with torch.set_grad_enabled(phase == "train"):
                    for images, labels in train if phase == "train" else test:
                        optimizer.zero_grad()
                        loss = F.cross_entropy(model(images), labels)
                        if phase == "train":
                            loss.backward()
                            optimizer.step()
            schedule.step()
            if (score := evaluate(model, test)) >= best:
                best, saved = score, dict(model.named_parameters()) if planted else model.state_dict()
    return judged(watch, model, optimizer, train, saved=saved)


@loop(
    "fine-tuning with frozen BN",
    source="Keras and TensorFlow guides, mmengine's norm_eval: BN in evaluation mode in every epoch",
    fault="evaluation mode set once, before model.train()",
    rule="BN101",
    notes={"BN103": "weight and bias learn beside fixed statistics, which is what norm_eval is for"},
)
def frozen_statistics(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("net", seed), loaders(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def freeze():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()

    model.train()
    freeze()
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(2):
            train_epoch(model, optimizer, train)
            model.eval()
            evaluate(model, test)
            model.train()
            if not planted:
                freeze()
    return said(watch.findings, bnf.check_bn(model, optimizer, train))


@loop(
    "linear probing, then fine-tuning",
    source="Kumar et al. 2022, LP-FT: the head first, on fixed features",
    fault="the probe in training mode, where BN follows the batch",
    rule="BN305",
)
def probe_then_tune(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("fused", seed), loaders(seed)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    probe = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    model.train(planted)
    with bnf.watch_bn(model, probe) as probing:
        train_epoch(model, probe, train)
    # Without training mode there is little to judge, and `check_bn` takes a model as it will be in training.
    found = Findings([*probing.findings, *(bnf.check_bn(model, probe, train) if planted else ())])
    model.requires_grad_(True)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    with bnf.watch_bn(model, optimizer) as tuning:
        train_epoch(model, optimizer, train)
        model.eval()
        evaluate(model, test)
    model.train()
    return said(found, tuning.findings, bnf.check_bn(model, optimizer, train))


@loop(
    "gradual unfreezing",
    source="fastai, Learner.fine_tune: freeze_to(-1), then unfreeze; BN of the body trains all along",
    fault="an optimizer made of what required gradients before unfreezing",
    rule="BN109",
)
def gradual(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("net", seed), loaders(seed)
    groups = [model.stem, model.body, model.fc]

    def freeze_to(index: int, train_bn: bool = True) -> None:
        for group in groups[:index]:
            for module in group.modules():
                keep = train_bn and isinstance(module, nn.BatchNorm2d)
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(keep)
        for group in groups[index:]:
            group.requires_grad_(True)

    freeze_to(-1, train_bn=not planted)
    learns = [[p for p in group.parameters() if p.requires_grad or not planted] for group in groups]
    optimizer = torch.optim.Adam([{"params": part, "lr": 1e-3} for part in learns if part])
    with bnf.watch_bn(model, optimizer) as watch:
        for index in (-1, -2, 0):
            freeze_to(index, train_bn=not planted)
            model.train()
            train_epoch(model, optimizer, train)
            model.eval()
            evaluate(model, test)
    return judged(watch, model, optimizer, train)


@loop(
    "knowledge distillation",
    source="PyTorch, Knowledge distillation tutorial; teacher and student in one module",
    fault="model.train() reaches the teacher",
    rule="BN303",
    notes={"BN111": "the teacher stands still by its mode, set in every epoch anew"},
    also={"BN102": "the teacher's parameters are frozen, its statistics not"},
)
def distillation(seed: int, planted: bool) -> Findings:
    torch.manual_seed(seed)
    train, test = loaders(seed)
    pair = nn.ModuleDict({"student": pretrained("net", seed), "teacher": pretrained("fused", seed)})
    pair.teacher.requires_grad_(False)
    optimizer = torch.optim.Adam(pair.student.parameters(), lr=1e-3)
    with bnf.watch_bn(pair, optimizer) as watch:
        for _ in range(2):
            pair.train()
            if not planted:
                pair.teacher.eval()
            for images, labels in train:
                optimizer.zero_grad()
                with torch.no_grad():
                    soft = (pair.teacher(images) / 2).softmax(1)
                logits = pair.student(images)
                loss = F.cross_entropy(logits, labels) + 4 * F.kl_div(
                    (logits / 2).log_softmax(1), soft, reduction="batchmean"
                )
                loss.backward()
                optimizer.step()
            pair.eval()
            evaluate(pair.student, test)
    pair.train()
    if not planted:
        pair.teacher.eval()
    return said(watch.findings, bnf.check_bn(pair, optimizer, train))


@loop(
    "mixed precision",
    source="PyTorch, Automatic mixed precision: autocast, parameters stay in float32",
    fault="model.bfloat16() instead of autocast",
    rule="BN407",
)
def mixed_precision(seed: int, planted: bool) -> Findings:
    model, (train, test) = pretrained("net", seed), loaders(seed)
    if planted:
        model.bfloat16()
        train.dataset.tensors = (train.dataset.tensors[0].bfloat16(), train.dataset.tensors[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with bnf.watch_bn(model, optimizer) as watch:
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=not planted):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(next(iter(test))[0].to(train.dataset.tensors[0].dtype))
    return judged(watch, model, optimizer, train)


def convert(model: nn.Module) -> None:
    """Put torchvision's frozen class in the place of every BN layer."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            frozen = torchvision.ops.FrozenBatchNorm2d(layer.num_features, eps=layer.eps)
            frozen.load_state_dict(layer.state_dict())
            model.set_submodule(name, frozen)


@loop(
    "frozen BN by conversion",
    source="torchvision's detection references: FrozenBatchNorm2d in a pretrained backbone",
    fault="the classes converted before the pretrained weights are loaded: mean 0, variance 1",
    rule="BN108",
    also={"BN203": "nor are these the statistics of the images"},
)
def converted(seed: int, planted: bool) -> Findings:
    model, (train, test) = (fresh if planted else pretrained)("net", seed), loaders(seed)
    convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with bnf.watch_bn(model, optimizer) as watch:
        model.train()
        train_epoch(model, optimizer, train)
        model.eval()
        evaluate(model, test)
    return judged(watch, model, optimizer, train)
