"""What measures returns a report, and every report prints as text and saves as JSON that any reader takes."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import bnfinetune as bnf
from tests.bn.models import images, toy


def group_norm_report(model: nn.Module) -> Any:
    reports: list[Any] = []
    bnf.convert_group_norm(model, [images(8, 12)], on_report=reports.append)
    return reports[0]


def watched(model: nn.Module) -> Any:
    with bnf.watch_bn(model) as watch:
        model.train()(images(1, 12)).sum().backward()
    return watch.findings


def damaged_drift(model: nn.Module) -> Any:
    with torch.no_grad():
        model[1].running_var[0] = math.inf
    return bnf.inspect_bn(model, [images(8, 12)])


# What each call returns, a part of its text, and the path to something in its JSON.
REPORTS: dict[str, tuple[Callable[[nn.Module], Any], str, tuple[Any, ...]]] = {
    "describe_bn": (bnf.describe_bn, "train stats", ("layers", 1, "eps")),
    "fold_report": (bnf.fold_report, "folded into", ("layers", 0, "remark")),
    "check_bn": (lambda model: bnf.check_bn(model, batch_size=2), "BN206", ("findings", 0, "page")),
    "watch_bn": (watched, "pitfall", ("exit_code",)),
    "inspect_bn": (lambda model: bnf.inspect_bn(model, [images(8, 12)]), "drift", ("layers", "4", "noise", 0)),
    "inspect_bn, damaged": (damaged_drift, "1 damaged", ("layers", "1", "damaged", 0)),
    "precise_bn": (lambda model: bnf.precise_bn(model, [images(8, 12)]), "mean shift", ("layers", "1", "values")),
    "convert_group_norm": (group_norm_report, "GroupNorm in place of 2 BN layers", ("samples",)),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("call", REPORTS)
def test_prints_and_saves(call, norm, tmp_path):
    make, shown, path = REPORTS[call]
    report = make(toy(norm))
    assert shown in str(report)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # NaN and Infinity
    assert saved == json.loads(json.dumps(report.to_dict()))
    for key in path:
        saved = saved[key]
    assert saved is not None
