"""The pauses of a run: measure, remember the best, save, decide whether to go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from bnfinetune.diagnose.finding import Findings
from bnfinetune.training.checkpoint import (
    StateStore,
    load_state,
    load_weights,
    random_state,
    restore_random_state,
    save_export,
)
from bnfinetune.training.drift import drift_meter
from bnfinetune.training.evaluate import measure
from bnfinetune.training.folder import append_line, complete_folder, write_text
from bnfinetune.training.loop import Trainer
from bnfinetune.training.metrics import Metrics
from bnfinetune.training.mistakes import Mistake, Mistakes
from bnfinetune.training.norms import norm_config
from bnfinetune.training.page import write_page
from bnfinetune.training.recalibrate import recalibrate
from bnfinetune.training.report import environment, metrics_table, write_report
from bnfinetune.training.resume import RunFolder, create_run
from bnfinetune.training.start import on_main, start_trackers

LOWER_IS_BETTER = {"loss", "ece"}


@dataclass
class Keeper:
    """Measures and saves a run into its folder; only rank 0 writes and speaks."""

    trainer: Trainer
    run: RunFolder
    recipe_text: str
    class_names: tuple[str, ...]
    data_config: dict[str, Any]
    statistics: dict[str, Any]  # where the running statistics come from
    say: Callable[..., None]
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per evaluation
    before: dict[str, Metrics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.run.path
        self.accelerator = self.trainer.accelerator
        self.store = StateStore(self.folder, keep=self.trainer.recipe.checkpoint.keep)
        loaders = self.trainer.loaders
        self.splits = {"validation": loaders.val} | ({} if loaders.test is None else {"test": loaders.test})

    def begin(self, headline: list[str], findings: Findings) -> dict[str, Metrics]:
        """Create the folder, or load the state to go on from, and measure the network as it starts.

        Args:
            headline: What to say first.
            findings: Of the checks of the set-up, for the report.

        Returns:
            Metrics by split; for a resumed run those that were measured when it first began.
        """
        for line in (*self.run.warnings, *headline):
            self.say(line)
        on_main(self.accelerator, lambda: create_run(self.run, self.recipe_text, environment(self.accelerator)))
        start_trackers(self.accelerator, self.trainer.recipe, self.folder)
        self.findings = findings
        self.meter = drift_meter(self.trainer)
        if self.run.state is not None:
            self._resume(self.run.state)
        else:
            self.before = self._measure_all(self.trainer.evaluated)
        for name, metrics in self.before.items():
            self.say(f"before  {name} top-1 {metrics.top1:.1%}, loss {metrics.loss:.3f} ({metrics.images} images)")
        if self.run.state is None:
            self._recalibrate("start", self.trainer.networks())
        return self.before

    def pause(self, *, evaluate: bool) -> None:
        """What happens between updates: evaluate if it is time, and save."""
        if evaluate:
            self.trainer.merge_statistics()
            self._recalibrate("eval", self.trainer.networks())
            network = self.trainer.evaluated
            self._record(self._measure("validation", network), network)
        self._save_state()

    def finish(self) -> tuple[nn.Module, dict[str, Metrics]]:
        """Measure the best network and write what the run has to show.

        Returns:
            The bare network with the best weights, and its metrics by split.
        """
        if self.trainer.progress.best is None:  # no update was made, and so no pause
            self.pause(evaluate=True)
        self.accelerator.wait_for_everyone()
        network = self.trainer.evaluated
        network.load_state_dict(load_weights(complete_folder(self.folder / "best")))
        if self._recalibrate("end", {"best network": network}):
            self._export(network)
        mistakes = Mistakes() if self.trainer.recipe.run.report else None
        after = self._measure_all(network, mistakes)
        if self.accelerator.is_main_process:
            write_report(self.folder, self.trainer, self.before, after, self.history, self.class_names)
            if mistakes is not None:
                self._write_page(network, after, mistakes.worst)
            rows = [(name, when, m[name]) for name in after for when, m in (("before", self.before), ("after", after))]
            self.say(metrics_table({f"{name} {when}": metrics for name, when, metrics in rows}))
            self.say(f"best network of update {self.trainer.progress.best_update}: {self.folder / 'best'}")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return network, after

    def _export(self, network: nn.Module) -> None:
        if self.accelerator.is_main_process:
            path, norms = self.folder / "best", norm_config(self.trainer.recipe.model)
            save_export(path, network, self.class_names, self.data_config, self.recipe_text, self.statistics, norms)

    def _write_page(self, network: nn.Module, after: dict[str, Metrics], mistakes: Sequence[Mistake]) -> None:
        write_page(
            self.folder,
            self.trainer,
            self.recipe_text,
            self.class_names,
            self.data_config,
            before=self.before,
            after=after,
            history=self.history,
            mistakes=mistakes,
            drift=self.meter.report(network, self.trainer.recipe.train.batch_size),
            drift_at_start=self.meter.start,
            findings=self.findings,
        )

    def _measure_all(self, network: nn.Module, mistakes: Mistakes | None = None) -> dict[str, Metrics]:
        """Metrics by split; `mistakes` are those on the last."""
        last = list(self.splits)[-1]
        return {name: self._measure(name, network, mistakes if name == last else None) for name in self.splits}

    def _measure(self, split: str, network: nn.Module, mistakes: Mistakes | None = None) -> Metrics:
        return measure(network, self.splits[split], self.trainer.num_classes, self.accelerator, mistakes)

    def _recalibrate(self, moment: str, networks: Mapping[str, nn.Module]) -> bool:
        """Recompute the statistics of networks if the recipe asks for it at this moment."""
        trainer, section = self.trainer, self.trainer.recipe.recalibrate
        if moment not in section.at:
            return False
        for name, network in networks.items():
            exported = moment == "end"
            report = recalibrate(network, trainer.loaders, trainer.recipe, self.accelerator, exported=exported)
            if moment != "eval":
                worst = max(change.mean_shift_rms for change in report.layers.values())
                self.say(
                    f"recalibrated {len(report.layers)} BN layers of the {name} on {report.samples} {section.data} "
                    f"images; means moved by up to {worst:.2f} standard deviations (rms of a layer)"
                )
        self.statistics.update(computed="precise-BN", images=report.samples, data=section.data, at=moment)
        return True

    def _record(self, metrics: Metrics, network: nn.Module) -> None:
        """Write one evaluation down, and export the network if it is the best so far."""
        progress, better = self.trainer.progress, self._is_better(metrics)
        record = self.trainer.take_losses() | {"update": progress.update, "epoch": progress.epoch} | metrics.scalars()
        record |= on_main(self.accelerator, lambda: self.meter.read(network))
        self.history.append(record)
        if better:
            progress.best, progress.best_update, progress.stale = self._value(metrics), progress.update, 0
        else:
            progress.stale += 1
            progress.stopped = progress.stale >= (self.trainer.recipe.train.early_stop or float("inf"))
        self.accelerator.log({key: value for key, value in record.items() if value is not None}, step=progress.update)
        if self.accelerator.is_main_process:
            append_line(self.folder / "metrics.jsonl", record)
            self.say(_line(record, better))
        if better:
            self._export(network)

    def _save_state(self) -> None:
        """Save everything that going on needs; each rank contributes its random state."""
        self.trainer.merge_statistics()
        randoms = gather_object([random_state(self.accelerator.device)])
        if self.accelerator.is_main_process:
            before = {name: asdict(metrics) for name, metrics in self.before.items()}
            state = self.trainer.state() | {"random": randoms, "history": self.history, "before": before}
            self.store.save(self.trainer.progress.update, self.trainer.networks(), state, self.recipe_text)
        self.accelerator.wait_for_everyone()

    def _resume(self, state: Path) -> None:
        saved = load_state(state, self.trainer.networks())
        self.trainer.load_state(saved)
        self.history[:] = saved["history"]
        self.before = {name: Metrics(**values) for name, values in saved["before"].items()}
        rank = self.accelerator.process_index
        if len(saved["random"]) == self.accelerator.num_processes:
            restore_random_state(saved["random"][rank], self.accelerator.device)
        if self.accelerator.is_main_process:
            lines = (json.dumps(record) + "\n" for record in self.history)
            write_text(self.folder / "metrics.jsonl", "".join(lines))
        progress = self.trainer.progress
        self.say(f"resume  after update {progress.update} of {self.trainer.updates}, from {state}")

    def _value(self, metrics: Metrics) -> float:
        return metrics.scalars()[self.trainer.recipe.checkpoint.metric]

    def _is_better(self, metrics: Metrics) -> bool:
        best, value = self.trainer.progress.best, self._value(metrics)
        lower = self.trainer.recipe.checkpoint.metric in LOWER_IS_BETTER
        return best is None or (value < best if lower else value > best)


def _line(record: dict[str, Any], better: bool) -> str:
    trained = "" if record["train_loss"] is None else f"  training loss {record['train_loss']:.3f}"
    return (
        f"epoch {record['epoch']:>3}  update {record['update']:>5}{trained}  validation loss {record['loss']:.3f}"
        f"  top-1 {record['top1']:.1%}{'  best' if better else ''}"
    )
