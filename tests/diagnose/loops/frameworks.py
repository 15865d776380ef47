"""Loops that belong to a framework: the framework itself runs them."""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.diagnose.loops.data import CLASSES, loaders, pictures, pretrained
from tests.diagnose.loops.registry import judged, loop


def _as_items(seed: int, count: int) -> list[dict[str, Any]]:
    return [{"pixel_values": image, "labels": label} for image, label in pictures(seed, count)]


def _wrapped(model: nn.Module) -> nn.Module:
    """A timm network in transformers' wrapper, which gives out the loss first."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture="test_efficientnet", num_labels=CLASSES, num_classes=CLASSES)
    wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model.load_state_dict(model.state_dict())
    return wrapper


@loop(
    "transformers Trainer",
    source="transformers, examples/pytorch/image-classification: Trainer, TimmWrapperForImageClassification",
    fault="the backbone frozen by requires_grad; Trainer puts it in training mode",
    rule="BN305",
    needs="transformers",
)
def trainer(seed: int, planted: bool) -> Findings:
    from transformers import Trainer, TrainingArguments

    model = _wrapped(pretrained("test_efficientnet", seed))
    if planted:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "classifier" in name
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            seed=seed,
            num_train_epochs=2,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        training = Trainer(
            model, arguments, train_dataset=_as_items(seed, 64), eval_dataset=_as_items(10_000 + seed, 32)
        )
        optimizer = training.create_optimizer()
        with bnf.watch_bn(model, optimizer) as watch, _quiet():
            training.train()
    return judged(watch, model, optimizer, training.get_train_dataloader())


def _quiet() -> Any:
    """Without the lines that frameworks write."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return warnings.catch_warnings(action="ignore")


@loop(
    "Lightning",
    source="Lightning, Level 1 and 2: training_step calls the network, Trainer validates in every epoch",
    fault="on_validation_model_eval overridden: validation in training mode",
    rule="BN304",
    needs="lightning",
)
def lightning(seed: int, planted: bool) -> Findings:
    import lightning.pytorch as pl

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = pretrained("net", seed)

        def training_step(self, batch, index):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        validation_step = training_step

        def on_validation_model_eval(self):
            if not planted:
                super().on_validation_model_eval()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    model, (train, test) = Classifier(), loaders(seed)
    with _quiet(), bnf.watch_bn(model) as watch:
        fit(pl, max_epochs=3).fit(model, train, test)
    return judged(watch, model, model.configure_optimizers(), train)


def fit(pl: Any, **options: Any) -> Any:
    """A Lightning trainer that writes nothing."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", devices=1, **silent, **options)


@loop(
    "Lightning, backbone finetuning",
    source="Lightning, BackboneFinetuning and BaseFinetuning.freeze(train_bn=True)",
    fault="freeze(train_bn=False), which switches track_running_stats off",
    rule="BN104",
    needs="lightning",
)
def lightning_finetuning(seed: int, planted: bool) -> Findings:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BaseFinetuning

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = pretrained("net", seed)
            self.backbone.fc = nn.Identity()
            self.head = nn.Linear(16, CLASSES)

        def forward(self, images):
            return self.head(self.backbone(images))

        def training_step(self, batch, index):
            images, labels = batch
            return F.cross_entropy(self(images), labels)

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    class HeadFirst(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.backbone, train_bn=not planted)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1 and not planted:
                self.unfreeze_and_add_param_group(module.backbone, optimizer, train_bn=True)

    model, (train, test) = Classifier(), loaders(seed)
    training = fit(pl, max_epochs=3, callbacks=[HeadFirst()])
    with _quiet(), bnf.watch_bn(model) as watch:
        training.fit(model, train, test)
    return judged(watch, model, training.optimizers[0], train)


@loop(
    "Accelerate's cv_example",
    source="accelerate, examples/cv_example.py: frozen but for the head, normalised, OneCycleLR",
    fault="the example as it stands: a frozen backbone in training mode",
    rule="BN305",
    needs="accelerate",
)
def cv_example(seed: int, planted: bool) -> Findings:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, (train, test) = pretrained("net", seed), loaders(seed)
    for parameter in model.parameters():
        parameter.requires_grad = not planted
    model.fc.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, epochs=2, steps_per_epoch=len(train))
    model, optimizer, train, test, schedule = accelerator.prepare(model, optimizer, train, test, schedule)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(2):
            model.train()
            for images, labels in train:
                accelerator.backward(F.cross_entropy(model(images), labels))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            model.eval()
            for images, labels in test:
                with torch.no_grad():
                    answers = model(images).argmax(-1)
                accelerator.gather_for_metrics((answers, labels))
    return judged(watch, model, optimizer, train)
