"""Two processes that train together."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.bn.distributed import run_ranks
from tests.diagnose.loops.classifiers import evaluate, train_epoch
from tests.diagnose.loops.data import pictures, pretrained
from tests.diagnose.loops.registry import loop, said


@loop(
    "two DDP ranks",
    source="PyTorch, Getting started with DistributedDataParallel; DistributedSampler, evaluated through the wrapper",
    fault="each process evaluates its own model.module",
    rule="BN401",
)
def two_ranks(seed: int, planted: bool) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        first, second = run_ranks(2, _rank, Path(folder), seed, planted)
    return said(first, second)


def _rank(rank: int, seed: int, planted: bool) -> Findings:
    model = DistributedDataParallel(pretrained("net", seed))
    data = pictures(seed, 256)
    train = DataLoader(data, 16, sampler=DistributedSampler(data, shuffle=True, seed=seed), drop_last=True)
    test = DataLoader(pictures(seed + 1, 32), 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with bnf.watch_bn(model, optimizer, process_group=dist.group.WORLD) as watch:
        for epoch in range(2):
            train.sampler.set_epoch(epoch)
            model.train()
            train_epoch(model, optimizer, train, F.cross_entropy)
            model.eval()
            evaluate(model.module if planted else model, test)
    model.train()
    return said(watch.findings, bnf.check_bn(model, optimizer, train, process_group=dist.group.WORLD))
