"""The pauses of a run: measure, remember the best, save, decide whether to go on."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object, set_seed
from torch import nn

from bnfinetune.diagnose.finding import Findings
from bnfinetune.errors import BnFinetuneError, CheckpointError
from bnfinetune.training.data.seeding import derive_seed
from bnfinetune.training.launch import on_main, start_trackers
from bnfinetune.training.loop.memory import enough_memory
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.drift_meter import drift_meter
from bnfinetune.training.measuring.measure import adapted, measure
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.measuring.mistakes import Mistake, Mistakes
from bnfinetune.training.measuring.recalibrate import recalibrate
from bnfinetune.training.network.norms import norm_config
from bnfinetune.training.reporting.report_page import write_page
from bnfinetune.training.reporting.summary import environment, metrics_table, write_report
from bnfinetune.training.saving.atomic import METRICS, UNREADABLE, append_line, complete_folder, in_words, write_text
from bnfinetune.training.saving.lock import RunLock
from bnfinetune.training.saving.resume import RunFolder, create_run
from bnfinetune.training.saving.states import (
    StateStore,
    describe_state,
    load_state,
    load_weights,
    random_state,
    rank_statistics,
    restore_random_state,
    restore_rank_statistics,
    save_export,
)

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
    lock: RunLock
    unreadable: dict[str, None]  # images left out so far by data.on_error=skip, with the reason
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per evaluation
    before: dict[str, Metrics] = field(default_factory=dict)
    saved_update: int | None = None  # of the newest state
    told_skipped: int = 0  # updates

    def __post_init__(self) -> None:
        self.folder = self.run.path
        self.accelerator = self.trainer.accelerator
        self.store = StateStore(self.folder, keep=self.trainer.recipe.checkpoint.keep)
        self.loaders = loaders = self.trainer.loaders
        self.splits = {"validation": loaders.val} | ({} if loaders.test is None else {"test": loaders.test})

    def begin(self, headline: list[str], findings: Findings) -> dict[str, Metrics]:
        """Create the folder, or load the state to go on from, and measure the network as it starts.

        Args:
            headline: What to say first.
            findings: Of the checks of the set-up, for the report.

        Returns:
            Metrics by split; for a resumed run those that were measured when it first began.
        """
        for line in (*self.run.notes, *headline):
            self.say(line)
        about = environment(self.accelerator)
        on_main(self.accelerator, lambda: create_run(self.run, self.recipe_text, about, self.lock))
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
        """What happens between updates: evaluate if it is time, and save.

        While updates are skipped, only what was asked for is saved: the weights are those from before, and states from
        before keep their places.
        """
        if evaluate:
            self.trainer.merge_statistics()
            self._recalibrate("eval", self.trainer.networks())
            network = self.trainer.evaluated
            self._record(self._measure("validation", network), network)
        progress, asked = self.trainer.progress, self.trainer.asked
        if any(asked) or not progress.skipped_in_row:
            self._save_state()
        if asked.end_by:
            name = signal.Signals(asked.end_by).name
            self.say(
                f"{name}: saved after update {progress.update}; go on with train.resume=auto run.dir={self.folder}"
            )

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
        after = self._measure_all(network, mistakes, adapt=True)
        self._list_unreadable()
        if self.accelerator.is_main_process:
            with in_words(f"the report in {self.folder}"):
                write_report(self.folder, self.trainer, self.before, after, self.history, self.class_names)
                if mistakes is not None:
                    self._write_page(network, after, mistakes.worst)
            rows = [(name, when, m[name]) for name in after for when, m in (("before", self.before), ("after", after))]
            self.say(metrics_table({f"{name} {when}": metrics for name, when, metrics in rows}))
            if self.unreadable:
                self.say(f"{len(self.unreadable)} unreadable images were left out: {self.folder / UNREADABLE}")
            self.say(f"best network of update {self.trainer.progress.best_update}: {self.folder / 'best'}")
            if mistakes is not None:
                self.say(f"a page to look at: {self.folder / 'report.html'}")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return network, after

    def _export(self, network: nn.Module) -> None:
        if self.accelerator.is_main_process:
            path, norms = self.folder / "best", norm_config(self.trainer.recipe.model)
            source = self.statistics | {"update": self.trainer.progress.best_update}
            save_export(path, network, self.class_names, self.data_config, self.recipe_text, source, norms)

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

    def _measure_all(
        self, network: nn.Module, mistakes: Mistakes | None = None, *, adapt: bool = False
    ) -> dict[str, Metrics]:
        """Metrics by split, adapted to each as `evaluate.adapt` says, or not; `mistakes` are those on the last."""
        last, targets = list(self.splits)[-1], self.trainer.loaders.targets
        return {
            name: self._measure(
                name,
                adapted(network, self.trainer.recipe, targets[name]) if adapt else network,
                mistakes if name == last else None,
            )
            for name in self.splits
        }

    def _measure(self, split: str, network: nn.Module, mistakes: Mistakes | None = None) -> Metrics:
        with self._enough_memory():
            return measure(network, self.splits[split], self.trainer.num_classes, self.accelerator, mistakes)

    def _enough_memory(self) -> AbstractContextManager[None]:
        setting = f"evaluate.batch_size={self.trainer.recipe.evaluate.batch_size} per process"
        return enough_memory(self.accelerator.device, setting, "lower it, or data.image_size")

    def _recalibrate(self, moment: str, networks: Mapping[str, nn.Module]) -> bool:
        """Recompute the statistics of networks if the recipe asks for it at this moment."""
        trainer, section = self.trainer, self.trainer.recipe.recalibrate
        if moment not in section.at:
            return False
        for name, network in networks.items():
            exported = moment == "end"
            with self._enough_memory():
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
            with in_words(f"{self.folder / METRICS}"):
                append_line(self.folder / METRICS, record)
            self.say(_line(record, better))
            if progress.skipped > self.told_skipped:
                self.say(f"skipped {progress.skipped - self.told_skipped} updates: loss or gradient was not finite")
            self.told_skipped = progress.skipped
        self._list_unreadable()
        if better:
            self._export(network)

    def _list_unreadable(self) -> None:
        """Write down the images that were left out, over all ranks and starts of the run."""
        if self.trainer.recipe.data.on_error != "skip":
            return
        known = len(self.unreadable)
        self.unreadable.update(dict.fromkeys(gather_object(self.loaders.skipped)))
        path = self.folder / UNREADABLE
        if self.accelerator.is_main_process and self.unreadable and (len(self.unreadable) > known or not path.exists()):
            with in_words(str(path)):
                write_text(path, "".join(f"{line}\n" for line in self.unreadable))

    def _save_state(self) -> None:
        """Save everything that going on needs; each rank contributes its random state and its own statistics."""
        trainer, recipe = self.trainer, self.trainer.recipe
        if self.saved_update == trainer.progress.update:
            return
        networks = trainer.networks()
        mine = {"random": random_state(self.accelerator.device), "statistics": {}}
        if self.accelerator.num_processes > 1:
            mine["statistics"] = rank_statistics(networks)
        ranks = gather_object([mine])
        state = trainer.state() | {
            "ranks": ranks,
            "history": self.history,
            "before": {name: asdict(metrics) for name, metrics in self.before.items()},
            "source": self.statistics,
        }
        about = {
            "update": trainer.progress.update,
            "epoch": trainer.progress.epoch,
            "ranks": len(ranks),
            "batch_size": recipe.train.batch_size,
            "grad_accum": recipe.train.grad_accum,
            "fingerprint": self.statistics["fingerprint"],
        }
        with trainer.merged_statistics():
            on_main(
                self.accelerator,
                lambda: self.store.save(trainer.progress.update, networks, state, self.recipe_text, about),
            )
        self.saved_update = trainer.progress.update

    def _resume(self, state: Path) -> None:
        self._check_data(state)
        saved = load_state(state, self.trainer.networks())
        try:
            self._take_over(saved)
        except BnFinetuneError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{state} cannot be resumed: it is no state of such a run ({error!r})") from error
        progress = self.trainer.progress
        if self.accelerator.is_main_process:
            lines = (json.dumps(record) + "\n" for record in self.history)
            write_text(self.folder / METRICS, "".join(lines))
        if (listed := self.folder / UNREADABLE).is_file():
            self.unreadable = dict.fromkeys(listed.read_text(encoding="utf-8").splitlines()) | self.unreadable
        self.say(f"resume  after update {progress.update} of {self.trainer.updates}, from {state}")

    def _take_over(self, saved: dict[str, Any]) -> None:
        """Go back to what was saved beside the weights."""
        trainer, device = self.trainer, self.accelerator.device
        trainer.load_state(saved)
        progress = trainer.progress
        self.saved_update, self.told_skipped = progress.update, progress.skipped
        self.history[:] = saved["history"]
        self.statistics = {**saved["source"], "fingerprint": self.statistics["fingerprint"]}
        self.before = {name: Metrics(**values) for name, values in saved["before"].items()}
        if len(saved["ranks"]) == self.accelerator.num_processes:
            mine = saved["ranks"][self.accelerator.process_index]
            restore_random_state(mine["random"], device)
            if mine["statistics"]:
                restore_rank_statistics(trainer.networks(), mine["statistics"])
        else:  # other draws than those at the beginning of the run
            set_seed(derive_seed(trainer.recipe.run.seed, progress.update) % 2**31, device_specific=True)
        if self.run.altered:
            progress.best = None  # the best network on disk may be one that this run will not come by

    def _check_data(self, state: Path) -> None:
        """Refuse images that are not those of the saved run."""
        same = describe_state(state)["fingerprint"] == self.statistics["fingerprint"]
        if not same and "data.source" not in self.trainer.recipe.train.resume_allow:
            raise CheckpointError(
                f"train.resume: {self.trainer.recipe.data.source} no longer holds the images that {state} was trained "
                "on; bring them back, or set train.resume_allow=[data.source]"
            )

    def _value(self, metrics: Metrics) -> float:
        return metrics.scalars()[self.trainer.recipe.checkpoint.metric]

    def _is_better(self, metrics: Metrics) -> bool:
        best, value = self.trainer.progress.best, self._value(metrics)
        lower = self.trainer.recipe.checkpoint.metric in LOWER_IS_BETTER
        return best is None or math.isnan(best) or (value < best if lower else value > best)


def _line(record: dict[str, Any], better: bool) -> str:
    trained = "" if record["train_loss"] is None else f"  training loss {record['train_loss']:.3f}"
    return (
        f"epoch {record['epoch']:>3}  update {record['update']:>5}{trained}  validation loss {record['loss']:.3f}"
        f"  top-1 {record['top1']:.1%}{'  best' if better else ''}"
    )
