"""Checks a data set: compares its counts with the published ones, and opens every image.

    python -m saga_fast.data check NAME --root DIR [--skip-unreadable] [--workers N]

Prints a line per fault, then the counts. Faults are images that are missing, unreadable, truncated or in no list, and
counts that differ. Exit code 2 if there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from saga_fast.data import IN_FILES, PUBLISHED, cores, notes
from saga_fast.data.dataset import ImageFiles, Subset, check_classes
from saga_fast.data.loader import prefetch
from saga_fast.utils.errors import InputError, exit_on_input_error, printable
from saga_fast.utils.files import is_litter
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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m saga_fast.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(required=True, metavar="check").add_parser("check", help="count and open all")
    command.add_argument("name", choices=list(IN_FILES), help="the data set")
    command.add_argument("--root", type=Path, required=True, help="the folder of its files, or your own list")
    command.add_argument("--skip-unreadable", action="store_true", help="list broken images without failing")
    command.add_argument("--workers", type=int, default=cores(), help="worker processes; default one per core")
    options = parser.parse_args(arguments)
    with exit_on_input_error():
        if not check(options.name, options.root, options.skip_unreadable, max(0, options.workers)):
            sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
