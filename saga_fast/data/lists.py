"""Readers of the lists that come with a data set and assign images to classes.

A list may be truncated, edited or hostile. So an error names the file and the line, and an image outside the data
set's folder is an error.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from saga_fast.data.dataset import ImageFiles, check_classes
from saga_fast.utils.errors import InputError
from saga_fast.utils.files import is_litter, read_regular

MAX_BYTES = 2**26  # of a list; the longest released is 1 MB
WRAPPERS = 20  # subfolders, at most, that may be unpacked archives; more of them are classes


class Entry(NamedTuple):
    value: str
    place: str
    """File and line, as errors name them."""


class ListedImage(NamedTuple):
    image: str
    """Path within the data set's folder."""
    label: int
    place: str


def read_list(path: Path, form: str) -> dict[str, Entry]:
    """The lines `KEY VALUE` of a text file, by key, in order; a value may contain spaces; blank lines are skipped.
    Spaces or tabs separate the two.

    form: what a line should look like, for errors. Raises InputError for a file that cannot be read, a line without a
    value and a repeated key.
    """
    entries: dict[str, Entry] = {}
    text = read_text(path, MAX_BYTES, "take it from the release again")
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not (line := line.strip()):
            continue
        place = f"{str(path)!r} line {number}"
        key, value, *_ = *re.split(r"[ \t]+", line, maxsplit=1), ""
        if not value:
            raise InputError(f"{place}: found {line!r}, accepted is `{form}`; take the file from the release again")
        if key in entries:
            raise InputError(f"{place}: {key!r} again, first in {entries[key].place}; take one of the two out")
        entries[key] = Entry(value, place)
    return entries


def read_text(path: Path, limit: int, mend: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 if it starts with that byte order mark; the mark is removed.

    Raises InputError, which ends in `mend`, for a file that cannot be read, is no text or has more than `limit` bytes.
    """
    try:
        content = read_regular(path, limit)
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if marked else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{str(path)!r}: cannot be read ({error.strerror}); check --data.root; {mend}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r}: not a text file in UTF-8; {mend}") from error


def find_root(root: Path, *marks: str) -> Path:
    """The folder that contains one of `marks`: `root`, or one up to two levels below, as archives unpack; else `root`.

    Raises InputError if there are several.
    """
    level = [root]
    for _ in range(3):
        found = [folder for folder in level if any((folder / mark).exists() for mark in marks)]
        if len(found) > 1:
            raise InputError(
                f"{str(root)!r}: both {str(found[0])!r} and {str(found[1])!r} look like the data set; give one of them "
                "as --data.root"
            )
        if found:
            return found[0]
        level = [path for folder in level for path in _folders(folder)]
        if len(level) > WRAPPERS:
            break
    return root


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry) for entry in entries if not is_litter(entry.name) and entry.is_dir())
    except OSError:
        return []


def split_list(
    root: Path, images: Iterable[ListedImage], classes: Sequence[str], folders: Sequence[str]
) -> tuple[ImageFiles, ImageFiles]:
    """(train, test): the images of the first and of the second half of `classes`, each in the order listed.

    folders: where in `root` all its images lie. Raises InputError, with the place in the list, for an image outside
    `root` (by an absolute path, `..` or a link) or listed twice, for a class with fewer than two images, and for fewer
    than two classes.
    """
    if len(classes) < 2:
        raise InputError(f"{str(root)!r}: {len(classes)} classes in its lists; training and testing need one each")
    real_root = os.path.realpath(root)
    middle = (len(classes) + 1) // 2
    within = [root / folder for folder in folders]
    train, test = (ImageFiles([], [], list(names), within) for names in (classes[:middle], classes[middle:]))
    place_of_file: dict[str, str] = {}
    for image, label, place in images:
        parts = Path(image)
        if "\0" in image or ".." in parts.parts or parts.is_absolute() or not parts.parts:
            raise InputError(f"{place}: {image!r} is no path within {str(root)!r}; correct or remove the line")
        real = os.path.realpath(root / image)
        if not Path(real).is_relative_to(real_root):
            raise InputError(
                f"{place}: {image!r} leads by a link out of {str(root)!r}, to {real!r}; put the file itself there"
            )
        if real in place_of_file:
            raise InputError(f"{place}: {image!r} again, first in {place_of_file[real]}; take one of the two out")
        place_of_file[real] = place
        half, first = (train, 0) if label < middle else (test, middle)
        half.paths.append(root / image)
        half.labels.append(label - first)
    for half in (train, test):
        check_classes(half, root)
    return train, test
