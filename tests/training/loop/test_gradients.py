"""Gradients of several ranks: every image of an update weighs the same, wherever it is and whatever others hold."""

import gc
import json
import weakref

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import bnfinetune as bnf
from bnfinetune.recipe_files import load_recipe
from bnfinetune.training.data.loaders import ImageLoader
from bnfinetune.training.launch import start_accelerator
from bnfinetune.training.loop.gradients import Gradients
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.run import finetune
from tests.bn.distributed import run_ranks
from tests.training.loop.test_guard import settings
from tests.training.support import before_ending, write_images
from tests.training.test_run_bn import write_domains

NETWORKS = ["test_resnet", "test_efficientnet"]
# images of each micro-batch, by rank: ragged over ranks, over micro-batches, and both
SHARES = {
    "3 + 2": [[3], [2]],
    "two micro-batches": [[3, 3], [3, 1]],
    "three ranks": [[4], [1], [2]],
    "three ranks, two micro-batches": [[2, 1], [2, 2], [1, 1]],
}


def network(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    for layer in bnf.find_bn_layers(model).values():
        layer.running_mean.normal_(std=0.1)
    bnf.freeze_bn(model)  # or images would be normalised with others on fewer ranks
    return model.double().train()


def batches(sizes):
    images = torch.randn(sum(sizes), 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(sum(sizes)) % 3
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def gradients_of(rank, name, shares, exchanged):
    recipe = load_recipe("freeze_bn", {"train.auto_batch": exchanged})
    accelerator = start_accelerator()
    model = network(name)
    every = batches([size for share in shares for size in share])
    first = sum(map(len, shares[:rank]))
    mine = every[first : first + len(shares[rank])]
    gradients = Gradients(recipe, accelerator)
    assert gradients.exchanges == exchanged
    forward = model if exchanged else DistributedDataParallel(model, broadcast_buffers=False)
    loss = gradients.compute(
        forward,
        mine,
        gradients.count(mine),
        lambda batch, _: batch,
        lambda piece: F.cross_entropy(forward(piece[0]), piece[1]),
    )
    return float(loss), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("exchanged", [False, True], ids=["DDP", "one exchange"])
def test_ragged_batches_of_several_ranks_equal_one_process(exchanged, shares, name, tmp_path):
    sizes = SHARES[shares]
    model = network(name)
    whole = [torch.cat(part) for part in zip(*batches([n for share in sizes for n in share]), strict=True)]
    expected = F.cross_entropy(model(whole[0]), whole[1])
    expected.backward()
    found = run_ranks(len(sizes), gradients_of, tmp_path, name, sizes, exchanged)
    assert sum(loss for loss, _ in found) / len(found) == pytest.approx(float(expected), abs=1e-6)
    for _, gradients in found:
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-12, atol=1e-12, msg=key)


PLAIN = {"data.augment.scale": [1.0, 1.0], "data.augment.ratio": [1.0, 1.0], "data.augment.hflip": 0.0,
         "optim.name": "sgd", "optim.schedule.name": "constant", "optim.schedule.warmup_fraction": 0.0}  # fmt: skip


def train(options):
    finetune("freeze_bn", **options)


def test_a_run_with_a_ragged_last_batch_is_the_same_on_two_ranks(nursery, tmp_path):
    """15 images in batches of 4: the last is of 3, as 2 + 1; the training loss is that of all of them too."""
    source = write_images(tmp_path / "images", train=5)
    one = settings(source, tmp_path / "one", **PLAIN, **{"train.batch_size": 4, "evaluate.every_steps": 1})
    two = {**one, "train.batch_size": 2, "run.dir": str(tmp_path / "two")}
    first = bnf.finetune("freeze_bn", **one)
    assert nursery.run(train, two, ranks=2) == [0, 0], nursery.said()
    weights = [load_file(tmp_path / run / "checkpoints/update-00000008/model.safetensors") for run in ("one", "two")]
    start = timm.create_model("test_resnet", num_classes=3).state_dict().keys()
    for key in start:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-5, atol=1e-6, msg=key)
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(first.history, lines, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


def test_the_training_loss_is_that_of_an_image(tmp_path, monkeypatch):
    """Over updates of 4, 4, 4 and 3 images, of which each counts the same."""
    note, seen = Trainer._note, []

    def noted(self, made, verdict):
        seen.append((made.images, verdict.loss))
        note(self, made, verdict)

    monkeypatch.setattr(Trainer, "_note", noted)
    source = write_images(tmp_path / "images", train=5)
    options = {"train.batch_size": 4, "train.epochs": 1}
    result = bnf.finetune("full", **settings(source, tmp_path / "run", **options))
    assert [images for images, _ in seen] == [4, 4, 4, 3]
    expected = sum(images * value for images, value in seen) / 15
    assert expected != pytest.approx(sum(value for _, value in seen) / 4)
    assert result.history[0]["train_loss"] == pytest.approx(expected)


def train_domains(options, folder):
    def keep(trainer):
        torch.save(trainer.model.state_dict(), folder / f"{trainer.accelerator.process_index}.pt")
        own = {key: p for key, p in trainer.model.named_parameters() if "bright" in key or "dark" in key}
        torch.save({key: p.detach() for key, p in own.items()}, folder / f"own-{trainer.accelerator.process_index}.pt")

    before_ending(keep)
    finetune("full", **options)


@pytest.mark.parametrize("affine", ["shared", "own"])
def test_domains_on_ranks_whose_batches_lack_some(affine, nursery, tmp_path):
    """Batches of 2 images of two domains: a rank may see one of them only."""
    source = write_domains(tmp_path / "train.parquet")
    options = settings(source, tmp_path / "run", **{
        "data.domain_column": "domain", "bn.domains": ["dark", "bright"], "bn.domain_affine": affine,
        "bn.train_stats": "running", "train.batch_size": 1, "train.steps": 6,
    })  # fmt: skip
    assert nursery.run(train_domains, options, tmp_path, ranks=2) == [0, 0], nursery.said()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    names = [key for key in first if "running" not in key and "num_batches" not in key]
    assert [key for key in names if not torch.equal(first[key], second[key])] == []
    one, two = (torch.load(tmp_path / f"own-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("accumulated", [2, 4])
def test_float_batches_are_made_one_by_one(accumulated, tmp_path, monkeypatch):
    """However many micro-batches an update has, no more than two of their float batches live at a time."""
    source = write_images(tmp_path / "images", train=16)
    alive, most = weakref.WeakSet(), []
    finish = ImageLoader.finish

    def counted(self, images):
        finished = finish(self, images)
        if images.dtype == torch.uint8 and self.dataset.seed is not None:
            alive.add(finished)
            gc.collect()
            most.append(len(alive))
        return finished

    monkeypatch.setattr(ImageLoader, "finish", counted)
    options = {"train.batch_size": 2, "train.grad_accum": accumulated, "train.epochs": 1}
    bnf.finetune("full", **settings(source, tmp_path / "run", **options))
    assert len(most) == 24
    assert max(most) <= 2
