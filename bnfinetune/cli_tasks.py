"""What people want to do, and the line that does it."""

from __future__ import annotations

from typing import Final

START: Final = {
    "see it work, without any download": "bnfinetune recipe=freeze_bn",
    "fine-tune on your images; the recipe is found by measuring": (
        "bnfinetune recipe=auto data.source=path/to/images model.name=resnet50"
    ),
    "name the classes of new images": "bnfinetune predict checkpoint=runs/auto photo.jpg",
    "begin a recipe of your own": "bnfinetune cp freeze_bn mine.yaml",
    "read on": "bnfinetune --help",
}

MORE: Final = {
    "choose recipe, network and learning rate yourself": (
        "bnfinetune recipe=freeze_bn model.name=resnet50 optim.lr=3e-4"
    ),
    "compare recipes on your images, over seeds": (
        "bnfinetune compare recipe='[freeze_bn, full]' data.source=path/to/images"
    ),
    "look for BatchNorm pitfalls before training": "bnfinetune check recipe=mine.yaml",
    "see what a network's BatchNorm statistics are worth on data": (
        "bnfinetune inspect checkpoint=runs/freeze_bn page=report.html"
    ),
    "measure a network on other images": "bnfinetune evaluate checkpoint=runs/auto data.source=path/to/others",
    "go on where a run was stopped": "bnfinetune recipe=freeze_bn run.dir=runs/mine train.resume=auto",
    "use all GPUs of a machine": "accelerate launch --multi_gpu -m bnfinetune recipe=freeze_bn",
    "learn what a key means, and which recipes set it": "bnfinetune help optim.lr",
}

TASKS: Final = {**{task: line for task, line in START.items() if task != "read on"}, **MORE}


def as_lines(tasks: dict[str, str]) -> str:
    """Each task with its line below it."""
    return "\n".join(f"  {task}\n      {line}" for task, line in tasks.items())
