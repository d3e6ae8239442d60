"""One folder of images a class: `root/<class>/<image>`, the layout for one's own pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from saga_fast.data.dataset import ImageFiles, check_classes, split_classes
from saga_fast.utils.errors import InputError
from saga_fast.utils.images import SUFFIXES


class ImageFolder(ImageFiles):
    """The classes of `root` named in `classes` (default: all), sorted by name, and in each its images, sorted by name.

    Hidden entries, other files and deeper folders are passed over. Raises InputError for a missing or empty root, an
    unknown class, and a class with fewer than two images. Images are decoded when asked for, not here.
    """

    def __init__(self, root: str | os.PathLike[str], classes: Sequence[str] | None = None):
        root = Path(root)
        super().__init__([], [], class_folders(root) if classes is None else list(classes))
        for label, name in enumerate(self.classes):
            paths = sorted(p for p in _visible(root / name) if p.suffix.lower() in SUFFIXES and not p.is_dir())
            self.paths += paths
            self.labels += [label] * len(paths)
        check_classes(self, root)


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in `root`, sorted. A link that leads back to `root` or above it is no class."""
    home = Path(os.path.realpath(root))
    names = sorted(p.name for p in _visible(Path(root)) if p.is_dir() and not home.is_relative_to(os.path.realpath(p)))
    if not names:
        raise InputError(f"{os.fspath(root)!r}: no class folders in it; put each class in a folder, ROOT/CLASS/IMAGE")
    return names


def load_folder(root: str | os.PathLike[str]) -> tuple[ImageFolder, ImageFolder]:
    """(train, test): the first and the second half of the class folders, so test classes are never seen in training."""
    train, test = split_classes(class_folders(root))
    if not test:
        raise InputError(f"{os.fspath(root)!r}: only one class, {train[0]!r}; training and testing need one each")
    return ImageFolder(root, train), ImageFolder(root, test)


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{os.fspath(folder)!r}: cannot be listed ({error.strerror}); accepted is a folder; check --data.root"
        ) from error
