"""Classes of single images, one each or any number of them, from an exported folder alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bnfinetune.errors import DataError
from bnfinetune.notes import note
from bnfinetune.training.data.images import open_image, wide_extremes
from bnfinetune.training.data.levels import Levels, levels_of
from bnfinetune.training.data.transforms import build_transforms
from bnfinetune.training.data.walking import PassedOver, images_below, printable
from bnfinetune.training.measuring.measure import checkpoint_recipe, exported_thresholds, load_exported
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.saving.provenance import stated_levels

_BATCH = 64  # images per forward, once the first answers are given
_LEVEL_IMAGES = 256  # files that are looked at for values of more than 8 bits, where the network tells no levels


def predict(checkpoint: str, paths: Sequence[str], top: int = 5) -> Iterator[dict[str, Any]]:
    """Predict the classes of images; `bnfinetune predict` calls this.

    Images that cannot be read are named in notes and counted in a last one; answers come from the first image on.

    Args:
        checkpoint: A run folder, or an exported folder such as RUN/best.
        paths: Image files, and folders that are searched for images as those to train on are.
        top: Classes per image, the likeliest first.

    Yields:
        `{"path": ..., "label": ..., "probability": ..., "top": [{"label": ..., "probability": ...}, ...]}` per image.
        Of a network trained with `data.task=multilabel`, `"labels": [{"label": ..., "probability": ...}, ...]` stands
        in the place of label and probability: all classes from their thresholds on, the likeliest first.

    Raises:
        CheckpointError: The folder holds no network.
        DataError: A path does not exist or holds no image, or no image at all can be read.
    """
    folder, recipe = checkpoint_recipe(checkpoint)
    files = [file for path in paths for file in _images(Path(path))]
    available = torch.accelerator.is_available()  # without Accelerate, which would wait for other ranks
    device = (torch.accelerator.current_accelerator() if available else None) or torch.device("cpu")
    model = load_exported(folder).to(device)
    transform = build_transforms(recipe.data, input_config(model, None)).eval
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(model.num_classes)]
    thresholds = torch.tensor(exported_thresholds(folder, len(names))) if recipe.is_multilabel else None
    levels = stated_levels(folder) or _levels_of(files)
    unreadable: list[str] = []
    read = _readable(files, recipe.data.max_pixels, levels, unreadable)
    size = 1
    while batch := [(file, transform.draw(image)) for file, image in islice(read, size)]:
        logits = _logits(model, transform.finish(_stacked([pixels for _, pixels in batch]).to(device)))
        scores = logits.softmax(dim=1) if thresholds is None else logits.sigmoid()
        for (file, _), probabilities in zip(batch, scores.cpu(), strict=True):
            yield {"path": str(file), **_answer(probabilities, names, top, thresholds)}
        size = min(2 * size, _BATCH)
    if len(unreadable) == len(files):
        raise DataError(unreadable[0] + (f" (and {len(files) - 1} more, of {len(files)})" if len(files) > 1 else ""))
    if unreadable:
        note(f"predict: {len(unreadable)} of {len(files)} images could not be read and were passed over")


def _readable(
    files: Sequence[Path], max_pixels: int, levels: Levels, unreadable: list[str]
) -> Iterator[tuple[Path, Image.Image]]:
    """The images that can be read; what is wrong with each other one is said, and added to `unreadable`."""
    for file in files:
        try:
            yield file, open_image({"path": str(file)}, printable(file), max_pixels, levels=levels)
        except DataError as error:
            unreadable.append(str(error))
            if len(files) > 1:
                note(f"predict: {error}")


def _logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(images)
    return logits


def _answer(
    probabilities: torch.Tensor, names: Sequence[str], top: int, thresholds: torch.Tensor | None
) -> dict[str, Any]:
    """What is told of one image of `probabilities` (classes,)."""
    order = probabilities.argsort(descending=True, stable=True)

    def guesses(numbers: torch.Tensor) -> list[dict[str, Any]]:
        return [{"label": names[n], "probability": float(probabilities[n])} for n in numbers.tolist()]

    ranked = guesses(order[:top])
    if thresholds is None:
        return {**ranked[0], "top": ranked}
    return {"labels": guesses(order[(probabilities >= thresholds)[order]]), "top": ranked}


def _stacked(pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels))


def _levels_of(files: Sequence[Path]) -> Levels:
    """Which values of 16-bit and float images are black and white, for a network that was trained on others."""
    some = files[:: max(1, len(files) // _LEVEL_IMAGES)]
    return levels_of(found for file in some if (found := wide_extremes({"path": str(file)})) is not None)


def _images(path: Path) -> list[Path]:
    """The image files at or below `path`, in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"predict: there is no file or folder {printable(path)}")
    passed = PassedOver()
    found = list(images_below(path, passed))
    if not found:
        beside = f", but {passed}" if str(passed) else ""
        raise DataError(f"predict: the folder {printable(path)} holds no image{beside}")
    if str(passed):
        note(f"predict: passed over in {printable(path)}: {passed}")
    return found
