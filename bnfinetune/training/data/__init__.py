"""From the recipe's `data` section to loaders of one rank."""

from bnfinetune.training.data.loaders import EvalLoader, ImageLoader, Loaders, TrainLoader, build_loaders
from bnfinetune.training.data.mixing import SeededMixup, build_mixup
from bnfinetune.training.data.splits import ImageSplits, load_splits
from bnfinetune.training.data.transforms import Transform, Transforms, build_transforms

__all__ = [
    "EvalLoader",
    "ImageLoader",
    "ImageSplits",
    "Loaders",
    "SeededMixup",
    "TrainLoader",
    "Transform",
    "Transforms",
    "build_loaders",
    "build_mixup",
    "build_transforms",
    "load_splits",
]
