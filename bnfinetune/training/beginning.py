"""The beginning of a run: the network measured as it starts, or the state that it goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from bnfinetune.errors import BnFinetuneError, CheckpointError
from bnfinetune.training.assembly import Assembly
from bnfinetune.training.data.seeding import derive_seed
from bnfinetune.training.launch import on_main
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.measuring.measurer import Measurer
from bnfinetune.training.probe.head_fit import fit_trainer_head
from bnfinetune.training.record import Record
from bnfinetune.training.reporting.lines import told
from bnfinetune.training.saving.atomic import write_text
from bnfinetune.training.saving.run_folder import METRICS, UNREADABLE, RunFolder
from bnfinetune.training.saving.states import (
    describe_state,
    load_networks,
    read_state,
    restore_random_state,
    restore_rank_statistics,
)


def begin(setup: Assembly, folder: RunFolder, measurer: Measurer, say: Callable[[str], None]) -> Record:
    """Measure the network as it starts and fit its head if asked for, or bring back the state to go on from.

    Returns:
        What is known of the run, with the metrics from before its first update.

    Raises:
        CheckpointError: The state cannot be read, or is of other images or another network.
    """
    trainer, recipe = setup.trainer, setup.trainer.recipe
    splits = setup.splits
    source = {"source": recipe.data.source, "fingerprint": splits.fingerprint(), "levels": dict(splits.levels)}
    record = Record({"computed": "as stored and trained", **source}, dict.fromkeys(setup.splits.skipped))
    if folder.state is not None:
        _go_on(trainer, folder, folder.state, record)
        say(f"resume  after update {trainer.progress.update} of {trainer.updates}, from {folder.state}")
    else:
        record.before = measurer.measure_start(trainer.evaluated)
    for name, metrics in record.before.items():
        say(f"before  {name} {metrics.headline}, loss {metrics.loss:.3f} ({metrics.images} images)")
    if folder.state is None:
        reports = measurer.recalibrate("start", trainer.networks())
        record.note_recalibration(reports.values(), recipe.recalibrate.data, "start")
        for line in told(reports, recipe.recalibrate.data):
            say(line)
        if recipe.model.head == "fitted":
            fit_trainer_head(trainer, say)
    return record


def _go_on(trainer: Trainer, folder: RunFolder, state: Path, record: Record) -> None:
    """Rank 0 reads, and hands over to the others: they need not see its disk."""
    accelerator, networks = trainer.accelerator, trainer.networks()
    _check_data(trainer, state, on_main(accelerator, lambda: describe_state(state))["fingerprint"], record)
    saved = on_main(accelerator, lambda: read_state(state, networks))
    load_networks(state, saved, networks)
    try:
        _take_over(trainer, record, saved)
    except BnFinetuneError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{state} cannot be resumed: it is no state of such a run ({error!r})") from error
    record.unreadable = dict.fromkeys(on_main(accelerator, lambda: _write_back(folder, record))) | record.unreadable
    if folder.altered:
        trainer.progress.best = None  # the best network on disk may be one that this run will not come by


def _write_back(folder: RunFolder, record: Record) -> list[str]:
    """Let the list of evaluations end where the state does; the images that were left out before."""
    write_text(folder.path / METRICS, "".join(json.dumps(entry) + "\n" for entry in record.history))
    listed = folder.path / UNREADABLE
    return listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []


def _take_over(trainer: Trainer, record: Record, saved: dict[str, Any]) -> None:
    """Go back to what was saved beside the weights."""
    trainer.load_state(saved)
    record.load_state(saved)
    rank, device = trainer.accelerator.process_index, trainer.accelerator.device
    if len(saved["ranks"]) == trainer.accelerator.num_processes:
        mine = saved["ranks"][rank]
        restore_random_state(mine["random"], device)
        if mine["statistics"]:
            restore_rank_statistics(trainer.networks(), mine["statistics"])
    else:  # other draws than those at the beginning of the run
        set_seed(derive_seed(trainer.recipe.run.seed, trainer.progress.update) % 2**31 + rank)


def _check_data(trainer: Trainer, state: Path, fingerprint: str, record: Record) -> None:
    """Refuse images that are not those of the saved run."""
    same = fingerprint == record.statistics["fingerprint"]
    if not same and "data.source" not in trainer.recipe.train.resume_allow:
        raise CheckpointError(
            f"train.resume: {trainer.recipe.data.source} no longer holds the images that {state} was trained on; bring "
            "them back, or set train.resume_allow=[data.source]"
        )
