"""iNat-Aves: the 1,486 bird species of iNaturalist 2021's train_mini. Sorted by folder, the first 743 train, the last
743 test.

    ROOT/train_mini/03111_Animalia_Chordata_Aves_Accipitriformes_Accipitridae_Accipiter_badius/IMAGE.jpg

The folder may be called 2021_train_mini, be nested in a folder of the same name, or be ROOT; ROOT may be its parent.
"""

from __future__ import annotations

import os
from pathlib import Path

from saga_fast.data.dataset import Published, split_classes
from saga_fast.data.folder import ImageFolder, class_folders
from saga_fast.data.lists import find_root
from saga_fast.utils.errors import InputError

PUBLISHED = Published(classes=1_486, train_images=37_150, test_images=37_150, images_per_class=50)


def load_inat_aves(root: str | os.PathLike[str]) -> tuple[ImageFolder, ImageFolder]:
    """(train, test). Raises InputError if there is no train_mini in `root`, or fewer than two Aves folders in that."""
    root_folder = find_root(Path(root), *_NAMES)
    folder = next((root_folder / name for name in _NAMES if (root_folder / name).is_dir()), None)
    if folder is None:
        folder = (
            root_folder
            if root_folder.is_dir() and any(_is_bird(path.name) for path in root_folder.iterdir())
            else root_folder / _NAMES[0]
        )
    folder = next((folder / name for name in _NAMES if (folder / name).is_dir()), folder)
    train, test = split_classes(list(filter(_is_bird, class_folders(folder))))
    if not test:
        raise InputError(f"{str(folder)!r}: {len(train)} folders NNNNN_{'_'.join(_AVES)}_…, 2 or more are needed")
    return ImageFolder(folder, train), ImageFolder(folder, test)


def _is_bird(folder: str) -> bool:
    return folder.split("_")[1:4] == _AVES


_NAMES = ("train_mini", "2021_train_mini")
_AVES = ["Animalia", "Chordata", "Aves"]
