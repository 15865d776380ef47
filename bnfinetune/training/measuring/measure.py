"""Measuring a network on a split: exact counts over all ranks, and nothing of the model changed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from accelerate import Accelerator
from torch import nn

from bnfinetune.bn.adapt import adapt_model
from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.errors import CheckpointError, DataError
from bnfinetune.notes import note
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import load_recipe, override_keys
from bnfinetune.source_paths import check_checkpoint
from bnfinetune.training.data.from_recipe import recipe_loaders, recipe_splits
from bnfinetune.training.data.levels import Levels
from bnfinetune.training.data.loaders import EvalLoader, ImageLoader
from bnfinetune.training.data.splits import ImageSplits, Network
from bnfinetune.training.failures import SharedFailures
from bnfinetune.training.launch import TIMEOUT_MINUTES, on_main, start_accelerator
from bnfinetune.training.measuring.metrics import LabelTally, Metrics, Tally, new_tally
from bnfinetune.training.measuring.mistakes import Mistakes
from bnfinetune.training.measuring.outcomes import Outcomes
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.network.norms import CONFIG_KEY, rebuild_norms
from bnfinetune.training.network.shapes import input_format
from bnfinetune.training.saving.provenance import check_provenance, stated_levels
from bnfinetune.training.saving.timm_folder import RECIPE, WEIGHTS, load_weights, stated_thresholds


def measure(
    model: nn.Module,
    loader: Any,
    tally: Tally | LabelTally,
    accelerator: Accelerator,
    *watchers: Mistakes | Outcomes,
) -> Metrics:
    """Metrics of `model` over `loader`, of which each rank holds a disjoint share; `watchers` see every image.

    The bare model is called, never its DDP wrapper, so ranks may hold different numbers of batches.
    """
    memory_format = input_format(model)
    # no inference mode: entropy minimisation at test time takes gradients
    with evaluation_mode(model), torch.no_grad(), accelerator.autocast():
        for images, labels, *indices in loader:
            images = images.to(accelerator.device, non_blocking=True, memory_format=memory_format)
            logits, labels = model(images), labels.to(accelerator.device, non_blocking=True)
            tally.add(logits, labels)
            for watcher in watchers:
                watcher.add(images, logits, labels, indices[0])
    tally.merge()
    for watcher in watchers:
        watcher.merge()
    return tally.metrics()


def measure_zeros(loader: EvalLoader, tally: Tally | LabelTally, num_classes: int) -> Metrics:
    """Metrics over `loader` of a network that gives every class the score 0, for which no image need be read."""
    for labels in loader.labels():
        labels = labels.to(loader.device)
        tally.add(torch.zeros(len(labels), num_classes, device=loader.device), labels)
    tally.merge()
    return tally.metrics()


def checkpoint_recipe(checkpoint: str, overrides: Sequence[str] = ()) -> tuple[Path, Recipe]:
    """The folder of a checkpoint (a run folder stands for its best) and the recipe saved in it, with overrides.

    Raises:
        CheckpointError: It is not a folder that a run exported.
    """
    check_checkpoint(checkpoint)
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file() and (folder / "best" / "config.json").is_file():
        folder = folder / "best"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"checkpoint: {checkpoint} holds no exported model (config.json); name RUN or RUN/best")
    saved = load_recipe(str(folder / RECIPE) if (folder / RECIPE).is_file() else {})
    given = override_keys(overrides)
    if "data.source" in given:  # what the recipe says of its own data is not true of others
        theirs = ("config", "train_split", "val_split", "test_split", "train_samples", "domain_column")
        defaults = {f"data.{key}": None for key in theirs if f"data.{key}" not in given}
        saved = load_recipe(saved, defaults)
    return folder, load_recipe(saved, overrides)


class Exported(NamedTuple):
    """An exported network on every rank, of the folder that rank 0 has."""

    accelerator: Accelerator
    folder: Path
    recipe: Recipe
    model: Any
    levels: Levels

    @staticmethod
    def open(checkpoint: str, overrides: Sequence[str] = ()) -> Exported:
        """Rank 0 reads, and hands over to the others: they need not see its disk.

        Raises:
            CheckpointError: The folder holds no network.
        """
        starting = start_accelerator("no")  # the ranks meet before they know the precision
        folder, recipe = on_main(starting, lambda: checkpoint_recipe(checkpoint, overrides))
        accelerator = start_accelerator(recipe.train.mixed_precision)
        model, levels = on_main(accelerator, lambda: (load_exported(folder), stated_levels(folder)))
        return Exported(accelerator, folder, recipe, model.to(accelerator.device), levels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that the network names, in its order; none if it names none."""
        return tuple(self.model.pretrained_cfg.get("label_names") or ())

    def knows(self, splits: ImageSplits) -> bool:
        """Whether images have the classes that the network names, in its order."""
        return self.class_names == tuple(splits.class_names)

    def splits(self, overrides: Sequence[str], *, any_classes: bool = False) -> ImageSplits:
        """The images to measure the network on: those of its own run, or all of what `data.source` names.

        Raises:
            DataError: The data cannot be used or, unless `any_classes`, has classes that the network does not know.
        """
        whole = "data.source" in override_keys(overrides)
        names = () if any_classes else self.class_names
        splits = recipe_splits(self.recipe, self.accelerator, network=Network(names, self.levels), whole=whole)
        if not (any_classes or names) and self.model.num_classes != len(splits.class_names):
            raise DataError(
                f"data.source has {len(splits.class_names)} classes, but {self.folder} predicts "
                f"{self.model.num_classes} that it does not name: measure it on data with the same classes"
            )
        return splits

    def thresholds(self) -> Sequence[float]:
        """The probabilities from which on each class is predicted, as rank 0 reads them."""
        return on_main(self.accelerator, lambda: exported_thresholds(self.folder, self.model.num_classes))


def evaluate_checkpoint(checkpoint: str, overrides: Sequence[str] = ()) -> dict[str, Metrics]:
    """Measure an exported network on a data set; `bnfinetune evaluate` calls this.

    Args:
        checkpoint: A run folder, an exported folder such as RUN/best, or any folder that timm saved.
        overrides: `data.*` and `evaluate.*` overrides of the recipe saved in the folder. Where they name `data.source`,
            the whole of it is measured, or its validation and test splits where it has such.

    Returns:
        Metrics by split: `validation`, and `test` where there is one; `all` of a set without such splits.

    Raises:
        CheckpointError: The folder holds no network.
        DataError: The data cannot be used, or has classes that the network does not know.
    """
    exported = Exported.open(checkpoint, overrides)
    accelerator, _, recipe, model, _ = exported
    splits = exported.splits(overrides)
    shown = {"validation": splits.measured_as}
    if "data.source" in override_keys(overrides):
        _note_what_is_measured(splits, on_main(accelerator, lambda: checkpoint_recipe(checkpoint)[1].data.source))
    cuts = exported.thresholds() if recipe.is_multilabel else None
    tally = partial(new_tally, model.num_classes, accelerator.device, multilabel=recipe.is_multilabel, thresholds=cuts)
    loaders = recipe_loaders(recipe, splits, input_config(model, None), accelerator)
    with closing(loaders), SharedFailures(TIMEOUT_MINUTES):
        return {
            shown.get(name, name): measure(adapted(model, recipe, loaders.targets[name]), loader, tally(), accelerator)
            for name, loader in loaders.measured.items()
        }


def exported_thresholds(folder: Path, num_classes: int) -> Sequence[float]:
    """The probabilities from which on the network of a folder predicts each class; 1/2 where the folder tells none."""
    stated = stated_thresholds(folder)
    if len(stated) == num_classes:
        return stated
    note(f"{folder} tells no thresholds of data.task=multilabel: a class is predicted from a probability of 0.5 on")
    return [0.5] * num_classes


def _note_what_is_measured(splits: ImageSplits, trained_on: str) -> None:
    """Say that a set is measured in part, or that it holds the images that the network was trained on."""
    train = splits.names["train"]
    if train not in (splits.names["val"], splits.names.get("test")):
        note(f"the split {train!r} is not measured; data.val_split={train} measures it")
    elif os.path.abspath(splits.source) == os.path.abspath(trained_on):
        note(
            f"{splits.source} is what the network was trained or recalibrated on; "
            "without data.source its held-out part is measured"
        )


def adapted(model: nn.Module, recipe: Recipe, target: ImageLoader) -> nn.Module:
    """`model`, or a copy that adapts to the images of `target` as `evaluate.adapt` says."""
    section = recipe.evaluate
    images = (batch[0] for batch in target) if section.adapt == "adabn" else None
    return adapt_model(
        model,
        section.adapt,
        images,
        num_samples=section.adapt_samples,
        several=recipe.is_multilabel,
        mix_prior=section.adapt_prior,
        lr=section.adapt_lr,
    )


def load_exported(folder: Path) -> Any:
    """The network of an exported folder, in evaluation mode.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ours = (folder / WEIGHTS).is_file()
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=not ours)
        if CONFIG_KEY in config:
            rebuild_norms(model, config, model.pretrained_cfg["input_size"])
        if ours:  # strictly: timm would give a head of another size new, random weights
            model.load_state_dict(load_weights(folder))
    except Exception as error:  # timm, torch, safetensors and json raise each their own
        raise CheckpointError(f"checkpoint: {folder} cannot be loaded ({error})") from error
    check_provenance(folder, model)
    return model.eval()
