"""A pass between two steps: on all ranks the same, and unnoticed by every generator."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from bnfinetune.errors import DataError, StatisticsError
from bnfinetune.integrations.precise_pass import PrecisePass, training_images
from tests.bn.distributed import run_ranks
from tests.bn.models import differing, images, tensors_of, toy
from tests.bn.statistics.oracle import inputs_of_layers, relative_errors

ODD = images(23)  # no multiple of two ranks or of a batch


def loader(data: torch.Tensor = ODD) -> DataLoader:
    order = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(data), 4, sampler=RandomSampler(TensorDataset(data), generator=order))


def the_pass(**options) -> PrecisePass:
    return PrecisePass("eval", None, 8192, None, None, options)


def statistics_on(rank: int) -> dict[str, torch.Tensor]:
    model = toy()
    the_pass(layers="1").run(model, loader(), 4, None)
    return tensors_of(model)


@pytest.mark.slow  # processes of their own
def test_ranks_share_the_images_and_end_with_the_same_bits(tmp_path):
    first, second = run_ranks(2, statistics_on, tmp_path)
    assert not differing(first, second)
    model = toy()
    model.load_state_dict(first)
    calls = inputs_of_layers(toy(), [ODD], ["1"])["1"]
    assert max(relative_errors(model[1], calls)) < 1e-5


def generators() -> list:
    return [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("fails", [False, True])
def test_no_generator_notices_it(fails):
    training, model = loader(), toy()
    before = [*generators(), training.sampler.generator.get_state().tolist()]

    def noisy(network, batch):
        x = batch[0] + torch.rand(()) + random.random() + float(np.random.rand())
        return network(x * float("nan") if fails else x)

    state = tensors_of(model)
    if fails:
        with pytest.raises(StatisticsError):
            the_pass().run(model, training, 4, noisy)
        assert not differing(tensors_of(model), state)
    else:
        the_pass().run(model, training, 4, noisy)
        assert differing(tensors_of(model), state)
    assert before == [*generators(), training.sampler.generator.get_state().tolist()]


def test_its_own_draws_are_the_same_in_every_pass():
    def noisy(network, batch):
        return network(batch[0] + torch.rand(()) + random.random() + float(np.random.rand()))

    first, second = toy(), toy()
    the_pass().run(first, loader(), 4, noisy)
    torch.rand(3)
    the_pass().run(second, loader(), 4, noisy)
    assert not differing(tensors_of(first), tensors_of(second))


def test_it_reads_as_many_images_as_there_are_at_most():
    assert the_pass().run(toy(), loader(), 4, None).samples == 23
    few = PrecisePass("end", None, 10, 5, None, {})
    report = few.run(toy(), loader(), 4, None)
    assert (report.samples, report.batches) == (10, 2)
    own = PrecisePass("end", [images(6), images(6, seed=1)], 10, None, None, {})
    assert own.run(toy(), None, 4, None).samples == 12


def test_its_order_is_not_that_of_the_set():
    read = torch.cat([batch[0] for batch in training_images(loader(torch.arange(40.0)), 4)])
    assert sorted(read.tolist()) == list(range(40))
    assert read.tolist() != list(range(40))


def test_what_is_no_loader_is_named():
    with pytest.raises(DataError, match="come from a list, which cannot be read twice; give data=LOADER"):
        the_pass().check(toy(), [ODD])
