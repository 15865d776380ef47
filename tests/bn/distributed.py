"""Runs a function as real gloo ranks, each a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(ranks: int, function: Callable[..., Any], tmp_path: Path, *args: Any) -> list[Any]:
    """Runs `function(rank, *args)` on every rank and gives back what each returned, in rank order."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # The server imports once what every rank needs and is forked from then on: fresh processes without the wait.
    multiprocessing.set_forkserver_preload(
        ["torch", "timm", "accelerate", "bnfinetune.bn.statistics.ranks", function.__module__]
    )
    mp.start_processes(_rank_main, (ranks, port, function, tmp_path, args), nprocs=ranks, start_method="forkserver")
    return [pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in range(ranks)]


def _rank_main(rank: int, ranks: int, port: int, function: Callable[..., Any], folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank)
    )
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        result = function(rank, *args)
    except BaseException:
        traceback.print_exc()
        raise
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()
