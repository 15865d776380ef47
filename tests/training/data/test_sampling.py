from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfinetune.errors import DataError
from bnfinetune.training.data.sampling import EvalSampler, TrainSampler


def epoch(length: int, batch_size: int, world_size: int, number: int = 0, **options) -> list[list[list[int]]]:
    """Image numbers by rank and batch."""
    ranks = []
    for rank in range(world_size):
        sampler = TrainSampler(length, batch_size, seed=5, rank=rank, world_size=world_size, **options)
        sampler.set_position(number)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert {pick.epoch for batch in batches for pick in batch} == {number}
        ranks.append([[pick.number for pick in batch] for batch in batches])
    return ranks


def joined(ranks: list[list[list[int]]]) -> list[list[int]]:
    """The global batches: all ranks' images, rank after rank."""
    return [[image for share in shares for image in share] for shares in zip(*ranks, strict=True)]


@pytest.mark.parametrize("length", [12, 24, 25, 31, 47])
def test_global_batches_are_the_same_for_any_number_of_ranks(length):
    alone = joined(epoch(length, 12, 1))
    assert sorted(chain(*alone)) == list(range(length))
    for world_size in (2, 3, 4):
        many = joined(epoch(length, 12 // world_size, world_size))
        assert many[: length // 12] == alone[: length // 12]
        if length % 12 >= world_size:  # a smaller rest cannot feed every rank and is left out
            assert many == alone


@settings(deadline=None)
@given(st.integers(4, 300), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_ranks_have_equally_many_batches_that_differ_by_one_image(length, batch_size, world_size, even):
    ranks = epoch(length, batch_size, world_size, even=even)
    for shares in zip(*ranks, strict=True):
        sizes = [len(share) for share in shares]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
    images = sorted(chain(*joined(ranks)))
    left_out = length % (batch_size * world_size) if not even else 0
    assert len(images) == length - (left_out if left_out < world_size else 0)
    assert len(set(images)) == len(images)


@settings(deadline=None)
@given(st.integers(4, 300), st.integers(2, 9), st.integers(1, 4))
def test_even_batches_are_within_one_image_per_rank(length, batch_size, world_size):
    sizes = [len(batch) for batch in joined(epoch(length, batch_size, world_size, even=True))]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == length


def test_epochs_differ_and_repeat_by_number():
    assert epoch(30, 4, 1, 0) != epoch(30, 4, 1, 1)
    assert epoch(30, 4, 2, 1) == epoch(30, 4, 2, 1)


def test_position_leaves_out_exactly_the_batches_before_it():
    sampler = TrainSampler(50, 4, seed=5, rank=1, world_size=2)
    sampler.set_position(3)
    whole = list(sampler)
    sampler.set_position(3, 4)
    assert list(sampler) == whole[4:]


def test_small_remainder_is_dropped_and_counted():
    sampler = TrainSampler(17, 4, seed=5)
    assert len(sampler) == 5
    assert sampler.drop_remainder(2) == 1
    assert sampler.drop_remainder(2) == 1
    assert [len(batch) for batch in sampler] == [4, 4, 4, 4]
    assert TrainSampler(18, 4, seed=5).drop_remainder(2) == 0
    two = TrainSampler(19, 4, seed=5, world_size=2)  # the rest of 3 images is 2 and 1
    assert two.drop_remainder(1) == 0
    assert two.drop_remainder(2) == 3
    assert TrainSampler(17, 4, seed=5, world_size=2).drop_remainder(1) == 1


def test_dropped_images_differ_between_epochs():
    sampler = TrainSampler(17, 4, seed=5)
    sampler.drop_remainder(2)
    seen = set()
    for number in range(8):
        sampler.set_position(number)
        seen |= {pick.number for batch in sampler for pick in batch}
    assert seen == set(range(17))


def test_no_batch_left_is_an_error():
    with pytest.raises(DataError, match="1 training images give 1 per process, fewer than 2"):
        TrainSampler(1, 4, seed=5).drop_remainder(2)
    with pytest.raises(DataError, match="2 training images cannot feed 3 processes"):
        TrainSampler(2, 4, seed=5, world_size=3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_covers_each_image_exactly_once(world_size):
    shares = [EvalSampler(23, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(list(share)) == len(share) for share in shares)
    assert sorted(pick.number for share in shares for batch in share for pick in batch) == list(range(23))
