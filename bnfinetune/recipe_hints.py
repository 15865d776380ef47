"""What somebody meant who wrote a bare name, a section or another tool's word where a key of a recipe belongs."""

from __future__ import annotations

import json
import shlex
from typing import Any, Final

from bnfinetune.recipe_keys import RecipeKey, RecipeSection, find_key, nearest_key

ELSEWHERE: Final = {
    "amp": "train.mixed_precision",
    "arch": "model.name",
    "architecture": "model.name",
    "backbone": "model.name",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "clip_grad_norm": "optim.clip_grad",
    "data_dir": "data.source",
    "data_path": "data.source",
    "dataset": "data.source",
    "encoder": "model.name",
    "gradient_accumulation_steps": "train.grad_accum",
    "gradient_checkpointing": "model.grad_checkpointing",
    "gradient_clip_val": "optim.clip_grad",
    "img_size": "data.image_size",
    "learning_rate": "optim.lr",
    "logger": "run.tracking",
    "max_epochs": "train.epochs",
    "max_grad_norm": "optim.clip_grad",
    "max_steps": "train.steps",
    "network": "model.name",
    "num_classes": "data.classes",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "num_workers": "data.workers",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "out": "run.dir",
    "output": "run.dir",
    "output_dir": "run.dir",
    "patience": "train.early_stop",
    "per_device_train_batch_size": "train.batch_size",
    "precision": "train.mixed_precision",
    "report_to": "run.tracking",
    "root": "data.source",
    "sched": "optim.schedule.name",
    "scheduler": "optim.schedule.name",
    "smoothing": "train.label_smoothing",
    "wd": "optim.weight_decay",
    "weights": "model.checkpoint",
}
"""Words of other trainers, and the keys that they stand for."""

_BY_TEXT: Final = {
    "data": "data.source",
    "model": "model.name",
    "optim": "optim.name",
    "optim.schedule": "optim.schedule.name",
}
"""The key of a section that a text given for the whole section most likely is."""

_LONGEST = 60


def meant_key(path: str) -> str | None:
    """The dotted key or section that somebody who wrote `path` most likely meant, spoken as here or elsewhere."""
    return ELSEWHERE.get(path.lower()) or nearest_key(path)


def key_inside(section: RecipeSection, value: Any) -> str | None:
    """The key of a section that takes a value given for the whole section: `optim.name` for `optim=adam`."""
    if not isinstance(value, str):
        return None
    takers = (key.path for key in section.keys if value in key.choices)
    return _BY_TEXT.get(section.path) or next(takers, None)


def suggestion(key: str, value: Any, *, in_file: bool = False) -> str | None:
    """What to write instead of `key=value`, with the value filled in; None if nothing is near.

    Args:
        key: A dotted name that is no key, or that is a section.
        value: What was given for it.
        in_file: Write it as in a YAML file, `key: value`, instead of as a word of the command line.
    """
    target = find_key(key)
    if isinstance(value, dict | list):
        return nearest_key(key) if target is None else None
    meant = key if isinstance(target, RecipeSection) else meant_key(key)
    section = find_key(meant) if meant else None
    if isinstance(section, RecipeSection):
        meant = key_inside(section, value) or (None if meant == key else meant)
    return _written(meant, value, in_file=in_file) if meant else None


def _written(key: str, value: Any, *, in_file: bool) -> str:
    target = find_key(key)
    if isinstance(target, RecipeSection):
        return key
    if isinstance(target, RecipeKey) and target.allowed.startswith("list of") and isinstance(value, str):
        text = f"[{value}]"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > _LONGEST:
        return key
    return f"{key}: {text}" if in_file else shlex.quote(f"{key}={text}")
