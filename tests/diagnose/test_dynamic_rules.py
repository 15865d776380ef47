"""Each dynamic rule fires on its pitfall in a running loop, names the right layer, and is silent once repaired."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.bn.folding.fold import fold_report
from bnfinetune.diagnose.first_loss import first_loss
from tests.diagnose.support import FAMILIES, INNER, STAGE, codes, loader, network, paste, settled, sgd, the, train_step


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def batches(count=2, **options):
    return list(loader(4 * count, batch_size=4, **options))


def train(model, optimizer, data):
    for images, labels in data:
        train_step(model, optimizer, images, labels)


def watched(model, loop, optimizer=None, **options):
    with bnf.watch_bn(model, optimizer, rerun=False, **options) as watch:
        loop()
    return watch


# freezing


def test_train_undoes_evaluation_mode(name):
    model = network(name)
    optimizer = sgd(model)
    stage = model.get_submodule(STAGE[name])

    def epochs():
        for _ in range(2):
            train(model, optimizer, batches(1))
            model.train()

    stage.eval()
    found = the(watched(model, epochs, optimizer).findings, "BN101")
    assert set(found.where) == {n for n in bnf.find_bn_layers(model) if n.startswith(STAGE[name] + ".")}
    paste(found.fix, model=model)
    assert "BN101" not in codes(watched(model, epochs, optimizer).findings)


def test_switching_the_whole_model_for_validation_is_no_undone_freeze(name):
    model = network(name)
    optimizer = sgd(model)

    def loop():
        train(model, optimizer, batches(1))
        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 3, 32, 32))
        model.train()
        train(model, optimizer, batches(1))

    assert not watched(model, loop, optimizer).findings


# what the statistics describe


@pytest.fixture(scope="module")
def character_network():
    """The embedded backbone and images that its statistics come from."""
    import timm

    from bnfinetune.demo import load_characters

    split = load_characters(train=49 * 3, validation=49)["train"].with_format("torch")
    images = torch.stack([image.float() for image in split["image"]]) / 255 * 2 - 1
    model = timm.create_model("bnf_resnet", pretrained=True)
    return model, list(zip(images.split(49), torch.as_tensor(split["label"][:]).split(49), strict=True))


def test_a_shifted_layer_makes_training_and_evaluation_disagree(character_network):
    model, data = copy.deepcopy(character_network[0]).train(), character_network[1]
    victim = list(bnf.find_bn_layers(model))[3]
    model.get_submodule(victim).running_mean += 6 * model.get_submodule(victim).running_var.sqrt()
    optimizer = sgd(model, lr=1e-6)
    with bnf.watch_bn(model, optimizer) as watch:
        train(model, optimizer, data[:2])
    found = the(watch.findings, "BN201")
    assert found.where == (victim,)
    paste(found.fix, model=model, loader=data)
    with bnf.watch_bn(model, optimizer) as watch:
        train(model, optimizer, data[:2])
    assert not watch.findings


def test_no_gap_on_the_data_of_the_statistics(character_network):
    model, data = copy.deepcopy(character_network[0]).train(), character_network[1]
    optimizer = sgd(model, lr=1e-4)
    with bnf.watch_bn(model, optimizer) as watch:
        train(model, optimizer, data)
    assert not watch.findings
    assert watch.trace.gap.distance < 0.15


def test_leaving_the_watch_changes_nothing(name):
    model = network(name)
    model.get_submodule(INNER[name]).eval()
    images, labels = batches(1)[0]
    with bnf.watch_bn(model) as watch:
        F.cross_entropy(model(images), labels).backward()
        before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        state = torch.random.get_rng_state()
    assert watch.trace.gap is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_frozen_statistics_of_another_domain(character_network):
    model, data = bnf.freeze_bn(copy.deepcopy(character_network[0]).train()), character_network[1]
    dark = [(images * 0.2 - 0.7, labels) for images, labels in data]
    optimizer = sgd(model, lr=1e-6)

    def watch(batches):
        with bnf.watch_bn(model, optimizer) as watching:
            train(model, optimizer, batches)
        return watching.findings

    assert not watch(data[:2])
    found = the(watch(dark[:2]), "BN203")
    assert "bn1" in found.where or "conv1.1" in found.where
    paste(found.fix, model=model, loader=dark)
    assert not watch(dark[:2])


def test_folded_layers_are_judged_by_what_their_convolutions_are_handed(character_network):
    """A folded BN layer itself sees what is normalised already, which no stored statistic describes."""
    model, data = bnf.freeze_bn(copy.deepcopy(character_network[0]).train()), character_network[1]
    bnf.fold_bn(model, data[0][0][:1])
    dark = [(images * 0.2 - 0.7, labels) for images, labels in data]
    optimizer = sgd(model, lr=1e-6)

    def watch(batches):
        with bnf.watch_bn(model, optimizer) as watching:
            train(model, optimizer, batches)
        return watching.findings

    assert not watch(data[:2])
    assert "BN203" in codes(watch(dark[:2]))
    assert fold_report(model).folded


def test_statistics_that_training_has_left_behind_are_no_other_domain(character_network):
    """Weights before the first layer learn, and the statistics behind them are frozen: nobody's domain has changed."""
    model, data = bnf.freeze_bn(copy.deepcopy(character_network[0]).train()), character_network[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)

    def move(*_):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 4:
                    parameter.mul_(3.0)

    optimizer.register_step_post_hook(move)
    with bnf.watch_bn(model, optimizer) as watch:
        train(model, optimizer, data[:2])
    assert next(iter(watch.trace.gap.layers.values())).drift > 0.75
    assert "BN203" not in codes(watch.findings)
    assert "BN203" not in watch.findings.unjudged
    with bnf.watch_bn(model, optimizer) as watch:
        train(model, optimizer, data[:2])
    assert "BN203" not in codes(watch.findings)
    assert watch.findings.unjudged["BN203"] == "no first step: the watch began when the weights had moved already"


# the start


def start(model, images, labels, criterion=F.cross_entropy, steps=2):
    optimizer = sgd(model, lr=1e-6)
    with bnf.watch_bn(model, optimizer, rerun=False) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
    return watch


def a_batch(count=16):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3)), torch.arange(count) % 5


@pytest.mark.parametrize("scale", [1.0, 1024.0, 1 / 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_head_that_is_sure_of_nothing_it_has_learned(name, scale, smoothing):
    model, (images, labels) = network(name), a_batch(32)
    nn.init.normal_(model.get_classifier().weight, std=3.0, generator=torch.Generator().manual_seed(0))

    def criterion(scores, wanted):  # scaled, as GradScaler and accumulation do
        return scale * F.cross_entropy(scores, wanted, label_smoothing=smoothing)

    wanted = F.cross_entropy(copy.deepcopy(model)(images), labels).item()
    watch = start(model, images, labels, criterion, steps=1)
    found = the(watch.findings, "BN505")
    assert found.where == ("fc" if name == "resnet18" else "classifier",)
    assert watch.trace.first_loss.value == pytest.approx(wanted, rel=1e-4)
    paste(found.fix, model=model)
    watch = start(model, images, labels, criterion)
    assert "BN505" not in codes(watch.findings)
    assert watch.trace.first_loss.value == pytest.approx(watch.trace.first_loss.chance, rel=1e-3)


def test_a_head_that_has_learned_something_is_left_alone(name):
    """However much it costs: a quarter of these images are of another class than it is sure of."""
    model, (images, _) = network(name), a_batch(32)
    nn.init.normal_(model.get_classifier().weight, std=3.0, generator=torch.Generator().manual_seed(0))
    labels = copy.deepcopy(model)(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 5
    watch = start(model, images, labels, steps=1)
    assert watch.trace.first_loss.value > 2 * watch.trace.first_loss.chance
    assert "BN505" not in codes(watch.findings)


@pytest.mark.parametrize("half", [False, True])
def test_the_first_loss_is_read_off_the_gradient_in_half_precision_too(name, half):
    model, (images, labels) = network(name), a_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        watch = start(model, images, labels, steps=1)
        wanted = F.cross_entropy(network(name)(images), labels).item()
    assert watch.trace.first_loss.value == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loud", [0.1, 3.0, 30.0])
def test_the_loss_that_a_gradient_tells_of(classes, smoothing, right, loud):
    """Of networks that know nothing, much or all of it, and say so quietly or loudly."""
    generator = torch.Generator().manual_seed(0)
    scores = loud * torch.randn(64, classes, generator=generator)
    labels = torch.randint(0, classes, (64,), generator=generator)
    known = torch.rand(64, generator=generator) < right
    labels[known] = scores.argmax(1)[known]
    scores.requires_grad_()
    F.cross_entropy(scores, labels, label_smoothing=smoothing).backward()
    found = first_loss(scores, scores.grad)
    wanted = F.cross_entropy(scores, labels).item()
    if found is None:  # all surer than the labels
        assert smoothing
        assert right == 1.0
        assert loud > 1
    else:
        assert found.value == pytest.approx(wanted, rel=0.02, abs=0.02)
        every = [F.cross_entropy(scores, torch.full_like(labels, label)).item() for label in range(classes)]
        assert found.blind == pytest.approx(sum(every) / classes, rel=1e-5)
        assert found.knows_nothing or right
        assert not (found.knows_nothing and right and loud > 1)


def test_a_gradient_of_zeros_tells_nothing():
    assert first_loss(100 * torch.eye(5), torch.zeros(5, 5)) is None


def test_the_watch_keeps_no_graph(name):
    model, (images, labels) = network(name), a_batch()
    with bnf.watch_bn(model, sgd(model), rerun=False):
        scores = model(images)
        kept = weakref.ref(scores)
        F.cross_entropy(scores, labels).backward()
        del scores
        assert kept() is None


def test_other_losses_and_later_steps_have_no_first_loss(name):
    images, labels = a_batch()
    one_hot = F.one_hot(labels, 5).float()
    for criterion in (F.binary_cross_entropy_with_logits, F.mse_loss):
        watch = start(network(name), images, one_hot, criterion)
        assert watch.trace.first_loss is None
        assert watch.findings.unjudged["BN505"] == "no first batch of class scores, of images with one label each"
    ignored = start(network(name), images, torch.full_like(labels, -100), steps=1)
    assert ignored.trace.first_loss is None
    few = start(network(name), images[:4], labels[:4], steps=1)
    assert few.trace.first_loss is None


def test_entropy_minimisation_that_collapses():
    model = network("resnet18").requires_grad_(False)
    nn.init.normal_(model.fc.weight, std=0.3)
    layers = bnf.find_bn_layers(model)
    for layer in layers.values():
        layer.requires_grad_(True)
    start = copy.deepcopy(model.state_dict())

    def adapt(lr):
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=lr) if learning else None
        with bnf.watch_bn(model, optimizer, rerun=False) as watch:
            for images, _ in list(loader(32, batch_size=16)) * 4:
                entropy = torch.distributions.Categorical(logits=model(images)).entropy().mean()
                if optimizer is not None:
                    optimizer.zero_grad()
                    entropy.backward()
                    optimizer.step()
        return watch.findings

    assert "BN204" not in codes(adapt(1e-4))
    found = the(adapt(0.1), "BN204")
    assert set(found.where) == set(layers)
    model.load_state_dict(start)
    paste(found.fix, model=model)
    model.eval()
    assert "BN204" not in codes(adapt(0.1))


def test_two_domains_through_one_set_of_statistics(name):
    model = network(name)
    optimizer = sgd(model)

    def loop(second):
        for images, labels in batches(3):
            first = F.cross_entropy(model(images), labels)
            (first + F.cross_entropy(second(images * 0.5 + 1.0), labels)).backward()
            optimizer.step()

    found = the(watched(model, lambda: loop(model), optimizer).findings, "BN209")
    assert set(found.where) == set(bnf.find_bn_layers(model))

    def second(images):
        scope = paste(found.fix, model=model, second=images)
        return scope["output"]

    assert "BN209" not in codes(watched(model, lambda: loop(second), optimizer).findings)


def test_accumulated_micro_batches_are_no_domains(name):
    model = network(name)
    optimizer = sgd(model)

    def loop():
        for number, (images, labels) in enumerate(batches(6)):
            F.cross_entropy(model(images), labels).backward()
            if number % 2:
                optimizer.step()

    assert not watched(model, loop, optimizer).findings


def test_other_resolution_in_validation(name):
    model = network(name)
    optimizer = sgd(model)

    def loop(size):
        train(model, optimizer, batches(1))
        with torch.no_grad():
            model.eval()(torch.randn(2, 3, size, size))
        model.train()

    found = the(watched(model, lambda: loop(48), optimizer).findings, "BN210")
    assert "32 and evaluated at 48" in found.measured
    assert not watched(model, lambda: loop(32), optimizer).findings


# hidden forwards


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_twice(name, reentrant):
    from torch.utils.checkpoint import checkpoint

    model = network(name)
    stage = model.get_submodule(STAGE[name])
    inner = stage.forward
    stage.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    optimizer = sgd(model)
    layer = model.get_submodule(INNER[name])
    batches_before = int(layer.num_batches_tracked)
    found = the(watched(model, lambda: train(model, optimizer, batches(2)), optimizer).findings, "BN301")
    assert int(layer.num_batches_tracked) - batches_before == 4
    assert set(found.where) == {n for n in bnf.find_bn_layers(model) if n.startswith(STAGE[name] + ".")}
    paste(found.fix, model=model)
    assert "BN301" not in codes(watched(model, lambda: train(model, optimizer, batches(2)), optimizer).findings)


def test_second_pass_over_the_same_batch(name):
    model = network(name)
    optimizer = sgd(model)

    def loop(second):
        for images, labels in batches(2):
            F.cross_entropy(model(images), labels).backward()
            F.cross_entropy(second(images.clone()), labels).backward()
            optimizer.step()

    found = the(watched(model, lambda: loop(model), optimizer).findings, "BN302")
    assert set(found.where) == set(bnf.find_bn_layers(model))

    def second(images):
        return paste(found.fix, model=model, images=images)["output"]

    assert not watched(model, lambda: loop(second), optimizer).findings


class Detector(nn.Module):
    """Takes images of any sizes in a list, as torchvision's detectors do; gives losses, or a dict for each image."""

    def __init__(self, name):
        super().__init__()
        self.net = network(name)

    def forward(self, images, targets=None):
        scores = self.net(torch.cat([F.interpolate(image[None], (32, 32)) for image in images]))
        return {"loss": scores.square().mean()} if self.training else [{"scores": row} for row in scores]


def listed(count, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 40 + 3 * index, 48, generator=draw) for index in range(count)]


@pytest.mark.parametrize("again", [True, False])
def test_lists_of_images_are_batches(name, again):
    model = Detector(name)
    optimizer = sgd(model)

    def loop():
        for step in range(2):
            for seed in (step, step if again else step + 10):
                images = listed(2, seed)
                model(images, [{} for _ in images])["loss"].backward()
            optimizer.step()

    watch = watched(model, loop, optimizer)
    assert [(each.images, each.size) for each in watch.trace.forwards] == [(2, None)] * 4
    wanted = torch.stack([image.mean((1, 2)) for image in listed(2, 0)]).mean(0)
    torch.testing.assert_close(watch.trace.forwards[0].mean, wanted, rtol=0.05, atol=0)
    assert ("BN302" in codes(watch.findings)) == again


def test_the_same_batch_in_the_next_step_is_fine(name):
    model = network(name)
    optimizer = sgd(model)
    data = batches(1)
    assert not watched(model, lambda: train(model, optimizer, data * 2), optimizer).findings


class Pair(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, images):
        with torch.no_grad():
            target = self.teacher(images).softmax(1)
        return F.cross_entropy(self.student(images), target)


def test_a_teacher_that_drifts(name):
    pair = Pair(network(name), network("test_resnet").requires_grad_(False)).train()
    optimizer = sgd(pair)
    data = [images for images, _ in batches(2)]

    def loop():
        for images in data:
            pair(images).backward()
            optimizer.step()

    found = the(watched(pair, loop, optimizer).findings, "BN303")
    assert set(found.where) == {n for n in bnf.find_bn_layers(pair) if n.startswith("teacher.")}
    paste(found.fix, model=pair)
    before = copy.deepcopy(pair.teacher.state_dict())
    assert not watched(pair, loop, optimizer).findings
    assert all(torch.equal(value, before[key]) for key, value in pair.teacher.state_dict().items())


def test_validation_in_training_mode(name):
    model = network(name)
    optimizer = sgd(model)

    def loop(fix=""):
        train(model, optimizer, batches(1))
        paste(fix, model=model)
        with torch.inference_mode():
            model(torch.randn(4, 3, 32, 32))
        model.train()

    found = the(watched(model, loop, optimizer).findings, "BN304")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert not watched(model, lambda: loop(found.fix), optimizer).findings


def test_training_goes_on_in_evaluation_mode(name):
    model = network(name)
    optimizer = sgd(model)

    def loop(fix=""):
        train(model, optimizer, batches(1))
        with torch.no_grad():
            model.eval()(torch.randn(2, 3, 32, 32))
        paste(fix, model=model)
        train(model, optimizer, batches(1))
        model.train()

    found = the(watched(model, loop, optimizer).findings, "BN304")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert not watched(model, lambda: loop(found.fix), optimizer).findings


def test_torchs_update_bn_re_estimates_on_purpose(name):
    model = network(name)
    data = [images for images, _ in batches(2)]
    found = watched(model, lambda: torch.optim.swa_utils.update_bn(data, model)).findings
    assert "BN304" not in codes(found)


def test_update_bn_destroys_an_untracked_freeze(name):
    """`update_bn` resets and re-estimates layers that were frozen by mode, and leaves momentum None if it fails."""
    model = network(name)
    model.get_submodule(STAGE[name]).eval()
    with pytest.raises(TypeError):
        torch.optim.swa_utils.update_bn([{"image": torch.zeros(2, 3, 32, 32)}], model)
    assert "BN106" in codes(bnf.check_bn(model.train()))


# numerics


def test_overflow_in_a_watched_step(name):
    model = network(name)
    images = torch.full((4, 3, 32, 32), torch.inf)

    def loop():
        with torch.enable_grad():
            model(images)

    found = the(watched(model, loop).findings, "BN501")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    paste(found.fix, model=model, loader=loader())
    bnf.apply_policy(model, bnf.BNPolicy(update_stats="ema"))  # the remedy against the next one
    assert not watched(model, loop).findings


# the watch itself


def test_a_sound_loop_is_silent(name):
    model = settled(name)
    optimizer = sgd(model)

    def loop():
        for _ in range(2):
            train(model, optimizer, batches(2))
            model.eval()
            with torch.no_grad():
                model(torch.randn(4, 3, 32, 32))
            model.train()

    assert not watched(model, loop, optimizer).findings


@pytest.mark.parametrize("affine", [True, False])
def test_policies_are_silent(name, affine):
    model = bnf.freeze_bn(settled(name), affine=affine)
    optimizer = sgd(model, lr=1e-9)  # a random network with fixed statistics has huge gradients
    with bnf.watch_bn(model, optimizer) as watch:
        train(model, optimizer, batches(2))
    assert not watch.findings


def test_findings_survive_an_exception(name):
    model = network(name)
    watch = bnf.watch_bn(model)

    def loop():
        with watch, torch.no_grad():
            model(torch.randn(4, 3, 32, 32))
            raise RuntimeError("out of coffee")

    with pytest.raises(RuntimeError, match="out of coffee"):
        loop()
    assert codes(watch.findings) == {"BN304"}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_that_cannot_be_run_again_is_said_once():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            if not self.training:
                raise KeyError("needs targets")
            return self.bn(x)

    with pytest.warns(UserWarning, match="BN201 and BN203"), bnf.watch_bn(Picky()) as watch:
        watch._case.model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert watch.trace.gap is None


def test_unknown_rules_are_refused_before_any_step():
    with pytest.raises(bnf.errors.SelectionError, match="no rule 'BN999'"):
        bnf.watch_bn(network("resnet18"), ignore=["BN999"])


# averages


def test_the_average_of_an_optimizer_wants_statistics_of_its_own(name):
    schedulefree = pytest.importorskip("schedulefree")
    model = network(name)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    data = batches(2)

    def loop(before_evaluation=lambda: None, switch=True):
        optimizer.train()
        train(model.train(), optimizer, data)
        if switch:
            optimizer.eval()
        before_evaluation()
        with torch.no_grad():
            model.eval()(data[0][0])
            model(data[1][0])

    found = the(watched(model, loop, optimizer).findings, "BN605")
    assert set(found.where) == set(bnf.find_bn_layers(model))
    assert "2 evaluation forwards" in found.measured
    repaired = watched(model, lambda: loop(lambda: paste(found.fix, model=model, loader=data)), optimizer)
    assert "BN605" not in codes(repaired.findings)
    plain = watched(model, lambda: loop(switch=False), optimizer)  # evaluates what was trained
    assert "BN605" not in codes(plain.findings)
    bnf.freeze_bn(model)
    assert "BN605" not in codes(watched(model, loop, optimizer).findings)  # statistics do not move
