"""Batches of every form: how many samples they hold, what the model gets, and what is left after a cut."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from bnfinetune.bn import precise_bn
from bnfinetune.bn.statistics.batches import find_images, first_samples, model_input
from bnfinetune.diagnose.drift import inspect_bn
from bnfinetune.errors import StatisticsError
from tests.bn.models import images, toy
from tests.bn.statistics.oracle import moments_of

Pair = namedtuple("Pair", ["image", "target"])
X, LABELS = torch.randn(4, 3, 8, 8), torch.arange(4)


def image(height: int = 8) -> Tensor:
    return torch.randn(3, height, 8)


def shapes(item: Any) -> Any:
    if isinstance(item, Tensor):
        return tuple(item.shape)
    if isinstance(item, list | tuple):
        return [shapes(each) for each in item]
    return {key: shapes(each) for key, each in item.items()} if isinstance(item, dict) else item


# name: batch, samples, shapes of what the model gets, shapes of the first sample alone
FORMS = {
    "tensor": (X, 4, (4, 3, 8, 8), (1, 3, 8, 8)),
    "tuple": ((X, LABELS), 4, (4, 3, 8, 8), [(1, 3, 8, 8), (1,)]),
    "named tuple": (Pair(X, LABELS), 4, (4, 3, 8, 8), [(1, 3, 8, 8), (1,)]),
    "dict": ({"image": X, "id": [*"abcd"]}, 4, (4, 3, 8, 8), {"image": (1, 3, 8, 8), "id": ["a"]}),
    "user dict": (UserDict(y=LABELS, pixel_values=X), 4, (4, 3, 8, 8), {"y": (1,), "pixel_values": (1, 3, 8, 8)}),
    "vectors": ((torch.randn(5, 3), torch.arange(5)), 5, (5, 3), [(1, 3), (1,)]),
    "sequences": ((torch.randn(3, 5, 7), torch.arange(3)), 3, (3, 5, 7), [(1, 5, 7), (1,)]),
    "sequences of one colour count": ((torch.randn(3, 3, 7), torch.randn(3, 3, 7)), 3, (3, 3, 7), [(1, 3, 7)] * 2),
    "boxes beside": ((X, [torch.zeros(k, 4) for k in (1, 2, 4, 3)]), 4, (4, 3, 8, 8), [(1, 3, 8, 8), [(1, 4)]]),
    "detection": (([image(), image(9)], [{"b": 1}] * 2), 2, [(3, 8, 8), (3, 9, 8)], [[(3, 8, 8)], [{"b": 1}]]),
    "detection, zipped": (((image(), image(9)), ({}, {})), 2, [(3, 8, 8), (3, 9, 8)], [[(3, 8, 8)], [{}]]),
    "detection, one image": (([image()], [{}]), 1, [(3, 8, 8)], [[(3, 8, 8)], [{}]]),
    "three images": (([image()] * 3, [{}] * 3), 3, [(3, 8, 8)] * 3, [[(3, 8, 8)], [{}]]),
    "images alone": ([image(), image(9)], 2, [(3, 8, 8), (3, 9, 8)], [(3, 8, 8)]),
    "images under a key": ({"x": [image(), image()], "y": [{}, {}]}, 2, [(3, 8, 8)] * 2, {"x": [(3, 8, 8)], "y": [{}]}),
    "one dict each": ([{"x": image()}, {"x": image(9)}], 2, [{"x": (3, 8, 8)}, {"x": (3, 9, 8)}], [{"x": (3, 8, 8)}]),
    "clips": (([torch.randn(3, 4, 8, 8)] * 2, torch.arange(2)), 2, [(3, 4, 8, 8)] * 2, [[(3, 4, 8, 8)], (1,)]),
    "crops": (([X, X[..., :6]], LABELS), 4, (4, 3, 8, 8), [[(1, 3, 8, 8), (1, 3, 8, 6)], (1,)]),
    "as many crops as samples": (([X[:2], X[2:]], LABELS[:2]), 2, (2, 3, 8, 8), [[(1, 3, 8, 8)] * 2, (1,)]),
    "crops under a key": ({"x": (X, X), "y": LABELS}, 4, (4, 3, 8, 8), {"x": [(1, 3, 8, 8)] * 2, "y": (1,)}),
    "views of sequences": (([torch.randn(6, 5, 7)] * 2, torch.arange(6)), 6, (6, 5, 7), [[(1, 5, 7)] * 2, (1,)]),
    "views of vectors": (([torch.randn(6, 5)] * 2, torch.arange(6)), 6, (6, 5), [[(1, 5)] * 2, (1,)]),
    "nothing in it": (([], []), 0, [], [[], []]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_counted_found_and_cut(form):
    batch, samples, given, first = FORMS[form]
    assert find_images(batch).samples == samples
    assert shapes(model_input(batch)) == given
    assert shapes(first_samples(batch, 1)) == first
    assert shapes(first_samples(batch, samples)) == shapes(batch)


@pytest.mark.parametrize(
    "batch", [(["a", "b"], X), [(image(), 0), (image(), 1)], {"foo": X}, torch.tensor(1.0), object()]
)
def test_other_forms_are_refused_and_ask_for_a_forward(batch):
    with pytest.raises(StatisticsError, match="forward="):
        model_input(batch)


def test_uncollated_pairs_count_as_samples_for_a_forward_that_takes_them():
    data = [[(x, 0) for x in images(3, 12)], [(x, 1) for x in images(2, 12)]]
    model, plain = toy(), toy()

    def forward(net, batch):
        return net(torch.stack([x for x, _ in batch]))

    assert precise_bn(model, data, num_samples=4, forward=forward).samples == 4
    precise_bn(plain, [images(3, 12), images(2, 12)[:1]])
    assert model[1].running_mean.equal(plain[1].running_mean)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("layout", ["list", "tuple", "dict", "side by side"])
def test_of_several_crops_the_first_is_read_and_a_warning_says_so(layout, norm):
    crops = [(images(4, 12, seed), images(4, 8, seed + 9) + 3) for seed in range(2)]
    data = {
        "list": [(list(pair), LABELS) for pair in crops],
        "tuple": [(pair, LABELS) for pair in crops],
        "dict": [{"pixel_values": list(pair), "labels": LABELS} for pair in crops],
        "side by side": [[*pair, LABELS] for pair in crops],
    }[layout]
    model, plain = toy(norm), toy(norm)
    with pytest.warns(UserWarning, match="2 tensors of images.*only the first was read"):
        report = precise_bn(model, data)
    assert "only the first was read" in report.warnings[0]
    assert report.samples == 8
    assert precise_bn(plain, [first for first, _ in crops]).warnings == ()
    assert model[4].running_mean.equal(plain[4].running_mean)
    with pytest.warns(UserWarning, match="only the first was read"):
        inspect_bn(model, data)


def test_a_forward_of_the_users_own_reads_all_crops_without_a_word():
    crops = [[images(4, 12, seed), images(4, 8, seed + 9) + 3] for seed in range(2)]
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = precise_bn(
        model, [(pair, LABELS) for pair in crops], forward=lambda net, batch: [net(x) for x in batch[0]]
    )
    assert report.warnings == ()
    flat = torch.cat([x.transpose(0, 1).flatten(1) for pair in crops for x in pair], 1)
    torch.testing.assert_close(model[0].running_mean.double(), moments_of(flat.T).mean, rtol=1e-6, atol=1e-7)
