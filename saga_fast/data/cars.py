"""Cars-196: 196 models. The first 98 in the release's own numbering train, the last 98 test; the release's partitions,
which cut across models, are pooled. It was released twice, and both are read:

    ROOT/cars_annos.mat                         annotations (relative_im_path, class, ...), class_names
    ROOT/car_ims/000001.jpg

    ROOT/[devkit/]cars_train_annos.mat          annotations (fname, class, ...), numbered anew in each partition
    ROOT/[devkit/]cars_test_annos_withlabels.mat
    ROOT/[devkit/]cars_meta.mat                 class_names
    ROOT/cars_train/00001.jpg, cars_test/00001.jpg

A third copy in circulation has one folder per model. Sorted by name it has the same halves: the release's numbering is
sorted by make, though not within a make, and the halves meet between two makes (after Eagle):

    ROOT/car_data/train/AM General Hummer SUV 2000/00001.jpg, car_data/test/…

Folders may be nested in a folder of the same name (cars_train/cars_train/), the devkit may be in car_devkit/, and ROOT
may be the parent folder.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from saga_fast.data.dataset import ImageFiles, Published
from saga_fast.data.folder import class_folders, images_in
from saga_fast.data.lists import MAX_BYTES, ListedImage, find_root, split_list
from saga_fast.utils.errors import InputError
from saga_fast.utils.files import read_regular

PUBLISHED = Published(classes=196, train_images=8_054, test_images=8_131)


def load_cars(root: str | os.PathLike[str]) -> tuple[ImageFiles, ImageFiles]:
    """(train, test) of whichever release ROOT holds. Raises InputError, naming file and entry, for broken lists."""
    root = find_root(Path(root), "car_ims", "cars_train", "car_data", "train")
    if (root / "car_ims").is_dir():
        names = root / "cars_annos.mat"
        folders = ["car_ims"]
        lists = [(names, "", "relative_im_path")]
    elif (root / "cars_train").is_dir():
        names = _find(root, "cars_meta.mat")
        folders = [_innermost(root, "cars_train"), _innermost(root, "cars_test")]
        lists = [
            (_find(root, "cars_train_annos.mat"), f"{folders[0]}/", "fname"),
            # The devkit's own cars_test_annos.mat names no classes.
            (_find(root, "cars_test_annos_withlabels.mat"), f"{folders[1]}/", "fname"),
        ]
    elif (root / (data := _innermost(root, "car_data")) / "train").is_dir():
        return _by_folder(root / data)
    elif (root / "train").is_dir():
        return _by_folder(root)
    else:
        raise InputError(
            f"{str(root)!r}: none of car_ims, cars_train and car_data is a folder in it; check --data.root"
        )
    classes = [str(name) for name in _variable(names, "class_names")]
    listed = [image for path, folder, field in lists for image in _listed(path, folder, field, len(classes))]
    return split_list(root, listed, classes, folders)


def _find(root: Path, name: str) -> Path:
    """ROOT/devkit/NAME, or another place of it; a browser adds ` (1)` to the name of a repeated download."""
    folders = [root / "devkit", root / "car_devkit" / "devkit", root / "car_devkit", root]
    names = [name, name.replace(".mat", " (1).mat")]
    return next(
        (path for folder in folders for name in names if (path := folder / name).exists()), root / "devkit" / name
    )


def _innermost(root: Path, name: str) -> str:
    """The folder `name` in `root`, or the folder of the same name in that."""
    return f"{name}/{name}" if (root / name / name).is_dir() else name


def _by_folder(root: Path) -> tuple[ImageFiles, ImageFiles]:
    """Both partitions, pooled."""
    parts = [part for part in ("train", "test") if (root / part).is_dir()]
    folders = [(part, name) for part in parts for name in class_folders(root / part)]
    labels = {name: label for label, name in enumerate(sorted({name for _, name in folders}))}
    skipped: Counter[str] = Counter()
    listed = [
        ListedImage(f"{part}/{name}/{path.name}", labels[name], repr(str(path)))
        for part, name in folders
        for path in images_in(root / part / name, skipped)
    ]
    halves = split_list(root, listed, list(labels), parts)
    halves[0].skipped = skipped
    return halves


def _variable(path: Path, name: str) -> np.ndarray:
    """A one-dimensional variable of a .mat file."""
    try:
        content = read_regular(path, MAX_BYTES)
        with ProcessPoolExecutor(1, get_context("fork" if hasattr(os, "fork") else "spawn")) as apart:
            return apart.submit(_load, content, name).result()
    except OSError as error:
        raise InputError(
            f"{str(path)!r}: cannot be read ({error.strerror or error}); it is part of the release: check --data.root"
        ) from error
    except KeyError as error:
        raise InputError(f"{str(path)!r}: holds no `{name}`; take the file from the release again") from error
    except BrokenProcessPool as error:
        raise InputError(
            f"{str(path)!r}: not a readable .mat file (what reads it crashed); take it from the release again"
        ) from error
    except Exception as error:  # scipy raises exceptions of any type for a broken file
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{str(path)!r}: not a readable .mat file ({cause}); take it from the release again"
        ) from error


def _load(content: bytes, name: str) -> np.ndarray:
    """Reads in a separate process, as some damaged files crash scipy's compiled reader."""
    return np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True, variable_names=[name])[name])


def _listed(path: Path, folder: str, field: str, classes: int) -> list[ListedImage]:
    annotations = _variable(path, "annotations")
    for name in (field, "class"):
        if name not in (annotations.dtype.names or ()):
            raise InputError(f"{str(path)!r}: its annotations have no `{name}`; take the file from the release again")
    listed = []
    for number, (image, label) in enumerate(zip(annotations[field], annotations["class"]), 1):
        place = f"{str(path)!r} annotation {number}"
        if not isinstance(image, str) or not image:
            raise InputError(f"{place}: {field} is {image!r}, accepted is a file name; take it from the release again")
        if np.ndim(label) or label not in range(1, classes + 1):
            raise InputError(f"{place}: class {label!r}, accepted are 1 to {classes}; take it from the release again")
        listed.append(ListedImage(folder + image, int(label) - 1, place))
    return listed
