"""Files that are whole or not there, and files from anywhere."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saga_fast.utils.errors import InputError

_locked_paths: set[Path] = set()  # locks of this process, which the system would give it twice


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


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Nobody else is in here with the same `folder`, which need not exist: .FOLDER.lock beside it is held.

    The lock is the system's, so it goes with its process, however that ends, and the file that a killed one left is no
    hindrance. Raises InputError, naming `flag`, for a folder that another process holds (and which one that is), or
    beside which nothing can be written. Where the file system knows no locks it holds nobody off.
    """
    path = hidden(folder, "lock")
    made = [outer for outer in path.parents if not outer.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except BlockingIOError as error:
        raise InputError(
            f"{flag}: {str(folder)!r} is in use by {error.strerror or 'another process'}; wait for it to end, or name "
            "another folder"
        ) from None
    except OSError as error:
        raise InputError(f"{flag}: {str(folder)!r} cannot be written to ({error.strerror}); name another") from error
    _locked_paths.add(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _locked_paths.discard(path)
        os.close(file)
        with suppress(OSError):  # not empty any more: the call was of use
            for outer in made:
                outer.rmdir()


def _lock(path: Path) -> int:
    """The open file, locked. Raises BlockingIOError, whose strerror is what the holder wrote into it."""
    if path in _locked_paths:  # opened once more, it would be unlocked when that is closed
        raise BlockingIOError(0, "another call in this process")
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock that forked workers do not inherit
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 200).decode(errors="replace")
            os.close(file)
            raise BlockingIOError(0, holder) from None
        except OSError:  # this file system has none
            return file
        if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
            break
        os.close(file)  # its last holder has just removed it
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}".encode())
    return file


def flush(path: Path) -> None:
    """Have the file or folder itself written to disk, not only to the page cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(staging: Path, folder: Path) -> None:
    """Flush the files of `staging` to disk, then rename it to `folder`, which may be there already.

    Killed between its two renames it leaves the earlier folder beside its place, for `recover`.
    """
    for path in (*staging.iterdir(), staging):
        flush(path)
    old = hidden(folder, "old")
    recover(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(staging, folder)
    shutil.rmtree(old, ignore_errors=True)
