"""The recipe schema: the one source of defaults, types, bounds, choices and help texts.

A recipe is a YAML file that says only what differs from these defaults. This module imports no torch,
so that `--help` and a mistake in a recipe answer at once.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from bnfinetune.source_paths import DEMOS

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
Between = Annotated[float, Field(gt=0.0, lt=1.0)]

DEMO_MODEL = "bnf_resnet"
PHOTO_MODEL = "resnet50.a1_in1k"

BN_FORMS = ("one section", "list of sections")

METRICS = {
    "multiclass": ("top1", "top5", "macro_f1", "loss", "ece"),
    "multilabel": ("map", "macro_f1", "micro_f1", "loss"),
}
"""Metrics that `checkpoint.metric` may name, by `data.task`, the default first."""

_Number = TypeVar("_Number", bound=float)


def _ascending(pair: tuple[_Number, _Number]) -> tuple[_Number, _Number]:
    if pair[0] > pair[1]:
        raise ValueError(f"the lower bound comes first, found {list(pair)}")
    return pair


def _at_home(path: str) -> str:
    """A path with `~` as the home folder: a shell expands it at the beginning of a word only, and not behind key=."""
    prefix, colon, rest = path.rpartition("local-dir:")
    return f"{prefix}{colon}{os.path.expanduser(rest)}"


FilePath = Annotated[str, AfterValidator(_at_home)]


def _yaml_no(value: object) -> object:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


def _yaml_off(value: object) -> object:
    """And a bare `off` too."""
    return "off" if value is False else value


def _bn_form(value: object) -> str:
    return BN_FORMS[isinstance(value, list | tuple)]


class Section(BaseModel):
    """A part of a recipe. Unknown keys are errors; a section never changes once it is built."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    """Which timm backbone is fine-tuned, and from which weights."""

    name: FilePath = Field(
        default=DEMO_MODEL,
        min_length=1,
        description=f"any timm model; also hf-hub:USER/NAME and local-dir:PATH; left out: {DEMO_MODEL} for the demo, "
        f"{PHOTO_MODEL} for other data",
    )
    pretrained: bool = Field(default=True, description="load the model's pretrained weights")
    checkpoint: FilePath | None = Field(
        default=None, description="weights file (safetensors, or a tensors-only pickle) loaded instead of timm's"
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of timm.create_model, such as drop_rate"
    )
    head: Literal["auto", "new", "fitted"] = Field(
        default="auto",
        description="auto keeps the pretrained classifier rows of classes that it knows by name, and a checkpoint's "
        "classifier of as many classes; otherwise, and with new, it starts at zeros, where the loss is ln C; fitted: "
        "by logistic regression on features of the training images, before the first update",
    )
    group_norm: Positive | None = Field(
        default=None,
        description="replace BatchNorm by GroupNorm of at most so many groups, calibrated on training images",
    )
    weight_standardisation: bool = Field(
        default=False, description="group_norm: standardise the filters of the convolutions before it too"
    )
    trainable: Literal["all", "bn_and_head", "last_bn_and_head", "head"] = Field(
        default="all", description="which parameters learn"
    )
    compile: bool = Field(default=False, description="torch.compile the training step's model")
    grad_checkpointing: bool = Field(default=False, description="recompute activations in backward to save memory")
    channels_last: Literal["auto"] | bool = Field(
        default="auto",
        description="store activations as NHWC; auto: on a CPU, for images of 96 pixels and more, where it is faster",
    )


class Augment(Section):
    """Training augmentation, all of it timm's. Evaluation never augments."""

    scale: Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)] = Field(
        default=(0.35, 1.0), description="share of the image area a random crop covers"
    )
    ratio: Annotated[tuple[AboveZero, AboveZero], AfterValidator(_ascending)] = Field(
        default=(0.75, 1.3333), description="aspect ratios of the random crop"
    )
    hflip: Fraction | None = Field(
        default=None, description="probability of a horizontal flip; null: 0.5, but 0 for the demo's characters"
    )
    vflip: Fraction = Field(default=0.0, description="probability of a vertical flip")
    color_jitter: Rate = Field(default=0.0, description="strength of brightness, contrast and saturation jitter")
    auto_augment: str | None = Field(
        default=None, description="timm policy text, such as rand-m9-mstd0.5 (RandAugment) or augmix-m3"
    )
    random_erasing: Fraction = Field(default=0.0, description="probability that a rectangle of the image is erased")
    mixup: Rate = Field(default=0.0, description="mixup alpha; 0 turns it off")
    cutmix: Rate = Field(default=0.0, description="cutmix alpha; 0 turns it off")
    mix_prob: Fraction = Field(
        default=1.0, description="probability that a batch is mixed, where mixup or cutmix is on"
    )


class Data(Section):
    """Where images and labels come from, and how they reach the model."""

    task: Literal["multiclass", "multilabel"] = Field(
        default="multiclass",
        description="multiclass: one class per image; multilabel: any number of them, from a column of lists, or of "
        "text such as a|b or a;b",
    )
    source: FilePath = Field(
        default="demo",
        min_length=1,
        description="demo, demo-characters, demo-domains, a folder of class folders, a parquet or webdataset (.tar) "
        "file or pattern, or a datasets name",
    )
    config: str | None = Field(default=None, description="configuration of a datasets name")
    train_split: str | None = Field(
        default=None, min_length=1, description="split that is trained on; null: train, or what is called alike"
    )
    val_split: str | None = Field(
        default=None,
        description="split that selects the best checkpoint; null: validation, valid, val, dev or a held-out fraction",
    )
    test_split: str | None = Field(
        default=None, description="split that is only measured before and after; null: test, where there is one"
    )
    val_fraction: Between = Field(
        default=0.2,
        description="share of the training split held out, stratified by class, where there is no validation split",
    )
    train_samples: Positive | None = Field(
        default=None, description="use at most so many training images, stratified by class"
    )
    image_column: str | None = Field(default=None, description="column of images; null: found by type")
    domain_column: str | None = Field(
        default=None, description="column with the domain of a training image, for bn.domains"
    )
    label_column: str | None = Field(default=None, description="column of labels; null: found by type or name")
    classes: Positive | tuple[str, ...] | None = Field(
        default=None,
        description="number of classes, or their names in order, where the label column does not tell them",
    )
    streaming: bool = Field(default=False, description="read the set as a stream; needs train.steps")
    shuffle_buffer: Positive = Field(default=2048, description="images held for shuffling a stream")
    image_size: Annotated[int, Field(ge=8)] | None = Field(
        default=None, description="side of the square input; null: the model's own"
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="loader processes per rank; null: 0 for the demo, else one per core of the rank, up to 16",
    )
    on_error: Literal["raise", "skip"] = Field(
        default="raise", description="what an unreadable image does: stop the run, or be left out and listed"
    )
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(
        default=89_478_485, description="largest width times height of an image file; larger ones are unreadable"
    )
    fast_decode: bool = Field(
        default=True,
        description="decode JPEGs for training at 1/2, 1/4 or 1/8 of their size where no random crop is then smaller "
        "than the model's input; evaluation reads every pixel",
    )
    decoded_cache: Annotated[int, Field(ge=0)] = Field(
        default=1024,
        description="MiB of decoded images that the ranks of a machine keep in temporary folders while they run, of a "
        "set that fits, so that each file is decoded once; 0: none",
    )
    augment: Augment = Field(default_factory=Augment)


class BN(Section):
    """What BatchNorm layers do; each switch left null keeps what the layer does by itself."""

    train_stats: Literal["batch", "running", "sync", "ghost", "renorm", "stochastic"] | None = Field(
        default=None, description="statistics that normalise in training"
    )
    update_stats: Literal["ema", "cumulative", "none"] | None = Field(
        default=None, description="what happens to running_mean and running_var in training"
    )
    affine: Literal["trained", "frozen"] | None = Field(default=None, description="what happens to weight and bias")
    eval_stats: Literal["running", "batch", "mix"] | None = Field(
        default=None, description="statistics that normalise in evaluation"
    )
    layers: str | tuple[str, ...] = Field(
        default="*", description="globs on names of layers that the switches apply to; :last is the last BN layer"
    )
    exclude: str | tuple[str, ...] = Field(default=(), description="globs on layer names that are left alone")
    momentum: Fraction | Literal["auto"] | None = Field(
        default=None,
        description="weight of the newest batch in the running statistics; auto: min(0.1, 10 / batches per epoch)",
    )
    ghost_size: Positive | None = Field(
        default=None, description="train_stats=ghost: images that are normalised together; null: 32"
    )
    sync_group_size: Positive | None = Field(
        default=None, description="train_stats=sync: consecutive ranks that share statistics; null: all"
    )
    stochastic_p: Fraction | None = Field(
        default=None, description="train_stats=stochastic: chance of a channel to use batch statistics; null: 0.5"
    )
    renorm_rmax: Annotated[float, Field(ge=1.0)] | None = Field(
        default=None, description="train_stats=renorm: bound of the scale correction r; null: 3"
    )
    renorm_dmax: Rate | None = Field(
        default=None, description="train_stats=renorm: bound of the shift correction d; null: 5"
    )
    renorm_warmup: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="train_stats=renorm: updates that it is plain BatchNorm for; null: 0"
    )
    renorm_ramp: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="train_stats=renorm: updates over which its bounds then grow; null: 0"
    )
    mix_prior: Rate | None = Field(
        default=None, description="eval_stats=mix: images that the running statistics count for; null: 16"
    )
    domains: tuple[str, ...] = Field(
        default=(),
        description="domains with statistics of their own; data.domain_column says which an image is of",
    )
    domain_affine: Literal["shared", "own"] | None = Field(
        default=None, description="whether domains share the affine or have their own; null: shared"
    )
    fold: Annotated[Literal["auto", "always", "off"], BeforeValidator(_yaml_off)] = Field(
        default="auto",
        description="auto: in training, layers with fixed statistics are computed by the convolutions before them "
        "where batches are large enough to gain by it; always: it saves memory wherever it is done",
    )
    parameterisation: Literal["separate", "absorbed"] = Field(
        default="separate",
        description="absorbed: move the scale of layers with fixed statistics into the convolutions before them, which "
        "learn from there; the same function, another optimisation",
    )
    freeze_after: Rate | None = Field(
        default=None,
        description="re-estimate the layers' statistics, then freeze these and the affine: after this share of all "
        "updates (below 1) or this many epochs",
    )
    unfreeze_after: Rate | None = Field(
        default=None,
        description="let the layers go back to what they were before they froze: after this share of all updates "
        "(below 1) or this many epochs",
    )


class Recalibrate(Section):
    """Population statistics computed anew from data with the weights as they are (precise-BN, AdaBN)."""

    at: tuple[Literal["start", "eval", "end"], ...] = Field(
        default=(), description="before training, before every evaluation, after the last update"
    )
    data: Literal["train", "target"] = Field(
        default="train",
        description="train: training images; target: images of the test split (else validation), labels unused",
    )
    preprocessing: Literal["eval", "train"] = Field(
        default="eval", description="how these images are prepared; train: with augmentation"
    )
    samples: Positive | None = Field(default=None, description="images over all processes, at most; null: all")
    tolerance: Between | None = Field(
        default=None, description="stop once every channel's standard error is below this"
    )
    variance: Literal["pooled", "mean"] = Field(default="pooled", description="which variance is estimated")
    layers: str | tuple[str, ...] = Field(
        default="*", description="globs on names of layers whose statistics are computed; :last is the last BN layer"
    )
    prior: Rate | Literal["auto"] = Field(
        default=0.0,
        description="images that the stored statistics count for beside those read; auto chooses, on at most 512 "
        "images (or samples): by how well features tell the classes apart at the start, later by the loss, and of "
        "target images by what predictions tell of them",
    )


class Schedule(Section):
    """timm's learning-rate schedules, stepped once per optimizer update."""

    name: Literal["cosine", "linear", "poly", "step", "multistep", "tanh", "constant"] = Field(
        default="cosine", description="shape of the schedule; linear and poly fall as the first and second power"
    )
    warmup_fraction: Fraction = Field(default=0.05, description="share of all updates spent warming up from warmup_lr")
    warmup_lr: Rate = Field(
        default=0.0, description="learning rate that the warm-up rises from; the first update is one step above it"
    )
    min_lr: Rate = Field(default=0.0, description="learning rate at the end")
    decay_fraction: Fraction = Field(default=0.3, description="step: share of all updates between two decays")
    decay_rate: Fraction = Field(default=0.1, description="step, multistep: factor of one decay")
    milestones: tuple[Fraction, ...] = Field(
        default=(0.6, 0.85), description="multistep: points of decay, as shares of all updates"
    )


class Optim(Section):
    """timm's optimizers by name, and which parameters decay."""

    name: str = Field(default="adamw", min_length=1, description="any timm optimizer")
    lr: AboveZero | Literal["auto"] = Field(
        default="auto",
        description="peak learning rate, which layer_decay scales down and head_lr_scale scales for the head; "
        "auto: 1e-3, or 3e-4 sqrt(images of an update / 16) where Adam tunes a pretrained network of timm's, not below "
        "3e-4 where BN normalises by the batch",
    )
    weight_decay: Rate = Field(default=0.05, description="weight decay of everything that decays")
    norm_decay: bool = Field(default=False, description="decay the weights and biases of normalisation layers too")
    bias_decay: bool = Field(default=False, description="decay biases too")
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None, description="learning-rate factor from each timm layer group to the one before it"
    )
    head_lr_scale: AboveZero = Field(default=1.0, description="learning-rate factor of the head")
    clip_grad: AboveZero | None = Field(default=None, description="largest norm of the gradient")
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the optimizer, such as betas"
    )
    schedule: Schedule = Field(default_factory=Schedule)


class Train(Section):
    """The training loop."""

    epochs: Positive = Field(default=15, description="passes over the training split")
    steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="optimizer updates, instead of epochs; needed for streams; 0 trains nothing"
    )
    batch_size: Positive = Field(default=8, description="images per process and forward")
    grad_accum: Positive = Field(default=1, description="forwards per optimizer update")
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"] | None, BeforeValidator(_yaml_no)] = Field(
        default=None, description="autocast precision; null: what accelerate launch or its configuration says, else no"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        description="share of the target spread over all classes; multilabel: over yes and no, for each class",
    )
    ema: Between | None = Field(
        default=None, description="decay of an averaged copy of the model, which is then what is evaluated and saved"
    )
    average: Literal["none", "last_k", "greedy"] = Field(
        default="none",
        description="at the end, average networks of evaluations, with statistics computed anew where they moved; the "
        "average is the best if it measures so; last_k: of the last ones; greedy: of the best ones, each that helps",
    )
    average_of: Annotated[int, Field(ge=2)] = Field(
        default=5, description="evaluations whose networks train.average takes, or tries"
    )
    cache_features: Annotated[Literal["auto", "off"], BeforeValidator(_yaml_off)] = Field(
        default="auto",
        description="auto: where only a linear head trains and images are not augmented, compute their features once",
    )
    cache_views: Positive | None = Field(
        default=None, description="augmented views of each image that features are computed once of, used in turn"
    )
    cache_memory: Annotated[int, Field(ge=0)] = Field(
        default=1024, description="MiB of features per process that are kept in memory; more go into files"
    )
    cache_dir: FilePath | None = Field(
        default=None, description="folder that keeps features for later runs; null: they go with the run"
    )
    early_stop: Positive | None = Field(default=None, description="stop after so many evaluations without a better one")
    resume: FilePath | None = Field(
        default=None, description="run folder to continue; auto: run.dir if it holds a checkpoint"
    )
    resume_allow: tuple[str, ...] = Field(
        default=(), description="keys that may differ from those of the run that is continued, such as [optim.lr]"
    )
    max_skipped: Positive = Field(
        default=10,
        description="updates in a row whose loss or gradient is not finite, each of them skipped, that stop the run",
    )
    auto_batch: bool = Field(
        default=False,
        description="out of memory: halve what one forward sees and accumulate, with the same global batch; not where "
        "BN uses batch statistics",
    )
    timeout_minutes: AboveZero = Field(
        default=10.0, description="several processes: how long one waits for the others before all of them end"
    )


class Evaluate(Section):
    """When and how the validation split is measured."""

    every_epochs: Positive = Field(default=1, description="epochs between evaluations")
    every_steps: Positive | None = Field(
        default=None, description="optimizer updates between evaluations, instead of epochs"
    )
    batch_size: Positive = Field(default=256, description="images per process and forward")
    adapt: Literal["none", "adabn", "mix", "ema", "tent"] = Field(
        default="none",
        description="how the finished network adapts, on a copy, to the unlabelled images that it is measured on",
    )
    adapt_samples: Positive | None = Field(default=None, description="adapt=adabn: images used; null: at most 512")
    adapt_prior: Rate = Field(default=16.0, description="adapt=mix: images that the stored statistics count for")
    adapt_lr: AboveZero = Field(default=1e-3, description="adapt=tent: learning rate")
    domain: str | None = Field(
        default=None,
        description="domain whose statistics evaluation and the exported network use; null: the last of bn.domains",
    )


class Checkpoint(Section):
    """What is kept on disk."""

    every_steps: Positive | None = Field(
        default=None, description="optimizer updates between saves of the last state; null: at each evaluation"
    )
    every_minutes: AboveZero | None = Field(
        default=None, description="minutes between such saves, besides those by steps or evaluations"
    )
    keep: Positive = Field(default=2, description="newest training states that are kept; the best network always is")
    metric: Literal["top1", "top5", "macro_f1", "micro_f1", "map", "loss", "ece"] | None = Field(
        default=None,
        description="validation metric that chooses the best checkpoint; null: top1, or map (mean average precision) "
        "where data.task=multilabel",
    )


class Run(Section):
    """Where a run writes, and what makes it repeatable."""

    dir: FilePath | None = Field(default=None, description="run folder; null: a new one under runs/")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=42, description="seed of every random draw")
    deterministic: bool = Field(default=False, description="only deterministic kernels; slower")
    check: Annotated[Literal["off", "warn", "error"], BeforeValidator(_yaml_off)] = Field(
        default="warn", description="look for BatchNorm pitfalls before training: print what is found, or refuse errors"
    )
    report: bool = Field(
        default=True,
        description="follow the BN statistics over the run, and write report.html meanwhile and at its end",
    )
    log_every: AboveZero = Field(
        default=30.0, description="seconds between lines of progress in run.log, and where output is no terminal"
    )
    tracking: str | None = Field(
        default=None, description="trackers of Accelerate, comma-separated, such as tensorboard or wandb"
    )
    track_every: Positive = Field(
        default=10, description="optimizer updates between a tracker's points of loss, learning rate and speed"
    )


class Auto(Section):
    """A recipe that is found by measuring."""

    recipes: tuple[str, ...] = Field(
        default=(), description="recipes, by name or path, of which the best on these images is found"
    )
    budget: Annotated[int, Field(ge=0)] = Field(
        default=1, description="how many recipes are trained beside the one that is advised; validation chooses"
    )


class Recipe(Section):
    """A complete fine-tuning run: every section with every value settled."""

    name: str = Field(default="custom", pattern=r"^\w[\w.-]*$", description="recipe name, for folders and tables")
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    bn: Annotated[
        Annotated[BN, Tag(BN_FORMS[0])] | Annotated[tuple[BN, ...], Tag(BN_FORMS[1])], Discriminator(_bn_form)
    ] = Field(default_factory=BN)
    recalibrate: Recalibrate = Field(default_factory=Recalibrate)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    run: Run = Field(default_factory=Run)
    auto: Auto = Field(default_factory=Auto)

    @model_validator(mode="after")
    def _network_for_the_data(self) -> Recipe:
        """Where no network is named, photos get one of their size: the demo's own takes 32 pixels."""
        if "name" not in self.model.model_fields_set and self.data.source not in DEMOS:
            self.__dict__["model"] = self.model.model_copy(
                update={"name": PHOTO_MODEL}
            )  # settled, and frozen from here
        return self

    @model_validator(mode="after")
    def _metric_of_the_task(self) -> Recipe:
        metric, known = self.checkpoint.metric, METRICS[self.data.task]
        if metric is not None and metric not in known:
            raise ValueError(
                f"checkpoint.metric={metric} is not measured with data.task={self.data.task}: choose {', '.join(known)}"
            )
        return self

    @model_validator(mode="after")
    def _softmax_has_one_class(self) -> Recipe:
        if self.evaluate.adapt == "tent" and self.is_multilabel:
            raise ValueError(
                "evaluate.adapt=tent lowers the entropy of one class per image, and data.task=multilabel has several: "
                "choose adabn, mix or none"
            )
        return self

    @model_validator(mode="after")
    def _standardisation_needs_groups(self) -> Recipe:
        if self.model.weight_standardisation and self.model.group_norm is None:
            raise ValueError("model.weight_standardisation goes with GroupNorm: set model.group_norm, such as 32")
        return self

    @model_validator(mode="after")
    def _streams_need_steps(self) -> Recipe:
        if self.data.streaming and self.train.steps is None:
            raise ValueError("data.streaming has no length: set train.steps")
        return self

    @model_validator(mode="after")
    def _heads_are_fitted_to_fixed_features(self) -> Recipe:
        if self.model.head != "fitted":
            return self
        if self.data.streaming or self.domains:
            what = "data.streaming" if self.data.streaming else "bn.domains"
            raise ValueError(f"model.head=fitted needs images of known number and of one domain: unset {what}")
        if any(section.freeze_after == 0 for section in self.bn_sections):
            raise ValueError(
                "model.head=fitted comes before bn.freeze_after=0 computes statistics anew: use recalibrate.at=[start]"
            )
        return self

    @model_validator(mode="after")
    def _one_average(self) -> Recipe:
        if self.train.average != "none" and self.train.ema is not None:
            raise ValueError("train.average and train.ema average weights twice: unset one of them")
        return self

    @model_validator(mode="after")
    def _evaluated_domain_is_declared(self) -> Recipe:
        if self.evaluate.domain is not None and self.evaluate.domain not in self.domains:
            known = ", ".join(self.domains) or "none"
            raise ValueError(f"evaluate.domain={self.evaluate.domain} is not among bn.domains ({known})")
        return self

    @property
    def best_metric(self) -> str:
        """The validation metric that chooses the best checkpoint."""
        return self.checkpoint.metric or METRICS[self.data.task][0]

    @property
    def is_multilabel(self) -> bool:
        """Whether an image may have any number of classes."""
        return self.data.task == "multilabel"

    @property
    def bn_sections(self) -> tuple[BN, ...]:
        """The `bn` sections, in order."""
        return self.bn if isinstance(self.bn, tuple) else (self.bn,)

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain that the `bn` sections declare, in order."""
        return tuple(dict.fromkeys(name for section in self.bn_sections for name in section.domains))

    @property
    def evaluated_domain(self) -> str | None:
        """The domain whose statistics evaluation and the exported network use; None where there are no domains."""
        return self.evaluate.domain or (self.domains[-1] if self.domains else None)

    @property
    def evaluated_domain_number(self) -> int | None:
        """Its place among `domains`, by which batches tell their images' domains."""
        return None if self.evaluated_domain is None else self.domains.index(self.evaluated_domain)
