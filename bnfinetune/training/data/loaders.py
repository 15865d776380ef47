"""Loaders of batches for one rank: training, evaluation, and clean training images for statistics."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_start_method
from typing import Any, Final, cast

import numpy as np
import torch
from datasets import IterableDataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from bnfinetune.errors import DataError
from bnfinetune.recipe import Data
from bnfinetune.source_paths import DEMOS
from bnfinetune.training.data.decoded import DecodedImages
from bnfinetune.training.data.hints import first_line, listed
from bnfinetune.training.data.labels import column_values
from bnfinetune.training.data.reading import Batch, Failure, ImageReader
from bnfinetune.training.data.sampling import EvalSampler, TrainSampler
from bnfinetune.training.data.seeding import derive_seed
from bnfinetune.training.data.splits import ImageSplits
from bnfinetune.training.data.streams import StreamSampler
from bnfinetune.training.data.transforms import Transform, Transforms

_MOST_WORKERS: Final = 16  # each of them takes memory, and so many feed any one device
_STATISTICS = 5  # stream of random draws


class ImageLoader(DataLoader[Any]):
    """A torch `DataLoader` that keeps count of unreadable images and says in one line what went wrong in a worker.

    It draws nothing from torch's global generator. Images are normalised on the device that they are for.

    Attributes:
        skipped: Unreadable images met so far, with the reason, in the order they were met (`data.on_error=skip`).
    """

    def __init__(
        self, reader: ImageReader, sampler: Any, *, workers: int, device: torch.device, persistent: bool
    ) -> None:
        super().__init__(
            reader,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # the reader has assembled the batch
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0 and (persistent or _starts_slowly()),
            generator=torch.Generator(),
            worker_init_fn=_leave_signals,
        )
        self.device = device
        self.skipped: dict[str, None] = {}
        self._running: _BaseDataLoaderIter | None = None

    @property
    def rarest_share(self) -> float:
        """Share of the rarest domain in the images; 1 where there are no domains."""
        domains = self.dataset.domains  # type: ignore[attr-defined]
        return 1.0 if domains is None else float(np.unique_counts(domains).counts.min() / len(domains))

    @property
    def emits_domains(self) -> bool:
        """Whether batches carry the domain of each image as their third item."""
        return self.dataset.domains is not None  # type: ignore[attr-defined]

    @property
    def images(self) -> int | None:
        """Images of one pass over all ranks; None for a stream."""
        return getattr(self.batch_sampler, "length", None)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield what `emit` makes of each batch that has an image.

        Raises:
            DataError: An image is unreadable (`data.on_error=raise`), or a worker was killed.
        """
        yield from self._read(self.finish)

    def _read(self, finish: Callable[[Tensor], Tensor]) -> Iterator[Any]:
        self._running = super().__iter__()
        try:
            yield from self._emitted(self._running, finish)
        except (DataError, RuntimeError) as error:
            self.close()
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{first_line(error)}: often for want of memory; lower data.workers or the batch size"
            ) from error
        finally:
            if not self.persistent_workers:
                self.close()

    def _emitted(self, batches: Iterator[Batch | Failure], finish: Callable[[Tensor], Tensor]) -> Iterator[Any]:
        for batch in batches:
            if isinstance(batch, Failure):
                raise DataError(batch.message)
            self.skipped.update(dict.fromkeys(batch.skipped))
            if len(batch.labels):
                yield self.emit(batch._replace(images=finish(batch.images)))

    def finish(self, images: Tensor) -> Tensor:
        """The images of a `Batch` as floats (B, C, H, W) on the device."""
        images = images.to(self.device, non_blocking=True)
        finished: Tensor = images if images.is_floating_point() else self.dataset.transform.finish(images)  # type: ignore[attr-defined]
        return finished

    def close(self) -> None:
        """End the loader's processes now; the next iteration starts new ones.

        Left to the garbage collector, an iterator that is part of a reference cycle (as a traceback makes one) waits
        five seconds for each process.
        """
        if isinstance(self._running, _MultiProcessingDataLoaderIter):
            self._running._shutdown_workers()
        self._running = self._iterator = None

    def emit(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images (B, C, H, W), labels (B,) or (B, classes) and, where images have domains, their numbers (B,)."""
        return (batch.images, batch.labels) if batch.domains is None else (batch.images, batch.labels, batch.domains)


class TrainLoader(ImageLoader):
    """Shuffled, augmented training images, from any position on."""

    @property
    def batches(self) -> int | None:
        """Batches per epoch on every rank; None for a stream, which is one endless epoch."""
        return None if isinstance(self.batch_sampler, StreamSampler) else len(self)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration begin at a batch of an epoch.

        An iteration that is run to its end is followed by the next epoch.
        """
        self._sampler.set_position(epoch, batch)

    def drop_remainder(self, min_size: int) -> int:
        """Leave out the last batch of each epoch where it would give a rank fewer than `min_size` images.

        Returns:
            How many images each epoch leaves out.

        Raises:
            DataError: No batch is left.
        """
        dropped: int = self._sampler.drop_remainder(min_size)
        return dropped

    def as_read(self) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over batches whose images are still as they were read, on the CPU: `finish` makes floats of them."""
        yield from self._read(lambda images: images)

    def _read(self, finish: Callable[[Tensor], Tensor]) -> Iterator[Any]:
        yield from super()._read(finish)
        self._sampler.set_position(self._sampler.epoch + 1)

    @property
    def _sampler(self) -> Any:
        return self.batch_sampler


class EvalLoader(ImageLoader):
    """The images of this rank, each once over all ranks: batches are images, labels and their indices in the split."""

    def emit(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images of shape `(B, C, H, W)`, labels of shape `(B,)` or `(B, classes)`, and indices of shape `(B,)`."""
        return batch.images, batch.labels, batch.indices

    def labels(self) -> Iterator[Tensor]:
        """The labels of each batch, without its images; not of a stream, which must be read for them."""
        reader, sampler = cast(Any, self.dataset), cast(Any, self.batch_sampler)
        for picks in sampler:
            yield torch.from_numpy(reader.labels[[pick.number for pick in picks]])


@dataclass(frozen=True)
class Loaders:
    """The loaders of one rank.

    Attributes:
        train: Shuffled and augmented, equally many batches on all ranks.
        val: Each image once over all ranks; ranks may hold different numbers of batches.
        test: As `val`, or None.
        stats: Training images preprocessed as for evaluation, shuffled, not mixed, each once over all ranks, with
            equally many batches of nearly even size on all ranks; the same in every iteration.
        augmented_stats: As `stats`, but augmented as in training, the same in every iteration.
        targets: The images of `validation` and, where there is one, `test` to adapt to without their labels:
            shuffled, since stored order is often sorted by class, the same in every iteration.
        decoded: What these loaders have decoded already.
    """

    train: TrainLoader
    val: EvalLoader
    test: EvalLoader | None
    stats: ImageLoader
    augmented_stats: ImageLoader
    targets: Mapping[str, ImageLoader]
    decoded: DecodedImages

    @property
    def measured(self) -> dict[str, EvalLoader]:
        """The splits that networks are measured on, the last of them the one that counts."""
        return {"validation": self.val} | ({} if self.test is None else {"test": self.test})

    @property
    def skipped(self) -> list[str]:
        """Unreadable images met so far on this rank, with the reason."""
        return list(dict.fromkeys(line for loader in self._all() for line in loader.skipped))

    def close(self) -> None:
        """End all loader processes, and forget what they decoded; call it when a run is over, whatever its end."""
        for loader in self._all():
            loader.close()
        self.decoded.close()

    def _all(self) -> list[ImageLoader]:
        loaders = [self.train, self.val, self.test, self.stats, self.augmented_stats, *self.targets.values()]
        return [loader for loader in loaders if loader is not None]


def build_loaders(
    splits: ImageSplits,
    transforms: Transforms,
    data: Data,
    *,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    domains: Sequence[str] = (),
) -> Loaders:
    """Build the loaders of one rank; they are sharded already and must not be prepared by Accelerate.

    Args:
        splits: From `load_splits`.
        transforms: From `build_transforms`.
        data: The recipe's `data` section.
        batch_size: Training images per batch and rank.
        eval_batch_size: Images per batch and rank of the other loaders.
        seed: Seed of order and augmentation.
        rank: Number of this process.
        world_size: Number of processes.
        device: Where images are normalised and batches of them come from; labels stay on the CPU.
        domains: Names that the domain column of the training split may hold; batches carry their positions here.

    Raises:
        DataError: There are fewer training images than processes.
    """
    workers = default_workers(data, world_size) if data.workers is None else data.workers
    kit = _Kit(
        splits,
        transforms,
        data,
        process={"workers": workers, "device": torch.device(device)},
        ranks={"rank": rank, "world_size": world_size},
        domains=_domain_numbers(splits, domains),
        decoded=DecodedImages(data.decoded_cache * 2**20 // _local_ranks(world_size)),
    )
    train_order, clean_order, augmented_order = kit.train_orders(batch_size, eval_batch_size, seed)
    return Loaders(
        train=TrainLoader(kit.train_reader(transforms.train, seed), train_order, persistent=True, **kit.process),
        val=kit.evaluation("val", splits.val, eval_batch_size, persistent=True),
        test=None if splits.test is None else kit.evaluation("test", splits.test, eval_batch_size, persistent=False),
        stats=ImageLoader(kit.train_reader(transforms.eval), clean_order, persistent=False, **kit.process),
        augmented_stats=ImageLoader(
            kit.train_reader(transforms.train, seed), augmented_order, persistent=False, **kit.process
        ),
        targets={
            name: kit.target(role, split, eval_batch_size, seed)
            for name, role, split in (("validation", "val", splits.val), ("test", "test", splits.test))
            if split is not None
        },
        decoded=kit.decoded,
    )


@dataclass(frozen=True)
class _Kit:
    """What all loaders of a rank share."""

    splits: ImageSplits
    transforms: Transforms
    data: Data
    process: dict[str, Any]
    ranks: dict[str, Any]
    domains: NDArray[np.int64] | None
    decoded: DecodedImages

    def reader(self, role: str, split: Any, transform: Transform, **options: Any) -> ImageReader:
        streamed = isinstance(split, IterableDataset)
        kind = "drawn" if options.get("seed") is None else "decoded"
        return ImageReader(
            split,
            (self.splits.image_column, self.splits.label_column),
            transform=transform,
            where=f"split {self.splits.names[role]!r} of {self.splits.source}",
            max_pixels=self.data.max_pixels,
            skip=self.data.on_error == "skip",
            levels=self.splits.levels,
            decoded=None if streamed else self.decoded.shelf(f"{role}-{kind}", len(split)),
            **options,
        )

    def train_reader(self, transform: Transform, seed: int | None = None) -> ImageReader:
        return self.reader("train", self.splits.train, transform, seed=seed, domains=self.domains)

    def train_orders(self, batch_size: int, clean_size: int, seed: int) -> tuple[Any, Any, Any]:
        """Samplers of the training images: for training, for statistics, and for statistics under augmentation."""
        train, ranks = self.splits.train, self.ranks
        clean_seed = derive_seed(seed, _STATISTICS)
        if isinstance(train, IterableDataset):
            buffer_size = self.data.shuffle_buffer
            order: Any = StreamSampler(train, batch_size, seed=seed, buffer_size=buffer_size, endless=True, **ranks)
            clean: Any = partial(StreamSampler, train, clean_size, seed=clean_seed, buffer_size=buffer_size, **ranks)
        else:
            order = TrainSampler(len(train), batch_size, seed=seed, spread=self.domains, **ranks)
            clean = partial(TrainSampler, len(train), clean_size, seed=clean_seed, even=True, **ranks)
        return order, clean(), clean()

    def target(self, role: str, split: Any, size: int, seed: int) -> ImageLoader:
        """Images of an evaluation split in random order."""
        target_seed = derive_seed(seed, _STATISTICS)
        if isinstance(split, IterableDataset):
            buffer_size = self.data.shuffle_buffer
            order: Any = StreamSampler(split, size, seed=target_seed, buffer_size=buffer_size, **self.ranks)
        else:
            order = EvalSampler(len(split), size, seed=target_seed, **self.ranks)
        return ImageLoader(self.reader(role, split, self.transforms.eval), order, persistent=False, **self.process)

    def evaluation(self, role: str, split: Any, size: int, *, persistent: bool) -> EvalLoader:
        if isinstance(split, IterableDataset):
            order: Any = StreamSampler(split, size, **self.ranks)
        else:
            order = EvalSampler(len(split), size, **self.ranks)
        return EvalLoader(self.reader(role, split, self.transforms.eval), order, persistent=persistent, **self.process)


def _domain_numbers(splits: ImageSplits, domains: Sequence[str]) -> NDArray[np.int64] | None:
    """The domain of each training image as a position in `domains`."""
    if splits.domain_column is None:
        return None
    values = column_values(splits.train, splits.domain_column)
    unknown = set(values) - set(domains)
    if unknown:
        raise DataError(
            f"data.domain_column: {splits.domain_column!r} holds the domain {min(map(str, unknown))!r}, which is "
            f"not among bn.domains={listed(domains) if domains else '()'}: name every domain there"
        )
    return np.array([list(domains).index(value) for value in values], dtype=np.int64)


def default_workers(data: Data, world_size: int) -> int:
    """Loader processes per rank: none for the demo's tiny images, else one per core of the rank, up to 16."""
    if data.source in DEMOS:
        return 0
    return min(_MOST_WORKERS, _cores() // _local_ranks(world_size))


def _local_ranks(world_size: int) -> int:
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _cores() -> int:
    """Cores that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _starts_slowly() -> bool:
    """Whether a process imports everything anew; asking does not settle the method."""
    return (get_start_method(allow_none=True) or get_all_start_methods()[0]) != "fork"


def _leave_signals(worker: int) -> None:
    """What is sent to a whole group of processes, as terminals and torchrun do, the one that trains answers alone."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _as_it_is(batch: Batch | Failure) -> Batch | Failure:
    return batch
