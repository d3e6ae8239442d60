"""The user's own images, one folder per class: `root/<class>/<image>`.

Also with the user's own split, `root/train/<class>/<image>` and `root/test/<class>/<image>`, or a list in place of the
folder: see `split`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from saga_fast.data.dataset import ImageFiles, check_classes, split_classes
from saga_fast.data.split import halves_among, load_list
from saga_fast.utils.errors import InputError
from saga_fast.utils.files import is_litter
from saga_fast.utils.images import is_image, kind_of


class ImageFolder(ImageFiles):
    """The classes of `root` named in `classes` (default: all), sorted by name, and in each its images, sorted by name.

    Hidden entries and system files (`is_litter`) are skipped; other files and deeper folders are skipped too, and
    counted in `skipped`. Raises InputError for a missing or empty root, an unknown class, and a class with
    fewer than two images. Images are decoded on access, not here.
    """

    def __init__(self, root: str | os.PathLike[str], classes: Sequence[str] | None = None):
        root = Path(root)
        super().__init__([], [], class_folders(root) if classes is None else list(classes))
        for label, name in enumerate(self.classes):
            paths = images_in(root / name, self.skipped)
            self.paths += paths
            self.labels += [label] * len(paths)
        check_classes(self, root)


def images_in(folder: Path, skipped: Counter[str]) -> list[Path]:
    """The image files in `folder`, sorted; other entries, except litter, are counted in `skipped` by kind."""
    paths = []
    for path in sorted(_visible(folder)):
        if path.is_dir():
            skipped["folders deeper down"] += 1
        elif is_image(path.name):
            paths.append(path)
        else:
            skipped[kind_of(path.name)] += 1
    return paths


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """Names of the folders in `root`, sorted. A link to `root` or a parent of it is no class."""
    names = _folders(Path(root))
    if not names:
        raise InputError(f"{os.fspath(root)!r}: no class folders in it; put each class in a folder, ROOT/CLASS/IMAGE")
    return names


def load_folder(root: str | os.PathLike[str]) -> tuple[ImageFiles, ImageFiles]:
    """(train, test): the user's own split, by folders or list; else the first and the second half of the class folders,
    so test classes are never seen in training.
    """
    root = Path(root)
    if root.is_file():
        return load_list(root)
    root = _unpacked(root)
    names = class_folders(root)
    halves = halves_among(names)
    if "train" in halves and len(halves) > 1:
        return _load_split(root, names, halves)
    train, test = split_classes(names)
    if not test:
        raise InputError(f"{os.fspath(root)!r}: only one class, {train[0]!r}; training and testing need one each")
    data = ImageFolder(root, train), ImageFolder(root, test)
    data[0].skipped["images in no class folder"] = sum(
        is_image(path.name) and not path.is_dir() for path in _visible(root)
    )
    return data


def _load_split(root: Path, names: list[str], halves: dict[str, list[str]]) -> tuple[ImageFolder, ImageFolder]:
    chosen = []
    for candidates in (halves["train"], halves.get("test") or halves["val"]):
        if len(candidates) > 1:
            raise InputError(f"{str(root)!r}: {' and '.join(map(repr, candidates))} are one half by name; keep one")
        chosen += candidates
    for name in chosen:
        if not _folders(root / name):
            raise InputError(
                f"{str(root)!r}: holds {' and '.join(map(repr, chosen))}, so it is a split, but {name!r} holds no "
                f"class folders; put images in ROOT/{name}/CLASS, or rename the folder if it is a class"
            )
    train, test = (ImageFolder(root / name) for name in chosen)
    for name in chosen:
        train.skipped["images in no class folder"] += sum(
            is_image(path.name) and not path.is_dir() for path in _visible(root / name)
        )
    if others := [name for name in names if name not in chosen]:
        train.skipped[f"folders beside {' and '.join(chosen)} ({', '.join(others[:5])})"] = len(others)
    return train, test


def _unpacked(root: Path) -> Path:
    """`root`, or the folder of folders in it that is alone but for a README and the like, as archives unpack; repeated
    up to four times."""
    for _ in range(4):
        inside = [path for path in _visible(root) if path.is_dir() or is_image(path.name)]
        if len(inside) != 1 or not inside[0].is_dir() or not _folders(inside[0]):
            break
        if any(is_image(path.name) and not path.is_dir() for path in _visible(inside[0])):
            break
        root = inside[0]
    return root


def _folders(root: Path) -> list[str]:
    real_root = Path(os.path.realpath(root))
    return sorted(p.name for p in _visible(root) if p.is_dir() and not real_root.is_relative_to(os.path.realpath(p)))


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not is_litter(path.name)]
    except OSError as error:
        raise InputError(
            f"{os.fspath(folder)!r}: cannot be listed ({error.strerror}); accepted is a folder, or a list; check "
            "--data.root"
        ) from error
