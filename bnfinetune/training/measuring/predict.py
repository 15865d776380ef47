"""Classes of single images, from an exported folder alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform

from bnfinetune.errors import DataError
from bnfinetune.training.data.images import EXTENSIONS, open_image
from bnfinetune.training.launch import start_accelerator
from bnfinetune.training.measuring.measure import checkpoint_recipe, load_exported
from bnfinetune.training.network.backbone import input_config

_BATCH = 64  # images per forward


def predict(checkpoint: str, paths: Sequence[str], top: int = 5) -> Iterator[dict[str, Any]]:
    """Predict the classes of images; `bnfinetune predict` calls this.

    Args:
        checkpoint: A run folder, or an exported folder such as RUN/best.
        paths: Image files, and folders that are searched for images.
        top: Classes per image, the likeliest first.

    Yields:
        `{"path": ..., "label": ..., "probability": ..., "top": [{"label": ..., "probability": ...}, ...]}` per image.

    Raises:
        CheckpointError: The folder holds no network.
        DataError: A path does not exist, is no image, or holds none.
    """
    folder, recipe = checkpoint_recipe(checkpoint)
    files = [file for path in paths for file in _images(Path(path))]
    device = start_accelerator().device
    model = load_exported(folder).to(device)
    transform = create_transform(**input_config(model, None), is_training=False)
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(model.num_classes)]
    for begin in range(0, len(files), _BATCH):
        chunk = files[begin : begin + _BATCH]
        opened = [open_image({"path": str(file)}, str(file), recipe.data.max_pixels) for file in chunk]
        images = torch.stack([transform(image) for image in opened]).to(device)
        with torch.inference_mode():
            likeliest = model(images).softmax(dim=1).topk(min(top, len(names)), dim=1)
        for file, values, indices in zip(chunk, likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            ranked = [{"label": names[i], "probability": p} for i, p in zip(indices, values, strict=True)]
            yield {"path": str(file), **ranked[0], "top": ranked}


def _images(path: Path) -> list[Path]:
    """The image files at or below `path`, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"predict: there is no file or folder {path}")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in EXTENSIONS)
    if not found:
        raise DataError(f"predict: the folder {path} holds no image")
    return found
