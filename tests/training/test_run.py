"""Whole runs: what each recipe leaves untouched, what a run folder holds, going on, and two ranks."""

import json
import os

import pytest
import timm
import torch
import torch.multiprocessing as mp

import bnfinetune as bnf
from bnfinetune.errors import BackboneError, CheckpointError, DataError, SelectionError
from tests.training.support import CLASSES, before_ending, bn_keys, broken_off, exported, write_images, write_weights

# which groups of tensors a recipe leaves bit-identical, and which it changes
FIXED = {
    "freeze_bn": ({"statistics", "affine"}, {"other", "head"}),
    "freeze_stats": ({"statistics"}, {"affine", "other", "head"}),
    "bn_only": ({"statistics", "other"}, {"affine", "head"}),
    "linear_probe": ({"statistics", "affine", "other"}, {"head"}),
    "lp_ft": ({"statistics", "affine"}, {"other", "head"}),
    "full": (set(), {"statistics", "affine", "other", "head"}),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def settings(images, folder, **more):
    return {
        "model.name": "bnf_resnet",
        "data.source": str(images),
        "data.image_size": 32,
        "data.workers": 0,
        "train.epochs": 3,
        "train.batch_size": 4,
        "run.dir": str(folder),
        "run.report": False,  # drawing takes as long as such a run
        **more,
    }


def last_weights(folder):
    """The weights of the newest training state: where training ended, not where it was best."""
    from safetensors.torch import load_file

    return load_file(str(max((folder / "checkpoints").iterdir()) / "model.safetensors"))


def assert_kept(recipe, start, end, name):
    kept, changed = FIXED[recipe]
    keys = bn_keys(name)
    for group in kept:
        assert [key for key in keys[group] if not torch.equal(start[key], end[key])] == []
    for group in changed:
        assert [key for key in keys[group] if not torch.equal(start[key], end[key])], f"no tensor of {group} changed"


MODELS = ["resnet18", "efficientnet_b0"]
MORE_MODELS = ["regnetx_002", "mobilenetv3_small_050", "densenet121"]


@pytest.mark.parametrize("recipe", FIXED)
@pytest.mark.parametrize("name", MODELS + [pytest.param(name, marks=pytest.mark.slow) for name in MORE_MODELS])
def test_a_recipe_changes_what_it_says_and_nothing_else(recipe, name, images, tmp_path):
    start = write_weights(tmp_path / "start.safetensors", name)
    bnf.finetune(
        recipe,
        **settings(
            images, tmp_path / "run", **{"model.name": name, "model.checkpoint": tmp_path / "start.safetensors"}
        ),
    )
    assert_kept(recipe, start, last_weights(tmp_path / "run"), name)


def test_the_run_folder_holds_everything(images, tmp_path):
    result = bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **{"run.report": True}))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "run.log", "best", "checkpoints",
        "report.html", "report.json", "outcomes.npz",
    }  # fmt: skip
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["peak_memory_bytes"] > 1e7
    assert summary["images_per_second"] > 0
    assert summary["images"] == 3 * 18
    assert summary["updates"] == 3 * 5
    assert summary["after"]["validation"] == pytest.approx(result.after["validation"].scalars())
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["update"] for record in records] == [5, 10, 15]
    assert all(record["images"] == 9 for record in records)


def test_the_best_network_is_a_timm_folder_with_names_and_preprocessing(images, tmp_path):
    result = bnf.finetune("full", **settings(images, tmp_path / "run", **{"data.image_size": 48}))
    best = tmp_path / "run" / "best"
    loaded = timm.create_model(f"local-dir:{best}", pretrained=True).eval()
    batch = torch.randn(5, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(loaded(batch), result.model.eval()(batch))
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 48, 48)
    assert loaded.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) or loaded.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]


def test_a_run_folder_is_never_overwritten(images, tmp_path):
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **{"train.epochs": 1}))
    with pytest.raises(CheckpointError, match="is not empty"):
        bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **{"train.epochs": 1}))


VARIANTS = {
    "plain": {"run.report": True},
    "accumulated": {"train.grad_accum": 2, "optim.clip_grad": 1.0},
    "averaged": {"train.ema": 0.9, "evaluate.every_steps": 2},
    "mixed": {"data.augment.mixup": 0.4, "data.augment.cutmix": 0.5, "data.augment.auto_augment": "rand-m5"},
    "dropout": {"model.kwargs": {"drop_rate": 0.5}, "train.label_smoothing": 0.1},
    "streamed": {"data.streaming": True, "data.shuffle_buffer": 5, "train.steps": 9, "evaluate.every_steps": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_gives_bit_for_bit_the_uninterrupted_run(variant, images, tmp_path, monkeypatch):
    options = {"checkpoint.every_steps": 1, **VARIANTS[variant]}
    bnf.finetune("full", **settings(images, tmp_path / "whole", **options))

    with broken_off(monkeypatch, 4):
        bnf.finetune("full", **settings(images, tmp_path / "broken", **options))
    torch.rand(7)  # other draws in between must not matter
    bnf.finetune("full", **settings(images, tmp_path / "broken", **options, **{"train.resume": "auto"}))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for one, other in (
        (last_weights(whole), last_weights(broken)),
        (exported(whole / "best"), exported(broken / "best")),
    ):
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert (whole / "metrics.jsonl").read_text() == (broken / "metrics.jsonl").read_text()


def test_a_resume_with_another_recipe_is_refused(images, tmp_path):
    options = settings(images, tmp_path / "run", **{"train.epochs": 1})
    bnf.finetune("freeze_bn", **options)
    with pytest.raises(CheckpointError, match=r"optim.lr was 0.001 and is 0.01"):
        bnf.finetune("freeze_bn", **options, **{"train.resume": "auto", "optim.lr": 0.01})
    with pytest.raises(CheckpointError, match="holds no undamaged state"):
        bnf.finetune("freeze_bn", **options, **{"train.resume": str(tmp_path / "other")})


def test_accumulation_of_frozen_bn_equals_the_larger_batch(images, tmp_path):
    common = {"data.augment.scale": [1.0, 1.0], "data.augment.ratio": [1.0, 1.0], "data.augment.hflip": 0.0,
              "optim.name": "sgd", "train.epochs": 2}  # fmt: skip
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "a", **common, **{"train.batch_size": 6}))
    options = {"train.batch_size": 2, "train.grad_accum": 3}
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "b", **common, **options))
    one, other = last_weights(tmp_path / "a"), last_weights(tmp_path / "b")
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)


def test_early_stopping_stops(images, tmp_path):
    options = {"train.epochs": 50, "train.early_stop": 2, "optim.lr": 1e-12}
    result = bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **options))
    assert len(result.history) == 3


@pytest.mark.parametrize(
    ("recipe", "options", "error", "message"),
    [
        ("freeze_bn", {"model.name": "vit_tiny_patch16_224", "model.pretrained": False}, SelectionError,
         r"no BatchNorm layer in .*LayerNorm"),
        ("freeze_bn", {"model.name": "resnet81"}, BackboneError, "no model 'resnet81'; did you mean resnet"),
        ("freeze_bn", {"model.name": "resnet18"}, BackboneError, "could not be fetched.*model.pretrained=false"),
        ("freeze_bn", {"model.name": "hf-hub:nobody/nothing"}, BackboneError, "could not be fetched"),
        ("freeze_bn", {"model.name": "local-dir:nowhere"}, BackboneError, "no config.json in nowhere"),
        ("freeze_bn", {"model.checkpoint": "nowhere.safetensors"}, CheckpointError, "no file nowhere.safetensors"),
        ("freeze_bn", {"model.kwargs": {"no_such": 1}}, BackboneError, "no_such"),
        ("full", {"train.batch_size": 1}, DataError, "train.batch_size=1 leaves BN layer"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(recipe, options, error, message, images, tmp_path):
    with pytest.raises(error, match=message) as caught:
        bnf.finetune(recipe, **settings(images, tmp_path / "run", **options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_frozen_statistics_accept_a_batch_of_one(images, tmp_path):
    bnf.finetune("freeze_bn", **settings(images, tmp_path / "run", **{"train.batch_size": 1, "train.epochs": 1}))


def run_rank(rank, world, port, images, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    # what training ended with on this rank
    before_ending(lambda trainer: torch.save(trainer.model.state_dict(), folder / f"{trainer.recipe.name}-{rank}.pt"))
    for recipe in ("full", "freeze_bn", "freeze_stats", "bn_only"):
        options = {"model.name": "resnet18", "model.checkpoint": folder / "start.safetensors", "train.epochs": 2}
        result = bnf.finetune(recipe, **settings(images, folder / recipe, **options))
        torch.save(result.after["validation"].scalars(), folder / f"{recipe}-{rank}-metrics.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_end_bit_identical_and_measure_the_whole_set(images, tmp_path, free_port):
    start = write_weights(tmp_path / "start.safetensors", "resnet18")
    mp.spawn(run_rank, args=(2, free_port, images, tmp_path), nprocs=2)
    for recipe in ("full", "freeze_bn", "freeze_stats", "bn_only"):
        first, second = (torch.load(tmp_path / f"{recipe}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
        assert_kept(recipe, start, last_weights(tmp_path / recipe), "resnet18")
        metrics = [torch.load(tmp_path / f"{recipe}-{rank}-metrics.pt", weights_only=True) for rank in (0, 1)]
        assert metrics[0] == metrics[1]
        assert metrics[0]["images"] == 9
