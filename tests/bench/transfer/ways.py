"""The ways to fine-tune that are compared, each with the same images, updates, optimizer and peak learning rate."""

from __future__ import annotations

import contextlib
import gc
import io
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import bnfinetune as bnf
from bnfinetune.recipe_files import load_recipe
from tests.bench import timm_script

SIZE, EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 128, 8, 3e-4, 0.05


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: a folder with `train`, `val` and `test`, each a folder of class folders.
        backbone: a folder that timm has saved.
        way: a recipe followed by what is changed in it, as on a command line; or a peer, and perhaps its learning rate:
            `HF Trainer lr=1.06e-4`.
        batch: images per update.
        seed: of every draw.
    """

    task: Path
    backbone: Path
    way: str
    batch: int
    seed: int

    @property
    def place(self) -> str:
        """What results are kept under: all ways and seeds of one task, backbone and batch size."""
        return f"{self.task.name}, {self.backbone.name}, batches of {self.batch}"

    @property
    def peer(self) -> str:
        """The way without its learning rate."""
        return self.way.partition(" lr=")[0]

    @property
    def peer_rate(self) -> float:
        """The peak learning rate of a peer; recipes choose their own."""
        return float(self.way.partition(" lr=")[2] or LEARNING_RATE)


def run(cell: Cell, timm_script: Path | None) -> dict[str, float]:
    """Top-1 on the test images in percent, that on the validation images, and what it took.

    Every way keeps the epoch that is best on the validation images and is measured on the test images once.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bnfinetune-transfer-") as folder:
        if cell.peer == "timm train.py":
            validation, test = _timm(cell, timm_script, Path(folder))
        else:
            validation, test = PEERS.get(cell.peer, _ours)(cell, Path(folder))
    gc.collect()
    return {
        "top1": round(test, 2),
        "validation": round(validation, 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _ours(cell: Cell, folder: Path) -> tuple[float, float]:
    recipe, *changes = cell.way.split()
    overrides = [
        *(f"model.name=local-dir:{cell.backbone}", f"data.source={cell.task}", f"data.image_size={SIZE}"),
        *(f"train.epochs={EPOCHS}", f"train.batch_size={cell.batch}", "data.workers=0"),
        *(f"optim.weight_decay={WEIGHT_DECAY}", f"run.dir={folder}/run", f"run.seed={cell.seed}", "run.report=false"),
        "model.channels_last=true",  # the same numbers, a quarter sooner
        *changes,
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        if recipe == "auto":
            found = bnf.finetune_auto(load_recipe(recipe, overrides))
            numbers = found.run.numbers["after"]
            return 100 * numbers["validation"]["top1"], 100 * numbers["test"]["top1"]
        result = bnf.finetune(load_recipe(recipe, overrides))
    return 100 * result.after["validation"].top1, 100 * result.after["test"].top1


def _plain(cell: Cell, folder: Path) -> tuple[float, float]:
    """What a tutorial would do: the network in training mode, all of it learning."""
    torch.manual_seed(cell.seed)
    model = timm.create_model(f"local-dir:{cell.backbone}", pretrained=True)
    config = resolve_data_config({}, model=model)
    prepare = {training: _transform(config, training) for training in (True, False)}
    images = {split: ImageFolder(cell.task / split, prepare[split == "train"]) for split in ("train", "val", "test")}
    model.reset_classifier(len(images["train"].classes))
    loader = DataLoader(images["train"], cell.batch, shuffle=True, drop_last=len(images["train"]) % cell.batch == 1)
    optimizer = torch.optim.AdamW(model.parameters(), cell.peer_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    best = (-1.0, 0.0)
    for _ in range(EPOCHS):
        model.train()
        for batch, labels in loader:
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        validation = _top1(model, images["val"])
        if validation > best[0]:
            best = (validation, _top1(model, images["test"]))
    return best


def _hugging_face(cell: Cell, folder: Path) -> tuple[float, float]:
    """transformers' Trainer on its wrapper of timm's networks, with its defaults where the budget says nothing."""
    from transformers import TimmWrapperForImageClassification, Trainer, TrainingArguments

    config = resolve_data_config({}, model=timm.create_model(f"local-dir:{cell.backbone}"))
    prepare = {training: _transform(config, training) for training in (True, False)}
    images = {split: ImageFolder(cell.task / split, prepare[split == "train"]) for split in ("train", "val", "test")}
    model = TimmWrapperForImageClassification.from_pretrained(
        cell.backbone, num_labels=len(images["train"].classes), ignore_mismatched_sizes=True
    )
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=cell.batch,
        per_device_eval_batch_size=64,
        num_train_epochs=EPOCHS,
        learning_rate=cell.peer_rate,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="best",
        metric_for_best_model="top1",
        load_best_model_at_end=True,
        seed=cell.seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(
        model,
        settings,
        data_collator=lambda rows: {
            "pixel_values": torch.stack([image for image, _ in rows]),
            "labels": torch.tensor([label for _, label in rows]),
        },
        train_dataset=images["train"],
        eval_dataset=images["val"],
        compute_metrics=lambda found: {"top1": 100 * float((found.predictions.argmax(1) == found.label_ids).mean())},
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer.state.best_metric, _top1(model.timm_model, images["test"])


def _timm(cell: Cell, script: Path | None, folder: Path) -> tuple[float, float]:
    """timm's own train.py, with its own defaults where the budget does not say otherwise."""
    if script is None:
        raise SystemExit("timm train.py is not part of this project: name it with --timm FILE")
    classes = sum(path.is_dir() for path in (cell.task / "train").iterdir())
    config = resolve_data_config({}, model=timm.create_model(f"local-dir:{cell.backbone}"))
    words = timm_script.command(
        script,
        data=cell.task,
        output=folder,
        model=cell.backbone.name,
        classes=classes,
        size=SIZE,
        batch=cell.batch,
        epochs=EPOCHS,
        pretrained_path=cell.backbone / "model.safetensors",
        lr=cell.peer_rate,
        weight_decay=WEIGHT_DECAY,
        seed=cell.seed,
        workers=0,
    )
    words += ["--pretrained", "--mean", *map(str, config["mean"]), "--std", *map(str, config["std"])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"timm train.py failed: {done.stderr.strip().splitlines()[-1]}")
    model = timm.create_model(
        cell.backbone.name, num_classes=classes, checkpoint_path=folder / timm_script.RUN / "model_best.pth.tar"
    )
    return timm_script.best_validation(folder), _top1(model, ImageFolder(cell.task / "test", _transform(config, False)))


def _transform(config: dict[str, Any], training: bool) -> Callable[..., Any]:
    """timm's preprocessing; in training with the random crops and flips that recipes have by default."""
    return create_transform(
        **{**config, "input_size": (3, SIZE, SIZE)}, is_training=training, scale=(0.35, 1.0), color_jitter=0.0
    )


@torch.inference_mode()
def _top1(model: nn.Module, images: ImageFolder) -> float:
    """In percent."""
    model.eval()
    hits = sum((model(batch).argmax(1) == labels).sum().item() for batch, labels in DataLoader(images, 64))
    return 100 * hits / len(images)


PEERS: dict[str, Callable[[Cell, Path], tuple[float, float]]] = {
    "plain PyTorch": _plain,
    "HF Trainer": _hugging_face,
}
