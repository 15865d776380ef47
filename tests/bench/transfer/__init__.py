"""Real transfer: recipes and other people's trainers on real images, from ImageNet weights.

Tasks x backbones x batch sizes x seeds x ways to fine-tune, each run measured once on its test images. A run that is
recorded is not made again, so the bench may be stopped at any time and go on another day, or in several processes, each
with a part of the grid.

    python -m tests.bench transfer --tasks FOLDER [FOLDER ...] [--ways full "freeze_bn optim.lr=1e-3" ...]

A task is a folder with `train`, `val` and `test`, each of class folders; any will do. Ours are `clothing`
(the public repository alexeygrigorev/clothing-dataset-small, folder `train`: per class, its sorted paths shuffled by
`random.Random(1)`, of which 25 train, 15 validate and 60 test), `sketch` and `cartoon` (PACS, Li et al. 2017: 30, 20
and at most 80), all with a shorter side of at most 160 pixels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from tests.bench.pages import DOCS, draw_plots, put_table
from tests.bench.results import FOLDER, record, recorded
from tests.bench.transfer.backbones import BACKBONES, backbone_folder
from tests.bench.transfer.tables import tables
from tests.bench.transfer.ways import Cell, run

WAYS = (
    *("auto", "full", "freeze_bn", "freeze_stats", "precise_bn", "precise_then_freeze", "bn_only", "lp_ft"),
    *("full optim.lr=1.06e-4", "freeze_bn optim.lr=3e-4", "precise_then_freeze optim.lr=3e-4"),  # at batches of 2
    *("linear_probe", "freeze_tail", "stoch_norm", "plain PyTorch", "HF Trainer", "timm train.py"),
    "HF Trainer lr=1.06e-4",
)
FEW = (
    *("freeze_bn data.train_samples=50", "lp_ft data.train_samples=50"),
    *("bn_only data.train_samples=50 optim.lr=1e-2", "linear_probe data.train_samples=50 optim.lr=1e-2"),
)
BATCHES = (16, 2)
BENCH = "transfer"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench transfer", description=__doc__)
    parser.add_argument("--tasks", nargs="+", type=Path, required=True, help="folders with train, val and test")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="recipes with changes, or peers")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--timm", type=Path, help="timm's train.py, from its repository")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnfinetune-transfer")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = [cell for cell in _grid(options) if not _known(cell)]
    for cell in (bar := tqdm(cells, unit="run")):
        bar.set_postfix_str(f"{cell.way}, {cell.place}, seed {cell.seed}")
        if not _known(cell):  # another process may have made it meanwhile
            _keep(cell, run(cell, options.timm))
    print(table := tables(BATCHES, WAYS, FEW))
    what = "Top-1 on the test images in %: mean of the seeds, lowest and highest; 8 epochs of AdamW, 128 px"
    put_table(DOCS / "transfer.md", FOLDER / f"{BENCH}.json", table, what)
    draw_plots()


def _grid(options: argparse.Namespace) -> Iterator[Cell]:
    """Every run, whole rounds of ways before the next seed, so that comparisons are paired early."""
    folders = [backbone_folder(name, options.work) for name in options.backbones]
    for seed, batch, folder, task, way in product(options.seeds, options.batches, folders, options.tasks, options.ways):
        yield Cell(task.resolve(), folder, way, batch, seed)


def _known(cell: Cell) -> bool:
    return str(cell.seed) in recorded(BENCH).get(cell.place, {}).get("ways", {}).get(cell.way, {})


def _keep(cell: Cell, found: dict[str, float]) -> None:
    ways = recorded(BENCH).get(cell.place, {}).get("ways", {})
    record(BENCH, cell.place, {"ways": {**ways, cell.way: {**ways.get(cell.way, {}), str(cell.seed): found}}})
