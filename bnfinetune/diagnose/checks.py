"""Judging a training set-up as it stands, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnfinetune.diagnose.case import Case, Context
from bnfinetune.diagnose.finding import Findings
from bnfinetune.diagnose.registry import run_rules


def check_bn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Any = None,
    *,
    grad_accum: int = 1,
    steps: int | None = None,
    batch_size: int | None = None,
    input_size: tuple[int, ...] | None = None,
    train_size: int | None = None,
    eval_size: int | None = None,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    process_group: Any = None,
    source: nn.Module | None = None,
    averaged: nn.Module | None = None,
    saved: Mapping[str, Any] | str | Path | None = None,
    exported: Any = None,
    ignore: Sequence[str] = (),
) -> Findings:
    """Finds BN pitfalls in any training set-up, without running it.

    The more is given, the more is judged; nothing is changed, no image is read and no random number drawn. Rules that
    need a few steps are `watch_bn`'s.

    Args:
        model: any module with BN layers, wrapped or not, in the mode it will train from.
        optimizer: what trains it.
        loader: the training loader; only its length, sampler and batch size are read, and labels that the set holds.
        grad_accum: forwards per optimizer update.
        steps: optimizer updates planned.
        batch_size: images per process and forward, where the loader does not tell.
        input_size: channels, height and width of one image, where timm's `pretrained_cfg` does not tell.
        train_size: height of the images in training, to be compared with `eval_size`.
        eval_size: height of the images in evaluation.
        ranks: processes that train together; by default those of `torch.distributed`.
        ranks_per_node: processes on one machine; by default what torchrun says.
        process_group: ranks to compare with each other. This makes the call a collective: every rank makes it.
        source: the model from before a conversion, to be compared with `model`.
        averaged: an EMA or SWA copy of the model.
        saved: a state dict of the model, or the path of one.
        exported: a `torch.export` program or fx graph of the model.
        ignore: codes of rules to leave out, such as `["BN503"]`.

    Returns:
        Findings, the gravest first; `print` shows a table, `exit_code` is 1 where one is an error.

    Examples:
        >>> print(bnf.check_bn(model, optimizer, loader, grad_accum=4, steps=2000))

    Raises:
        SelectionError: the model has no BN layer, or `ignore` names no rule.
        CheckpointError: `saved` cannot be read.
    """
    context = Context(
        grad_accum=grad_accum,
        steps=steps,
        batch_size=batch_size,
        input_size=input_size,
        train_size=train_size,
        eval_size=eval_size,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        process_group=process_group,
        source=source,
        averaged=averaged,
        saved=saved,
        exported=exported,
    )
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    return run_rules(Case(model, optimizer, loader, context), ignore=ignore)
