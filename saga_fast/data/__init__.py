"""Data sets by name, one file each. Each is loaded as (train, test), without a class in both, unless the user's own
split has one.

The drawn birds are in `tiny`, with the supervisor that is trained on them, and are imported only when loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from saga_fast.data import aircraft, cars, cub, inat
from saga_fast.data.augment import Augmentation, augmented
from saga_fast.data.dataset import (
    ImageDataset,
    ImageFiles,
    Published,
    Subset,
    check_classes,
    checksum,
    first_classes,
    split_classes,
)
from saga_fast.data.folder import ImageFolder, class_folders, load_folder
from saga_fast.data.loader import Batch, PixelLoader, cores
from saga_fast.data.sampler import ClassBalancedSampler
from saga_fast.utils.errors import InputError, warn_rank_zero
from saga_fast.utils.images import skipped_kinds

__all__ = [
    "DATASETS",
    "IN_FILES",
    "PUBLISHED",
    "Augmentation",
    "Batch",
    "ClassBalancedSampler",
    "ImageDataset",
    "ImageFiles",
    "ImageFolder",
    "PixelLoader",
    "Published",
    "Subset",
    "augmented",
    "check_classes",
    "checksum",
    "class_folders",
    "cores",
    "first_classes",
    "load_dataset",
    "load_folder",
    "notes",
    "split_classes",
]


def _drawn_birds(root: None, **settings: Any) -> tuple[ImageDataset, ImageDataset]:
    from saga_fast.tiny.birds import DrawnBirds

    return DrawnBirds("train", **settings), DrawnBirds("test", **settings)


IN_FILES: dict[str, Callable[..., tuple[ImageFiles, ImageFiles]]] = {
    "cub": cub.load_cub,
    "cars": cars.load_cars,
    "aircraft": aircraft.load_aircraft,
    "inat-aves": inat.load_inat_aves,
    "folder": load_folder,
}
DATASETS: dict[str, Callable[..., tuple[ImageDataset, ImageDataset]]] = {"drawn-birds": _drawn_birds, **IN_FILES}

PUBLISHED: dict[str, Published] = {
    "cub": cub.PUBLISHED,
    "cars": cars.PUBLISHED,
    "aircraft": aircraft.PUBLISHED,
    "inat-aves": inat.PUBLISHED,
}


def load_dataset(
    name: str, root: str | os.PathLike[str] | None = None, **settings: Any
) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) of the data set `name`. root: the folder of its files, None if it is drawn; settings: of that data
    set.

    Warns of skipped files, of counts that differ from the published ones, as figures are then not comparable, and of
    classes in both halves of the user's own split. Raises InputError for an unknown name and a missing root.
    """
    if name not in DATASETS:
        raise InputError(f"--data.name: {name!r} is unknown; accepted are {', '.join(DATASETS)}")
    if not root and name != "drawn-birds":
        raise InputError(f"--data.root: missing; {name!r} needs the folder that holds its images")
    train, test = DATASETS[name](root, **settings)
    if name in PUBLISHED and (differences := PUBLISHED[name].differences(train, test)):
        warn_rank_zero(f"{name}: {differences[0]}; for details: python -m saga_fast.data check {name} --root {root}")
    for line in notes(train, test):
        warn_rank_zero(f"{name}: {line}")
    return train, test


def notes(train: ImageDataset, test: ImageDataset) -> Iterator[str]:
    """Warnings about the two halves, a line each: skipped files, a single test class, shared classes."""
    skipped: Counter[str] = Counter()
    for half in (train, test):
        skipped.update(getattr(half, "skipped", {}))
    if skipped_summary := skipped_kinds(skipped):
        yield f"skipped: {skipped_summary}"
    if len(test.classes) == 1:
        yield "the test half has one class, so Recall and MAP are 100 per cent for any encoder; add test classes"
    if shared := set(train.classes) & set(test.classes):
        yield (
            f"{len(shared):,} of {len(test.classes):,} test classes are in the training half too, so the figures are "
            "not for unseen classes alone"
        )
