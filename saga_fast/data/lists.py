"""Lists that come with a data set: which image is of which class.

A list may be cut short, edited, or someone else's. So an error names the file and the line, and an image that would lie
outside the data set's folder is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from saga_fast.data.dataset import ImageFiles, check_classes
from saga_fast.utils.errors import InputError
from saga_fast.utils.files import read_regular

MAX_BYTES = 2**26  # of a list; the longest released is 1 MB


class Entry(NamedTuple):
    value: str
    place: str
    """File and line, as errors name them."""


class Listed(NamedTuple):
    image: str
    """Path within the data set's folder."""
    label: int
    place: str


def read_list(path: Path, form: str) -> dict[str, Entry]:
    """The lines `KEY VALUE` of a text file, by key, in order; a value may hold spaces, blank lines are passed over.

    form: what a line should look like, for errors. Raises InputError for a file that cannot be read, a line without a
    value and a key that comes twice.
    """
    entries: dict[str, Entry] = {}
    try:
        lines = read_regular(path, MAX_BYTES).decode().split("\n")
    except OSError as error:
        raise InputError(
            f"{str(path)!r}: cannot be read ({error.strerror}); it is part of the release: check --data.root"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r}: not a text file; take it from the release again") from error
    for number, line in enumerate(lines, 1):
        if not (line := line.strip()):
            continue
        place = f"{str(path)!r} line {number}"
        key, _, value = line.partition(" ")
        if not value:
            raise InputError(f"{place}: found {line!r}, accepted is `{form}`; take the file from the release again")
        if key in entries:
            raise InputError(f"{place}: {key!r} again, first in {entries[key].place}; take one of the two out")
        entries[key] = Entry(value.lstrip(), place)
    return entries


def split_list(
    root: Path, images: Iterable[Listed], classes: Sequence[str], folders: Sequence[str]
) -> tuple[ImageFiles, ImageFiles]:
    """(train, test): the images of the first and of the second half of `classes`, each in the order listed.

    folders: where in `root` all its images lie. Raises InputError, with the place in the list, for an image outside
    `root` (by an absolute path, `..` or a link) or listed twice, for a class with fewer than two images, and for fewer
    than two classes.
    """
    if len(classes) < 2:
        raise InputError(f"{str(root)!r}: {len(classes)} classes in its lists; training and testing need one each")
    home = os.path.realpath(root)
    middle = (len(classes) + 1) // 2
    halves = tuple(
        ImageFiles([], [], list(names), [root / folder for folder in folders])
        for names in (classes[:middle], classes[middle:])
    )
    seen: dict[str, str] = {}
    for image, label, place in images:
        parts = Path(image)
        if "\0" in image or ".." in parts.parts or parts.is_absolute():
            raise InputError(f"{place}: {image!r} is no path within {str(root)!r}; correct or remove the line")
        real = os.path.realpath(root / image)
        if not Path(real).is_relative_to(home):
            raise InputError(
                f"{place}: {image!r} leads by a link out of {str(root)!r}, to {real!r}; put the file itself there"
            )
        if real in seen:
            raise InputError(f"{place}: {image!r} again, first in {seen[real]}; take one of the two out")
        seen[real] = place
        half = halves[label >= middle]
        half.paths.append(root / image)
        half.labels.append(label - middle * (label >= middle))
    for half in halves:
        check_classes(half, root)
    return halves
