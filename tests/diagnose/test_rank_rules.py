"""Rules about several processes, in real gloo processes."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import bnfinetune as bnf
from tests.bn.distributed import run_ranks
from tests.diagnose.support import codes, network, paste, the


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of two processes saw in each set-up, by name of the set-up; processes are slow to start."""
    ranks = run_ranks(2, _all, tmp_path_factory.mktemp("ranks"))
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def _all(rank):
    return {"disagree": _disagree(rank), "two_forwards": _two_forwards(rank), "uneven": _uneven(rank)}


def _disagree(rank):
    model, world = network("test_resnet"), dist.group.WORLD
    agreeing = codes(bnf.check_bn(model, process_group=world))
    model.layer2[0].bn1.running_mean += 0.5 * rank
    found = the(bnf.check_bn(model, process_group=world), "BN401")
    alone = codes(bnf.check_bn(model))
    with bnf.watch_bn(model, process_group=world, rerun=False) as watch:
        model(torch.randn(4, 3, 32, 32))
    paste(found.fix, model=model, images=10)
    mended = codes(bnf.check_bn(model, process_group=world))
    return agreeing, found.where, found.measured, alone, codes(watch.findings), mended


def test_processes_that_disagree(seen):
    for agreeing, where, measured, alone, watched, mended in seen["disagree"]:
        assert "BN401" not in agreeing | alone | mended
        assert where == ("layer2.0.bn1",)
        assert "up to 0.5" in measured
        assert "BN401" in watched


def _two_forwards(rank):
    images = torch.randn(4, 3, 32, 32)

    def step(ddp):
        loss = ddp(images).sum() + ddp(images + 1).sum()
        loss.backward()

    ddp = DistributedDataParallel(network("test_resnet"))
    watch = bnf.watch_bn(ddp, rerun=False)
    with contextlib.suppress(RuntimeError), watch:  # whether PyTorch notices depends on its release
        step(ddp)
    found = the(watch.findings, "BN402")
    ddp = DistributedDataParallel(network("test_resnet"))
    paste(found.fix, model=ddp)
    with bnf.watch_bn(ddp, rerun=False) as repaired:
        step(ddp)
    with bnf.watch_bn(DistributedDataParallel(network("test_resnet")), rerun=False) as ordinary:
        for _ in range(2):
            ordinary._case.model(images).sum().backward()
    return found.where, codes(repaired.findings), codes(ordinary.findings), list(bnf.find_bn_layers(ddp))


def test_two_forwards_before_one_backward(seen):
    for where, repaired, ordinary, names in seen["two_forwards"]:
        assert list(where) == names
        assert "BN402" not in repaired | ordinary


def _uneven(rank):
    model, world = bnf.convert_sync_bn(network("test_resnet")), dist.group.WORLD
    images = TensorDataset(torch.randn(8 + 4 * rank, 3, 32, 32))
    loader = DataLoader(images, batch_size=4, shuffle=True)
    found = the(bnf.check_bn(model, None, loader, process_group=world), "BN405")
    whole = DataLoader(TensorDataset(torch.randn(20, 3, 32, 32)), batch_size=4)
    scope = paste(found.fix, loader=whole)
    mended = codes(bnf.check_bn(model, None, scope["loader"], process_group=world))
    local = network("test_resnet")
    without = codes(bnf.check_bn(local, None, loader, process_group=world))
    return found.where, found.measured, mended, without, list(bnf.find_bn_layers(model))


def test_loaders_of_unequal_length(seen):
    for where, measured, mended, without, names in seen["uneven"]:
        assert list(where) == names
        assert "2, 3" in measured
        assert "BN405" not in mended | without
