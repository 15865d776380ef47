"""One fine-tuning run, from a recipe to a folder with the best network and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from bnfinetune.recipe import Recipe
from bnfinetune.recipe_files import dump_recipe, load_recipe
from bnfinetune.training.assembly import assemble, judge
from bnfinetune.training.averages import try_average
from bnfinetune.training.beginning import begin
from bnfinetune.training.ending import measure_best
from bnfinetune.training.failures import SharedFailures
from bnfinetune.training.launch import (
    as_it_was,
    check_trackers,
    keep_freed_memory,
    launcher_notes,
    on_main,
    seed_ranks,
    start_accelerator,
    start_trackers,
)
from bnfinetune.training.loop.memory import enough_memory
from bnfinetune.training.measuring.measurer import Measurer
from bnfinetune.training.measuring.metrics import Metrics
from bnfinetune.training.network.optim import with_rate
from bnfinetune.training.pauses import Pauses
from bnfinetune.training.probe.features import features_or_images
from bnfinetune.training.reporting.headline import checked, headline
from bnfinetune.training.reporting.lines import LOG, Lines, shown_progress
from bnfinetune.training.reporting.summary import environment, write_report
from bnfinetune.training.saving.lock import RunLock
from bnfinetune.training.saving.resume import choose_run, with_saved_choices
from bnfinetune.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class RunResult:
    """What a run gave. `before` and `after` map `validation`, and `test` where there is one, to metrics."""

    folder: Path
    recipe: Recipe
    before: dict[str, Metrics]
    after: dict[str, Metrics]
    model: nn.Module = field(repr=False)  # the bare network with the best weights
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)


def finetune(recipe: str | Mapping[str, Any] | Recipe, /, **overrides: Any) -> RunResult:
    """Fine-tune as `bnfinetune recipe=... [overrides]` does; the process is left as it was.

    Args:
        recipe: The name of a shipped recipe, the path of a YAML file, a nested mapping, or a `Recipe`.
        overrides: Values that differ, under dotted keys (`**{"optim.lr": 1e-3}`) or as nested mappings (`optim={...}`).

    Returns:
        The measured accuracies, the run folder and the network.

    Raises:
        BnFinetuneError: One of its children, with one line that names the key or file and the remedy.
    """
    return train(load_recipe(recipe, overrides))


def train(recipe: Recipe, began: float | None = None) -> RunResult:
    """Run a complete recipe; `finetune` is the same for names and overrides.

    Args:
        recipe: The recipe.
        began: When the process began, as `time.time` counts, where the run is all that it does.

    Raises:
        BnFinetuneError: As `finetune`.
        SystemExit: SIGTERM came during training, with code 143, after a state was saved.
        KeyboardInterrupt: Ctrl-C came; during training, after a state was saved.
    """
    clock = Stopwatch(began)
    if began is not None:
        keep_freed_memory()
    minutes = recipe.train.timeout_minutes
    check_trackers(recipe.run.tracking)
    accelerator = start_accelerator(recipe.train.mixed_precision, minutes, trains=True)
    recipe = _settled(recipe, accelerator)
    setting = f"train.batch_size={recipe.train.batch_size}, evaluate.batch_size={recipe.evaluate.batch_size}"
    with (
        as_it_was(),
        RunLock() as lock,
        closing(Lines(speaks=accelerator.is_main_process)) as say,
        SharedFailures(minutes),
        enough_memory(accelerator.device, setting, "lower them"),
    ):
        return _train(recipe, accelerator, lock, say, clock)


def _train(recipe: Recipe, accelerator: Accelerator, lock: RunLock, say: Lines, clock: Stopwatch) -> RunResult:
    with clock.part("set_up"):
        folder = choose_run(recipe, accelerator, lock)
        setup = assemble(recipe, accelerator, say, clock)
    trainer = setup.trainer
    seed_ranks(recipe.run, accelerator.process_index)
    with closing(trainer.loaders):
        with clock.part("set_up"):
            findings = judge(trainer)
            for line in (*folder.notes, *launcher_notes(recipe), *headline(setup), *checked(findings)):
                say(line)
            on_main(accelerator, lambda: folder.create(dump_recipe(recipe), environment(accelerator), lock))
            start_trackers(accelerator, recipe, folder.path)

        measurer = Measurer(trainer)
        record = begin(setup, folder, measurer, say)
        say.write_to(folder.path / LOG)  # not before: a state that is refused leaves its run as it was
        with (
            features_or_images(trainer, record.statistics["fingerprint"], say) as (images, validation),
            shown_progress(recipe, trainer.updates, trainer.progress.update, say, accelerator.log) as show,
        ):
            pauses = Pauses(setup, folder, record, measurer, validation, findings, say)
            trainer.fit(pauses, images, show)
        try_average(setup, folder, record, measurer, say)
        best = measure_best(setup, folder, record, measurer, say)
        pauses.list_unreadable()
        write_report(setup, folder, record, best, findings, say)
        for tracker in accelerator.trackers:
            tracker.finish()
    return RunResult(folder.path, recipe, record.before, best.after, best.network, record.history)


def _settled(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with what it leaves to the launcher, as the run will go by it."""
    train = recipe.train.model_copy(update={"mixed_precision": accelerator.mixed_precision})
    recipe = with_saved_choices(recipe.model_copy(update={"train": train}), accelerator)
    return with_rate(recipe, accelerator.num_processes)
