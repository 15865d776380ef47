"""The end of a run: its best network, with the statistics that the recipe asks for, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from bnfinetune.diagnose.drift_report import DriftReport
from bnfinetune.errors import TrainingError
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.launch import on_main
from bnfinetune.training.measuring.measurer import Measurer
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.measuring.mistakes import Mistakes
from bnfinetune.training.measuring.outcomes import Outcomes
from bnfinetune.training.record import Record
from bnfinetune.training.reporting.lines import told
from bnfinetune.training.saving.atomic import complete_folder
from bnfinetune.training.saving.run_folder import RunFolder
from bnfinetune.training.saving.timm_folder import load_weights


class Best(NamedTuple):
    """The best network of a run.

    Attributes:
        network: The bare network with its weights.
        after: Its metrics by split.
        mistakes: The worst on the last split; None where `run.report` is off.
        drift: Its statistics against images; None without BN.
        drift_at_start: What `DriftMeter.read` gave before training.
        outcomes: What becomes of every image, by split.
    """

    network: nn.Module
    after: dict[str, Metrics]
    mistakes: Mistakes | None
    drift: DriftReport | None
    drift_at_start: Mapping[str, float]
    outcomes: Mapping[str, Outcomes]


def measure_best(
    setup: Assembly, folder: RunFolder, record: Record, measurer: Measurer, say: Callable[[str], None]
) -> Best:
    """Load the best network, compute its statistics anew if the recipe asks for it, and measure it.

    Raises:
        TrainingError: No network that was evaluated gave finite numbers.
    """
    trainer, recipe = setup.trainer, setup.trainer.recipe
    if trainer.progress.best is None:
        raise TrainingError(
            "no network that was evaluated has a finite validation loss and finite statistics, so none is the best: "
            "look at the weights it starts from (model.checkpoint), the data, and optim.lr"
        )
    network = trainer.evaluated
    network.load_state_dict(on_main(trainer.accelerator, lambda: load_weights(complete_folder(folder.best))))
    reports = measurer.recalibrate("end", {"best network": network})
    record.note_recalibration(reports.values(), recipe.recalibrate.data, "end")
    for line in told(reports, recipe.recalibrate.data):
        say(line)
    if reports:
        # scores have changed, by which thresholds of labels are chosen
        cuts = measurer.measure(network, trainer.loaders.val).thresholds if recipe.is_multilabel else ()
        if trainer.accelerator.is_main_process:
            setup.export(network, folder, record.statistics, cuts)
    mistakes = Mistakes() if recipe.run.report else None
    after, outcomes = measurer.measure_final(network, mistakes)
    drift = measurer.report_drift(network) if mistakes is not None else None
    return Best(network, after, mistakes, drift, measurer.drift_at_start, outcomes)
