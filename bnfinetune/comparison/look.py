"""A first look at network and images: what tells, before anything trains, which recipes are worth trying."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bnfinetune.bn.layers import find_bn_layers
from bnfinetune.bn.statistics.batches import first_batches
from bnfinetune.diagnose.facts import is_untouched
from bnfinetune.diagnose.readout import Readout
from bnfinetune.errors import CheckpointError
from bnfinetune.recipe import Recipe
from bnfinetune.training.assembly import assemble
from bnfinetune.training.data.from_recipe import recipe_splits
from bnfinetune.training.launch import as_it_was, start_accelerator
from bnfinetune.training.measuring.prior import read_out
from bnfinetune.training.saving.atomic import write_json

LOOK = "look.json"
_IMAGES = 256
"""Training images that the readout is made on."""


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        fingerprint: Of the images.
        bn_layers: How many the network has.
        untouched: Whether all statistics are still those of construction.
        training_images: How many; None of a stream.
        classes: How many.
        readout: What statistics of the images are worth to a new head; None without BN, or of a stream.
    """

    fingerprint: str
    bn_layers: int
    untouched: bool
    training_images: int | None
    classes: int
    readout: Readout | None

    def lines(self) -> list[str]:
        """What was seen, a sentence each."""
        images = "a stream of" if self.training_images is None else f"{self.training_images:,}"
        if not self.bn_layers:
            return [f"{images} training images, {self.classes} classes; the network has no BN, which plays no part"]
        said = [f"{images} training images, {self.classes} classes; {self.bn_layers} BN layers"]
        if self.untouched:
            said.append("all stored statistics are those of construction: only statistics of the images can be used")
        return said if self.readout is None else [*said, self.readout.verdict]


def look(recipe: Recipe, folder: Path) -> Look:
    """Look at the network and the images of a recipe, or read what was seen before.

    Raises:
        BnFinetuneError: They cannot be used.
        CheckpointError: The folder holds what was seen of other images.
    """
    with as_it_was():
        accelerator = start_accelerator(recipe.train.mixed_precision, trains=True)
        path = folder / LOOK
        if path.is_file():
            return _read(path, recipe_splits(recipe, accelerator).fingerprint())
        setup = assemble(recipe, accelerator, lambda _: None)
        loaders = setup.trainer.loaders
        try:
            layers = list(find_bn_layers(setup.trainer.model).values()) if setup.trainer.has_bn else []
            readout = None
            if layers and not recipe.data.streaming:
                batches = [(images, labels) for images, labels, *_ in first_batches(loaders.stats, _IMAGES)]
                readout = read_out(setup.trainer.model, batches, accelerator)
        finally:
            loaders.close()
    found = Look(
        setup.splits.fingerprint(),
        len(layers),
        bool(layers) and all(map(is_untouched, layers)),
        None if recipe.data.streaming else len(setup.splits.train),
        len(setup.splits.class_names),
        readout,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(found) | {"readout": None if readout is None else readout.to_dict()})
    return found


def _read(path: Path, fingerprint: str) -> Look:
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if saved["fingerprint"] != fingerprint:
        raise CheckpointError(f"{path.parent} holds a search over other images: remove it, or choose another run.dir")
    told = saved.pop("readout")
    return Look(**saved, readout=None if told is None else Readout.from_dict(told))
