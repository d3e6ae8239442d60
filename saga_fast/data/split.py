"""The user's own split into training and test images, by folders or by a list.

By folders, ROOT/train/CLASS/IMAGE and ROOT/test/CLASS/IMAGE. By a list, in place of the folder:

    path,label,split               or JSON lines:   {"path": "owls/1.jpg", "label": "barn owl", "split": "train"}
    owls/1.jpg,barn owl,train                       {"path": "/disk/9.png", "label": 7, "split": "test"}
    /disk/9.png,7,test

A list is UTF-8 text named .csv or .tsv (with a header; commas, semicolons or tabs) or .jsonl, .ndjson or .json (one
object per line). A path is absolute, or relative to the list's folder; where there is no such file, one with slashes
in place of backslashes is tried. Other columns are ignored. The halves are `train` and `test`. `val` is the test half
where there is no `test`; else its images are skipped, and counted.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saga_fast.data.dataset import ImageFiles, check_classes
from saga_fast.data.lists import read_text
from saga_fast.utils.errors import InputError, first_line

COLUMNS = ("path", "label", "split")
TABLES, LINES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
MAX_BYTES = 2**28  # of a list: some million images
HALVES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
}


def halves_among(names: Iterable[str]) -> dict[str, list[str]]:
    """half → those of `names` that mean it, in any letter case."""
    found: dict[str, list[str]] = {}
    for name in names:
        if half := HALVES.get(name.casefold()):
            found.setdefault(half, []).append(name)
    return found


def load_list(path: Path) -> tuple[ImageFiles, ImageFiles]:
    """(train, test) of the images that the list names, in its order; classes sorted by name.

    Raises InputError, naming file and line, for a list that is malformed, an image named twice, a half that is empty,
    and a class with fewer than two images in a half.
    """
    suffix = path.suffix.lower()
    if suffix not in (*TABLES, *LINES):
        raise InputError(
            f"--data.root: {str(path)!r} is a file; accepted are a folder of class folders, and a list of "
            f"{', '.join(COLUMNS)} named {', '.join((*TABLES, *LINES))}"
        )
    text = read_text(path, MAX_BYTES, "save it as UTF-8")
    images: dict[str, tuple[list[Path], list[str]]] = {}
    place_of_file: dict[str, str] = {}
    for place, values in _table(path, text) if suffix in TABLES else _objects(path, text):
        name, label, half = _row(place, values)
        image = path.parent / name
        if "\\" in name and not image.exists() and (posix := path.parent / name.replace("\\", "/")).exists():
            image = posix
        if (real := os.path.realpath(image)) in place_of_file:
            raise InputError(f"{place}: {name!r} again, first in {place_of_file[real]}; take one of the two out")
        place_of_file[real] = place
        paths, labels = images.setdefault(half, ([], []))
        paths.append(image)
        labels.append(label)
    test = "test" if "test" in images else "val"
    for half in ("train", test):
        if half not in images:
            found = ", ".join(f"{len(paths):,} of {half}" for half, (paths, _) in images.items()) or "none"
            wanted = "train" if half == "train" else "test (or val)"
            raise InputError(f"{str(path)!r}: no image of split {wanted}, found {found}; say which images {half}")
    train_images, test_images = (_half(*images[half], f"{path} ({half})") for half in ("train", test))
    if "val" in images and test != "val":
        train_images.skipped["images of split val"] = len(images["val"][0])
    return train_images, test_images


def _half(paths: list[Path], labels: list[str], source: str) -> ImageFiles:
    classes = sorted(set(labels))
    number = {name: i for i, name in enumerate(classes)}
    data = ImageFiles(paths, [number[label] for label in labels], classes)
    check_classes(data, source)
    return data


def _row(place: str, values: Sequence[Any]) -> tuple[str, str, str]:
    """(path, label, half) of a row's three values."""
    for column, value in zip(COLUMNS, values):
        if not isinstance(value, str) and (column != "label" or type(value) is not int):
            accepted = "text or a whole number" if column == "label" else "text"
            raise InputError(f"{place}: {column} is {value!r}, accepted is {accepted}; correct the line")
        if isinstance(value, str):
            try:
                usable = value.strip() and "\0" not in value and os.fsencode(value)
            except UnicodeEncodeError:
                usable = False
            if not usable:
                raise InputError(f"{place}: {column} is {value!r}, accepted is a non-empty text; correct the line")
    path, label, split = values[0], str(values[1]).strip(), values[2].strip()
    if not (half := HALVES.get(split.casefold())):
        raise InputError(f"{place}: split {split!r}, accepted are train, test and val; correct the line")
    return path, label, half


def _table(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    """(place, values of COLUMNS) of each row of a table with a header."""
    head = text.lstrip("\r\n").split("\n", 1)[0]
    separator = max(",;\t", key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    order: list[int] = []
    width = 0
    try:
        for row in rows:
            place = f"{str(path)!r} line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not order:
                order, width = _columns(place, row), len(row)
            elif len(row) != width:
                raise InputError(f"{place}: {len(row)} values, the header has {width}; correct the line, quote commas")
            else:
                yield place, [row[i] for i in order]
    except csv.Error as error:
        raise InputError(
            f"{str(path)!r} line {rows.line_num}: not CSV ({first_line(error)}); correct the line"
        ) from error
    if not order:
        raise InputError(f"{str(path)!r}: empty; its first line names the columns, {','.join(COLUMNS)}")


def _columns(place: str, header: list[str]) -> list[int]:
    names = [name.strip().casefold() for name in header]
    for column in COLUMNS:
        if names.count(column) != 1:
            raise InputError(
                f"{place}: {names.count(column) or 'no'} columns named {column!r} among {', '.join(map(repr, header))};"
                f" the header names each of {', '.join(COLUMNS)} once"
            )
    return [names.index(column) for column in COLUMNS]


def _objects(path: Path, text: str) -> Iterator[tuple[str, list[Any]]]:
    """(place, values of COLUMNS) of each line's object."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{str(path)!r} line {number}"
        try:
            pairs = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({first_line(error)}); put one object on each line") from error
        if not isinstance(pairs, _Pairs):
            raise InputError(f"{place}: {line.strip()[:40]!r} is no object; put one object on each line")
        for column in COLUMNS:
            if (count := sum(key == column for key, _ in pairs)) != 1:
                raise InputError(f"{place}: {count or 'no'} {column!r} in it; name each of {', '.join(COLUMNS)} once")
        values = dict(pairs)
        yield place, [values[column] for column in COLUMNS]


class _Pairs(list[tuple[str, Any]]):
    """The (key, value) pairs of a JSON object, so that a repeated key is noticed."""
