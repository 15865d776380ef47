"""The card of a network on the hub: what its run measured, how its BatchNorm was treated, and where it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData

from bnfinetune.diagnose.run_report import SHARES, wilson
from bnfinetune.inference.preprocessing import Preprocessing
from bnfinetune.recipe import BN, Recipe
from bnfinetune.source_paths import DEMOS
from bnfinetune.training.saving.provenance import PROVENANCE
from bnfinetune.training.saving.run_folder import SUMMARY

_METRICS: Final = {**SHARES, "ece": "calibration error", "loss": "loss"}
_NAMED: Final = 20  # classes that are listed
_WEAKEST: Final = 3  # classes that the limits name
_PROVENANCE: Final = {
    "computed": "Running statistics",
    "images": "from images",
    "data": "of",
    "at": "at",
    "share": "their weight",
    "update": "of update",
    "fingerprint": "fingerprint of the data",
}
_SWITCHES: Final = ("train_stats", "update_stats", "affine", "eval_stats")


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of.

    Attributes:
        name: Of the network on the hub, such as `user/birds`.
        architecture: timm's name.
        recipe: That which made it, without paths of the machine that trained.
        preprocessing: Of its images, with the labels.
        statistics: Where its running statistics come from (`statistics.json`); empty where nothing says it.
        summary: The numbers of its run (`summary.json`); empty for a folder that is no run's.
        licence: As the hub names licences.
    """

    name: str
    architecture: str
    recipe: Recipe
    preprocessing: Preprocessing
    statistics: Mapping[str, Any]
    summary: Mapping[str, Any]
    licence: str

    @property
    def dataset(self) -> str | None:
        """The hub's data set that it was trained on; None of local images."""
        source = self.recipe.data.source
        return source if source.count("/") == 1 and source not in DEMOS else None


def read_facts(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """The statistics of an exported folder and the numbers of the run that it belongs to, as far as they are there."""
    found: dict[str, Mapping[str, Any]] = {"statistics": {}, "summary": {}}
    with suppress(OSError, ValueError):
        found["statistics"] = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    if folder.name == "best":
        with suppress(OSError, ValueError):
            found["summary"] = json.loads((folder.parent / SUMMARY).read_text(encoding="utf-8"))
    return found


def model_card(facts: CardFacts) -> str:
    """The card as Markdown, with the metadata that the hub reads before it."""
    sections = {
        "Data": _data(facts),
        "BatchNorm": _batch_norm(facts),
        "Measured": _measured(facts),
        "Limits": _limits(facts),
        "How to load": _how_to_load(facts),
    }
    labels = facts.preprocessing.labels
    made = f"fine-tuned by bnfinetune (recipe `{facts.recipe.name}`) to tell {len(labels)} classes"
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{_metadata(facts).to_yaml()}\n---\n\n# {facts.name}\n\n" + (
        f"{facts.architecture}, {made}: {_listed(labels)}.\n\n{body}\n"
    )


def _metadata(facts: CardFacts) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=facts.dataset or "images",
            dataset_name=facts.recipe.data.source,
            dataset_split=split,
            metric_type={"top1": "accuracy", "macro_f1": "f1"}.get(key, key),
            metric_name=SHARES[key],
            metric_value=round(float(values[key]), 4),
        )
        for split, values in facts.summary.get("after", {}).items()
        for key in SHARES
        if key in values
    ]
    return ModelCardData(
        model_name=facts.name if results else None,
        eval_results=results or None,
        datasets=[facts.dataset] if facts.dataset else None,
        library_name="timm",
        license=facts.licence,
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "bnfinetune"],
    )


def _data(facts: CardFacts) -> str:
    ready = facts.preprocessing
    size = " x ".join(map(str, ready.input_size[1:]))
    lines = [
        f"Fine-tuned on: `{facts.recipe.data.source}`",
        f"Weights before: `{facts.recipe.model.name}`{'' if facts.recipe.model.pretrained else ', drawn at random'}",
        f"Images: {ready.input_size[0]} x {size}, {ready.interpolation}, crop {ready.crop_pct:g} ({ready.crop_mode}), "
        f"mean {_numbers(ready.mean)}, std {_numbers(ready.std)}",
    ]
    if "images" in facts.summary:
        lines.append(f"Training: {facts.summary['updates']:,} updates, {facts.summary['images']:,} images seen")
    if ready.is_multilabel:
        lines.append("Any number of labels per image, each from its own threshold (`label_thresholds` in config.json)")
    return _bullets(lines)


def _batch_norm(facts: CardFacts) -> str:
    lines = [f"Policy: {_policy(section)}" for section in facts.recipe.bn_sections]
    if facts.recipe.model.group_norm is not None:
        lines = [f"Replaced by GroupNorm of {facts.recipe.model.group_norm} groups"]
    known = {key: value for key, value in facts.statistics.items() if value not in (None, {}, "")}
    said = [f"{words}: {known[key]}" for key, words in _PROVENANCE.items() if key in known]
    return _bullets([*lines, "; ".join(said) if said else "Running statistics: as the weights had them"])


def _policy(section: BN) -> str:
    switches = [f"`{key}={value}`" for key in _SWITCHES if (value := getattr(section, key)) is not None]
    layers = (section.layers,) if isinstance(section.layers, str) else section.layers
    return f"{', '.join(switches) or 'as the layers are'}, layers {', '.join(f'`{each}`' for each in layers)}"


def _measured(facts: CardFacts) -> str:
    after = facts.summary.get("after", {})
    if not after:
        return "Nothing: no report of a run lies beside these weights."
    first = next(iter(after.values()))
    keys = [key for key in _METRICS if key in first]
    header = ["", "images", *(_METRICS[key] for key in keys), *(["top-1, 95 % interval"] if "top1" in first else [])]
    rows = []
    for split, values in after.items():
        for moment, numbers in (("before", facts.summary.get("before", {}).get(split)), ("after", values)):
            if numbers is not None:
                cells = [f"{split}, {moment}", f"{numbers['images']:,}", *(_shown(key, numbers[key]) for key in keys)]
                rows.append(cells + ([_interval(numbers)] if "top1" in first else []))
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows))


def _interval(numbers: Mapping[str, Any]) -> str:
    """Wilson's 95 % interval of top-1, as the run's report has it."""
    low, high = wilson(numbers["top1"], int(numbers["images"]))
    return f"{low:.1%} to {high:.1%}"


def _limits(facts: CardFacts) -> str:
    several = facts.preprocessing.is_multilabel
    lines = [
        f"It knows the {len(facts.preprocessing.labels)} classes above and no other: "
        + ("what else an image shows gets no label." if several else "an image of anything else gets one of them too.")
    ]
    if after := facts.summary.get("after", {}):
        lines.append(
            f"The numbers hold for images like those of `{facts.recipe.data.source}`; of others, measure them anew "
            "(`bnfinetune evaluate`, and `bnfinetune inspect` for its BatchNorm statistics)."
        )
        if "validation" in after:
            lines.append("The best update was chosen by validation, which is therefore a little too favourable.")
    per_class = facts.summary.get("per_class", {})
    weakest = sorted((share, name) for name, share in per_class.items() if share is not None)[:_WEAKEST]
    if len(per_class) > 1:
        named = ", ".join(f"{name} ({share:.1%})" for share, name in weakest)
        lines.append(f"Weakest classes on {facts.summary['measured_on']}: {named}.")
    return _bullets(lines)


def _how_to_load(facts: CardFacts) -> str:
    name = facts.name
    return (
        "```python\n"
        "import timm\n\n"
        f'model = timm.create_model("hf-hub:{name}", pretrained=True).eval()\n'
        "config = timm.data.resolve_data_config({}, model=model)\n"
        "transform = timm.data.create_transform(**config, is_training=False)\n"
        'labels = model.pretrained_cfg["label_names"]\n'
        "```\n\n"
        "```python\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
        f'model = AutoModelForImageClassification.from_pretrained("{name}")\n'
        f'processor = AutoImageProcessor.from_pretrained("{name}")\n'
        "```\n\n"
        "From a copy on disk: `bnfinetune predict checkpoint=FOLDER IMAGE`, or "
        '`bnfinetune.load("FOLDER").predict("IMAGE")`.'
    )


def _listed(labels: Sequence[str]) -> str:
    more = f", and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return ", ".join(labels[:_NAMED]) + more


def _shown(key: str, value: float) -> str:
    return f"{value:.1%}" if key in SHARES else f"{value:.3f}"


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
