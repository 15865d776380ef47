"""Networks of one architecture averaged into one, with BN statistics of its own; the verb `average`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from bnfinetune.bn.average import layers_that_moved, mean_of_states
from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.errors import CheckpointError
from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import dump_recipe
from bnfinetune.training.data.from_recipe import recipe_loaders
from bnfinetune.training.data.loaders import Loaders
from bnfinetune.training.failures import SharedFailures
from bnfinetune.training.launch import TIMEOUT_MINUTES, on_main
from bnfinetune.training.loop.progress import Score, score_of
from bnfinetune.training.measuring.measure import Exported, checkpoint_recipe, load_exported, measure
from bnfinetune.training.measuring.metrics import Metrics, new_tally
from bnfinetune.training.measuring.recalibrate import recalibrate
from bnfinetune.training.network.backbone import input_config
from bnfinetune.training.network.norms import norm_config
from bnfinetune.training.saving.run_folder import choose_folder
from bnfinetune.training.saving.timm_folder import save_timm_folder

T = TypeVar("T")
Weights = dict[str, Tensor]


def load_average(
    network: nn.Module,
    states: Callable[[], Iterable[Weights]],
    loaders: Loaders,
    recipe: Recipe,
    accelerator: Accelerator,
) -> PreciseBNReport | None:
    """Load the mean of some networks into one; statistics in which they differ are computed anew.

    Args:
        network: The bare network, without domains.
        states: Called on rank 0, which hands the mean over to the others.
        loaders: The images that `recipe.recalibrate` computes statistics from.
        recipe: What the networks were trained with.
        accelerator: The ranks.

    Returns:
        What came of the statistics; None where all networks agree in them.
    """
    mean = on_main(accelerator, lambda: mean_of_states(states()))
    network.load_state_dict(mean.state)
    layers = layers_that_moved(network, mean.moved)
    return recalibrate(network, loaders, recipe, accelerator, layers=layers, exported=True) if layers else None


def greedy(order: Sequence[T], score: Callable[[Sequence[T]], Score | None]) -> list[T]:
    """Those of some networks, the best first, that do not make the average of those before them worse.

    Args:
        order: The networks, in the order in which they are tried; the first is taken.
        score: That of an average of some of them.

    Source: Wortsman et al. 2022, algorithm 1; equal values are compared by their loss here.
    """
    chosen, best = list(order[:1]), score(order[:1])
    for network in order[1:]:
        found = score([*chosen, network])
        if found is not None and (best is None or found >= best):
            chosen, best = [*chosen, network], found
    return chosen


def metrics_score(metrics: Metrics, recipe: Recipe) -> Score | None:
    """The score by which a recipe compares networks."""
    return score_of(recipe.best_metric, metrics.scalars()[recipe.best_metric], metrics.loss)


class AveragedRuns(NamedTuple):
    """What came of the average of finished networks.

    Attributes:
        metrics: On validation, of each network by its folder and of the average under `average`.
        taken: The folders of the networks that are in it.
        report: What came of statistics computed anew; None where the networks agree in all of them.
    """

    metrics: dict[str, Metrics]
    taken: tuple[str, ...]
    report: PreciseBNReport | None

    @property
    def statistics(self) -> str:
        """Where its statistics come from, in words."""
        if self.report is None:
            return "statistics as they agree in"
        return f"statistics of {len(self.report.layers)} BN layers anew from {self.report.samples} images"


def average_checkpoints(
    checkpoints: Sequence[str], out: str, overrides: Sequence[str] = (), *, choose: bool = False
) -> AveragedRuns:
    """Write the average of exported networks, of one architecture and the same classes, to a new folder.

    Runs that began at the same weights often have an average better than each (Wortsman et al. 2022); others do not.

    Args:
        checkpoints: Run folders, or exported folders such as RUN/best; the first one's recipe says the data.
        out: The new folder, which must not exist.
        overrides: `data.*`, `recalibrate.*` and `evaluate.batch_size` overrides of that recipe.
        choose: Take the best on validation, and of the others, from the next best on, those that `greedy` takes.

    Raises:
        CheckpointError: Fewer than two networks, one that is missing or of another kind, or `out` is taken.
        StatisticsError: The pass over the training images failed; nothing is written.
    """
    if len(set(checkpoints)) < 2:
        raise CheckpointError(f"an average is of two networks or more, found {len(set(checkpoints))}: name run folders")
    first = Exported.open(checkpoints[0], overrides)
    accelerator, _, recipe, network, _ = first
    target = on_main(accelerator, lambda: choose_folder(out, "average"))
    splits = first.splits(overrides)
    data_config = input_config(network, recipe.data.image_size)
    with closing(recipe_loaders(recipe, splits, data_config, accelerator)) as loaders, SharedFailures(TIMEOUT_MINUTES):

        def tried(names: Sequence[str]) -> tuple[PreciseBNReport | None, Metrics]:
            states = partial(map, partial(_weights, classes=first.class_names), names)
            report = load_average(network, states, loaders, recipe, accelerator)
            tally = new_tally(network.num_classes, accelerator.device, multilabel=recipe.is_multilabel)
            return report, measure(network, loaders.val, tally, accelerator)

        metrics = {name: tried([name])[1] for name in checkpoints}

        def score(names: Sequence[str]) -> Score | None:
            return metrics_score(metrics[names[0]] if len(names) == 1 else tried(names)[1], recipe)

        order = sorted(metrics, key=lambda name: metrics_score(metrics[name], recipe) or _WORST, reverse=True)
        taken = greedy(order, score) if choose else order
        report, metrics["average"] = tried(taken)
    anew = {"computed": "precise-BN", "images": report.samples, "share": report.share} if report else {}
    source = {"data": recipe.recalibrate.data, "source": recipe.data.source, "fingerprint": splits.fingerprint()}
    about = dump_recipe(recipe), anew | source | {"averaged": taken, "levels": dict(splits.levels)}
    settings = norm_config(recipe.model), metrics["average"].thresholds
    on_main(accelerator, lambda: save_timm_folder(target, network, first.class_names, data_config, *about, *settings))
    return AveragedRuns(metrics, tuple(taken), report)


_WORST = Score(float("-inf"), float("-inf"))


def _weights(checkpoint: str, classes: Sequence[str]) -> Weights:
    """Those of a checkpoint whose classes are as those of the first."""
    folder, _ = checkpoint_recipe(checkpoint)
    model: Any = load_exported(folder)
    theirs = tuple(model.pretrained_cfg.get("label_names") or ())
    if theirs != tuple(classes):
        raise CheckpointError(f"{checkpoint} has other classes than the first network: average networks of one task")
    weights: Weights = model.state_dict()
    return weights
