"""What the training loop adds to a bare PyTorch loop over the same loader, network, loss and optimizer."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.bench.folders import write_jpegs
from tests.bench.harness import compare, table
from tests.bench.results import record
from tests.bench.trainers import fit, trainer_of

BARE, OURS = "bare loop", "bnfinetune"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench loop_overhead", description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="side of the network's input")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="keep the figures for docs/benchmarks.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder) / "images", train=40, val=4, size=96)
        trainer = trainer_of(
            "full",
            **{
                "model.name": options.model,
                "model.pretrained": False,
                "data.source": str(Path(folder) / "images"),
                "data.image_size": options.size,
                "data.workers": 0,
                "train.batch_size": 16,
                "train.steps": options.updates,
                "bn.fold": "off",
            },
        )
        model, loader = copy.deepcopy(trainer.model), trainer.loaders.train
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def bare() -> None:
            model.train()
            done = 0
            for epoch in range(options.updates):
                loader.set_position(epoch)
                for images, labels in loader:
                    F.cross_entropy(model(images), labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    done += 1
                    if done == options.updates:
                        return

        timings = compare({BARE: bare, OURS: lambda: fit(trainer)}, baseline=BARE, rounds=options.rounds, warmup=1)
    what = f"{options.model} at {options.size} px, {options.updates} updates with batches of 16"
    print(table(what, timings))
    if options.record:
        record("loop_overhead", what, {"rows": [timing._asdict() for timing in timings], "rounds": options.rounds})
