"""FGVC-Aircraft: 100 variants. Sorted by name, the first 50 train and the last 50 test; the release's partitions, which
cut across variants, are pooled. Pictures are not cropped: the photographer's credit line stays at the bottom.

    ROOT/data/images_variant_train.txt, images_variant_val.txt, images_variant_test.txt      1025794 707-320
    ROOT/data/images/1025794.jpg

ROOT may also be that data/, or its parent folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from saga_fast.data.dataset import ImageFiles, Published
from saga_fast.data.lists import ListedImage, find_root, read_list, split_list

PUBLISHED = Published(classes=100, train_images=5_000, test_images=5_000)


def load_aircraft(root: str | os.PathLike[str]) -> tuple[ImageFiles, ImageFiles]:
    """(train, test). Raises InputError, naming file and line, for lists that are missing or malformed."""
    root = find_root(Path(root), "data/images_variant_train.txt", "images_variant_train.txt")
    data = "" if (root / "images_variant_train.txt").exists() else "data/"
    lists = [read_list(root / f"{data}images_variant_{part}.txt", "IMAGE VARIANT") for part in ("train", "val", "test")]
    classes = sorted({entry.value for entries in lists for entry in entries.values()})
    labels = {name: label for label, name in enumerate(classes)}
    listed = [
        ListedImage(f"{data}images/{image}.jpg", labels[variant], place)
        for entries in lists
        for image, (variant, place) in entries.items()
    ]
    return split_list(root, listed, classes, [f"{data}images"])
