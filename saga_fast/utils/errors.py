"""Errors that a user can fix: one clear line, exit code 2."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

LONGEST = 2000  # characters of a message: it may quote untrusted names and values
PATIENCE = timedelta(seconds=10)  # for the first rank to come to the same error on a busy machine


class InputError(ValueError):
    """Bad user input. The message is one line: the file or field, what was found, what is accepted, the remedy.

    It may quote hostile names and values, so line breaks and other unprintable characters in it are escaped, and a very
    long one loses its middle.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 3 :]}"
        super().__init__(printable(message))


def printable(message: str) -> str:
    """The message on one line: line breaks and other characters that do not print are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def warn_rank_zero(message: str) -> None:
    """Warn, on the first of torchrun's processes only, as all of them find the same."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(printable(message), stacklevel=3)


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` into its line on stderr and exit code 2, Ctrl-C into 130, and a closed
    output into 141; other exceptions are bugs and keep their trace.

    Of torchrun's processes the first prints at once. Each of the others waits up to `PATIENCE` for the first to print
    the same line, and prints its own if that does not happen, so that an error of all ranks appears once and an error
    of one rank appears with its number. Output inside may contain file names that are not valid text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except InputError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
            _publish(str(error))
        elif not _printed_by_first_rank(str(error)):
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # as shells say of a process that Ctrl-C ended
    except BrokenPipeError:  # the reader of the output is gone, as `head` is after some lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print goes there at the end of the process
        sys.exit(141)  # as shells say of a process that SIGPIPE ended


def _store() -> Any:
    """torchrun's key-value store, of this start of the processes; None where there is none, or no longer."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    import torch.distributed as dist  # late: most commands end without it

    try:
        store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
    except (RuntimeError, ValueError):
        return None
    return dist.PrefixStore(f"input error {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _publish(message: str) -> None:
    with suppress(RuntimeError):
        if store := _store():
            store.set("message", message)


def _printed_by_first_rank(message: str) -> bool:
    try:
        return bool((store := _store()) and store.get("message").decode() == message)
    except RuntimeError:  # it did not come in time
        return False


def first_line(error: BaseException) -> str:
    """The first line of another library's exception, and the second if the first ends in a colon; its type if empty."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))
