"""BN in Lightning's Trainer: the real Trainer, on timm networks."""

from __future__ import annotations

import logging
import random
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import bnfinetune as bnf
from bnfinetune.errors import DataError, PolicyError
from tests.bn.models import differing, randomise, tensors_of
from tests.integrations.oracle import worst_error

pl = pytest.importorskip("lightning.pytorch")
BNCallback = pytest.importorskip("bnfinetune.integrations.lightning").BNCallback

NAMES = ("test_resnet", "test_efficientnet")  # plain BN, and BatchNormAct2d
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 1.5 + 0.3
LABELS = torch.arange(24) % 3
NEEDS_AVERAGE = pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="since lightning 2.6")
FREEZE = bnf.BNPolicy(train_stats="running", update_stats="none", affine="frozen")


def network(name: str = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=3))


class Module(pl.LightningModule):
    """A classifier that notes what every validation starts from, and the network after every step."""

    def __init__(self, name: str = "test_resnet", lr: float = 0.02) -> None:
        super().__init__()
        self.net, self.lr = network(name), lr
        self.seen: list[dict[str, torch.Tensor]] = []
        self.steps: list[dict[str, torch.Tensor]] = []

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, index):
        assert all(layer.training for layer in bnf.find_bn_layers(self.net).values())
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        if index == 0:
            self.seen.append(tensors_of(self.net))
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_batch_end(self, *args):
        self.steps.append(tensors_of(self.net))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr, momentum=0.9)


class Noisy(Dataset):
    """Images with noise from two generators."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index] + 0.1 * torch.randn(3, 32, 32) + random.random(), LABELS[index]


def loader(data: Any = None, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS) if data is None else data, 8, **options)


def fit(module: Any, *callbacks: Any, train: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    settings = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options}
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **silent, **settings)
        trainer.fit(module, loader() if train is None else train, loader(), ckpt_path=ckpt_path)
    return trainer


def bn_keys(net: nn.Module) -> set[str]:
    layers = tuple(f"{name}." for name in bnf.find_bn_layers(net))
    return {key for key in net.state_dict() if key.startswith(layers)}


@pytest.mark.parametrize("name", NAMES)
def test_frozen_bn_keeps_its_bytes_through_every_step(name):
    module = Module(name)
    before = tensors_of(module.net)
    fit(module, BNCallback(FREEZE))
    assert len(module.steps) == 6
    for state in module.steps:
        moved = differing(before, state)
        assert moved
        assert not bn_keys(module.net) & set(moved)


@pytest.mark.parametrize("name", NAMES)
def test_every_validation_sees_population_statistics_and_is_saved_with_them(name, tmp_path):
    module = Module(name)
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    callback = BNCallback(precise_at="eval", batch_size=24)
    fit(module, best, callback, enable_checkpointing=True, val_check_interval=1, max_epochs=1)
    assert len(module.seen) == 3
    assert all(worst_error(network(name), seen, IMAGES) < 1e-4 for seen in module.seen)
    assert callback.report.samples == 24
    for file in tmp_path.iterdir():
        saved = torch.load(file, weights_only=True)["state_dict"]
        saved = {key.removeprefix("net."): value for key, value in saved.items()}
        assert any(not differing(seen, saved) for seen in module.seen)


def test_the_pass_moves_no_weight_of_the_training():
    nets = []
    for callbacks in ([BNCallback(precise_at="eval", num_samples=9)], []):
        torch.manual_seed(1)
        random.seed(1)
        module = Module()
        torch.manual_seed(2)
        fit(module, *callbacks, train=loader(Noisy(), shuffle=True), val_check_interval=1)
        nets.append(tensors_of(module.net))
    moved = differing(*nets)
    assert moved
    assert all("running" in key for key in moved)


def test_the_sanity_check_and_validating_alone_judge_the_network_as_it_came():
    module = Module()
    before = tensors_of(module.net)
    callback = BNCallback(precise_at="eval", batch_size=24)
    trainer = fit(module, callback, num_sanity_val_steps=1, max_epochs=1)
    assert len(module.seen) == 2
    assert not differing(before, module.seen[0])
    assert differing(before, module.seen[1])
    after, report = tensors_of(module.net), callback.report
    trainer.validate(module, loader(), verbose=False)
    assert callback.report is report
    assert not differing(after, tensors_of(module.net))
    alone, own = Module(), BNCallback(bnf.BNPolicy(eval_stats="batch"), precise_at="eval")
    settings = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    pl.Trainer(accelerator="cpu", devices=1, callbacks=[own], **settings).validate(alone, loader(), verbose=False)
    assert own.report is None
    assert not differing(before, tensors_of(alone.net))
    assert {switches.eval_stats for switches in map(_switches, bnf.find_bn_layers(alone).values())} == {"batch"}


def _switches(layer: nn.Module) -> Any:
    from bnfinetune.bn.policy.switched_layer import switches_of

    return switches_of(layer)


@NEEDS_AVERAGE
@pytest.mark.parametrize("name", NAMES)
def test_averaged_weights_get_statistics_of_their_own(name, tmp_path):
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    module, callback = Module(name), BNCallback(precise_at="eval", batch_size=24)
    best = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")
    fit(module, averaging, best, callback, enable_checkpointing=True)
    assert len(module.seen) == 2
    for seen, last in zip(module.seen, module.steps[2::3], strict=True):
        assert [key for key in differing(seen, last) if key not in bn_keys(module.net)]
        assert worst_error(network(name), seen, IMAGES) < 1e-4
    for file in tmp_path.iterdir():
        saved = {k.removeprefix("net."): v for k, v in torch.load(file, weights_only=True)["state_dict"].items()}
        assert any(not differing(seen, saved) for seen in module.seen)


@NEEDS_AVERAGE
def test_at_the_end_the_averaged_weights_get_them():
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    module = Module()
    fit(module, averaging, BNCallback(precise_at="end", batch_size=24))
    assert worst_error(network(), tensors_of(module.net), IMAGES) < 1e-4
    assert differing(tensors_of(module.net), module.steps[-1])


@NEEDS_AVERAGE
def test_an_average_made_before_the_policy_stays_in_step_with_it():
    policy = bnf.BNPolicy(train_stats="renorm", renorm_ramp=3, domains="b", domain_affine="own")
    module, averaging = Module(), pl.callbacks.EMAWeightAveraging(decay=0.5)
    fit(module, averaging, BNCallback(policy))
    other, plain = Module(), pl.callbacks.EMAWeightAveraging(decay=0.5)
    bnf.apply_policy(other, policy)
    fit(other, plain)
    assert not differing(tensors_of(module.net), tensors_of(other.net))


@NEEDS_AVERAGE
def test_before_an_average_it_refuses_its_place():
    module = Module()
    with pytest.raises(PolicyError, match="stands before EMAWeightAveraging.*list it after"):
        fit(module, BNCallback(precise_at="eval"), pl.callbacks.EMAWeightAveraging())
    assert not module.steps


def test_lightnings_stochastic_averaging_would_reset_frozen_statistics():
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    module = Module()
    bnf.apply_policy(module, FREEZE)
    fit(module, swa)
    assert all(not layer.running_mean.any() for layer in bnf.find_bn_layers(module).values())  # what must not be
    swa, module = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), Module()
    with pytest.raises(
        PolicyError, match="StochasticWeightAveraging sets all running statistics to 0 and 1.*'net.conv1"
    ):
        fit(module, swa, BNCallback(FREEZE))
    assert not module.steps
    module = Module()
    fit(module, pl.callbacks.StochasticWeightAveraging(0.01, 1), BNCallback(precise_at="end", batch_size=24))
    assert worst_error(network(), tensors_of(module.net), IMAGES) < 1e-4


class Transfer(Module):
    """A backbone and a head, as Lightning's finetuning callbacks want them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.backbone, self.head = self.net, nn.Linear(3, 3)
        del self.net

    @property
    def net(self):  # what the notes are of
        return self.backbone

    def forward(self, images):
        return self.head(self.backbone(images))

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.02)


@pytest.mark.parametrize("train_bn", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_lightnings_frozen_backbone_does_not_freeze_bn_and_ours_does(name, train_bn):
    def finetuning() -> Any:
        return pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=train_bn, lambda_func=lambda _: 1)

    torch.manual_seed(0)
    module = Transfer(name)
    before = tensors_of(module.net)
    fit(module, finetuning(), max_epochs=1)
    moved = set(differing(before, tensors_of(module.net)))
    trains, evaluates = _both_modes(module.net)
    assert (moved & bn_keys(module.net)) if train_bn else not torch.allclose(trains, evaluates, atol=1e-2)
    whole = Transfer(name)
    fit(whole, finetuning())
    assert {key for key in differing(before, tensors_of(whole.net)) if "running_mean" in key}

    if train_bn:
        with pytest.raises(
            PolicyError, match=r"BackboneFinetuning\(train_bn=True\) would train.*give it train_bn=False"
        ):
            fit(Transfer(name), finetuning(), BNCallback(FREEZE))
        return
    for order in (lambda *each: each, lambda *each: each[::-1]):
        ours = Transfer(name)
        fit(ours, *order(finetuning(), BNCallback(FREEZE)))
        trains, evaluates = _both_modes(ours.net)
        torch.testing.assert_close(trains, evaluates)
        moved = set(differing(before, tensors_of(ours.net)))
        assert moved
        assert not moved & bn_keys(ours.net)


@torch.no_grad()
def _both_modes(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with bnf.no_stat_updates(net):
        trains = net.train()(IMAGES)
    return trains, net.eval()(IMAGES)


POLICIES = [
    bnf.BNPolicy(train_stats="renorm", renorm_warmup=2, renorm_ramp=5, domains="b"),
    bnf.BNPolicy(train_stats="running", update_stats="none", affine="frozen", layers="*layer1*"),
]


@pytest.mark.parametrize("precise_at", [None, "eval"])
def test_a_run_resumed_from_a_checkpoint_is_the_one_without_a_break(precise_at, tmp_path):
    whole, resumed = Module(), Module()
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(whole, keep, BNCallback(POLICIES, precise_at=precise_at), enable_checkpointing=True)
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["bnfinetune"]["layers"]
    fit(resumed, BNCallback(POLICIES, precise_at=precise_at), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert len(resumed.steps) == 3
    assert not differing(tensors_of(resumed.net), tensors_of(whole.net))
    assert bnf.describe_bn(resumed) == bnf.describe_bn(whole)
    ages = {
        int(layer.bn_renorm_age) for layer in bnf.find_bn_layers(resumed).values() if hasattr(layer, "bn_renorm_age")
    }
    assert ages == {6}
    given_none = Module()
    fit(given_none, BNCallback(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert bnf.describe_bn(given_none) == bnf.describe_bn(whole)


def test_batches_go_through_the_modules_own_transfer():
    class Scaled(Module):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2 - 1, batch[1]

    module = Scaled()
    fit(module, BNCallback(precise_at="eval", batch_size=24), max_epochs=1)
    assert worst_error(network(), module.seen[0], IMAGES * 2 - 1) < 1e-4


def test_only_the_images_that_are_drawn_are_read():
    module = Module()
    drawn = loader(sampler=SubsetRandomSampler(range(16)))
    fit(module, BNCallback(precise_at="eval", batch_size=16), train=drawn, max_epochs=1)
    assert worst_error(network(), module.seen[0], IMAGES[:16]) < 1e-4


def test_what_cannot_work_is_said_before_the_first_step():
    weighted = loader(sampler=WeightedRandomSampler([1.0] * 24, 24))
    module = Module()
    with pytest.raises(
        DataError, match="drawn by a WeightedRandomSampler, whose choice is not known; give data=LOADER"
    ):
        fit(module, BNCallback(precise_at="eval"), train=weighted)
    with pytest.raises(DataError, match="come from a dict, which cannot be read twice"):
        fit(module, BNCallback(precise_at="eval"), train={"a": loader()})
    with pytest.raises(PolicyError, match="precise_at='eval' has nothing to do"):
        fit(Module(), BNCallback(FREEZE, precise_at="eval"))
    assert not module.steps

    class NoForward(Module):
        forward = pl.LightningModule.forward

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.seen.append(tensors_of(self.net))

    with pytest.raises(PolicyError, match="NoForward has no forward of its own"):
        fit(NoForward(), BNCallback(precise_at="eval"))
    given = NoForward()
    own = BNCallback(precise_at="eval", batch_size=24, forward=lambda module, batch: module.net(batch[0]))
    fit(given, own, max_epochs=1)
    assert worst_error(network(), given.seen[0], IMAGES) < 1e-4


def test_a_network_that_is_built_later_is_named():
    class Late(Module):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = network()

    with pytest.raises(PolicyError, match="must see the network of Late before its setup"):
        fit(Late(), BNCallback(FREEZE))
