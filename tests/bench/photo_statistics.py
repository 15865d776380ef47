"""What statistics of few images cost and give on photographs, with ImageNet backbones: docs/domain_shift.md.

    python -m tests.bench photo_statistics --tasks FOLDER [FOLDER ...]

A linear probe is fitted on features of the training images, under the stored statistics, under those of the training
images (re-estimated), and under mixtures of both; beside it stands what `bnfinetune inspect` says of the same images
before anything is trained. Then the probe of the stored statistics meets other images, corrupted
ones of its own task and those of another task with the same classes, and statistics alone adapt to 128 of them. What is
recorded is not measured again. The tasks are those of `python -m tests.bench transfer`.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torchvision.transforms.v2.functional as tvf
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from bnfinetune.bn import choose_prior, precise_bn
from bnfinetune.bn.adapt import adapt_model
from bnfinetune.bn.statistics.shrinkage import prior_of
from bnfinetune.diagnose.readout import Readout
from bnfinetune.training.checkup import inspect_checkpoint
from bnfinetune.training.measuring.ridge import leave_one_out
from tests.bench.pages import DOCS, draw_plots, put_table
from tests.bench.results import FOLDER, record, recorded
from tests.bench.transfer.backbones import BACKBONES, backbone_folder

BENCH, PROBE, SHIFT, VERDICT = "photo_statistics", "probe", "shift", "verdict"
SIZE, BATCH, ADAPT, TEST = 128, 64, 128, 240
STORED, AGAIN, AFTERWARDS, CHOSEN = "stored", "re-estimated", "half, mixed afterwards", "auto"
SHARES = {"0.1": 0.1, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75}
CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": lambda images, _: images,
    "low contrast": lambda images, _: 0.5 + 0.25 * (images - 0.5),
    "darker": lambda images, _: 0.3 * images,
    "noise": lambda images, generator: (images + 0.15 * torch.randn(images.shape, generator=generator)).clamp(0, 1),
    "blur": lambda images, _: tvf.gaussian_blur(images, [9, 9], [2.0, 2.0]),
}
"""From images (N, 3, H, W) in [0, 1] to such."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench photo_statistics", description=__doc__)
    parser.add_argument("--tasks", nargs="+", type=Path, required=True, help="folders with train, val and test")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bnfinetune-transfer")
    parser.add_argument("--parts", nargs="+", default=[PROBE, VERDICT, SHIFT], choices=[PROBE, VERDICT, SHIFT])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # few images are the point
    for part in options.parts:
        for name in options.backbones:
            folder = backbone_folder(name, options.work)
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            for task in options.tasks:
                if part == SHIFT:
                    _measure_shifts(model, name, task, options.tasks)
                elif (key := f"{part}: {task.name}, {name}") not in recorded(BENCH):
                    _measure_probe(model, key, task) if part == PROBE else _measure_verdict(model, folder, key, task)
    print(write_tables())


def _measure_probe(model: Any, key: str, task: Path) -> None:
    (images, labels), (held_out, truth) = (_read(model, task / split) for split in ("train", "test"))
    batches = list(images[torch.randperm(len(images), generator=_generator())].split(BATCH))
    found = {}
    for way, adapted in tqdm(_ways(model, batches), desc=key):
        found[way] = _fit(adapted, images, labels).score(_features(adapted, held_out), truth)
    chosen = copy.deepcopy(model)
    targets = nn.functional.one_hot(labels)
    choice = choose_prior(
        chosen, batches, lambda: -leave_one_out(torch.from_numpy(_features(chosen, images)), targets).error
    )
    found[CHOSEN] = _fit(chosen, images, labels).score(_features(chosen, held_out), truth)
    record(BENCH, key, {"top1": _percent(found), "share": choice.share})


def _measure_verdict(model: Any, folder: Path, key: str, task: Path) -> None:
    """What `inspect` says of re-estimation, and what a probe then has on the test images."""
    begin = time.perf_counter()
    found = inspect_checkpoint(str(folder), [f"data.source={task}", f"data.image_size={SIZE}"], minutes=1).readout
    assert found is not None
    seconds = time.perf_counter() - begin
    (images, labels), (held_out, truth) = (_read(model, task / split) for split in ("train", "test"))
    batches = list(images.split(BATCH))

    def score(share: float) -> float:
        adapted = model if share == 0 else _with_prior(model, batches, prior_of(share, len(images)), "mixture")
        return float(_fit(adapted, images, labels).score(_features(adapted, held_out), truth))

    stored, advised, again = score(0.0), score(found.best if found.helps else 0.0), score(1.0)
    record(
        BENCH,
        key,
        found.to_dict()
        | {"test": _percent({STORED: stored, "advised": advised, AGAIN: again})}
        | {"seconds": round(seconds)},
    )


def _measure_shifts(model: Any, name: str, task: Path, tasks: Sequence[Path]) -> None:
    """A classifier on images of its own task, corrupted, and of every other task with the same classes."""
    cases = [(task, corruption) for corruption in CORRUPTIONS]
    cases += [(other, "none") for other in tasks if other != task and _classes(other) == _classes(task)]
    classifier = None
    for target, corruption in tqdm(cases, desc=f"{SHIFT}: {task.name}, {name}"):
        kind = corruption if target == task else f"images of {target.name}"
        key = f"{SHIFT}: {task.name}, {name}, {kind}"
        if key in recorded(BENCH):
            continue
        classifier = classifier or _classifier(model, task)
        seen, _ = _read(model, target / "val", corruption, ADAPT)
        held_out, truth = _read(model, target / "test", corruption, TEST)
        batches = list(seen.split(BATCH))
        found = {way: _accuracy(adapted, held_out, truth) for way, adapted in _ways(classifier, batches)}
        found[CHOSEN] = _accuracy(adapt_model(classifier, "adabn", batches), held_out, truth)
        record(BENCH, key, {"top1": _percent(found)})


def _ways(model: Any, batches: list[Tensor]) -> Iterator[tuple[str, Any]]:
    """Copies of a model under every kind of statistics."""
    samples = sum(map(len, batches))
    yield STORED, model
    for way, share in SHARES.items():
        yield way, _with_prior(model, batches, prior_of(share, samples), "mixture")
    yield AFTERWARDS, _with_prior(model, batches, samples, "batch")
    yield AGAIN, _with_prior(model, batches, 0, "batch")


def _with_prior(model: Any, batches: list[Tensor], prior: float, through: str) -> Any:
    adapted = copy.deepcopy(model)
    precise_bn(adapted, batches, prior=prior, through=through)
    return adapted


def _read(model: Any, folder: Path, corruption: str = "none", at_most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) as the network takes them, and their labels; a random part of them where they are many."""
    config = resolve_data_config({}, model=model)
    plain = {**config, "input_size": (3, SIZE, SIZE), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    images = ImageFolder(folder, create_transform(**plain))
    chosen = torch.randperm(len(images), generator=_generator())[:at_most].tolist() if at_most else range(len(images))
    pixels, labels = zip(*(images[number] for number in chosen), strict=True)
    corrupted = CORRUPTIONS[corruption](torch.stack(pixels), _generator())
    return tvf.normalize(corrupted, config["mean"], config["std"]), torch.tensor(labels)


def _classes(task: Path) -> list[str]:
    return sorted(path.name for path in (task / "train").iterdir())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.inference_mode()
def _features(model: Any, images: Tensor) -> Any:
    parts = [model.forward_head(model.forward_features(part), pre_logits=True) for part in images.split(BATCH)]
    return torch.cat(parts).double().numpy()


def _fit(model: Any, images: Tensor, labels: Tensor) -> Any:
    """A logistic regression on standardised features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    return probe.fit(_features(model, images), labels.numpy())


def _classifier(model: Any, task: Path) -> Any:
    """The network with its probe, fitted on training and validation images, as its classifier."""
    parts = [_read(model, task / split) for split in ("train", "val")]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    scaler, probe = (step for _, step in _fit(model, images, labels).steps)
    classifier = copy.deepcopy(model)
    classifier.reset_classifier(len(probe.classes_))
    weight = torch.from_numpy(probe.coef_ / scaler.scale_)
    linear = classifier.get_classifier()
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(torch.from_numpy(probe.intercept_) - weight @ torch.from_numpy(scaler.mean_))
    return classifier.eval()


@torch.inference_mode()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([model(part).argmax(1) for part in images.split(BATCH)])
    return (predicted == labels).double().mean().item()


def _percent(found: dict[str, float]) -> dict[str, float]:
    return {way: round(100 * value, 1) for way, value in found.items()}


def write_tables() -> str:
    """Puts the tables into the page; gives them as text too."""
    parts = [_table_of_tops(PROBE, "probe of"), _table_of_verdicts(), _table_of_tops(SHIFT, "classifier, images")]
    text = "\n\n".join(part for part in parts if part)
    what = f"Top-1 in %, one split of each task; {SIZE} px"
    put_table(DOCS / "domain_shift.md", FOLDER / f"{BENCH}.json", text, what)
    draw_plots()
    return text


def _table_of_tops(kind: str, title: str) -> str:
    rows = {key.partition(": ")[2]: found["top1"] for key, found in recorded(BENCH).items() if key.startswith(kind)}
    if not rows:
        return ""
    ways = list(next(iter(rows.values())))
    rows["mean"] = {way: mean(row[way] for row in rows.values()) for way in ways}
    lines = [f"| {title} | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
    lines += [f"| {key} | " + " | ".join(f"{row[way]:.1f}" for way in ways) + " |" for key, row in rows.items()]
    return "\n".join(lines)


def _table_of_verdicts() -> str:
    rows = {key.partition(": ")[2]: found for key, found in recorded(BENCH).items() if key.startswith(VERDICT)}
    lines = ["| `inspect` of | says of the images' own statistics | gain | test: stored | as said | re-estimated |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for key, found in rows.items():
        said, test = Readout.from_dict(found), found["test"]
        gain = f"{100 * said.gain:+.1f} ± {100 * said.doubt:.1f}"
        lines.append(
            f"| {key} | {said.answer} | {gain} | {test[STORED]:.1f} | {test['advised']:.1f} | {test[AGAIN]:.1f} |"
        )
    return "\n".join(lines) if rows else ""
