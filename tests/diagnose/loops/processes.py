"""Two processes that train together."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.bn.distributed import run_ranks
from tests.diagnose.loops.classifiers import evaluate, train_epoch
from tests.diagnose.loops.data import pictures, pretrained
from tests.diagnose.loops.registry import judged, loop, said

BLOCK = 5
"""Seeds that share one start of the processes."""


@loop(
    "two DDP ranks",
    source="PyTorch, Getting started with DistributedDataParallel; DistributedSampler, evaluated through the wrapper",
    fault="each process evaluates its own model.module",
    rule="BN401",
)
def two_ranks(seed: int, planted: bool) -> Findings:
    return _blocks(seed // BLOCK, planted)[seed % BLOCK]


@cache
def _blocks(block: int, planted: bool) -> list[Findings]:
    """What is said with each of some seeds that follow each other; processes are slow to start."""
    seeds = range(block * BLOCK, (block + 1) * BLOCK)
    models = [pretrained("net", seed) for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(2, _rank, Path(folder), list(zip(seeds, models, strict=True)), planted)
    return [said(*both) for both in zip(*ranks, strict=True)]


def _rank(rank: int, starts: list[tuple[int, nn.Module]], planted: bool) -> list[Findings]:
    # Tensors come as memory that the processes share, and each trains a network of its own.
    return [_train(seed, copy.deepcopy(model), planted) for seed, model in starts]


def _train(seed: int, network: nn.Module, planted: bool) -> Findings:
    model, world = DistributedDataParallel(network), dist.group.WORLD
    data = pictures(seed, 256)
    train = DataLoader(data, 16, sampler=DistributedSampler(data, shuffle=True, seed=seed), drop_last=True)
    test = DataLoader(pictures(10_000 + seed, 32), 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with bnf.watch_bn(model, optimizer, process_group=world) as watch:
        for epoch in range(2):
            train.sampler.set_epoch(epoch)
            model.train()
            train_epoch(model, optimizer, train)
            model.eval()
            evaluate(model.module if planted else model, test)
    return judged(watch, model, optimizer, train, process_group=world)
