"""precise_bn on real gloo ranks: the same bits everywhere, those of one process, faults shared, padding left out."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from bnfinetune.bn.statistics.fvcore import update_bn_stats
from bnfinetune.bn.statistics.padding import real_rows_of
from bnfinetune.bn.statistics.precise import precise_bn
from bnfinetune.bn.statistics.prior_search import choose_prior
from bnfinetune.errors import ShortDataError, StatisticsError
from tests.bn.distributed import run_ranks
from tests.bn.models import backbone, differing, images, tensors_of, toy

SHARDS = {2: ((8, 5, 2), (3, 7)), 3: ((8, 5, 2, 6), (), (3,))}


def shard_of(ranks: int, rank: int) -> list[torch.Tensor]:
    return [images(n, 32, 10 * rank + i) * (1 + rank) + i for i, n in enumerate(SHARDS[ranks][rank])]


def statistics_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors_of(model).items() if "running" in key}


def assert_all_equal_one(by_rank, one, rtol=1e-6):
    for other in by_rank[1:]:
        assert not differing(by_rank[0], other)
    for key, value in by_rank[0].items():
        torch.testing.assert_close(value, one[key], rtol=rtol, atol=1e-6, msg=key)


def recompute_rank(rank: int, ranks: int, name: str, arguments: dict) -> tuple:
    model = backbone(name) if name else toy(BatchNormAct2d)
    for buffer in model.buffers():  # ranks disagree beforehand, as they do after training
        buffer += rank
    report = precise_bn(model, iter(shard_of(ranks, rank)), **arguments)
    return statistics_of(model), report.samples, report.batches, report.error


@pytest.mark.parametrize(("ranks", "name"), [(2, "efficientnet_b0"), (3, "resnet18")])
def test_unequal_and_empty_shards_equal_one_process(ranks, name, tmp_path):
    by_rank = run_ranks(ranks, recompute_rank, tmp_path, ranks, name, {})
    model = backbone(name)
    report = precise_bn(model, [batch for rank in range(ranks) for batch in shard_of(ranks, rank)])
    assert_all_equal_one([statistics for statistics, *_ in by_rank], statistics_of(model))
    for _, samples, batches, error in by_rank:
        assert (samples, batches) == (report.samples, report.batches)
        assert error == by_rank[0][3]


def weighing_rank(rank: int) -> tuple:
    model = toy(BatchNormAct2d)
    shards = shard_of(3, rank)
    share = precise_bn(model, iter(shards), prior=6.0).share
    choice = choose_prior(model, shards, lambda: -abs(model[1].running_var[0].item() - 1.0))
    return statistics_of(model), share, choice.share


def test_a_prior_counts_the_samples_of_all_ranks(tmp_path):
    by_rank = run_ranks(3, weighing_rank, tmp_path)
    one = toy(BatchNormAct2d)
    shards = [batch for rank in range(3) for batch in shard_of(3, rank)]
    share = precise_bn(one, shards, prior=6.0).share
    choice = choose_prior(one, shards, lambda: -abs(one[1].running_var[0].item() - 1.0))
    assert_all_equal_one([statistics for statistics, *_ in by_rank], statistics_of(one))
    assert [shares for _, *shares in by_rank] == [[share, choice.share]] * 3
    assert share == 24 / 30


@pytest.mark.parametrize("variance", ["mean", "ema"])
def test_other_estimates_are_the_same_on_all_ranks(variance, tmp_path):
    by_rank = run_ranks(3, recompute_rank, tmp_path, 3, "", {"variance": variance})
    for statistics, *_ in by_rank[1:]:
        assert not differing(statistics, by_rank[0][0])
    if variance == "mean":
        model = toy(BatchNormAct2d)
        precise_bn(model, [batch for rank in range(3) for batch in shard_of(3, rank)], variance="mean")
        assert_all_equal_one([by_rank[0][0]], statistics_of(model))


@pytest.mark.parametrize("wanted", [9, 14])
def test_num_samples_counts_over_all_ranks(wanted, tmp_path):
    by_rank = run_ranks(3, recompute_rank, tmp_path, 3, "", {"num_samples": wanted})
    if wanted == 9:
        taken = [shard_of(3, 0)[0], shard_of(3, 2)[0][:1]]  # 8, then 1 of 3
    else:
        taken = [shard_of(3, 0)[0], shard_of(3, 2)[0], shard_of(3, 0)[1][:3]]  # 8 and 3 at first, then 3 of 5
    model = toy(BatchNormAct2d)
    precise_bn(model, taken)
    assert_all_equal_one([statistics for statistics, *_ in by_rank], statistics_of(model))
    assert [samples for _, samples, *_ in by_rank] == [wanted] * 3


def drop_in_rank(rank: int) -> dict:
    model = toy(BatchNormAct2d)
    update_bn_stats(model, shard_of(2, rank), 2)
    return tensors_of(model)


def test_the_drop_in_pools_over_ranks_as_well(tmp_path):
    by_rank = run_ranks(2, drop_in_rank, tmp_path)
    model = toy(BatchNormAct2d)
    update_bn_stats(model, [*shard_of(2, 0)[:2], *shard_of(2, 1)], 4)
    one = tensors_of(model)
    assert by_rank[0].pop("1.num_batches_tracked") == 2  # per rank, as in training
    one.pop("1.num_batches_tracked")
    assert by_rank[1].pop("1.num_batches_tracked") == 2
    for tensors in (*by_rank, one):
        tensors.pop("4.num_batches_tracked")
    assert_all_equal_one(by_rank, one)


def faults_of_rank(rank: int) -> list[tuple[str, str]]:
    caught = []

    def attempt(data, **arguments):
        model = toy(BatchNormAct2d)
        before = tensors_of(model)
        with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)) as error:
            precise_bn(model, data, **arguments)
        assert not differing(tensors_of(model), before)
        caught.append((type(error.value).__name__, str(error.value)))

    def broken(at, fault):
        for index, batch in enumerate(shard_of(2, rank)):
            if rank and index == at:
                raise fault
            yield batch

    attempt(broken(0, RuntimeError("disk")))
    attempt(broken(1, KeyboardInterrupt()))
    attempt(broken(1, RuntimeError("disk")), num_samples=20)
    attempt(shard_of(2, rank), num_batches=3)  # rank 1 has two
    attempt(shard_of(2, rank), num_samples=26)  # there are 25
    attempt([x * float("nan") if rank else x for x in shard_of(2, rank)])
    attempt(shard_of(2, rank), layers="1" if rank else "*")
    attempt(shard_of(2, rank), layers="nothing" if rank else "*")
    return caught


def test_a_fault_on_one_rank_is_raised_on_all(tmp_path):
    others, own = run_ranks(2, faults_of_rank, tmp_path)
    assert [kind for kind, _ in own[:4]] == ["RuntimeError", "KeyboardInterrupt", "RuntimeError", "ShortDataError"]
    for (kind, text), (_, cause) in zip(others[:4], own[:4], strict=True):
        assert kind == "StatisticsError"
        assert text.startswith("rank 1 failed with")
        assert cause in text
    assert others[4] == own[4]
    assert own[4][0] == ShortDataError.__name__
    assert "NaN" in own[5][1]
    assert "NaN" in others[5][1]
    assert "other BN layers" in own[6][1]
    assert own[7][0] == "SelectionError"
    assert others[7][0] == StatisticsError.__name__


def tolerance_rank(rank: int) -> tuple:
    model = nn.Sequential(nn.BatchNorm2d(3))
    source = iter([images(16, 8, 100 * rank + i) for i in range(200)])
    report = precise_bn(model, source, tolerance=0.02)
    return statistics_of(model), report.error, report.batches, len(list(source))


def test_the_stopping_rule_stops_all_ranks_at_the_same_batch(tmp_path):
    first, second = run_ranks(2, tolerance_rank, tmp_path)
    assert first[1:] == second[1:]
    assert first[1] <= 0.02
    assert 16 <= first[2] < 200
    assert first[2] == 2 * (200 - first[3])
    assert not differing(first[0], second[0])


# --- padding


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError
        return torch.full((1,), float(index))


class Stream(IterableDataset):
    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        return (torch.full((1,), float(index)) for index in range(self.length))


def loaders_of_rank(rank: int, ranks: int, length: int, batch: int):
    data = Numbers(length)
    for shuffle in (False, True):
        yield DataLoader(data, batch, sampler=DistributedSampler(data, ranks, rank, shuffle=shuffle))
    yield DataLoader(data, batch, sampler=DistributedSampler(data, ranks, rank, drop_last=True))
    for split, dispatch, even in [
        (False, False, True),
        (False, False, False),
        (True, False, True),
        (False, True, True),
    ]:
        loader = DataLoader(data, batch * ranks if split else batch)
        yield prepare_data_loader(
            loader, num_processes=ranks, process_index=rank, split_batches=split, dispatch_batches=dispatch,
            even_batches=even, device=torch.device("cpu"), put_on_device=True,
        )  # fmt: skip
    for split, dispatch in [(False, False), (True, False), (False, True)]:
        loader = DataLoader(Stream(length), batch * ranks if split else batch)
        yield prepare_data_loader(
            loader, num_processes=ranks, process_index=rank, split_batches=split, dispatch_batches=dispatch,
            device=torch.device("cpu"), put_on_device=True,
        )  # fmt: skip


def padding_rank(rank: int, ranks: int, length: int, batch: int) -> list[tuple]:
    Accelerator(cpu=True)
    found = []
    for loader in loaders_of_rank(rank, ranks, length, batch):
        rule, all_rows, kept = real_rows_of(loader), [], []
        for index, rows in enumerate(loader):
            numbers = rows.flatten().tolist()
            all_rows += numbers
            kept += numbers[: rule(index, len(numbers))]
        found.append((type(loader).__name__, all_rows, kept))
    return found


@pytest.mark.parametrize(("ranks", "length", "batch"), [(2, 13, 3), (3, 10, 4), (3, 2, 2), (2, 12, 3)])
def test_padding_is_recognised_in_every_kind_of_loader(ranks, length, batch, tmp_path):
    for kinds in zip(*run_ranks(ranks, padding_rank, tmp_path, ranks, length, batch), strict=True):
        read = {number for _, rows, _ in kinds for number in rows}
        kept = [number for *_, rows in kinds for number in rows]
        assert sorted(kept) == sorted(read)  # each sample that was read at all, once


def skipping_rank(rank: int, skipped: int) -> list[tuple[str, list[float]]]:
    Accelerator(cpu=True)
    found = []
    for loader in loaders_of_rank(rank, 2, 13, 3):
        loader = skip_first_batches(loader, skipped)
        rule, kept = real_rows_of(loader), []
        for index, rows in enumerate(loader):
            kept += rows.flatten().tolist()[: rule(index, len(rows))]
        found.append((type(loader).__name__, kept))
    return found


@pytest.mark.parametrize("skipped", [1, 2])
def test_padding_is_recognised_after_skipped_batches(skipped, tmp_path):
    for (kind, first), (_, second) in zip(*run_ranks(2, skipping_rank, tmp_path, skipped), strict=True):
        kept = first + second
        assert len(set(kept)) == len(kept), kind
        # accelerate's dispatcher skips batches of one rank, everything else those of both; one sampler drops the 13th
        assert len(kept) in (13 - 3 * skipped, 13 - 6 * skipped, 12 - 6 * skipped), kind


def padded_statistics_rank(rank: int, kind: str) -> tuple[dict, int]:
    data = Images(11)
    loader = DataLoader(data, 3, sampler=DistributedSampler(data, 2, rank, shuffle=False))
    if kind == "accelerate":
        loader = Accelerator(cpu=True).prepare(DataLoader(data, 3))
    model = toy(BatchNormAct2d)
    report = precise_bn(model, loader, layers="1")
    return statistics_of(model), report.samples


class Images(Dataset):
    """Images that differ so much that counting one twice shows."""

    def __init__(self, length: int):
        self.images = images(length, 12) * torch.arange(1.0, length + 1).view(-1, 1, 1, 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 2


@pytest.mark.parametrize("kind", ["sampler", "accelerate"])
def test_padding_counts_once_in_statistics(kind, tmp_path):
    by_rank = run_ranks(2, padded_statistics_rank, tmp_path, kind)
    model = toy(BatchNormAct2d)
    precise_bn(model, [Images(11).images], layers="1")
    assert_all_equal_one([statistics for statistics, _ in by_rank], statistics_of(model))
    assert [samples for _, samples in by_rank] == [11, 11]


def wrapped_rank(rank: int) -> tuple[dict, dict]:
    model = toy(BatchNormAct2d)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(images(4, 32, rank)).sum().backward()
    buffers = dict(model.named_buffers())
    precise_bn(wrapped, shard_of(3, 0)[rank : 3 * rank + 1])  # one batch, and three: no collective of DDP's own
    assert all(buffers[key] is buffer for key, buffer in model.named_buffers())
    after = statistics_of(model)
    wrapped(images(4, 32, rank)).sum().backward()
    return after, statistics_of(model)


def test_models_in_ddp(tmp_path):
    (first, trained), (second, _) = run_ranks(2, wrapped_rank, tmp_path)
    assert not differing(first, second)
    assert len(differing(first, trained)) == len(first)
