"""A network that is ready for use: images in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bnfinetune.errors import DataError
from bnfinetune.inference.inputs import Input, gather, read_levels, readable
from bnfinetune.inference.preprocessing import PREPROCESSING, Preprocessing, read_preprocessing
from bnfinetune.inference.runners import Runner, TorchRunner, open_runner
from bnfinetune.notes import note
from bnfinetune.source_paths import check_checkpoint
from bnfinetune.training.measuring.measure import checkpoint_recipe, load_exported

_BATCH = 64  # images per forward
OnError = Literal["raise", "skip"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of one image.

    Attributes:
        path: The image's file; None of an image from memory.
        probabilities: (classes,), float32, in the order of `names`.
        names: Of all classes.
        thresholds: (classes,), of a network that gives any number of labels: the probability from which on it gives
            each. None of one that gives one label.
    """

    path: str | None
    probabilities: NDArray[np.float32]
    names: Sequence[str] = field(repr=False)
    thresholds: NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.top(1)[0][0]

    @property
    def probability(self) -> float:
        """That of the likeliest class."""
        return self.top(1)[0][1]

    @property
    def labels(self) -> tuple[str, ...]:
        """The likeliest class alone or, of any number of labels, those from their thresholds on, likeliest first."""
        if self.thresholds is None:
            return (self.label,)
        return tuple(self.names[n] for n in self._order() if self.probabilities[n] >= self.thresholds[n])

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities, the likeliest first."""
        return [(self.names[n], float(self.probabilities[n])) for n in self._order()[:count]]

    def record(self, top: int = 5) -> dict[str, Any]:
        """As `bnfinetune predict format=jsonl` writes it.

        `{"path": ..., "label": ..., "probability": ..., "top": [{"label": ..., "probability": ...}, ...]}`; of several
        labels per image, `"labels": [{"label": ..., "probability": ...}, ...]` stands in the place of label and
        probability.
        """
        ranked = [{"label": name, "probability": value} for name, value in self.top(len(self.names))]
        if self.thresholds is None:
            return {"path": self.path, **ranked[0], "top": ranked[:top]}
        given = set(self.labels)
        return {"path": self.path, "labels": [each for each in ranked if each["label"] in given], "top": ranked[:top]}

    def _order(self) -> list[int]:
        order: list[int] = np.argsort(-self.probabilities, kind="stable").tolist()
        return order


class Predictor:
    """A network with all that it needs to be used on images; `bnf.load` makes one.

    Attributes:
        labels: Names of the classes, in the order of the scores.
        preprocessing: What happens to an image before the network.
        device: Where the network computes.
    """

    def __init__(self, runner: Runner, preprocessing: Preprocessing) -> None:
        self.preprocessing, self.labels = preprocessing, preprocessing.labels
        self.device = runner.device
        self._runner, self._transform = runner, preprocessing.transform()

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.preprocessing.input_size))
        return f"Predictor({len(self.labels)} classes, images of {size}, on {self.device})"

    def predict(
        self, images: Input | Iterable[Input], *, batch_size: int = _BATCH, on_error: OnError = "raise"
    ) -> list[Prediction]:
        """Labels and probabilities of images, one prediction each, in their order.

        Args:
            images: One or many: paths of files, folders that are searched for images as those to train on are, or
                Pillow images of any mode.
            batch_size: Images per forward.
            on_error: What to do about an image that cannot be read: `raise`, or `skip`, which leaves it out, names it
                in a note and counts it in a last one.

        Raises:
            DataError: A path does not exist or holds no image; an image cannot be read; with `skip`, none can be.
        """
        return list(self.stream(images, batch_size=batch_size, on_error=on_error))

    def stream(
        self, images: Input | Iterable[Input], *, batch_size: int = _BATCH, on_error: OnError = "raise"
    ) -> Iterator[Prediction]:
        """What `predict` gives, one by one: the first image is answered alone and at once, later ones in batches."""
        inputs = gather(images)
        levels = self.preprocessing.levels or read_levels(inputs)
        unreadable: list[str] = []
        read = readable(inputs, self.preprocessing.max_pixels, levels, unreadable, skip=on_error == "skip")
        several = self.preprocessing.is_multilabel
        cuts = np.array(self.preprocessing.thresholds, np.float32) if several else None
        size = 1
        while batch := [(path, self._transform.draw(image)) for path, image in islice(read, size)]:
            scores = self._scores([pixels for _, pixels in batch])
            found = scores.sigmoid() if several else scores.softmax(dim=1)
            for (path, _), probabilities in zip(batch, found.numpy(), strict=True):
                yield Prediction(path, probabilities, self.labels, cuts)
            size = min(2 * size, batch_size)
        if unreadable and len(unreadable) == len(inputs):
            others = f" (and {len(inputs) - 1} more, of {len(inputs)})" if len(inputs) > 1 else ""
            raise DataError(unreadable[0] + others)
        if unreadable:
            note(f"predict: {len(unreadable)} of {len(inputs)} images could not be read and were passed over")

    def scores(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the network gives for RGB images before softmax or sigmoid: (images, classes), float32, on the CPU."""
        return self._scores([self._transform.draw(image) for image in images])

    def _scores(self, pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        stacked = torch.from_numpy(np.stack(pixels)).to(self.device)
        return self._runner(self._transform.finish(stacked)).float().cpu()


def load(checkpoint: str | Path, *, device: str | torch.device | None = None) -> Predictor:
    """Load a network for use on images, with the preprocessing that it was evaluated with.

    Example:
        >>> predictor = bnf.load("runs/freeze_bn")
        >>> for found in predictor.predict(["cat.jpg", "dog.jpg"]):
        ...     print(found.path, found.label, found.probability)

    Args:
        checkpoint: A run folder (its best network is taken), RUN/best, any folder that timm saved, or a folder that
            `bnfinetune export` wrote in any format.
        device: Where to compute; by default the accelerator, where there is one.

    Raises:
        CheckpointError: The folder holds no network, or one that cannot be loaded.
        ExportError: A package that runs it is not installed.
    """
    check_checkpoint(str(checkpoint))
    chosen = torch.device(device) if device is not None else _best_device()
    folder = Path(checkpoint)
    if (folder / PREPROCESSING).is_file():
        preprocessing, stated = read_preprocessing(folder)
        if stated.get("format") != "timm":
            return Predictor(open_runner(folder, stated, chosen), preprocessing)
    folder, recipe = checkpoint_recipe(str(checkpoint))
    model = load_exported(folder)
    return Predictor(TorchRunner(model.to(chosen), chosen), Preprocessing.of(model, recipe, folder))


def _best_device() -> torch.device:
    """The accelerator, where there is one; asked without Accelerate, which would wait for other ranks."""
    available = torch.accelerator.is_available()
    return (torch.accelerator.current_accelerator() if available else None) or torch.device("cpu")
