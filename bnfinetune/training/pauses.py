"""What happens between updates: measure, remember the best, save, decide whether to go on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from bnfinetune.bn.layers import is_bn_layer
from bnfinetune.diagnose.finding import Findings
from bnfinetune.recipe_files import dump_recipe
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.averages import candidates
from bnfinetune.training.data.loaders import EvalLoader
from bnfinetune.training.ending import Best
from bnfinetune.training.launch import GlobalBatch, on_main
from bnfinetune.training.measuring.collapse import CollapseWatch
from bnfinetune.training.measuring.measurer import Measurer
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.record import Record
from bnfinetune.training.reporting.report_page import write_page
from bnfinetune.training.saving.atomic import append_line, in_words, write_text
from bnfinetune.training.saving.run_folder import METRICS, UNREADABLE, RunFolder
from bnfinetune.training.saving.snapshots import SnapshotStore
from bnfinetune.training.saving.states import StateStore, random_state, rank_statistics


@dataclass
class Pauses:
    """Called by the loop between updates; only rank 0 writes and speaks."""

    setup: Assembly
    folder: RunFolder
    record: Record
    measurer: Measurer
    validation: EvalLoader  # or the features of its images
    findings: Findings
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.trainer, self.accelerator = self.setup.trainer, self.setup.trainer.accelerator
        self.store = StateStore(self.folder.path, keep=self.trainer.recipe.checkpoint.keep)
        going_on = self.folder.state is not None
        self.saved_update = self.trainer.progress.update if going_on else None  # of the newest state
        self.told_skipped = self.trainer.progress.skipped
        self.best: Metrics | None = None  # since this start of the run
        self.collapse = CollapseWatch(self.trainer.recipe, self.setup.splits.class_names)
        self.page_at, self.page_cost = time.monotonic(), 0.0  # of the last page, in seconds

    def __call__(self, *, evaluate: bool) -> None:
        """Evaluate if it is time, and save.

        While updates are skipped, only what was asked for is saved: the weights are those from before, and states from
        before keep their places.
        """
        if evaluate:
            self.evaluate()
        progress, asked = self.trainer.progress, self.trainer.asked
        if any(asked) or not progress.skipped_in_row:
            with self.trainer.clock.part("saving"):
                self.save()
        if asked.end_by:
            name = signal.Signals(asked.end_by).name
            self.say(
                f"{name}: saved after update {progress.update}; go on with train.resume=auto run.dir={self.folder.path}"
            )

    def evaluate(self) -> None:
        """Measure the network, and export it if it is the best so far."""
        trainer, recipe = self.trainer, self.trainer.recipe
        with trainer.clock.part("statistics"):
            trainer.merge_statistics()
        reports = self.measurer.recalibrate("eval", trainer.networks())
        self.record.note_recalibration(reports.values(), recipe.recalibrate.data, "eval")
        network = trainer.evaluated
        metrics = self.measurer.measure(network, self.validation, confusion=True)
        better = self._compare(network, metrics)
        self._note(network, metrics, better)
        self.list_unreadable()
        with self.trainer.clock.part("saving"):
            if better and self.accelerator.is_main_process:
                self.setup.export(network, self.folder, self.record.statistics, metrics.thresholds)
            self._keep_for_average(network)
        self.best = metrics if better else self.best
        self._write_page(network, self.best or metrics)

    def _compare(self, network: nn.Module, metrics: Metrics) -> bool:
        """Whether a network is the best so far; one that holds a value which is not finite never is."""
        progress, recipe = self.trainer.progress, self.trainer.recipe
        value = metrics.scalars()[recipe.best_metric]
        better = progress.take_score(recipe.best_metric, value, metrics.loss, sound=_is_finite(network))
        progress.stopped = progress.stale >= (recipe.train.early_stop or float("inf"))
        return better

    def _note(self, network: nn.Module, metrics: Metrics, better: bool) -> None:
        """Write an evaluation down, for trackers, files and readers."""
        progress = self.trainer.progress
        record = self.trainer.take_losses() | {"update": progress.update, "epoch": progress.epoch} | metrics.scalars()
        record |= self.measurer.read_drift(network)
        self.record.history.append(record)
        self.accelerator.log({key: value for key, value in record.items() if value is not None}, step=progress.update)
        if self.accelerator.is_main_process:
            path = self.folder.path / METRICS
            with in_words(f"{path}"):
                append_line(path, record)
        self.say(_line(record, metrics.headline, better))
        if collapsed := self.collapse.look(metrics, progress.update, record["train_loss"]):
            self.say(collapsed)
        if progress.skipped > self.told_skipped:
            self.say(f"skipped {progress.skipped - self.told_skipped} updates: loss or gradient was not finite")
        self.told_skipped = progress.skipped

    def _keep_for_average(self, network: nn.Module) -> None:
        """Keep a network that may become a part of the average at the end, in place of one that no longer can."""
        update, wanted = self.trainer.progress.update, candidates(self.record.history, self.trainer.recipe)
        if update in wanted and self.accelerator.is_main_process:
            store = SnapshotStore(self.folder.path)
            store.save(update, network)
            store.keep_only(wanted)

    def _write_page(self, network: nn.Module, metrics: Metrics) -> None:
        """Let the run be looked at as it goes on, as often as it says a line, in a hundredth of its time."""
        run, begin = self.trainer.recipe.run, time.monotonic()
        soon = begin - self.page_at < max(run.log_every, 100 * self.page_cost)
        if not (run.report and self.accelerator.is_main_process) or soon:
            return
        so_far = Best(network, {"validation": metrics}, None, None, self.measurer.drift_at_start, {})
        with self.trainer.clock.part("page"), in_words(f"the report in {self.folder.path}"):
            write_page(self.setup, self.folder, self.record, so_far, self.findings)
        self.page_at = time.monotonic()
        self.page_cost = self.page_at - begin

    def list_unreadable(self) -> None:
        """Write down the images that were left out, over all ranks and starts of the run."""
        if self.trainer.recipe.data.on_error != "skip":
            return
        unreadable = self.record.unreadable
        known = len(unreadable)
        unreadable.update(dict.fromkeys(gather_object(self.trainer.loaders.skipped)))
        path = self.folder.path / UNREADABLE
        if self.accelerator.is_main_process and unreadable and (len(unreadable) > known or not path.exists()):
            with in_words(str(path)):
                write_text(path, "".join(f"{line}\n" for line in unreadable))

    def save(self) -> None:
        """Save everything that going on needs; each rank contributes its random state and its own statistics."""
        trainer, update = self.trainer, self.trainer.progress.update
        if self.saved_update == update:
            return
        networks = trainer.networks()
        mine = {"random": random_state(self.accelerator.device), "statistics": {}}
        if self.accelerator.num_processes > 1:
            mine["statistics"] = rank_statistics(networks)
        ranks = gather_object([mine])
        state = trainer.state() | self.record.state() | {"ranks": ranks}
        batch = GlobalBatch.of(trainer.recipe, len(ranks))
        about = {
            "update": update,
            "epoch": trainer.progress.epoch,
            "ranks": batch.ranks,
            "batch_size": batch.size,
            "grad_accum": batch.accumulated,
            "fingerprint": self.record.statistics["fingerprint"],
        }
        with trainer.merged_statistics():
            on_main(
                self.accelerator, lambda: self.store.save(update, networks, state, dump_recipe(trainer.recipe), about)
            )
        self.saved_update = update


def _is_finite(network: nn.Module) -> bool:
    """Whether all weights and BN statistics of a network are finite numbers."""
    layers = filter(is_bn_layer, network.modules())
    statistics = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    return all(bool(tensor.isfinite().all()) for tensor in (*network.parameters(), *statistics))


def _line(record: dict[str, Any], headline: str, better: bool) -> str:
    trained = "" if record["train_loss"] is None else f"  training loss {record['train_loss']:.3f}"
    return (
        f"epoch {record['epoch']:>3}  update {record['update']:>5}{trained}  validation loss {record['loss']:.3f}"
        f"  {headline}{'  best' if better else ''}"
    )
