"""Errors a user can mend: one clear line, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad user input. The message is one line: the file or field, what was found, what is accepted, the mend."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn an `InputError` into its line on stderr and exit code 2; other exceptions are bugs and keep their trace."""
    try:
        yield
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # the others met the same; what one meets alone, torchrun reports
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
