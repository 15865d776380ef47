"""The average of networks that a run has evaluated: at the end it competes with the best of them.

`last_k` averages those of the last evaluations (Kaddour 2022, LAWA; at a constant learning rate, Izmailov et al. 2018,
SWA). `greedy` begins with the best on validation and takes in the next best, each if the average does not become worse
by it (Wortsman et al. 2022, model soups).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.recipe import Recipe
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.launch import on_main
from bnfinetune.training.loop.progress import Score, score_of
from bnfinetune.training.measuring.average import greedy, load_average, metrics_score
from bnfinetune.training.measuring.measurer import Measurer
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.record import Record
from bnfinetune.training.saving.run_folder import RunFolder
from bnfinetune.training.saving.snapshots import SnapshotStore


def candidates(history: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[int]:
    """Updates whose networks `train.average` may take, of greedy the best first; as more are evaluated, some drop out.

    Args:
        history: One entry per evaluation, in order.
        recipe: How to average, and by which metric networks are compared.
    """
    metric = recipe.best_metric
    scores = {entry["update"]: score_of(metric, entry[metric], entry["loss"]) for entry in history}
    sound = [update for update, score in scores.items() if score is not None]
    if recipe.train.average == "greedy":
        return sorted(sound, key=lambda update: (scores[update], update), reverse=True)[: recipe.train.average_of]
    return sound[-recipe.train.average_of :] if recipe.train.average == "last_k" else []


def try_average(
    setup: Assembly, folder: RunFolder, record: Record, measurer: Measurer, say: Callable[[str], None]
) -> None:
    """Average as `train.average` says, and export the average if it is better than the best network so far.

    All ranks together; the networks are read by rank 0.

    Raises:
        CheckpointError: A network that was kept is damaged.
        StatisticsError: The statistics of the average could not be computed.
    """
    recipe, accelerator = setup.trainer.recipe, setup.trainer.accelerator
    store = SnapshotStore(folder.path)
    wanted = candidates(record.history, recipe)
    kept = on_main(accelerator, lambda: [update for update in wanted if store.holds(update)]) if wanted else []
    if len(kept) < 2:
        return
    averager = _Averager(setup, store, measurer)
    updates = greedy(kept, averager.score) if recipe.train.average == "greedy" else kept
    if len(updates) < 2:
        say(f"average  of update {updates[0]} with any other is worse than it is")
        return
    report, metrics = averager.load(updates)
    progress = setup.trainer.progress
    better = progress.take_score(recipe.best_metric, metrics.scalars()[recipe.best_metric], metrics.loss)
    record.average = {"of": sorted(updates), "best": better, **metrics.scalars()}
    if better:
        record.note_recalibration([report] if report else [], recipe.recalibrate.data, "average")
        if accelerator.is_main_process:
            source = record.statistics | {"averaged": sorted(updates)}
            setup.export(averager.network, folder, source, metrics.thresholds)
    say(_line(record.average, metrics, report))


@dataclass
class _Averager:
    """Loads averages into a run's network, whose training is over."""

    setup: Assembly
    store: SnapshotStore
    measurer: Measurer

    def __post_init__(self) -> None:
        self.network: nn.Module = self.setup.trainer.evaluated

    def load(self, updates: Iterable[int]) -> tuple[PreciseBNReport | None, Metrics]:
        """What came of statistics computed anew, if any moved, and the metrics on validation."""
        trainer = self.setup.trainer
        states = partial(map, self.store.load, updates)
        report = load_average(self.network, states, trainer.loaders, trainer.recipe, trainer.accelerator)
        return report, self.measurer.measure(self.network, trainer.loaders.val)

    def score(self, updates: Sequence[int]) -> Score | None:
        """That of an average on validation."""
        return metrics_score(self.load(updates)[1], self.setup.trainer.recipe)


def _line(average: Mapping[str, Any], metrics: Metrics, report: PreciseBNReport | None) -> str:
    anew = f", statistics of {len(report.layers)} BN layers anew from {report.samples} images" if report else ""
    return (
        f"average  of updates {', '.join(map(str, average['of']))}{anew}: validation loss {metrics.loss:.3f}"
        f"  {metrics.headline}{'  best' if average['best'] else ''}"
    )
