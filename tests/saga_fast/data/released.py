"""Miniature copies of data sets as they were released: the same files and fields, few images, each of its own color."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CLASSES = ("class_0", "class_1", "class_2", "class_3")


def color(label: int, number: int) -> tuple[int, int, int]:
    """What image `number` of class `label` shows all over."""
    return (20 * label, 20 * number, 99)


def paint(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), color(label, number)).save(path, quality=100, subsampling=0)


def fill(root: Path, *folders: str, images: int = 2) -> Path:
    """A folder a class: root/FOLDER/NUMBER.jpg; `root`."""
    for label, folder in enumerate(folders):
        for number in range(images):
            paint(root / folder / f"{number}.jpg", label, number)
    return root


def cub(root: Path, classes: int = 4, images: int = 3) -> Path:
    """Images are listed by class, numbered through; classes are numbered in an order that is not their names'."""
    names = [f"{label + 1:03d}.{'ZYXWVUTS'[label]}_Bird" for label in range(classes)]
    files = [(label, number) for label in range(classes) for number in range(images)]
    for label, number in files:
        paint(root / "images" / names[label] / f"Bird_{number}.jpg", label, number)
    lines = {
        "classes": [f"{label + 1} {name}" for label, name in enumerate(names)],
        "images": [f"{i} {names[label]}/Bird_{number}.jpg" for i, (label, number) in enumerate(files, 1)],
        "image_class_labels": [f"{i} {label + 1}" for i, (label, _) in enumerate(files, 1)],
        "train_test_split": [f"{i} {number % 2}" for i, (_, number) in enumerate(files, 1)],
    }
    for name, text in lines.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in text))
    return root


def _structs(fields: list[str], rows: list[tuple]) -> np.ndarray:
    """A 1 x n MATLAB struct array."""
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


def _cells(values: list[str]) -> np.ndarray:
    """A 1 x n MATLAB cell array."""
    array = np.empty((1, len(values)), dtype=object)
    array[0, :] = values
    return array


BOX = (np.uint16(1), np.uint16(1), np.uint16(12), np.uint16(9))
CORNERS = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"]


def _models(classes: int) -> list[str]:
    return [f"Model {'ZYXWVUTS'[label]} Sedan 2012" for label in range(classes)]


def cars_whole(root: Path, classes: int = 4, images: int = 3) -> Path:
    """cars_annos.mat and car_ims/: the later release, in one folder."""
    rows = []
    for label in range(classes):
        for number in range(images):
            paint(root / (name := f"car_ims/{len(rows) + 1:06d}.jpg"), label, number)
            rows.append((name, *BOX, np.uint8(label + 1), np.uint8(number % 2)))
    annotations = _structs(["relative_im_path", *CORNERS, "class", "test"], rows)
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": _cells(_models(classes))})
    return root


def cars_devkit(root: Path, classes: int = 4, images: int = 3, inner: bool = True) -> Path:
    """The first release: two partitions, each with its own numbering; `inner`: lists in devkit/, all but one."""
    (devkit := root / "devkit" if inner else root).mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple]] = {"train": [], "test": []}
    for label in reversed(range(classes)):
        for number in range(images):
            part = rows["test" if number % 2 else "train"]
            name = f"{len(part) + 1:05d}.jpg"
            paint(root / ("cars_test" if number % 2 else "cars_train") / name, label, number)
            part.append((*BOX, np.uint8(label + 1), name))
    train, test = (_structs([*CORNERS, "class", "fname"], rows[part]) for part in ("train", "test"))
    blind = _structs([*CORNERS, "fname"], [(*row[:4], row[5]) for row in rows["test"]])
    savemat(devkit / "cars_train_annos.mat", {"annotations": train})
    savemat(devkit / "cars_test_annos.mat", {"annotations": blind})
    savemat(root / "cars_test_annos_withlabels.mat", {"annotations": test})
    savemat(devkit / "cars_meta.mat", {"class_names": _cells(_models(classes))})
    return root


def aircraft(root: Path, classes: int = 4, images: int = 3) -> Path:
    """Three partitions; names with spaces and strokes, listed in an order that is not sorted."""
    names = ["707-320", "An-12", "F/A-18", "Gulfstream IV", "MD-80", "Yak-42"][:classes]
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for label in reversed(range(classes)):
        for number in range(images):
            image = f"{1_000_000 + 10 * label + number:07d}"
            paint(root / "data" / "images" / f"{image}.jpg", label, number)
            lines[("train", "val", "test")[number % 3]].append(f"{image} {names[label]}\n")
    for part, text in lines.items():
        (root / "data" / f"images_variant_{part}.txt").write_text("".join(text))
    return root


def inat_aves(root: Path, classes: int = 4, images: int = 3) -> Path:
    """Species folders of birds, among those of a plant and of a mammal."""
    for label in range(classes):
        folder = f"{3111 + label:05d}_Animalia_Chordata_Aves_Passeriformes_Genus_species-{label}"
        for number in range(images):
            paint(root / "train_mini" / folder / f"{number:08x}-ab.jpg", label, number)
    for other in ("02000_Animalia_Chordata_Mammalia_Aves_x_y", "06000_Plantae_Tracheophyta_Aves_x_y_z"):
        paint(root / "train_mini" / other / "0.jpg", 0, 0)
    return root


RELEASES: dict[str, tuple[str, Callable[..., Path]]] = {
    "cub": ("cub", cub),
    "cars, whole": ("cars", cars_whole),
    "cars, devkit": ("cars", cars_devkit),
    "aircraft": ("aircraft", aircraft),
    "inat-aves": ("inat-aves", inat_aves),
}
