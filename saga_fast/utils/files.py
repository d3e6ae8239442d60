"""Files that are whole or not there, and files from anywhere."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """A regular file's content.

    Raises OSError, whose `strerror` says what is wrong, for more than `limit` bytes too, and for a pipe or a device,
    which may have no end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(0, "not a regular file", os.fspath(path))
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(0, f"more than {limit:,} bytes", os.fspath(path))
    return content


LITTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
    *("__macosx", "icon\r"),  # macOS, which hides the rest
    *("@eadir", "#recycle", "lost+found", "__pycache__"),  # network storage, ext4, Python
}


def is_litter(name: str) -> bool:
    """Whether an entry of a folder is hidden (`._x.jpg` too), or one that systems leave behind."""
    return name.startswith(".") or name.casefold() in LITTER


def hidden(folder: Path, what: str) -> Path:
    """The sibling of `folder` named .FOLDER.what."""
    folder = folder.absolute()
    return folder.with_name(f".{folder.name}.{what}")


def recover(folder: Path) -> None:
    """Put back the folder that a killed `replace` had moved out of the way."""
    old = hidden(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)


def flush(path: Path) -> None:
    """Have the file or folder itself written to disk, not only to the page cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(aside: Path, folder: Path) -> None:
    """Flush the files of `aside` to disk, then rename it to `folder`, which may be there already.

    Killed between its two renames it leaves the earlier folder beside its place, for `recover`.
    """
    for path in (*aside.iterdir(), aside):
        flush(path)
    old = hidden(folder, "old")
    recover(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
