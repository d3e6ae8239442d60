"""The interface of a data set; splitting and checking its classes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from saga_fast.utils.errors import InputError
from saga_fast.utils.images import SUFFIXES, open_rgb, skipped_kinds


class ImageDataset(Protocol):
    """Labelled images. `labels[i]`, known without decoding, is the index in `classes` of the class of image i."""

    labels: list[int]
    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


class ImageFiles:
    """Image files and their labels, decoded on access. folders: should hold no other images.

    skipped: number of files that the reader skipped, by kind.
    """

    def __init__(self, paths: list[Path], labels: list[int], classes: list[str], folders: Sequence[Path] = ()):
        self.paths, self.labels, self.classes, self.folders = paths, labels, classes, folders
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_rgb(self.paths[index]), self.labels[index]


def checksum(dataset: ImageDataset, called: Callable[[Path], str] = os.fspath) -> str:
    """SHA-256 of the images' names, in order, and their labels: for equal checksums a seed draws the same batches.

    called: the part of a path that identifies a file; in a data set that may be moved, its name alone.
    """
    images = list(range(len(dataset)))
    data = dataset
    while isinstance(data, Subset):
        images, data = [data.indices[i] for i in images], data.dataset
    names = [called(data.paths[i]) for i in images] if isinstance(data, ImageFiles) else images
    return hashlib.sha256(json.dumps([dataset.classes, dataset.labels, names]).encode()).hexdigest()


class Published(NamedTuple):
    """Published counts of a data set."""

    classes: int
    train_images: int
    test_images: int
    images_per_class: int | None = None

    def differences(self, train: ImageDataset, test: ImageDataset) -> list[str]:
        """A line per count that differs from the published one."""
        counts = {
            "classes": (len(train.classes) + len(test.classes), self.classes),
            "training images": (len(train), self.train_images),
            "test images": (len(test), self.test_images),
        }
        if self.images_per_class is not None:
            for half in (train, test):
                found = Counter(half.labels)
                counts |= {
                    f"images of {name}": (found[label], self.images_per_class)
                    for label, name in enumerate(half.classes)
                }
        return [f"{found:,} {what}, published {known:,}" for what, (found, known) in counts.items() if found != known]


class Subset:
    """The images of `dataset` at `indices`, in that order, under the same classes."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, list(indices)
        self.labels = [dataset.labels[i] for i in self.indices]
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.dataset[self.indices[index]]


def first_classes(dataset: ImageDataset, count: int) -> Subset:
    """The images of the first `count` classes, under these classes alone. Raises InputError if there are fewer."""
    if count > len(dataset.classes):
        raise InputError(f"--data.train-classes: {count}; the training half has {len(dataset.classes)} classes")
    subset = Subset(dataset, [i for i, label in enumerate(dataset.labels) if label < count])
    subset.classes = dataset.classes[:count]
    return subset


def split_classes(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(train, test): the halves of the sorted names; of an odd number, train has one more."""
    names = sorted(names)
    middle = (len(names) + 1) // 2
    return names[:middle], names[middle:]


def check_classes(dataset: ImageDataset, source: str | Path) -> None:
    """Raise InputError, naming `source` and the class, if a class has fewer than two images: a query needs a match."""
    counts = Counter(dataset.labels)
    skipped = skipped_kinds(getattr(dataset, "skipped", {}))
    for label, name in enumerate(dataset.classes):
        if counts[label] < 2:
            raise InputError(
                f"{str(source)!r}: class {name!r} has {counts[label]} readable image{'s' * (counts[label] != 1)}"
                f" ({' '.join(SUFFIXES)}), retrieval needs 2 or more; add images or remove the class"
                + (f"; in all classes, skipped: {skipped}" if skipped else "")
            )
