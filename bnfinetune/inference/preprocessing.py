"""What happens to an image before the network, and what its scores mean: all that a network's file does not hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bnfinetune.errors import CheckpointError
from bnfinetune.recipe import Data, Recipe
from bnfinetune.training.data.levels import Levels
from bnfinetune.training.data.transforms import Transform, build_transforms
from bnfinetune.training.measuring.measure import exported_thresholds
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.saving.provenance import stated_levels

PREPROCESSING: Final = "preprocessing.json"
_STATED: Final = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class Preprocessing:
    """From an image to what a network takes, and from its scores to labels.

    Attributes:
        input_size: (channels, height, width) of what the network takes.
        mean: Of each channel, of values from 0 to 1.
        std: Of each channel, of values from 0 to 1.
        interpolation: Of the resizing, in timm's words.
        crop_pct: Share of the resized image that the crop takes.
        crop_mode: `center`, `squash` or `border`, as timm means them.
        labels: Names of the classes, in the order of the scores.
        thresholds: Of a network that gives any number of labels, the probability from which on it gives each; empty for
            one that gives one label per image.
        levels: Values of 16-bit and float images that become 0 and 255; empty where none were met.
        max_pixels: Largest width times height of an image.
        in_graph: The network subtracts the mean and divides by the standard deviation itself.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str
    labels: tuple[str, ...]
    thresholds: tuple[float, ...] = ()
    levels: Levels = field(default_factory=dict)
    max_pixels: int = Data().max_pixels
    in_graph: bool = False

    @staticmethod
    def of(model: Any, recipe: Recipe, folder: Path) -> Preprocessing:
        """That which the timm network of a folder is measured with."""
        config = input_config(model, recipe.data.image_size)
        labels = tuple(model.pretrained_cfg.get("label_names") or map(str, range(model.num_classes)))
        return Preprocessing(
            input_size=tuple(config["input_size"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config.get("crop_mode") or "center",
            labels=labels,
            thresholds=tuple(exported_thresholds(folder, len(labels))) if recipe.is_multilabel else (),
            levels=stated_levels(folder),
            max_pixels=recipe.data.max_pixels,
        )

    @property
    def is_multilabel(self) -> bool:
        return bool(self.thresholds)

    def transform(self) -> Transform:
        """What prepares images; it leaves values from 0 to 1 where the network normalises by itself."""
        channels = self.input_size[0]
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels} if self.in_graph else {}
        config = {name: getattr(self, name) for name in _STATED}
        return build_transforms(Data(), {**config, **plain}).eval

    def to_dict(self) -> dict[str, Any]:
        """What `preprocessing.json` says, for other programs too: `steps` are the transforms in words, in order."""
        values = "value / 255" if self.in_graph else "(value / 255 - mean) / std"
        return {
            "input": {"name": "images", "shape": ["batch", *self.input_size], "dtype": "float32", "values": values},
            "output": {
                "name": "logits",
                "shape": ["batch", len(self.labels)],
                "probabilities": "sigmoid" if self.is_multilabel else "softmax",
            },
            **asdict(self),
            "steps": [str(step) for step in self.transform().geometry.transforms],
        }

    @staticmethod
    def from_dict(stated: Mapping[str, Any]) -> Preprocessing:
        """Back from `to_dict`, through JSON or not."""
        return Preprocessing(
            input_size=tuple(stated["input_size"]),
            mean=tuple(stated["mean"]),
            std=tuple(stated["std"]),
            interpolation=stated["interpolation"],
            crop_pct=stated["crop_pct"],
            crop_mode=stated["crop_mode"],
            labels=tuple(stated["labels"]),
            thresholds=tuple(stated["thresholds"]),
            levels={kind: (float(black), float(white)) for kind, (black, white) in stated["levels"].items()},
            max_pixels=stated["max_pixels"],
            in_graph=stated["in_graph"],
        )


def read_preprocessing(folder: Path) -> tuple[Preprocessing, dict[str, Any]]:
    """What the `preprocessing.json` of a folder says, and all of it as it stands there.

    Raises:
        CheckpointError: It is missing, or somebody else's.
    """
    path = folder / PREPROCESSING
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        return Preprocessing.from_dict(stated), stated
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint: {path} cannot be read ({type(error).__name__}: {error}); write the folder anew by "
            "bnfinetune export"
        ) from error
