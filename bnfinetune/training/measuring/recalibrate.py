"""Population statistics within a run: which images they are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from bnfinetune.bn.policy.domains import domain
from bnfinetune.bn.statistics.batches import first_batches
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.bn.statistics.prior_search import CHOICE
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.recipe import Recalibrate, Recipe
from bnfinetune.recipe_files import dump_recipe
from bnfinetune.training.data.from_recipe import recipe_loaders
from bnfinetune.training.data.loaders import ImageLoader, Loaders
from bnfinetune.training.failures import SharedFailures
from bnfinetune.training.launch import TIMEOUT_MINUTES, on_main
from bnfinetune.training.measuring.measure import Exported
from bnfinetune.training.measuring.prior import Judge, recalibrate_by_choice
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.network.norms import norm_config
from bnfinetune.training.saving.run_folder import choose_folder
from bnfinetune.training.saving.timm_folder import save_timm_folder, stated_thresholds


def recalibrate(
    model: nn.Module,
    loaders: Loaders,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    judge: Judge = "labels",
    exported: bool = False,
    **selection: Any,
) -> PreciseBNReport:
    """Recompute the running statistics of `model` as a recipe's `recalibrate` section says; all ranks together.

    Frozen statistics are recomputed too: a recipe that asks for it means them.

    Args:
        model: The bare network.
        loaders: The run's loaders.
        recipe: Which images, at most how many, which estimator and prior, and the domain where there are several.
        accelerator: For the autocast precision.
        judge: By what `recalibrate.prior=auto` chooses, where labels may be used.
        exported: The network is one domain's plain copy, which has no domains any more.
        **selection: `layers` and `exclude` of `precise_bn`.

    Raises:
        StatisticsError: The pass failed; the network is as it was.
    """
    section, name, number = recipe.recalibrate, recipe.evaluated_domain, recipe.evaluated_domain_number
    loader = _loader(loaders, section)
    options = {
        "layers": section.layers,
        **selection,
        "variance": section.variance,
        "tolerance": section.tolerance,
        "include_frozen": True,
    }
    with accelerator.autocast(), nullcontext() if name is None or exported else domain(model, name):
        if section.prior == "auto":
            share = -(-(section.samples or CHOICE) // accelerator.num_processes)
            few = list(first_batches(_labelled(loader, number), share))
            judge = "certainty" if section.data == "target" else judge
            return recalibrate_by_choice(model, few, judge, accelerator, **options)
        enough = section.samples is not None and (loader.images is None or section.samples < loader.images)
        images = (images for images, _ in _labelled(loader, number))
        samples = section.samples if enough else None
        return precise_bn(model, images, num_samples=samples, prior=section.prior, **options)


def recalibrate_checkpoint(checkpoint: str, out: str, overrides: Sequence[str] = ()) -> PreciseBNReport:
    """Write a copy of an exported network with statistics computed anew; `bnfinetune recalibrate` calls this.

    Args:
        checkpoint: A run folder, an exported folder such as RUN/best, or any folder that timm saved.
        out: The new folder, which must not exist.
        overrides: `data.*`, `recalibrate.*` and `evaluate.batch_size` overrides of the recipe saved in the folder.

    Raises:
        CheckpointError: The folder holds no network, or `out` is taken.
        StatisticsError: The pass failed; nothing is written.
    """
    exported = Exported.open(checkpoint, overrides)
    accelerator, _, recipe, model, _ = exported
    target = on_main(accelerator, lambda: choose_folder(out, "recalibrated"))
    splits = exported.splits(overrides, any_classes=True)
    data_config = input_config(model, recipe.data.image_size)
    judge: Judge = "labels" if exported.knows(splits) else "certainty"
    with closing(recipe_loaders(recipe, splits, data_config, accelerator)) as loaders, SharedFailures(TIMEOUT_MINUTES):
        report = recalibrate(model, loaders, recipe, accelerator, judge=judge, exported=True)
    names = model.pretrained_cfg.get("label_names") or [str(number) for number in range(model.num_classes)]
    source = {
        "computed": "precise-BN",
        "images": report.samples,
        "share": report.share,
        "data": recipe.recalibrate.data,
        "source": recipe.data.source,
        "fingerprint": splits.fingerprint(),
        "levels": dict(splits.levels),
    }
    about = dump_recipe(recipe), source, norm_config(recipe.model)
    on_main(
        accelerator,
        lambda: save_timm_folder(target, model, names, data_config, *about, stated_thresholds(exported.folder)),
    )
    return report


def _labelled(loader: ImageLoader, number: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of a loader; where batches tell domains, only those of the domain of that number."""
    for images, labels, *more in loader:
        chosen = more[0] == number if number is not None and loader.emits_domains else slice(None)
        if len(images[chosen]):
            yield images[chosen], labels[chosen]


def _loader(loaders: Loaders, section: Recalibrate) -> ImageLoader:
    if section.data == "target":
        return loaders.targets.get("test", loaders.targets["validation"])
    return loaders.stats if section.preprocessing == "eval" else loaders.augmented_stats
