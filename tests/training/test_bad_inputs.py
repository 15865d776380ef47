"""Whatever a stranger or a tired person hands in: one clear line, exit code 2, nothing written, nothing run.

Recipes and overrides that never get as far as torch are in tests/test_cli.py, damaged sets in data/test_errors.py.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from bnfinetune.cli import main
from bnfinetune.training.run import finetune
from tests.training.support import write_images

TRAIN = ("recipe=freeze_bn model.name=test_resnet model.pretrained=false data.source=images data.image_size=32 "
         "data.workers=0 train.epochs=1 run.dir=new run.check=off run.report=false")  # fmt: skip
RESUME = f"{TRAIN} run.dir=run train.resume=auto train.epochs=2 train.batch_size=4"
WEIGHTS = f"{TRAIN} model.checkpoint=weights"
STATE = Path("run/checkpoints/update-00000005")
BEST = Path("run/best")


class Payload:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return (Path.touch, (Path(os.environ["BNF_TEST_PAYLOAD"]),))


def fill(path: str, content: bytes = b"") -> Callable[[], object]:
    return lambda: Path(path).write_bytes(content)


def cut(path: Path | str, share: float = 0.5) -> Callable[[], object]:
    def make():
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: int(len(content) * share)])

    return make


def weights_file(change: Callable[[dict], object]) -> Callable[[], object]:
    def make():
        weights = load_file(BEST / "model.safetensors")
        changed = change(weights)
        save_file(weights if changed is None else changed, "weights")

    return make


def pickled(path: Path | str, value: Callable[[], object], save: Callable = torch.save) -> Callable[[], object]:
    return lambda: save(value(), path)


def plain_pickle(value: object, path: Path | str) -> None:
    Path(path).write_bytes(pickle.dumps(value))


def seal(folder: Path, *makes: Callable[[], object]) -> Callable[[], object]:
    """Change files of a state and write a manifest to match, as somebody who means harm would."""

    def make():
        for each in makes:
            each()
        names = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        (folder / "manifest.json").write_text(json.dumps(digests))

    return make


def only_state(*makes: Callable[[], object]) -> Callable[[], object]:
    """Spoil the only state there is."""

    def make():
        for folder in STATE.parent.iterdir():
            if folder != STATE:
                shutil.rmtree(folder)
        for each in makes:
            each()

    return make


def config(change: Callable[[dict], object]) -> Callable[[], object]:
    def make():
        path = BEST / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def links(path: Path, target: str) -> Callable[[], object]:
    def make():
        path.unlink()
        path.symlink_to(target)

    return make


def both(*makes: Callable[[], object]) -> Callable[[], object]:
    return lambda: [make() for make in makes]


def more_classes() -> None:
    weights = load_file(BEST / "model.safetensors")
    weights |= {"fc.weight": torch.zeros(7, weights["fc.weight"].shape[1]), "fc.bias": torch.zeros(7)}
    save_file(weights, BEST / "model.safetensors")


def nothing() -> None:
    """Everything is as the run left it."""


def trainer(change: Callable[[dict], object]) -> Callable[[], object]:
    def make():
        state = torch.load(STATE / "trainer.pt", weights_only=True)
        change(state)
        torch.save(state, STATE / "trainer.pt")

    return make


HUGE_HEADER = struct.pack("<Q", 2**62) + b"{}"
LYING = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()

# what is made first, the words of the command line, what the line on stderr must say, and the environment
Case = tuple[Callable[[], object], str, str, dict[str, str]]
CASES: dict[str, Case] = {
    # weights to start from
    "no weights": (nothing, WEIGHTS, "model.checkpoint: no file weights", {}),
    "weights are a folder": (lambda: Path("weights").mkdir(), WEIGHTS, "model.checkpoint: no file weights", {}),
    "empty weights": (fill("weights"), WEIGHTS, "neither safetensors nor a tensors-only pickle", {}),
    "text as weights": (fill("weights", b"hello\n"), WEIGHTS, "neither safetensors nor a tensors-only pickle", {}),
    "weights of zeros": (fill("weights", bytes(1000)), WEIGHTS, "neither safetensors nor", {}),
    "cut weights": (both(weights_file(lambda w: None), cut("weights")), WEIGHTS, "neither safetensors nor", {}),
    "endless header": (fill("weights", HUGE_HEADER), WEIGHTS, "neither safetensors nor", {}),
    "lying header": (fill("weights", struct.pack("<Q", len(LYING)) + LYING), WEIGHTS, "neither safetensors nor", {}),
    "payload": (pickled("weights", lambda: {"state_dict": Payload()}), WEIGHTS, r"save its state_dict\(\) alone", {}),
    "pointer": (fill("weights", b"version https://git-lfs.github.com/spec/v1\n"), WEIGHTS, "by git lfs pull", {}),
    "old payload": (pickled("weights", Payload, plain_pickle), WEIGHTS, "neither safetensors nor", {}),
    "payload as safetensors": (
        both(pickled("w.safetensors", Payload), lambda: None),
        f"{TRAIN} model.checkpoint=w.safetensors",
        "neither safetensors nor",
        {},
    ),
    "whole model": (pickled("weights", lambda: torch.nn.Linear(2, 2)), WEIGHTS, "neither safetensors nor", {}),
    "cut pickle": (both(pickled("weights", dict), cut("weights", 0.8)), WEIGHTS, "neither safetensors nor", {}),
    "no tensors": (pickled("weights", lambda: {"a": 1}), WEIGHTS, "model.checkpoint: weights", {}),
    "a list": (pickled("weights", lambda: [torch.ones(2)]), WEIGHTS, "model.checkpoint: weights", {}),
    "a number": (pickled("weights", lambda: 3), WEIGHTS, "model.checkpoint: weights", {}),
    "foreign weights": (
        weights_file(lambda w: {"x": torch.ones(2)}),
        WEIGHTS,
        "weights lacks .* such\\): is model.name right",
        {},
    ),
    "one tensor short": (
        weights_file(lambda w: {key: value for key, value in w.items() if key != "bn1.running_mean"}),
        WEIGHTS,
        "lacks bn1.running_mean",
        {},
    ),
    "one tensor too many": (weights_file(lambda w: w.update(more=torch.ones(1))), WEIGHTS, "has unknown more", {}),
    "wrong shape": (
        weights_file(lambda w: w.update({"bn1.weight": torch.ones(3)})),
        WEIGHTS,
        "has another shape of bn1.weight",
        {},
    ),
    # models
    "unknown model": (
        nothing,
        TRAIN.replace("test_resnet", "resnet81"),
        "timm knows no model 'resnet81'; did you mean",
        {},
    ),
    "empty local folder": (nothing, f"{TRAIN} model.name=local-dir:images", "no config.json in images", {}),
    "payload as local folder": (
        both(
            links(BEST / "model.safetensors", "nowhere"),
            lambda: (BEST / "model.safetensors").unlink(),
            pickled(BEST / "pytorch_model.bin", lambda: {"x": Payload()}),
        ),
        f"{TRAIN} model.name=local-dir:run/best model.pretrained=true",
        "model.name=local-dir:run/best",
        {},
    ),
    "unknown argument": (nothing, f"{TRAIN} model.kwargs.no_such=1", "no_such", {}),
    "kwargs that are code": (nothing, f"{TRAIN} model.kwargs.act_layer=os.system", "model", {}),
    "unknown optimizer": (nothing, f"{TRAIN} optim.name=adamm", "optim.name", {}),
    "unknown optimizer argument": (nothing, f"{TRAIN} optim.kwargs.betaz=1", "optim", {}),
    "no BN": (nothing, f"{TRAIN} model.name=test_vit data.image_size=160", "no BatchNorm layer in", {}),
    "layers that match nothing": (nothing, f"{TRAIN} bn.layers=layer9*", "layer9", {}),
    # data
    "no data": (nothing, f"{TRAIN} data.source=petz", "there is no folder or file|not.*reach", {}),
    "empty data": (lambda: Path("empty").mkdir(), f"{TRAIN} data.source=empty", "no class folders with images", {}),
    "text data": (fill("a.csv", b"a,b\n"), f"{TRAIN} data.source=a.csv", "neither .parquet nor .tar", {}),
    "broken image": (fill("images/train/red/0.png", b"no"), TRAIN, "cannot read the image images/train/red/0.png", {}),
    "cut image": (cut("images/train/red/0.png"), TRAIN, "cannot read the image images/train/red/0.png", {}),
    "large images": (nothing, f"{TRAIN} data.max_pixels=100", "has 40 x 40 pixels, more than data.max_pixels=100", {}),
    "one class": (
        lambda: [shutil.rmtree(f"images/{s}/{c}") for s in ("train", "val") for c in ("red", "blue")],
        TRAIN,
        "one class only, 'green'",
        {},
    ),
    "foreign class": (lambda: Path("images/val/red").rename("images/val/rot"), TRAIN, "has the class 'rot'", {}),
    "no such split": (nothing, f"{TRAIN} data.train_split=trian", "did you mean 'train'", {}),
    "damaged parquet": (fill("x.parquet", b"PAR1"), f"{TRAIN} data.source=x.parquet", "x.parquet cannot be loaded", {}),
    "batch of one": (
        nothing,
        f"{TRAIN} recipe=full train.batch_size=1",
        "train.batch_size=1 leaves BN layer",
        {},
    ),
    # states to go on from
    "nothing to resume": (nothing, f"{TRAIN} train.resume=images", "holds no undamaged state", {}),
    "resume nowhere": (nothing, f"{TRAIN} train.resume=nowhere", "holds no undamaged state", {}),
    "resume without a folder": (
        nothing,
        f"{TRAIN} run.dir=null train.resume=auto",
        "train.resume=auto needs run.dir",
        {},
    ),
    "folder in use": (nothing, f"{TRAIN} run.dir=run", "run is not empty", {}),
    "folder is a file": (fill("new"), TRAIN, "new", {}),
    "folder below a file": (fill("file"), f"{TRAIN} run.dir=file/new", "is not a writable folder", {}),
    "folder that no one can write": (nothing, f"{TRAIN} run.dir=/proc/new", "run.dir: /proc/new cannot be written", {}),
    "another recipe": (nothing, f"{RESUME} optim.lr=0.5", "optim.lr was 0.001 and is 0.5", {}),
    "no such key allowed": (nothing, f"{RESUME} train.resume_allow=[optim.lrr]", "did you mean optim.lr", {}),
    "other images": (
        lambda: Path("images/train/red/0.png").rename("images/train/red/9.png"),
        RESUME,
        "no longer holds the images",
        {},
    ),
    "only state cut": (only_state(cut(STATE / "trainer.pt")), RESUME, "holds no undamaged state", {}),
    "only state without manifest": (
        only_state(lambda: (STATE / "manifest.json").unlink()),
        RESUME,
        "holds no undamaged state",
        {},
    ),
    "manifest names a device": (
        only_state(fill(STATE / "manifest.json", b'{"../../../../../../../../dev/zero": ""}')),
        RESUME,
        "holds no undamaged state",
        {},
    ),
    "state is a device": (only_state(links(STATE / "trainer.pt", "/dev/zero")), RESUME, "holds no undamaged state", {}),
    "sealed payload": (
        only_state(seal(STATE, pickled(STATE / "trainer.pt", Payload))),
        RESUME,
        "cannot be resumed: Weights only",
        {},
    ),
    "sealed old payload": (
        only_state(seal(STATE, pickled(STATE / "trainer.pt", Payload, plain_pickle))),
        RESUME,
        "cannot be resumed",
        {},
    ),
    "sealed foreign trainer": (
        only_state(seal(STATE, pickled(STATE / "trainer.pt", dict))),
        RESUME,
        "cannot be resumed",
        {},
    ),
    "sealed without progress": (
        only_state(seal(STATE, trainer(lambda s: s.pop("progress")))),
        RESUME,
        "cannot be resumed: it is no state",
        {},
    ),
    "sealed wrong progress": (
        only_state(seal(STATE, trainer(lambda s: s.update(progress={"x": 1})))),
        RESUME,
        "cannot be resumed",
        {},
    ),
    "sealed wrong optimizer": (
        only_state(seal(STATE, trainer(lambda s: s.update(optimizer={})))),
        RESUME,
        "train.resume: the state of",
        {},
    ),
    "sealed wrong draws": (
        only_state(seal(STATE, trainer(lambda s: s.update(ranks=[{"random": 1, "statistics": {}}])))),
        RESUME,
        "cannot be resumed",
        {},
    ),
    "sealed weights of another": (
        only_state(seal(STATE, lambda: save_file({"x": torch.ones(1)}, STATE / "model.safetensors"))),
        RESUME,
        "cannot be resumed",
        {},
    ),
    "sealed description": (only_state(seal(STATE, fill(STATE / "state.json", b"[]"))), RESUME, "cannot be resumed", {}),
    "sealed tag": (
        only_state(seal(STATE, fill(STATE / "recipe.yaml", b"name: !!python/object/apply:os.system [touch x]"))),
        RESUME,
        "the tag .* is refused",
        {},
    ),
    # exported networks
    "no such checkpoint": (nothing, "evaluate checkpoint=nowhere", "there is no folder nowhere", {}),
    "checkpoint of nothing": (nothing, "evaluate checkpoint=images", "holds no exported model", {}),
    "config is no JSON": (fill(BEST / "config.json", b"{"), "evaluate checkpoint=run", "cannot be loaded", {}),
    "config is a list": (fill(BEST / "config.json", b"[]"), "evaluate checkpoint=run", "cannot be loaded", {}),
    "config of no model": (
        config(lambda c: c.update(architecture="os.system")),
        "evaluate checkpoint=run",
        "cannot be loaded",
        {},
    ),
    "config of another model": (
        config(lambda c: c.update(architecture="test_efficientnet")),
        "evaluate checkpoint=run",
        "cannot be loaded",
        {},
    ),
    "export of other classes": (more_classes, "evaluate checkpoint=run", "cannot be loaded .*size mismatch", {}),
    "cut export": (cut(BEST / "model.safetensors"), "evaluate checkpoint=run", "cannot be loaded", {}),
    "export without weights": (
        lambda: (BEST / "model.safetensors").unlink(),
        "evaluate checkpoint=run",
        "cannot be loaded",
        {},
    ),
    "export with a payload": (
        both(lambda: (BEST / "model.safetensors").unlink(), pickled(BEST / "pytorch_model.bin", Payload)),
        "evaluate checkpoint=run",
        "cannot be loaded",
        {},
    ),
    "export of a payload": (
        pickled(BEST / "model.safetensors", Payload),
        "evaluate checkpoint=run",
        "cannot be loaded",
        {},
    ),
    "recipe of an export is no recipe": (fill(BEST / "recipe.yaml", b"["), "evaluate checkpoint=run", "not YAML", {}),
    "data of other classes": (
        lambda: [Path(f"images/{s}/red").rename(f"images/{s}/rot") for s in ("train", "val")],
        "evaluate checkpoint=run data.source=images",
        "with the same classes",
        {},
    ),
    "picture that is none": (fill("x.png", b"no"), "predict checkpoint=run x.png", "cannot read the image x.png", {}),
    "picture that is missing": (nothing, "predict checkpoint=run y.png", "there is no file or folder y.png", {}),
    "picture of nothing": (lambda: Path("none").mkdir(), "predict checkpoint=run none", "none holds no image", {}),
    "recalibrate into a run": (nothing, "recalibrate checkpoint=run out=run", "run is not empty", {}),
    # environment
    "unknown tracker": (nothing, f"{TRAIN} run.tracking=tensorbored", "no tracker 'tensorbored'", {}),
    "a rank without an address": (nothing, TRAIN, "WORLD_SIZE=2 without MASTER_ADDR", {"RANK": "0", "WORLD_SIZE": "2"}),
    "ranks without numbers": (nothing, TRAIN, "WORLD_SIZE=2 without RANK; start", {"WORLD_SIZE": "2"}),
    "a rank that is no number": (nothing, TRAIN, "RANK=one, which is no number; start", {"RANK": "one"}),
    "a number that is none": (nothing, TRAIN, "WORLD_SIZE=-1, which is no number", {"WORLD_SIZE": "-1"}),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with images and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = dict(word.split("=", 1) for word in TRAIN.split() if not word.startswith("recipe="))
        options |= {"run.dir": "run", "train.epochs": "2", "train.batch_size": "4"}
        finetune("freeze_bn", **{key: _value(value) for key, value in options.items()})
    return folder


def _value(text):
    return {"true": True, "false": False, "off": "off"}.get(text, int(text) if text.isdecimal() else text)


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("BNF_TEST_PAYLOAD", str(tmp_path / "payload"))
    return tmp_path / "work"


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# One of each kind; the others are slow together.
QUICK = {
    *("cut weights", "endless header", "payload", "foreign weights", "wrong shape", "unknown model"),
    *("kwargs that are code", "layers that match nothing", "broken image", "batch of one", "folder in use"),
    *("another recipe", "only state cut", "manifest names a device", "sealed payload", "sealed without progress"),
    *("export of other classes", "export of a payload", "picture that is none", "a rank that is no number"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_is_one_line_and_exit_code_2_and_nothing_is_written_or_run(name, folder, capfd, monkeypatch):
    make, words, said, environment = CASES[name]
    make()
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if environment:
        AcceleratorState._reset_state(reset_partial_state=True)  # it reads the environment once
    before = contents(folder)
    words = words.split()
    overridden = {word.partition("=")[0]: word for word in words if "=" in word}  # later words win
    words = [word for word in words if "=" not in word or overridden[word.partition("=")[0]] == word]
    code = main(words)
    if environment:
        AcceleratorState._reset_state(reset_partial_state=True)
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bnfinetune: ")]
    assert code == 2
    assert len(err) == 1
    assert re.search(said, err[0]), err[0]
    assert contents(folder) == before
    assert not (folder.parent / "payload").exists()


def test_payloads_would_be_noticed(folder):
    torch.save(Payload(), folder / "payload.pt")
    torch.load(folder / "payload.pt", weights_only=False)
    assert (folder.parent / "payload").exists()


def test_there_are_enough_of_them():
    assert len(CASES) >= 60
    assert set(CASES) >= QUICK


@pytest.mark.slow
@pytest.mark.parametrize("name", ["payload", "broken image", "sealed payload", "config is no JSON", "no such split"])
def test_a_process_of_its_own_says_the_same(name, folder):
    make, words, _, environment = CASES[name]
    make()
    before = contents(folder)
    done = subprocess.run(
        [sys.executable, "-m", "bnfinetune", *words.split()],
        capture_output=True, text=True, check=False, timeout=100, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("bnfinetune: error:") == 1
    assert "Traceback" not in done.stderr
    assert contents(folder) == before
    assert not (folder.parent / "payload").exists()
