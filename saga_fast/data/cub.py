"""CUB-200-2011: 200 bird species. The first 100 in the release's own numbering train, the last 100 test.

ROOT/classes.txt               1 001.Black_footed_Albatross
ROOT/images.txt                1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
ROOT/image_class_labels.txt    1 1
ROOT/images/

ROOT may also be the parent folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from saga_fast.data.dataset import ImageFiles, Published
from saga_fast.data.lists import ListedImage, find_root, read_list, split_list
from saga_fast.utils.errors import InputError

PUBLISHED = Published(classes=200, train_images=5_864, test_images=5_924)


def load_cub(root: str | os.PathLike[str]) -> tuple[ImageFiles, ImageFiles]:
    """(train, test). Raises InputError, naming file and line, for lists that are missing, malformed or disagree."""
    root = find_root(Path(root), "images.txt")
    names = read_list(root / "classes.txt", "NUMBER NAME")
    images = read_list(root / "images.txt", "NUMBER FOLDER/FILE")
    labels = read_list(root / "image_class_labels.txt", "NUMBER CLASS-NUMBER")
    for number, (key, entry) in enumerate(names.items(), 1):
        if key != str(number):
            raise InputError(f"{entry.place}: class {key!r}, accepted is {number} here; classes are numbered from 1 on")
    for key, entry in labels.items():
        if key not in images:
            raise InputError(f"{entry.place}: image {key!r} is not in images.txt; take both from one release")
        if entry.value not in names:
            raise InputError(f"{entry.place}: class {entry.value!r} is not in classes.txt; take both from one release")
    for key, entry in images.items():
        if key not in labels:
            raise InputError(
                f"{entry.place}: image {key!r} is not in image_class_labels.txt; take both from one release"
            )
    listed = [
        ListedImage(f"images/{image}", int(labels[key].value) - 1, place) for key, (image, place) in images.items()
    ]
    return split_list(root, listed, [entry.value for entry in names.values()], ["images"])
