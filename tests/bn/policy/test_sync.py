"""Synchronised BN over real gloo ranks equals one process on the joined batch; DDP trains under every policy."""

import copy

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfinetune.bn import (
    BNPolicy,
    apply_policy,
    convert_sync_bn,
    describe_bn,
    find_bn_layers,
    freeze_bn,
    no_stat_updates,
    restore_bn,
    revert_sync_bn,
    unfreeze_bn,
)
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.errors import PolicyError
from tests.bn.distributed import run_ranks
from tests.bn.models import BACKBONES, backbone, differing, images, randomise, tensors_of, toy

UNEQUAL = {2: (5, 2), 3: (4, 0, 1)}


def second_world_rank(rank: int, ranks: int, store: str) -> list[torch.Tensor]:
    """The same model in one world, and again in a second world of other neighbours."""
    model, found = sync_model(), []
    convert_sync_bn(model, group_size=2)
    for world, order in enumerate([range(ranks), [0, 2, 1, 3]]):
        if world:
            dist.destroy_process_group()
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=list(order).index(rank), world_size=ranks
            )
        model.load_state_dict(toy(BatchNormAct2d).double().state_dict())
        found.append(model.train()(images(3, 9, seed=rank).double()).detach())
    return found


def test_groups_of_an_earlier_world_are_not_used_in_the_next(tmp_path):
    results = run_ranks(4, second_world_rank, tmp_path, 4, str(tmp_path / "store"))
    for world, pairs in enumerate([[(0, 1), (2, 3)], [(0, 2), (1, 3)]]):
        for pair in pairs:
            joined = torch.cat([images(3, 9, seed=rank).double() for rank in pair])
            wanted = toy(BatchNormAct2d).double()(joined).split(3)
            for rank, output in zip(pair, wanted, strict=True):
                torch.testing.assert_close(results[rank][world], output, rtol=1e-9, atol=1e-11)


def joined_batch(ranks: int) -> torch.Tensor:
    return images(sum(UNEQUAL[ranks]), size=9).double() * 3 + 40


def sync_model() -> nn.Module:
    return convert_sync_bn(toy(BatchNormAct2d).double())


def outcome(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    weights = torch.linspace(-1, 1, output[0].numel(), dtype=x.dtype).view_as(output[0]) if len(output) else 1.0
    (output * weights).square().sum().backward()
    return {
        "output": output.detach(),
        "x.grad": x.grad,
        **{f"{name}.grad": p.grad for name, p in model.named_parameters()},
        **{name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def sync_rank(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    return outcome(sync_model(), joined_batch(ranks).split(UNEQUAL[ranks])[rank])


@pytest.mark.parametrize("ranks", [2, 3])
def test_unequal_ranks_equal_one_process_on_the_joined_batch(ranks, tmp_path):
    wanted = outcome(toy(BatchNormAct2d).double(), joined_batch(ranks))
    results = run_ranks(ranks, sync_rank, tmp_path, ranks)
    for name, tensor in wanted.items():
        parts = [result[name] for result in results]
        if name in ("output", "x.grad"):
            got = torch.cat(parts)
        elif name.endswith(".grad"):
            got = sum(parts)
        else:
            assert all(part.equal(parts[0]) for part in parts), f"ranks disagree on {name}"
            got = parts[0]
        torch.testing.assert_close(got, tensor, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def grouped_rank(rank: int) -> torch.Tensor:
    layer = convert_sync_bn(randomise(nn.BatchNorm2d(3)), group_size=2)
    restore = convert_sync_bn(randomise(nn.BatchNorm2d(3)), dist.new_subgroups(group_size=2)[0])
    x = images(8, size=4).split(2)[rank]
    layer(x), restore(x)
    assert layer.running_mean.equal(restore.running_mean)
    with pytest.raises(PolicyError, match="sync_group_size=3 does not divide the 4 ranks"):
        convert_sync_bn(nn.BatchNorm2d(3), group_size=3)
    copied = copy.deepcopy(restore)
    copied(x)
    return layer.running_mean


def test_groups_of_neighbouring_ranks_pool_among_themselves(tmp_path):
    results = run_ranks(4, grouped_rank, tmp_path)
    for pair in range(2):
        alone = randomise(nn.BatchNorm2d(3))
        alone(images(8, size=4).split(4)[pair])
        for rank in (2 * pair, 2 * pair + 1):
            torch.testing.assert_close(results[rank], alone.running_mean)
    assert not results[0].equal(results[2])


DDP_POLICIES = {
    "batch": {"train_stats": "batch"},
    "cumulative": {"update_stats": "cumulative"},
    "frozen": {"train_stats": "running", "update_stats": "none", "affine": "frozen"},
    "frozen_stats": {"train_stats": "running", "update_stats": "none"},
    "running": {"train_stats": "running"},
    "sync": {"train_stats": "sync"},
    "ghost": {"train_stats": "ghost", "ghost_size": 2},
    "renorm": {"train_stats": "renorm", "renorm_ramp": 2},
    "stochastic": {"train_stats": "stochastic"},
    "own_domain": {"domains": "b", "domain_affine": "own", "affine": "frozen"},
}


def ddp_rank(rank: int, name: str) -> dict[str, dict[str, torch.Tensor]]:
    states = {}
    for label, policy in DDP_POLICIES.items():
        model = apply_policy(toy(BatchNormAct2d) if name == "toy" else backbone(name), BNPolicy(**policy))
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-4)
        before = tensors_of(model)
        for step in range(2):
            torch.manual_seed(step)
            wrapped(images(4, seed=10 * step + rank)).square().mean().backward()
            # Before the second forward DDP copies rank 0's buffers; the first one's backward must bear that.
            if label.startswith("frozen"):
                (wrapped(images(2, seed=step)).mean() + wrapped(images(2, seed=rank)).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with no_stat_updates(wrapped):
            wrapped(images(2))  # DDP copies rank 0's buffers before a forward
        states[label] = tensors_of(model)
        assert differing(before, states[label])
    return states


@pytest.mark.parametrize("name", ["toy", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES)])
def test_ddp_trains_under_every_policy_and_ranks_agree(name, tmp_path):
    first, second = run_ranks(2, ddp_rank, tmp_path, name)
    for label in DDP_POLICIES:
        assert differing(first[label], second[label]) == [], label


def wrapped_rank(rank: int) -> None:
    wrapped = DistributedDataParallel(toy())
    apply_policy(wrapped, BNPolicy(train_stats="ghost", ghost_size=2))
    wrapped(images(size=12)).sum().backward()
    for change in (freeze_bn, lambda m: apply_policy(m, BNPolicy(domains="b", domain_affine="own"))):
        with pytest.raises(PolicyError, match=r"BN layer '1' would change .* below a DistributedDataParallel wrapper"):
            change(wrapped)
    freeze_bn(wrapped, affine=False)
    assert [row.name for row in describe_bn(wrapped)] == ["1", "4"]
    restore_bn(wrapped)
    frozen = DistributedDataParallel(freeze_bn(toy()))
    for change in (unfreeze_bn, restore_bn):
        with pytest.raises(PolicyError, match="wrap it again with the same optimizer"):
            change(frozen)
    revert_sync_bn(converted := DistributedDataParallel(convert_sync_bn(toy())))
    converted(images(size=12)).sum().backward()


def test_what_ddp_has_wrapped_keeps_its_gradients(tmp_path):
    run_ranks(2, wrapped_rank, tmp_path)


@pytest.mark.parametrize("name", BACKBONES)
def test_converting_and_reverting_keeps_everything(name):
    model = backbone(name).eval()
    wanted, parameters = model(images()), list(model.parameters())
    next(iter(find_bn_layers(model).values())).momentum = 0.03
    convert_sync_bn(model)
    assert model(images()).equal(wanted)
    assert {row.train_stats for row in describe_bn(model)} == {"sync"}
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    revert_sync_bn(model)
    assert model(images()).equal(wanted)
    assert {row.train_stats for row in describe_bn(model)} == {"batch"}
    assert describe_bn(model)[0].momentum == 0.03
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_frozen_layers_stay_frozen_in_a_conversion():
    model = freeze_bn(toy(), layers="1")
    convert_sync_bn(model)
    assert [switches_of(layer).train_stats for layer in find_bn_layers(model).values()] == ["running", "sync"]
    with pytest.raises(
        PolicyError, match=r"none of 1 BN layers normalises by batch or sync in training \('1' by running"
    ):
        convert_sync_bn(model, layers="1")
    with pytest.raises(PolicyError, match="none of 2 BN layers normalises by sync"):
        revert_sync_bn(toy())


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, SyncBatchNormAct])
def test_layers_built_synchronised_are_reverted_and_come_back(cls):
    def make(channels):
        layer = cls(channels)
        if cls is SyncBatchNormAct:
            layer.drop, layer.act = nn.Identity(), nn.ReLU()
        return layer

    model, twin = toy(make), toy(nn.BatchNorm2d if cls is nn.SyncBatchNorm else BatchNormAct2d)
    revert_sync_bn(model)
    assert model.train()(images(size=12)).equal(twin.train()(images(size=12)))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert type(restore_bn(model)[4]) is cls
