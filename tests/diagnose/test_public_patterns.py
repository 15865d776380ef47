"""Faulty patterns of public tools, reproduced with those tools where they are installed: each is caught, by name."""

import contextlib
import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import bnfinetune as bnf
from tests.diagnose.support import FAMILIES, STAGE, codes, group_on_cpu, loader, network, sgd, train_step

PATTERNS = {}


def pattern(title, code):
    """Enter a function that does what the tool does and gives back what the doctor finds."""

    def enter(reproduce):
        PATTERNS[title] = (code, reproduce)
        return reproduce

    return enter


def batches(count):
    return list(loader(8 * count, batch_size=8))


def backbone_parameters(model):
    head = {id(p) for p in model.get_classifier().parameters()}
    return [p for p in model.parameters() if id(p) not in head]


# freezing


@pattern("Accelerate's cv_example: requires_grad=False on the backbone, then model.train()", "BN305")
def _(name):
    model = network(name)
    for parameter in backbone_parameters(model):
        parameter.requires_grad_(False)
    model.train()
    return bnf.check_bn(model, sgd(model))


@pattern("requires_grad=False on BN alone, then model.train()", "BN102")
def _(name):
    model = network(name)
    for layer in bnf.find_bn_layers(model).values():
        layer.requires_grad_(False)
    model.train()
    return bnf.check_bn(model)


@pattern("BN set to evaluation mode once, before the epochs", "BN101")
def _(name):
    model = network(name)
    optimizer = sgd(model)
    for layer in bnf.find_bn_layers(model).values():
        layer.eval()
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        for images, labels in batches(2):
            train_step(model, optimizer, images, labels)
            model.train()
    return watch.findings


@pattern("Lightning's BaseFinetuning.freeze: track_running_stats=False", "BN104")
def _(name):
    model = network(name)
    for layer in bnf.find_bn_layers(model).values():
        layer.track_running_stats = False
        layer.requires_grad_(False)
    return bnf.check_bn(model)


@pattern("Lightning's unfreeze_and_add_param_group(train_bn=False): statistics move again", "BN102")
def _(name):
    model = network(name)
    for layer in bnf.find_bn_layers(model).values():
        layer.track_running_stats = True
        layer.requires_grad_(False)
    return bnf.check_bn(model.train(), sgd(model))


@pattern("Lightning's duplicate filter: BN parameters that never reach the optimizer", "BN109")
def _(name):
    model = network(name)
    affine = {id(p) for layer in bnf.find_bn_layers(model).values() for p in layer.parameters(recurse=False)}
    held = [p for p in model.parameters() if id(p) not in affine]
    return bnf.check_bn(model, torch.optim.SGD(held, lr=0.1))


@pattern("momentum=0 taken for freezing", "BN106")
def _(name):
    model = network(name)
    for layer in bnf.find_bn_layers(model).values():
        layer.momentum = 0.0
    return bnf.check_bn(model)


@pattern("timm's freeze misses BatchNorm1d", "BN107")
def _(_name):
    model = timm.create_model("levit_128s", num_classes=5)
    for layer in bnf.find_bn_layers(model).values():
        layer.running_mean.normal_()
    return bnf.check_bn(timm.layers.freeze_batch_norm_2d(model))


@pattern("timm's freeze, then unfreeze: momentum is the default again", "BN502")
def _(name):
    source = network(name)
    for layer in bnf.find_bn_layers(source).values():
        layer.momentum = 0.01
    thawed = timm.layers.unfreeze_batch_norm_2d(timm.layers.freeze_batch_norm_2d(copy.deepcopy(source)))
    return bnf.check_bn(thawed, source=source)


@pattern("timm's freeze, then unfreeze: the optimizer holds the parameters of before", "BN109")
def _(name):
    model = network(name)
    optimizer = sgd(model)
    return bnf.check_bn(timm.layers.unfreeze_batch_norm_2d(timm.layers.freeze_batch_norm_2d(model)), optimizer)


@pattern("torchvision's frozen detection backbones on random weights", "BN108")
def _(name):
    return bnf.check_bn(bnf.freeze_bn(timm.create_model(name, num_classes=5)))


@pattern("torchvision's FrozenBatchNorm2d with the eps of 0 that it once had", "BN502")
def _(_name):
    source = network("resnet18")
    model = copy.deepcopy(source)
    for name, layer in bnf.find_bn_layers(source).items():
        frozen = torchvision.ops.misc.FrozenBatchNorm2d(layer.num_features, eps=0.0)
        frozen.load_state_dict({key: value for key, value in layer.state_dict().items() if key in frozen.state_dict()})
        model.set_submodule(name, frozen)
    return bnf.check_bn(model, source=source)


# conversions


@pattern("torch's SyncBatchNorm converter on timm's fused layers", "BN403")
def _(_name):
    source = network("efficientnet_b0")
    return bnf.check_bn(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(source)), source=source)


@pattern("detectron2's and open_clip's frozen BN in place of a fused layer", "BN403")
def _(_name):
    source = network("efficientnet_b0")
    model = copy.deepcopy(source)
    for name, layer in bnf.find_bn_layers(source).items():
        frozen = torchvision.ops.misc.FrozenBatchNorm2d(layer.num_features, eps=layer.eps)
        frozen.load_state_dict({key: value for key, value in layer.state_dict().items() if key in frozen.state_dict()})
        model.set_submodule(name, frozen)
    return bnf.check_bn(model, source=source)


@pattern("SyncBatchNorm left in on the CPU", "BN404")
def _(_name):
    with group_on_cpu():
        return bnf.check_bn(nn.SyncBatchNorm.convert_sync_batchnorm(network("resnet18")))


# re-estimation


@pattern("swa_utils.update_bn on a frozen model: its layers train again", "BN101")
def _(name):
    model = network(name)
    optimizer = sgd(model)
    stage = model.get_submodule(STAGE[name])
    stage.eval()
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        train_step(model, optimizer, *batches(1)[0])
        update_bn([images for images, _ in batches(1)], model)
        model.train()
        train_step(model, optimizer, *batches(1)[0])
    return watch.findings


@pattern("swa_utils.update_bn on batches that are dicts: momentum stays None", "BN106")
def _(name):
    model = network(name)
    with contextlib.suppress(TypeError):
        update_bn([{"image": torch.zeros(2, 3, 32, 32)}], model)
    return bnf.check_bn(model.train())


@pattern("fvcore's update_bn_stats on a loader that is too short: momentum stays 1", "BN106")
def _(name):
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    model = network(name)
    with contextlib.suppress(AssertionError):
        precise.update_bn_stats(model, [images for images, _ in batches(1)], num_iters=3)
    return bnf.check_bn(model)


@pattern("fvcore's update_bn_stats in float32: a negative variance", "BN501")
def _(_name):
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 2))
    precise.update_bn_stats(model, [100 + 0.01 * torch.randn(8, 64) for _ in range(50)], num_iters=50)
    return bnf.check_bn(model)


@pattern("fvcore's update_bn_stats on a layer that no batch reaches: mean 0, variance 0", "BN502")
def _(_name):
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    model = network("resnet18")
    model.spare = nn.BatchNorm2d(4)
    model.spare.running_mean.fill_(0.3)
    source = copy.deepcopy(model)
    precise.update_bn_stats(model, [images for images, _ in batches(2)], num_iters=2)
    only = nn.Sequential(model.spare), nn.Sequential(source.spare)
    return bnf.check_bn(only[0], source=only[1])


# hidden forwards


@pattern("activation checkpointing updates twice", "BN301")
def _(name):
    model = network(name)
    model.set_grad_checkpointing()
    optimizer = sgd(model)
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        train_step(model, optimizer, *batches(1)[0])
    return watch.findings


@pattern("SAM's second pass over the same batch", "BN302")
def _(name):
    model = network(name)
    optimizer = sgd(model)
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        for images, labels in batches(2):
            nn.functional.cross_entropy(model(images), labels).backward()
            train_step(model, optimizer, images, labels)
    return watch.findings


# averaging and checkpoints


@pattern("AveragedModel without its buffers", "BN601")
def _(name):
    model = network(name)
    averaged = AveragedModel(model, use_buffers=False)
    for layer in bnf.find_bn_layers(model).values():
        layer.running_mean.add_(1)
        layer.num_batches_tracked.add_(100)
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    averaged.update_parameters(model)
    return bnf.check_bn(model, averaged=averaged)


@pattern("an adapter's save without the BN buffers, as PEFT's once was", "BN602")
def _(name):
    model = network(name)
    return bnf.check_bn(model, saved=dict(model.named_parameters()))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("title", PATTERNS)
def test_it_is_caught(title, name):
    code, reproduce = PATTERNS[title]
    assert code in codes(reproduce(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_patterns_start_from_is_sound(name):
    model = network(name)
    assert not codes(bnf.check_bn(model, sgd(model), source=copy.deepcopy(model), saved=model.state_dict()))
