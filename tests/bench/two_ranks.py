"""Two gloo processes against one: images per second, and what each sends per update."""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from tests.bench.folders import write_jpegs
from tests.bench.results import record
from tests.bench.trainers import fit, trainer_of


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench two_ranks", description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["full", "freeze_bn", "sync_bn"])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=96, help="side of the network's input")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder / "images", train=64, val=4, size=128)
        for recipe in options.recipes:
            rows.append(measure(recipe, options, folder))
            print(rows[-1], flush=True)
    what = f"{options.model} at {options.size} px, batches of 16 per process, one thread each"
    print(what)
    if options.record:
        record("two_ranks", what, {"rows": rows, "rounds": options.rounds})


def measure(recipe: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One process and a pair of them, all started and warm, run in turn."""
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    groups = {ranks: _start(ranks, recipe, vars(options), folder) for ranks in found}
    for number in range(options.rounds):
        for ranks in list(found)[:: -1 if number % 2 else 1]:
            processes, turns, results = groups[ranks]
            for turn in turns:
                turn.put("run")
            found[ranks].append(_result(processes, results))
    for processes, turns, _ in groups.values():
        for turn in turns:
            turn.put("end")
        while not processes.join():
            pass
    rates = {ranks: [run["rate"] for run in runs] for ranks, runs in found.items()}
    low, _, high = statistics.quantiles([two / one for one, two in zip(rates[1], rates[2], strict=True)], n=4)
    return {
        "name": recipe,
        "one, images/s": round(statistics.median(rates[1]), 1),
        "two, images/s": round(statistics.median(rates[2]), 1),
        "speed-up": statistics.median(rates[2]) / statistics.median(rates[1]),
        "spread": [low, high],
        "MB per update": round(found[2][0]["bytes"] / 1e6, 2),
    }


def _start(ranks: int, recipe: str, options: dict[str, Any], folder: Path) -> tuple[Any, list[Any], Any]:
    """A group of processes, once they are warm, with a queue for the turns of each and one for what rank 0 finds."""
    context = mp.get_context("spawn")
    turns, results = [context.Queue() for _ in range(ranks)], context.Queue()
    arguments = (ranks, _free_port(), recipe, options, folder, turns, results)
    processes = mp.spawn(_run_rank, arguments, nprocs=ranks, join=False)
    _result(processes, results)
    return processes, turns, results


def _result(processes: Any, results: Any) -> Any:
    """The next thing that rank 0 finds; a rank that fails raises here what it failed with."""
    while results.empty():
        processes.join(timeout=0.2)
    return results.get()


def _run_rank(
    rank: int, ranks: int, port: int, recipe: str, options: dict[str, Any], folder: Path, turns: Any, results: Any
) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
    trainer = trainer_of(
        recipe,
        **{
            "model.name": options["model"],
            "model.pretrained": False,
            "data.source": str(folder / "images"),
            "data.image_size": options["size"],
            "data.workers": 0,
            "train.batch_size": 16,
            "train.steps": options["updates"],
        },
    )
    sent = [0]
    if isinstance(trainer.forward, DistributedDataParallel):

        def counting(_, bucket):  # DDP checks annotations, and knows no postponed ones
            sent[0] += bucket.buffer().nbytes
            return allreduce_hook(torch.distributed.group.WORLD, bucket)

        trainer.forward.register_comm_hook(None, counting)
    fit(trainer)  # decodes the images
    if rank == 0:
        results.put("warm")
    while turns[rank].get() != "end":
        sent[0] = 0
        begin = time.perf_counter()
        fit(trainer)
        seconds = time.perf_counter() - begin
        if rank == 0:
            results.put({"rate": trainer.progress.images / seconds, "bytes": sent[0] / options["updates"]})
    if ranks > 1:
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
