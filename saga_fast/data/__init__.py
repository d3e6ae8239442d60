"""Data sets by name. Each comes as (train, test) with no class in both; one file a data set.

The drawn birds live with the tiny supervisor that is taught on drawings; they are the one thing here imported from
outside, and only when asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from saga_fast.data.dataset import ImageDataset, Subset, check_classes, first_classes, split_classes
from saga_fast.data.folder import ImageFolder, class_folders, load_folder
from saga_fast.data.loader import Batch, PixelLoader
from saga_fast.data.sampler import ClassBalancedSampler
from saga_fast.errors import InputError

__all__ = [
    "DATASETS",
    "Batch",
    "ClassBalancedSampler",
    "ImageDataset",
    "ImageFolder",
    "PixelLoader",
    "Subset",
    "check_classes",
    "class_folders",
    "first_classes",
    "load_dataset",
    "load_folder",
    "split_classes",
]


def _drawn_birds(root: None, **settings: Any) -> tuple[ImageDataset, ImageDataset]:
    from saga_fast.tiny.birds import DrawnBirds

    return DrawnBirds("train", **settings), DrawnBirds("test", **settings)


DATASETS: dict[str, Callable[..., tuple[ImageDataset, ImageDataset]]] = {
    "drawn-birds": _drawn_birds,
    "folder": load_folder,
}


def load_dataset(
    name: str, root: str | os.PathLike[str] | None = None, **settings: Any
) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) of the data set `name`. root: the folder of its files, None if it is drawn; settings: its own."""
    if name not in DATASETS:
        raise InputError(f"--data.name: {name!r} is unknown; accepted are {', '.join(sorted(DATASETS))}")
    if root is None and name != "drawn-birds":
        raise InputError(f"--data.root: missing; {name!r} needs the folder that holds its images")
    return DATASETS[name](root, **settings)
