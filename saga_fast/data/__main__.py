"""Checks a data set: compares its counts with the published ones, and opens every image.

    python -m saga_fast.data check NAME --root DIR [--skip-unreadable] [--workers N]

Prints a line per fault, then the counts. Faults are images that are missing, unreadable, truncated or in no list, and
counts that differ. Exit code 2 if there are any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch.utils.data import Dataset
from tqdm import tqdm

from saga_fast.data import IN_FILES, PUBLISHED, cores, notes
from saga_fast.data.dataset import ImageFiles, Subset, check_classes
from saga_fast.data.loader import prefetch
from saga_fast.utils.errors import InputError, exit_on_input_error, printable
from saga_fast.utils.files import is_litter
from saga_fast.utils.flags import WORKERS, parse_flags
from saga_fast.utils.images import is_image, open_rgb


class _Faults(Dataset[tuple[int, str | None]]):
    """Maps an index to (index, fault of that image or None)."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            open_rgb(self.paths[index])
        except InputError as error:
            return index, str(error)
        return index, None


def broken(data: ImageFiles, workers: int, name: str) -> dict[int, str]:
    """index → fault, of the images that cannot be read; shows a progress bar on stderr."""
    opened = prefetch(_Faults(data.paths), range(len(data)), workers)
    bar = tqdm(opened, f"opening {name}", len(data), unit="image", leave=False)
    return {index: fault for index, fault in bar if fault is not None}


def unlisted(train: ImageFiles, test: ImageFiles) -> Iterator[Path]:
    """Image files in the data set's folders that are in neither half, sorted."""
    known = {*train.paths, *test.paths}
    for folder in {*train.folders, *test.folders}:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).parts
            if is_image(path.name) and path not in known and not any(map(is_litter, inside)) and not path.is_dir():
                yield path


def check(name: str, root: Path, skip_unreadable: bool, workers: int) -> bool:
    """Prints the data set's faults and counts; returns whether there are no faults.

    skip_unreadable: broken images are printed, but are no faults as long as each class has enough others. Raises
    InputError for a data set whose lists cannot be read.
    """
    train, test = IN_FILES[name](root)
    wrong = 0
    for half, data in (("train", train), ("test", test)):
        faults = broken(data, workers, f"{name} {half}")
        for index in sorted(faults):
            path = data.paths[index]
            print(faults[index] if os.path.lexists(path) else f"{str(path)!r}: missing")
        if skip_unreadable and faults:
            check_classes(Subset(data, [index for index in range(len(data)) if index not in faults]), root)
        wrong += 0 if skip_unreadable else len(faults)
    for path in unlisted(train, test):
        print(f"{str(path)!r}: extra, in no list")
        wrong += 1
    differences = PUBLISHED[name].differences(train, test) if name in PUBLISHED else []
    for difference in differences:
        print(printable(difference))
    wrong += len(differences)
    for note in notes(train, test):
        print(printable(note))
    print(f"\n{'':12}{'classes':>9}{'images':>9}")
    for half, data in (("train", train), ("test", test)):
        print(f"{half:12}{len(data.classes):9,}{len(data):9,}")
    print(f"\n{name} in {printable(str(root))}: {f'{wrong:,} wrong, listed above' if wrong else 'nothing wrong'}")
    return not wrong


@dataclass(frozen=True)
class CheckArguments:
    name: tyro.conf.Positional[str] = ""
    """The data set: cub, cars, aircraft, inat-aves, folder."""
    root: Path | None = None
    """Folder of its files; for `folder` also your own list."""
    skip_unreadable: bool = False
    """List broken images without failing, as with --data.skip-unreadable."""
    workers: Annotated[int | None, WORKERS] = None
    """Worker processes that open images, 0 for none; default one per core."""


def main(arguments: Sequence[str]) -> None:
    with exit_on_input_error():
        flags = list(arguments[arguments[:1] == ["check"] :])
        parsed = parse_flags(
            CheckArguments(),
            flags,
            "python -m saga_fast.data check",
            "Compare the counts with the published ones, and open every image.",
        )
        if len(flags) == len(arguments) or parsed.name not in IN_FILES:
            raise InputError(f"data: say `check`, then one of {', '.join(IN_FILES)}, and where it is with --root")
        if parsed.root is None:
            raise InputError("--root: missing; name the folder of the data set's files, or your own list")
        workers = cores() if parsed.workers is None else parsed.workers
        if not check(parsed.name, parsed.root, parsed.skip_unreadable, workers):
            sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
