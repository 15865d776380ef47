"""All that is measured of a run's networks, and when their statistics are computed anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from bnfinetune.bn.statistics.report import PreciseBNReport
from bnfinetune.diagnose.drift_report import DriftReport
from bnfinetune.training.data.loaders import EvalLoader
from bnfinetune.training.launch import GlobalBatch, on_main
from bnfinetune.training.loop.memory import enough_memory
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.drift_meter import DriftMeter
from bnfinetune.training.measuring.measure import adapted, measure, measure_zeros
from bnfinetune.training.measuring.metrics import LabelTally, Metrics, Tally, new_tally
from bnfinetune.training.measuring.mistakes import Mistakes
from bnfinetune.training.measuring.outcomes import Outcomes
from bnfinetune.training.measuring.recalibrate import recalibrate
from bnfinetune.training.network.head import is_head_zero


class Measurer:
    """Measures the networks of a run.

    Args:
        trainer: Of the run, as it starts, before any statistic of its network is computed anew.
    """

    def __init__(self, trainer: Trainer) -> None:
        recipe, self.accelerator, self.loaders = trainer.recipe, trainer.accelerator, trainer.loaders
        self.recipe, self.num_classes, self._clock = recipe, trainer.num_classes, trainer.clock
        followed = trainer.evaluated if recipe.run.report else nn.Identity()
        trained = trainer.updates * GlobalBatch.of(recipe, self.accelerator.num_processes).images
        with self._clock.part("statistics"):
            self._meter = DriftMeter(followed, self.loaders, self.accelerator, recipe.evaluated_domain_number, trained)
        self.drift_at_start = self._meter.start

    def measure(
        self, network: nn.Module, loader: EvalLoader, *watchers: Mistakes | Outcomes, **counted: Any
    ) -> Metrics:
        """Metrics over the images of a loader, each seen by `watchers`; `counted` goes to `new_tally`."""
        with self._clock.part("evaluation"), self._enough_memory():
            return measure(network, loader, self._tally(**counted), self.accelerator, *watchers)

    def measure_start(self, network: nn.Module) -> dict[str, Metrics]:
        """Metrics by split, as a run starts; those of a head of zeros follow from the labels alone."""
        unread = is_head_zero(network) and self.recipe.data.on_error != "skip" and not self.recipe.data.streaming
        found: dict[str, Metrics] = {}
        for name, loader in self.loaders.measured.items():
            cuts = _chosen(found)
            if unread:
                found[name] = measure_zeros(loader, self._tally(thresholds=cuts), self.num_classes)
            else:
                found[name] = self.measure(network, loader, thresholds=cuts)
        return found

    def measure_final(
        self, network: nn.Module, mistakes: Mistakes | None
    ) -> tuple[dict[str, Metrics], dict[str, Outcomes]]:
        """Metrics with confusion, and the outcome of every image, by split, adapted to each as `evaluate.adapt` says.

        Thresholds of labels are chosen on validation; `mistakes` are those on the last split.
        """
        measured = self.loaders.measured
        found: dict[str, Metrics] = {}
        outcomes = {name: Outcomes() for name in measured}
        for name, loader in measured.items():
            worst = [mistakes] if mistakes is not None and name == list(measured)[-1] else []
            final = adapted(network, self.recipe, self.loaders.targets[name])
            counted = {"confusion": True, "thresholds": _chosen(found)}
            found[name] = self.measure(final, loader, outcomes[name], *worst, **counted)
        return found, outcomes

    def recalibrate(self, moment: str, networks: Mapping[str, nn.Module]) -> dict[str, PreciseBNReport]:
        """Compute statistics anew if the recipe asks for it at this moment; what came of it, by network."""
        if moment not in self.recipe.recalibrate.at:
            return {}
        with self._clock.part("statistics"), self._enough_memory():
            return {
                name: recalibrate(
                    network,
                    self.loaders,
                    self.recipe,
                    self.accelerator,
                    judge="features" if moment == "start" else "labels",
                    exported=moment == "end",
                )
                for name, network in networks.items()
            }

    def read_drift(self, network: nn.Module) -> dict[str, float]:
        """How far the statistics of a network are from the images' own and have moved; see `DriftMeter.read`."""
        with self._clock.part("statistics"):
            return on_main(self.accelerator, lambda: self._meter.read(network))

    def report_drift(self, network: nn.Module) -> DriftReport | None:
        """The whole measurement of statistics, on rank 0."""
        with self._clock.part("statistics"):
            return self._meter.report(network, self.recipe.train.batch_size)

    def _tally(self, **counted: Any) -> Tally | LabelTally:
        options = {"confusion": False, "multilabel": self.recipe.is_multilabel, **counted}
        return new_tally(self.num_classes, self.accelerator.device, **options)

    def _enough_memory(self) -> AbstractContextManager[None]:
        setting = f"evaluate.batch_size={self.recipe.evaluate.batch_size} per process"
        return enough_memory(self.accelerator.device, setting, "lower it, or data.image_size")


def _chosen(found: Mapping[str, Metrics]) -> Sequence[float] | None:
    """Thresholds of labels, once validation has chosen them."""
    return found["validation"].thresholds if found else None
