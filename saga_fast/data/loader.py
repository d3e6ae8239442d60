"""uint8 batches of a data set: pixels are cached if they fit in memory, else decoded ahead by workers."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from saga_fast.data.dataset import ImageDataset, Subset, check_classes, first_classes
from saga_fast.utils.errors import InputError, warn_rank_zero
from saga_fast.utils.images import to_pixels

Item = TypeVar("Item")
MEMORY_LIMIT = 2 * 2**30  # bytes of pixels that are cached, for each half of a data set


class Batch(NamedTuple):
    indices: list[int]
    pixels: Tensor  # uint8 (B, 3, size, size)
    labels: Tensor  # int64 (B,)


class PixelLoader:
    """Every image of `dataset`, resized to (size, size).

    The constructor decodes each image once, so a broken file is found before anything is trained or written: it raises
    InputError, which names the file, or with `skip_unreadable` skips it with a warning and lists it in `skipped`.
    Indices refer to the attribute `dataset`, which has the readable images only. Pixels are cached if they fit in
    `memory_limit` bytes.

    workers: processes that decode; 0 decodes in this one.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        size: int,
        workers: int = 0,
        memory_limit: int = MEMORY_LIMIT,
        skip_unreadable: bool = False,
        name: str = "data set",
    ):
        self.size, self.workers = size, workers
        count = len(dataset)
        fits_in_memory = count * 3 * size * size <= memory_limit
        cached = torch.empty(count if fits_in_memory else 0, 3, size, size, dtype=torch.uint8)
        faults: dict[int, str] = {}
        self.dataset = dataset
        with tqdm(total=count, desc=f"reading {name}", unit="image", delay=2, leave=False) as progress:
            for indices, pixels, broken in self._decode(torch.arange(count).split(32)):
                if broken and not skip_unreadable:
                    raise InputError(f"{next(iter(broken.values()))}, or skip such files with --data.skip-unreadable")
                faults |= broken
                if fits_in_memory:
                    cached[indices] = pixels
                progress.update(len(indices))
        self.skipped = [faults[index] for index in sorted(faults)]
        if faults:
            warn_rank_zero(f"{name}: {len(faults)} of {count} images skipped, the first {self.skipped[0]}")
            readable = [index for index in range(count) if index not in faults]
            self.dataset = Subset(dataset, readable)
            check_classes(self.dataset, name)
            cached = cached[readable] if fits_in_memory else cached
        self.labels = torch.tensor(self.dataset.labels)
        self._cached = cached if fits_in_memory else None

    def __len__(self) -> int:
        return len(self.dataset)

    def hold_out(self) -> tuple[PixelLoader, PixelLoader]:
        """(rest, held out): holds out the last tenth of the classes, two at least, without decoding again. Raises
        InputError if fewer than two classes are left."""
        classes = self.dataset.classes
        first = len(classes) - max(2, round(len(classes) / 10))
        if first < 2:
            raise InputError(f"--log.evaluate-every: holds out 2 of {len(classes)} training classes; pass None")
        rest = first_classes(self.dataset, first)
        held_out = Subset(self.dataset, [i for i, label in enumerate(self.dataset.labels) if label >= first])
        halves = copy.copy(self), copy.copy(self)
        for half, dataset in zip(halves, (rest, held_out)):
            half.dataset, half.labels = dataset, self.labels[dataset.indices]
            half._cached = None if self._cached is None else self._cached[dataset.indices]
        return halves

    def batch(self, indices: list[int]) -> Batch:
        """The images at `indices`, decoded in this process where they are not cached."""
        if self._cached is not None:
            return Batch(indices, self._cached[indices], self.labels[indices])
        return self._checked_batch(*Decoder(self.dataset, self.size)[indices])

    def stream(self, batches: Iterable[list[int]]) -> Iterator[Batch]:
        """The batches in order. Where pixels are not cached, workers decode ahead, so `batches` is read ahead too."""
        if self._cached is not None:
            return map(self.batch, batches)
        return (self._checked_batch(*decoded) for decoded in self._decode(batches))

    def _checked_batch(self, indices: list[int], pixels: Tensor, faults: dict[int, str]) -> Batch:
        if faults:
            raise InputError(next(iter(faults.values())))
        return Batch(indices, pixels, self.labels[indices])

    def _decode(self, batches: Iterable[list[int] | Tensor]) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
        return prefetch(Decoder(self.dataset, self.size), batches, self.workers)


class Decoder(Dataset[tuple[list[int], Tensor, dict[int, str]]]):
    """Maps indices to (indices, pixels, {index: fault}). Faults are returned, as a worker's exception would arrive
    wrapped in a traceback."""

    def __init__(self, dataset: ImageDataset, size: int):
        self.dataset, self.size = dataset, size

    def __getitem__(self, indices: list[int] | Tensor) -> tuple[list[int], Tensor, dict[int, str]]:
        indices = [int(index) for index in indices]
        pixels = torch.zeros(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        faults = {}
        for row, index in enumerate(indices):
            try:
                pixels[row] = to_pixels(self.dataset[index][0], self.size)
            except InputError as error:
                faults[index] = str(error)
        return indices, pixels, faults


def prefetch(dataset: Dataset[Item], items: Iterable[Any], workers: int) -> Generator[Item]:
    """dataset[item] of each item, in order, computed ahead by `workers` processes, or lazily in this one if 0.

    The processes end with the iterator, when it is exhausted or dropped, and with this process, even if that is killed.
    Raises InputError if one of them is killed.
    """
    stream = _prefetched(dataset, items, workers)
    # At exit Python sends SIGTERM to its children and waits; these workers ignore it, so close them before.
    atexit.register(_close, weakref.ref(stream))
    return stream


def _close(stream: weakref.ref[Generator[Any]]) -> None:
    if (living := stream()) is not None:
        living.close()


def _prefetched(dataset: Dataset[Item], items: Iterable[Any], workers: int) -> Generator[Item]:
    generator = torch.Generator()  # else the DataLoader draws a seed from the run's own generator
    try:
        yield from DataLoader(
            dataset,
            sampler=items,
            batch_size=None,
            num_workers=workers,
            generator=generator,
            worker_init_fn=_ignore_signals,
        )
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"--data.workers: {workers}, one of them died ({str(error).splitlines()[0]}); give memory or shared memory "
            "(/dev/shm) free, or pass fewer, 0 to decode without"
        ) from error


def _ignore_signals(worker: int) -> None:
    """Ignores SIGINT, which Ctrl-C sends to all processes of the terminal, and SIGTERM; ends with the parent
    instead."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when its parent ends. PyTorch's own check misses a parent that ends before the check
    starts."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def cores() -> int:
    """CPU cores that this process may use; torchrun's processes on a host share them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
