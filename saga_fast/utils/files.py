"""Atomic writes, locks, and reading of untrusted files."""

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

_locked_paths: set[Path] = set()  # locks of this process, to which the system would grant them twice


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """A regular file's content.

    Raises OSError, whose `strerror` says what is wrong, also for more than `limit` bytes, and for a pipe or a device,
    which may never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(0, "not a regular file", os.fspath(path))
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(0, f"more than {limit:,} bytes", os.fspath(path))
    return content


LFS = b"version https://git-lfs."  # how a pointer begins that Git LFS leaves where it has not fetched a file


def is_lfs_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(LFS)) == LFS


LITTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),  # Windows
    *("__macosx", "icon\r"),  # macOS, which hides the rest
    *("@eadir", "#recycle", "lost+found", "__pycache__"),  # network storage, ext4, Python
}


def is_litter(name: str) -> bool:
    """Whether an entry of a folder is hidden (`._x.jpg` too), or a system file."""
    return name.startswith(".") or name.casefold() in LITTER


def hidden(folder: Path, what: str) -> Path:
    """The sibling of `folder`, or of the folder that it is a link to, named .FOLDER.what."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(f".{folder.name}.{what}")


def recover(folder: Path) -> None:
    """Restore the folder that a killed `replace` moved away."""
    old = hidden(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, os.path.realpath(folder))


def expect_text(path: Path, flag: str) -> None:
    """Raises InputError, naming `flag`, for a place whose name is not UTF-8, as safetensors, faiss and others write to
    no such place."""
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{flag}: {str(path)!r} is not UTF-8 where it lies; name another, or rename it") from None


def expect_replaceable(folder: Path, flag: str) -> None:
    """Raises InputError, naming `flag`, for a folder in whose place no other can be renamed, before there is one."""
    expect_text(folder, flag)
    if os.path.ismount(folder):
        raise InputError(f"{flag}: {str(folder)!r} is a mount point, which stays as it is; name a folder in it")
    if folder.exists() and os.path.samefile(folder, os.curdir):
        raise InputError(f"{flag}: {str(folder)!r} is the working directory, which stays as it is; name a folder in it")


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Holds an exclusive lock for `folder`, which need not exist, by the file .FOLDER.lock beside it.

    It is a lock of the operating system, so it ends with its process, and a leftover file does not block. Raises
    InputError, naming `flag`, for a folder that another process has locked, naming that process, or whose parent is not
    writable. Where the file system has no locks, nothing is locked.
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
        with suppress(OSError):  # not empty: the caller wrote into it
            for outer in made:
                outer.rmdir()


def _lock(path: Path) -> int:
    """The open file, locked. Raises BlockingIOError, whose strerror is the text that the holder wrote into it."""
    if path in _locked_paths:  # closing a second descriptor would release the lock
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
        os.close(file)  # its last holder has just deleted it
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}".encode())
    return file


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(staging: Path, folder: Path) -> None:
    """Flush the files of `staging` to disk, then rename it to `folder`, which may be there already, or be a link.

    Killed between its two renames it leaves the earlier folder beside its place, for `recover`.
    """
    for path in (*staging.iterdir(), staging):
        flush(path)
    folder = Path(os.path.realpath(folder))
    old = hidden(folder, "old")
    recover(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(staging, folder)
    shutil.rmtree(old, ignore_errors=True)
