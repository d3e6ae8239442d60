from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], fast: int = 1, several: bool = False) -> list[Any]:
    """The values of a parametrised sweep, of which `make test` runs the first `fast`; the rest are marked slow.

    several: each is a tuple of the values of several parameters.
    """
    first, rest = (found := list(values))[:fast], found[fast:]
    return first + [pytest.param(*(value if several else (value,)), marks=pytest.mark.slow) for value in rest]
