"""What ordinary loops do on purpose is not reported: each of these was once a false alarm."""

import copy
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    WeightedRandomSampler,
    random_split,
)

import bnfinetune as bnf
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.demo import load_characters
from bnfinetune.diagnose.finding import Findings, render
from bnfinetune.diagnose.prediction import first_tensor
from bnfinetune.diagnose.registry import all_rules
from bnfinetune.diagnose.rules.domains import MOST_DISTANCE
from tests.diagnose.sound_watches import KINDS, pictures
from tests.diagnose.support import (
    FAMILIES,
    INNER,
    codes,
    group_on_cpu,
    loader,
    network,
    paste,
    settled,
    sgd,
    the,
    train_step,
)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


# loaders


class Unlabelled(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), index // 8


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(3, 8, 8), 0)] * 40)


def prepared(data):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_data_loader(data)


def sharded(data, ranks=2, **options):
    """What Accelerate makes of a loader on the first of some processes."""
    from accelerate.data_loader import prepare_data_loader

    options |= {"device": torch.device("cpu"), "put_on_device": True}
    return prepare_data_loader(data, num_processes=ranks, process_index=0, **options)


SHUFFLED = {
    "shuffle": lambda: DataLoader(Unlabelled(), batch_size=8, shuffle=True),
    "weighted": lambda: DataLoader(Unlabelled(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 40, 40)),
    "distributed": lambda: DataLoader(
        Unlabelled(), batch_size=8, sampler=DistributedSampler(Unlabelled(), num_replicas=2, rank=0)
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=8),
}
ORDERED = {
    "sequential": lambda: DataLoader(Unlabelled(), batch_size=8),
    "distributed": lambda: DataLoader(
        Unlabelled(), batch_size=8, sampler=DistributedSampler(Unlabelled(), num_replicas=2, rank=0, shuffle=False)
    ),
}
WRAPPERS = {
    "plain": lambda data: data,
    "prepared": prepared,
    "sharded": sharded,
    "seedable": lambda data: sharded(data, use_seedable_sampler=True),
    "dispatched": lambda data: sharded(data, dispatch_batches=True),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", SHUFFLED)
def test_loaders_that_shuffle_below_their_wrappers(name, kind, wrapper):
    data = WRAPPERS[wrapper](SHUFFLED[kind]())
    assert not codes(bnf.check_bn(network(name), loader=data)) & {"BN205", "BN208"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ORDERED)
def test_wrappers_do_not_hide_stored_order(name, kind, wrapper):
    data = WRAPPERS[wrapper](ORDERED[kind]())
    assert "BN208" in codes(bnf.check_bn(network(name), loader=data))


def test_a_part_drawn_at_random_is_in_no_stored_order(name):
    part, _ = random_split(Unlabelled(), [32, 8], torch.Generator().manual_seed(0))
    assert "BN208" not in codes(bnf.check_bn(network(name), loader=DataLoader(part, batch_size=8)))
    first = torch.utils.data.Subset(Unlabelled(), range(32))
    assert "BN208" in codes(bnf.check_bn(network(name), loader=DataLoader(first, batch_size=8)))


def one_too_many(**options):
    return loader(41, batch_size=8, **options)


def test_a_prepared_loader_still_drops_its_last_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.BatchNorm1d(4))
    options = {"input_size": (3, 8, 8)}
    assert "BN205" in codes(bnf.check_bn(model, loader=prepared(one_too_many(size=8)), **options))
    assert "BN205" not in codes(bnf.check_bn(model, loader=prepared(one_too_many(size=8, drop_last=True)), **options))
    assert "BN205" not in codes(bnf.check_bn(model, loader=sharded(one_too_many(size=8)), **options))  # filled up


# sizes


@pytest.mark.parametrize(("train", "evaluated"), [(176, 224), (224, 288), (128, 160), (160, 160)])
def test_evaluation_somewhat_larger_than_training_is_chosen(name, train, evaluated):
    assert "BN210" not in codes(bnf.check_bn(network(name), train_size=train, eval_size=evaluated))


@pytest.mark.parametrize(("train", "evaluated"), [(224, 176), (160, 224), (288, 224)])
def test_other_differences_of_size_are_not(name, train, evaluated):
    assert "BN210" in codes(bnf.check_bn(network(name), train_size=train, eval_size=evaluated))


def test_watched_sizes_are_judged_alike(name):
    def watch(size):
        model = network(name)
        with bnf.watch_bn(model, rerun=False) as watching:
            model(torch.randn(4, 3, 40, 40)).sum().backward()
            with torch.no_grad():
                model.eval()(torch.randn(4, 3, size, size))
            model.train()
        return codes(watching.findings)

    assert "BN210" not in watch(48)
    assert "BN210" in watch(32)


# devices


def test_synchronised_layers_may_still_move(name):
    model = timm.layers.convert_sync_batchnorm(network(name))
    assert "BN404" not in codes(bnf.check_bn(model))  # before model.to("cuda")
    with group_on_cpu():
        assert "BN404" in codes(bnf.check_bn(model))


# what is compared


class WithLoss(nn.Module):
    """A model that gives out its loss first, as those of transformers do when they are handed labels."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, pixel_values, labels=None):
        logits = self.model(pixel_values)
        loss = nn.functional.cross_entropy(logits * 1e4, labels)  # far apart, where the logits are not
        return self.form(loss, logits)


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Pair(NamedTuple):
    loss: torch.Tensor
    answer: torch.Tensor


FORMS = {
    "tuple": lambda loss, logits: (loss, logits),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "dataclass": Output,
    "named tuple": Pair,
    "nested": lambda loss, logits: {"losses": [loss, {"all": loss[None]}], "heads": [logits]},
    "features first": lambda loss, logits: {"loss": loss, "hidden": logits.repeat(1, 2) * 1e4, "logits": logits},
}


@pytest.mark.parametrize(("name", "form"), [*(("resnet18", form) for form in FORMS), ("efficientnet_b0", "tuple")])
def test_predictions_are_compared_and_no_losses(name, form):
    def watch(model):
        with bnf.watch_bn(model) as watching:
            for images, labels in data:
                output = model(images) if model is bare else model(images, labels)
                first_tensor(output).sum().backward()
        return watching

    bare, data = settled(name), list(loader(16, batch_size=8))
    alone, wrapped = watch(bare).trace, watch(WithLoss(settled(name), FORMS[form])).trace
    assert [gap.distance for gap in wrapped.gaps] == pytest.approx([gap.distance for gap in alone.gaps], rel=1e-3)
    assert wrapped.gap.agreement == alone.gap.agreement
    assert wrapped.steps == 2  # the loss was seen to lead to a backward


def test_a_loss_of_the_loops_own_is_seen_as_well(name):
    model = WithLoss(settled(name), FORMS["tuple"])
    with bnf.watch_bn(model, rerun=False) as watch:
        for images, labels in loader(16, batch_size=8):
            nn.functional.cross_entropy(model(images, labels)[1], labels).backward()
    assert watch.trace.steps == 2
    assert watch.trace.unanswered == 1


@pytest.mark.parametrize(
    "form",
    [
        lambda loss, logits: loss,
        lambda loss, logits: {"loss_box": loss, "loss_class": loss * 2},
        lambda loss, logits: [{"boxes": row.expand(8, 4), "scores": row} for row in logits[:, :1]],
    ],
)
def test_where_no_prediction_is_found_nothing_is_compared(form):
    model = WithLoss(settled("resnet18"), form)
    with bnf.watch_bn(model) as watch:
        for images, labels in loader(16, batch_size=8):
            first_tensor(model(images, labels), lambda t: t.requires_grad).sum().backward()
    assert watch.trace.gap is None
    assert watch.findings.unjudged["BN201"] == "no prediction with a row for each image"


# statistics on their way


@pytest.fixture(scope="module")
def characters():
    """The embedded backbone and the images that its statistics come from, in batches of 49."""
    split = load_characters(train=49 * 8, validation=49)["train"].with_format("torch")
    images = torch.stack([image.float() for image in split["image"]]) / 255 * 2 - 1
    model = timm.create_model("bnf_resnet", pretrained=True)
    labels = torch.as_tensor(split["label"][:])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return model, list(zip(images[order].split(49), labels[order].split(49), strict=True))


def watched(model, optimizer, data, evaluated=None):
    with bnf.watch_bn(model, optimizer) as watch:
        for images, labels in data:
            train_step(model, optimizer, images, labels)
        if evaluated is not None:
            with torch.no_grad():
                model.eval()(evaluated)
            model.train()
    return watch


def from_scratch(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).train()


def test_statistics_that_warm_up_are_not_judged(name):
    model = from_scratch(name)
    data = list(loader(40, batch_size=8)) * 2
    watch = watched(model, sgd(model, lr=0.1), data)
    assert "BN201" not in codes(watch.findings)
    assert watch.findings.unjudged["BN201"] == "running statistics that have warmed up"
    assert set(watch.trace.warming) == set(bnf.find_bn_layers(model))
    again = watched(model, sgd(model, lr=0.1), data)  # 20 updates in all, of which the second watch saw 10
    assert set(again.trace.warming) == set(bnf.find_bn_layers(model))


def test_sources_that_did_not_count_their_updates_are_judged(name):
    model = settled(name)
    for layer in bnf.find_bn_layers(model).values():
        layer.num_batches_tracked.zero_()  # as state dicts from before there was a count
    assert not watched(model, sgd(model), loader(16, batch_size=8)).trace.warming


def test_averages_that_forget_their_construction_at_once_are_judged(name):
    model = from_scratch(name)
    bnf.apply_policy(model, bnf.BNPolicy(update_stats="cumulative"))
    assert not watched(model, sgd(model), loader(16, batch_size=8)).trace.warming


def test_momentum_of_0_between_updates_is_no_warming(name):
    """Sharpness-aware loops leave it at 0 after the second forward of each step."""
    model = settled(name)
    layers = bnf.find_bn_layers(model).values()
    with bnf.watch_bn(model, rerun=True) as watch:
        for images, labels in loader(16, batch_size=8):
            for momentum in (0.1, 0.0):
                for layer in layers:
                    layer.momentum = momentum
                nn.functional.cross_entropy(model(images), labels).backward()
    assert not watch.trace.warming
    assert "BN302" not in codes(watch.findings)


# mixed images


def mixed(data, seed):
    """Batches as timm's mixup and cutmix make them, one share for a whole batch."""
    draw = np.random.default_rng(seed)
    for images, labels in data:
        share, images = draw.beta(0.8, 0.8), images.clone()
        if draw.random() < 0.5:
            images = share * images + (1 - share) * images.flip(0)
        else:
            rows = round(images.shape[-2] * (1 - share) ** 0.5)
            images[..., :rows, :rows] = images.flip(0)[..., :rows, :rows]
        yield images, labels


def trained_on_mixed(characters, seed, steps=12):
    torch.manual_seed(seed)
    model, data = copy.deepcopy(characters[0]).train(), characters[1]
    return model, sgd(model, lr=1e-3), list(mixed((data * 3)[:steps], seed))


def test_mixed_batches_are_not_the_measure(characters):
    """Single mixed batches are far from the average that evaluation uses; clean ones are not."""
    said, worst = 0, 0.0
    for seed in range(20):
        watch = watched(*trained_on_mixed(characters, seed))
        said += "BN201" in codes(watch.findings)
        worst = max(worst, *(gap.distance for gap in watch.trace.gaps))
    assert worst > MOST_DISTANCE  # one of them alone would have been reported
    assert not said


def test_what_is_wrong_in_every_batch_is_still_found(characters):
    model, optimizer, data = trained_on_mixed(characters, 0)
    clean = characters[1][0][0]
    for layer in list(bnf.find_bn_layers(model).values())[3:]:
        layer.momentum = 1e-9
    victim = list(bnf.find_bn_layers(model).values())[3]
    victim.running_mean += 6 * victim.running_var.sqrt()
    assert "BN201" in codes(watched(model, optimizer, data, clean).findings)


def test_an_evaluated_batch_clears_the_network(name):
    model = settled(name)
    odd = [(images * 3 + 5, labels) for images, labels in loader(64, batch_size=16)]
    nn.init.normal_(model.get_classifier().weight, std=1.0)
    for layer in bnf.find_bn_layers(model).values():
        layer.momentum = 1e-9
    assert "BN201" in codes(watched(model, sgd(model, lr=1e-9), odd).findings)
    clean = next(iter(loader(64, batch_size=64)))[0]
    watch = watched(model, sgd(model, lr=1e-9), odd, clean)
    assert watch.trace.held_out.distance < MOST_DISTANCE
    assert "BN201" not in codes(watch.findings)


def test_one_batch_is_no_evidence(name):
    watch = watched(settled(name), sgd(network(name)), loader(8, batch_size=8))
    assert watch.findings.unjudged["BN201"] == "fewer than 2 training batches of 8 images"


# chance


def accumulating(draw, *, images, places, steps, shift=0.0):
    """What is said of a small network whose loop accumulates gradients over some micro-batches per step."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        for _ in range(steps):
            for place in range(places):
                model(draw(images) + shift * (place == 1)).sum().backward()
            optimizer.step()
    return watch.findings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("images", "places", "steps"), [(2, 8, 3), (2, 8, 6), (4, 2, 3), (1, 4, 12), (16, 3, 4)])
def test_micro_batches_drawn_alike_are_no_domains(kind, images, places, steps):
    """The rate of false alarms that BN209 states, 1 % of watches at most, on 40 seeds of each kind."""
    said = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        found = accumulating(lambda n: pictures(kind, n, generator), images=images, places=places, steps=steps)  # noqa: B023
        said += "BN209" in codes(found)
    assert not said


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_second_domain_is_still_found(kind):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        found = accumulating(lambda n: pictures(kind, n, generator), images=16, places=2, steps=10, shift=3.0)  # noqa: B023
        assert "BN209" in codes(found)


def test_too_few_micro_batches_are_no_evidence():
    found = accumulating(lambda n: torch.randn(n, 3, 8, 8), images=2, places=8, steps=3, shift=9.0)
    assert found.unjudged["BN209"] == "fewer than 3 steps of several forwards, with 12 images at each place"
    assert "BN209" not in accumulating(lambda n: torch.randn(n, 3, 8, 8), images=4, places=1, steps=3).unjudged


def test_the_same_micro_batches_in_each_step_tell_nothing_of_others():
    two = iter([torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)] * 9)
    assert "BN209" not in codes(accumulating(lambda n: next(two), images=4, places=2, steps=9))


# intent


class Momentum(nn.Module):
    """A query encoder that learns, and a key encoder that follows it, as in MoCo and BYOL."""

    def __init__(self, name):
        super().__init__()
        self.query, self.key = network(name), network(name).requires_grad_(False)

    def forward(self, images):
        with torch.no_grad():
            target = self.key(images).softmax(1)
        return nn.functional.cross_entropy(self.query(images), target)


def momentum_watch(model):
    optimizer = torch.optim.SGD(bnf.param_groups(model.query, weight_decay=0.0), lr=1e-4)
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        for images, _ in loader(8, batch_size=4):
            model(images).backward()
            optimizer.step()
    return watch.findings


def test_what_is_expected_of_layers_is_not_reported(name):
    model = Momentum(name)
    keys = set(bnf.find_bn_layers(model.key))
    assert set(the(bnf.check_bn(model), "BN102").where) == {f"key.{each}" for each in keys}
    assert "BN303" in codes(momentum_watch(model))
    before = copy.deepcopy(model.state_dict())
    assert bnf.expect(model, ["BN102", "BN303"], layers="key.*") is model
    assert model.state_dict().keys() == before.keys()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not codes(bnf.check_bn(each)) & {"BN102", "BN303"}
        assert not codes(momentum_watch(each)) & {"BN102", "BN303"}


def test_other_layers_and_other_rules_are_reported_as_before(name):
    model = bnf.expect(Momentum(name), "BN102", layers="key.*")
    model.query.get_submodule(INNER[name]).requires_grad_(False)
    found = the(bnf.check_bn(model), "BN102")
    assert found.where == (f"query.{INNER[name]}",)
    assert found.measured.startswith("1 layers")
    paste(found.fix, model=model)
    assert "BN102" not in codes(bnf.check_bn(model))
    assert "BN303" in codes(momentum_watch(model))


def test_fixes_do_not_reach_what_is_expected(name):
    model = nn.ModuleDict(
        {"body": network(name).requires_grad_(False), "other": nn.Linear(2, 2), "head": nn.Linear(2, 2)}
    )
    kept = f"body.{INNER[name]}"
    bnf.expect(model, "BN102", layers=kept)
    found = the(bnf.check_bn(model), "BN102")
    assert set(found.where) == set(bnf.find_bn_layers(model)) - {kept}
    paste(found.fix, model=model)
    assert not codes(bnf.check_bn(model))
    fixed = {n for n, layer in bnf.find_bn_layers(model).items() if switches_of(layer).train_stats == "running"}
    assert fixed == set(found.where)


def test_rules_and_layers_that_are_not_there_are_refused(name):
    with pytest.raises(bnf.errors.SelectionError, match="codes: there is no rule 'BN999'"):
        bnf.expect(network(name), "BN999")
    with pytest.raises(bnf.errors.SelectionError, match="matches no BN layer"):
        bnf.expect(network(name), "BN102", layers="key.*")


# parts that loops call by themselves


class Module(nn.Module):
    """As of Lightning: the loop calls methods of it, and these its networks; nobody calls the whole."""

    def __init__(self, name):
        super().__init__()
        self.model, self.other = settled(name), nn.Linear(2, 2)

    def training_step(self, images, labels):
        return nn.functional.cross_entropy(self.model(images), labels)


def test_parts_that_are_called_by_themselves_are_seen(name):
    module = Module(name)
    optimizer = sgd(module)
    with bnf.watch_bn(module.model, optimizer) as alone, bnf.watch_bn(module, optimizer) as watch:
        for images, labels in loader(32, batch_size=8):
            module.training_step(images, labels).backward()
            optimizer.step()
    assert [each.part for each in watch.trace.forwards] == ["model"] * 4
    assert all(each.trains and each.updated and each.backwards for each in watch.trace.forwards)
    assert [gap.images for gap in watch.trace.gaps] == [8] * 4
    distances = [[gap.distance for gap in each.trace.gaps] for each in (watch, alone)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)
    assert "no training step" not in watch.findings.unjudged.values()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_whole_that_is_called_has_no_parts(name):
    watch = watched(settled(name), sgd(network(name)), loader(16, batch_size=8))
    assert [each.part for each in watch.trace.forwards] == ["", ""]


def test_a_forward_that_fails_hides_none_after_it(name):
    module = Module(name)
    with bnf.watch_bn(module, rerun=False) as watch:
        with pytest.raises(RuntimeError):
            module.model(torch.zeros(2, 5, 32, 32))
        module.training_step(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)).backward()
    assert [each.part for each in watch.trace.forwards] == ["model", "model"]
    assert watch.trace.forwards[-1].backwards == 1


def test_the_same_images_in_two_parts_are_no_repetition(name):
    pair = nn.ModuleDict({"one": network(name), "other": network(name)})
    optimizer = sgd(pair)

    def step(images, parts):
        sum(pair[part](images).sum() for part in parts).backward()
        optimizer.step()

    for parts, said in ((("one", "other"), False), (("one", "other", "one"), True)):
        with bnf.watch_bn(pair, optimizer, rerun=False) as watch:
            for images, _ in loader(8, batch_size=4):
                step(images, parts)
        assert ("BN302" in codes(watch.findings)) == said


def test_training_in_evaluation_mode_is_told_by_part(name):
    """A frozen network in evaluation mode that gradients pass, beside one that trains, leaks no mode."""
    pair = nn.ModuleDict({"model": network(name), "loss": network(name).requires_grad_(False)})

    def watch(modes):
        with bnf.watch_bn(pair, rerun=False) as watching:
            for mode in modes:
                pair.model.train(mode)
                images = torch.randn(4, 3, 32, 32, requires_grad=True)
                (pair.model(images).sum() + pair.loss.eval()(images).sum()).backward()
        return codes(watching.findings)

    assert "BN304" not in watch([True, True])
    assert "BN304" in watch([True, False])


# freezing in parts


def test_a_teacher_of_another_type_is_no_missed_type():
    pair = nn.ModuleDict({"student": network("resnet18"), "teacher": network("efficientnet_b0")})
    pair.teacher.requires_grad_(False)
    pair.teacher.eval()
    assert "BN107" not in codes(bnf.check_bn(pair))
    for layer in bnf.find_bn_layers(pair.teacher).values():
        layer.requires_grad_(False)
    for parameter in pair.teacher.parameters():
        parameter.requires_grad_(parameter.ndim > 1)  # BN alone is frozen, and only that of one type
    assert "BN107" in codes(bnf.check_bn(pair))


def test_the_classifier_of_a_wrapped_network_is_found(name):
    wrapper = nn.ModuleDict({"model": network(name)})
    for parameter in wrapper.parameters():
        parameter.requires_grad_(False)
    wrapper.model.get_classifier().requires_grad_(True)
    found = codes(bnf.check_bn(wrapper))
    assert "BN305" in found
    assert "BN102" not in found


# averages


def averaged_from(model, buffers):
    """An average of weights that have moved since, without the statistics of layers whose names these are."""
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        for each, layer in bnf.find_bn_layers(model).items():
            if each not in buffers:
                layer.running_mean.add_(1)
    return average


def test_frozen_layers_of_an_average_are_the_models(name):
    model = network(name)
    first = next(iter(bnf.find_bn_layers(model)))
    model.requires_grad_(False)
    model.get_submodule(first).eval()
    model.get_classifier().requires_grad_(True)
    assert "BN601" not in codes(bnf.check_bn(model, averaged=averaged_from(model, [first])))


@pytest.mark.parametrize("training", [True, False])
def test_nor_are_those_before_which_nothing_moved(name, training):
    model = network(name).train(training)
    first, *_, last = bnf.find_bn_layers(model)
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    assert "BN601" not in codes(bnf.check_bn(model, averaged=averaged_from(model, [first])))
    assert the(bnf.check_bn(model, averaged=averaged_from(model, [last])), "BN601").where == (last,)


# schedule-free


def test_schedule_frees_own_way_to_statistics(name):
    """Forwards in training mode without gradients before an evaluation, as its README teaches."""
    schedulefree = pytest.importorskip("schedulefree")
    model = settled(name)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-4)

    def watch(*, anew, evaluated):
        optimizer.train()
        with bnf.watch_bn(model, optimizer, rerun=False) as watching:
            for images, labels in loader(16, batch_size=8):
                train_step(model.train(), optimizer, images, labels)
            optimizer.eval()
            with torch.no_grad():
                if anew:
                    model(torch.randn(8, 3, 32, 32))
                if evaluated:
                    model.eval()(torch.randn(8, 3, 32, 32))
        return codes(watching.findings) & {"BN304", "BN605"}

    assert watch(anew=True, evaluated=True) == set()
    assert watch(anew=False, evaluated=True) == {"BN605"}
    assert watch(anew=True, evaluated=False) == {"BN304"}  # this was the evaluation


# training that moves what fixed statistics describe


def test_training_that_moves_deeper_inputs_makes_no_other_domain(characters):
    model, data = bnf.freeze_bn(copy.deepcopy(characters[0]).train(), affine=False), characters[1]
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for conv in convs[2:]:
            conv.weight.mul_(3)  # as far as a long training may get
    watch = watched(model, sgd(model, lr=1e-9), data[:3])
    drifts = [each.drift for each in watch.trace.gap.layers.values()]
    assert max(drifts) > 0.75 > 0.25 > drifts[0]
    assert "BN203" not in codes(watch.findings)
    dark = [(images * 0.2 - 0.7, labels) for images, labels in data[:3]]
    assert "BN203" in codes(watched(model, sgd(model, lr=1e-9), dark).findings)


# what could not be judged


def test_an_all_clear_says_what_it_did_not_see(name):
    model = settled(name)
    found = bnf.check_bn(model)
    assert not found
    assert found.unjudged["BN503"] == "no optimizer"
    assert "BN503" not in bnf.check_bn(model, sgd(model)).unjudged
    assert "BN206" not in bnf.check_bn(model, batch_size=32).unjudged
    assert str(found).startswith("no BatchNorm pitfall found\n\n")
    last = str(found).splitlines()[-1]
    assert last == render(found, "lines")
    assert last.startswith(f"{len(found.unjudged)} rules had nothing to look at: no ")
    assert "no optimizer, " in last
    assert last.count("no optimizer") == 1
    assert render(found, "json") == "[]"
    assert found.to_dict()["unjudged"] == found.unjudged


def test_a_watch_that_saw_nothing_clears_nothing(name):
    with bnf.watch_bn(network(name)) as watch:
        pass
    assert {code for code, rule in all_rules().items() if rule.is_dynamic} <= watch.findings.unjudged.keys()


def test_a_watch_without_evaluation_says_so(name):
    model = settled(name)
    model.get_classifier().reset_parameters()  # timm's own start is BN505
    watch = watched(model, sgd(model), loader(16, batch_size=8))
    assert not watch.findings
    assert watch.findings.unjudged["BN304"] == "no evaluation batch"
    assert watch.findings.unjudged["BN210"] == "no evaluation batch of images"
    full = watched(model, sgd(model), loader(16, batch_size=8), torch.randn(8, 3, 32, 32))
    assert not {"BN304", "BN210"} & full.findings.unjudged.keys()


def test_what_either_half_has_judged_is_judged():
    one, other = Findings((), {"BN201": "a", "BN304": "b"}), Findings((), {"BN201": "c", "BN503": "d"})
    assert one.joined(other).unjudged == {"BN201": "c"}
