"""A linear probe's features, computed once: a frozen backbone gives the same for an image in every epoch.

Images go through the backbone once, in evaluation mode, or once for each of a number of augmented views. What reaches
the classifier is kept, in memory or in a memory-mapped file, and the loop trains the classifier on it. Epoch e sees
view `e % views`: the very augmentation that it would have drawn from the images. What is measured before and after a
run is the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from bnfinetune.bn.layers import find_bn_layers, is_bn_layer
from bnfinetune.bn.policy.switched_layer import switches_of
from bnfinetune.bn.statistics.precise import evaluation_mode
from bnfinetune.recipe import Augment, Data
from bnfinetune.training.data.loaders import EvalLoader, ImageLoader, TrainLoader
from bnfinetune.training.data.sampling import Pick
from bnfinetune.training.data.transforms import flip_probability
from bnfinetune.training.launch import on_main
from bnfinetune.training.loop.trainer import Trainer
from bnfinetune.training.network.head import head_parameters
from bnfinetune.training.network.shapes import input_format
from bnfinetune.training.probe.cache import ArrayCache

_PLAIN: Final = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)


def obstacle(trainer: Trainer) -> str | None:
    """Why features cannot be computed once; None if they can."""
    recipe, model = trainer.recipe, cast(Any, trainer.model)
    augment, head = recipe.data.augment, head_parameters(model)
    layers = find_bn_layers(model).values() if any(map(is_bn_layer, model.modules())) else ()
    fixed = all(switches_of(layer)[:2] == ("running", "none") for layer in layers)
    loaders = trainer.loaders
    checks = {
        "train.cache_features=off": recipe.train.cache_features == "off",
        "more than the head trains": any(p.requires_grad and id(p) not in head for p in model.parameters()),
        "the head is not one linear layer": not isinstance(model.get_classifier(), nn.Linear),
        "BN statistics move": not fixed or bool(trainer.phases) or "eval" in recipe.recalibrate.at,
        "mixup and cutmix mix images": bool(augment.mixup or augment.cutmix),
        "images are augmented, and train.cache_views does not say how often": recipe.train.cache_views is None
        and not _is_plain(recipe.data),
        "images have domains": loaders.train.emits_domains,
        "images come as a stream": any(
            cast(Any, loader.dataset).split is None for loader in (loaders.train, loaders.val)
        ),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def _is_plain(data: Data) -> bool:
    """Whether an image is the same in every epoch."""
    plain = {"hflip": flip_probability(data), "mix_prob": _PLAIN.mix_prob}
    return data.augment.model_copy(update=plain) == _PLAIN


@contextmanager
def features_or_images(
    trainer: Trainer, fingerprint: str, say: Callable[[str], None]
) -> Iterator[tuple[TrainLoader, EvalLoader]]:
    """What a run trains on and is measured on meanwhile: a linear probe on features computed once, any other on images.

    Within this context the networks of a probe take features for images too.

    Args:
        trainer: The run, with its networks as they train.
        fingerprint: Of the data, from `ImageSplits.fingerprint`.
        say: Told what is computed.

    Yields:
        The training loader and the validation loader, or what stands for them.

    Raises:
        DataError: An image is unreadable.
    """
    loaders = trainer.loaders
    possible = not trainer.is_over and obstacle(trainer) is None
    extractor = Extractor(trainer.model, trainer.accelerator) if possible else None
    if extractor is None or not extractor.is_exact(one_image(loaders.train)):
        yield loaders.train, loaders.val
        return
    with closing(ArrayCache(trainer.recipe.train, trainer.accelerator)) as arrays, ExitStack() as stack:
        with trainer.folding.training():
            train = _training_features(trainer, extractor, arrays, fingerprint)
            validation = EvalFeatures(loaders.val, extractor, arrays)
        views, rows, width = train.features.shape
        say(f"features  {width} of each of {rows} training images{f' in {views} views' if views > 1 else ''}, once")
        for network in trainer.networks().values():
            stack.enter_context(_taking_features(network))
        yield cast(Any, train), cast(Any, validation)


class Extractor:
    """What reaches a network's classifier, in evaluation mode.

    Attributes:
        width: Features per image.
    """

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        self.classifier: nn.Linear = model.get_classifier()
        self.width = self.classifier.in_features

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Features (B, F) of images (B, C, H, W)."""
        features: NDArray[np.float32] = self._run(images)[0].float().cpu().numpy()
        return features

    def is_exact(self, images: Tensor) -> bool:
        """Whether what the network puts out is just what its classifier makes of features (B, F)."""
        features, logits = self._run(images)
        with torch.no_grad(), self.accelerator.autocast():
            return features.ndim == 2 and torch.equal(self.classifier(features), logits)

    @torch.no_grad()
    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        images = images.to(self.accelerator.device, non_blocking=True, memory_format=input_format(self.model))
        hook = self.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with evaluation_mode(self.model), self.accelerator.autocast():
                logits: Tensor = self.model(images)
        finally:
            hook.remove()
        return seen[0], logits


class TrainFeatures:
    """A training loader's batches as features (B, F, 1, 1) and labels, in the loader's own order and position.

    Args:
        loader: Whose order, position and length count.
        features: (views, N, F).
        labels: (views, N) or (views, N, classes), since a neighbour may stand in for an unreadable image.
    """

    def __init__(self, loader: TrainLoader, features: NDArray[np.float32], labels: NDArray[Any]) -> None:
        self.loader, self.features, self.labels = loader, features, labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def as_read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches on the CPU; an iteration that is run to its end is followed by the next epoch."""
        sampler: Any = self.loader.batch_sampler
        for picks in sampler:
            view, rows = picks[0].epoch % len(self.features), [pick.number for pick in picks]
            yield _as_maps(self.features[view, rows]), torch.from_numpy(self.labels[view, rows])


class EvalFeatures:
    """An evaluation loader's batches as features (B, F, 1, 1), labels and indices (B,)."""

    def __init__(self, loader: EvalLoader, extractor: Extractor, arrays: ArrayCache) -> None:
        self.loader = loader
        share = -(-cast(Any, loader.batch_sampler).length // extractor.accelerator.num_processes)
        self.features = arrays.own("validation", (share, extractor.width))
        self.batches: list[tuple[slice, list[Tensor]]] = []
        done = 0
        for images, *others in loader:
            rows = slice(done, done := done + len(images))
            self.features[rows] = extractor(images)
            self.batches.append((rows, others))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for rows, others in self.batches:
            yield _as_maps(np.array(self.features[rows])), *others


def _as_maps(features: NDArray[np.float32]) -> Tensor:
    """Features (B, F) as maps of one pixel, which go wherever images do."""
    return torch.from_numpy(features)[..., None, None]


@contextmanager
def _taking_features(network: nn.Module) -> Iterator[None]:
    """Within this context a network takes maps of one pixel for what reaches its classifier."""
    network.__class__ = _probe_class(cast(Any, type(network)))
    try:
        yield
    finally:
        network.__class__ = type(network).__bases__[0]


@cache
def _probe_class(native: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Any:
        classifier = self.get_classifier()
        if x.shape[1:] != (classifier.in_features, 1, 1):
            return native.forward(self, x)
        return classifier(F.dropout(x.flatten(1), getattr(self, "drop_rate", 0.0), self.training))

    return type(native.__name__, (native,), {"__module__": native.__module__, "forward": forward})


def one_image(loader: TrainLoader) -> Tensor:
    """A training image (1, C, H, W)."""
    images, _ = next(_read(loader, [[Pick(0, 0)]]))
    return images


def _training_features(trainer: Trainer, extractor: Extractor, arrays: ArrayCache, fingerprint: str) -> TrainFeatures:
    """Features of every training image in every view: each rank computes its share, and all have them all."""
    loader, views, accelerator = trainer.loaders.train, trainer.recipe.train.cache_views or 1, trainer.accelerator
    count = len(cast(Any, loader.dataset).split)
    name = on_main(accelerator, lambda: _key(trainer, views, fingerprint)) if arrays.keeps else "train"
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    size = trainer.recipe.evaluate.batch_size

    def fill(features: NDArray[Any], labels: NDArray[Any]) -> None:
        for view in range(views):
            picks = [[Pick(view, row) for row in mine[i : i + size]] for i in range(0, len(mine), size)]
            for batch, (images, found) in zip(picks, _read(loader, picks), strict=True):
                rows = [pick.number for pick in batch]
                features[view, rows], labels[view, rows] = extractor(images), found.numpy()

    known = cast(Any, loader.dataset).labels
    shapes = {
        "features": ((views, count, extractor.width), np.float32),
        "labels": ((views, *known.shape), known.dtype),
    }
    return TrainFeatures(loader, *arrays.shared(name, shapes, fill))


def _read(loader: TrainLoader, picks: list[list[Pick]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of picks, as the training loader prepares them."""
    reader: Any = loader.dataset
    images = ImageLoader(reader, picks, workers=loader.num_workers, device=loader.device, persistent=False)
    with closing(images):
        yield from images
        loader.skipped.update(images.skipped)


def _key(trainer: Trainer, views: int, fingerprint: str) -> str:
    """A name that changes with whatever features depend on: weights, statistics, transform, data, precision."""
    reader: Any = trainer.loaders.train.dataset
    transform = reader.transform
    recipe, digest = trainer.recipe, blake2b(digest_size=16)
    head = head_parameters(trainer.model)
    frozen = {
        name: tensor for name, tensor in trainer.model.state_dict(keep_vars=True).items() if id(tensor) not in head
    }
    stated = [
        *(views, fingerprint, recipe.train.mixed_precision, recipe.model.name, recipe.model.kwargs),
        *(recipe.data.augment.model_dump(), reader.seed, repr(transform.geometry), transform.mode),
        *(transform.shortest, transform.mean, transform.std),
        *(recipe.data.on_error, recipe.data.max_pixels),
    ]
    digest.update(repr(stated).encode())
    for name, tensor in sorted(frozen.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for row in range(len(reader.split)):
        digest.update(blake2b(_encoded(reader.split[row][reader.image_column])).digest())
    return digest.hexdigest()


def _encoded(raw: Any) -> bytes:
    """The bytes of an image file, as far as there are any."""
    if raw is None:
        return b""
    if raw.get("bytes") is not None:
        return bytes(raw["bytes"])
    path = Path(raw.get("path") or "")
    return path.read_bytes() if path.is_file() else b""
