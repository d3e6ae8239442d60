"""Embeddings by attribute: the cosine of each block of two embeddings, and a similarity that weights the blocks.

z is M unit blocks over √M (see `encoder.AttributePooler`), so M Σ a_i b_i over block m is the cosine of the two blocks,
and the cosine of a and b is the mean of those. Weighted, the similarity is Σ w_m cos_m / Σ w_m, which is the inner
product of b with an a whose block m is multiplied by M w_m / Σ w: a weighted search is a search for another query.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from saga_fast.utils.errors import InputError


class Blocks:
    """The M blocks of an embedding (D_e,), end to end. `names`: their attributes; `sizes`: name -> length."""

    def __init__(self, sizes: Mapping[str, int]):
        self.names = tuple(sizes)
        self._sizes = np.array(list(sizes.values()))
        self._starts = self._sizes.cumsum() - self._sizes

    def cosines(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """float64 (..., M): the cosine of each block of a (..., D_e) with that of b (..., D_e); axes broadcast."""
        return len(self.names) * np.add.reduceat(a * b, self._starts, axis=-1, dtype=np.float64)

    def scaled(self, z: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float32 (..., D_e): the query whose inner product with an embedding is the similarity by `weights` (M,)."""
        share = len(weights) * weights / weights.sum()
        return (z * share.repeat(self._sizes)).astype(np.float32)

    def named(self, cosines: np.ndarray) -> dict[str, float]:
        """attribute -> cosine, from cosines (M,), largest first; equal ones in the order of `names`."""
        order = np.argsort(-cosines, kind="stable")
        return {self.names[m]: float(cosines[m]) for m in order}

    def weights(self, given: Mapping[str, float] | None = None, only: str | None = None) -> np.ndarray:
        """float64 (M,): the weights given by name, 1 for the others; or 1 for `only` one, 0 for the others.

        Raises InputError for an unknown name, for weights that are negative, not finite or all 0, and for both at once.
        """
        if only is not None:
            if given:
                raise InputError("--only: given with --attribute; choose one")
            return np.eye(len(self.names))[self.place(only, "--only")]
        weights = np.ones(len(self.names))
        for name, weight in (given or {}).items():
            place = self.place(name)
            if not (math.isfinite(weight) and weight >= 0):
                raise InputError(f"--attribute: the weight of {name!r} is {weight:g}; give a finite number, 0 or more")
            weights[place] = weight
        if not weights.any():
            raise InputError("--attribute: all weights are 0; give one attribute a positive weight")
        return weights / weights.max()  # so that their sum is finite too

    def place(self, name: str, flag: str = "--attribute") -> int:
        """The index of the attribute's block. Raises InputError, with the nearest name, for an unknown attribute."""
        if name not in self.names:
            close = difflib.get_close_matches(name, self.names, n=1, cutoff=0)[0]
            raise InputError(
                f"{flag}: {name!r} is no attribute of this encoder; did you mean {close!r}? "
                f"It has {', '.join(self.names)}"
            )
        return self.names.index(name)


def parse_weights(given: Sequence[str]) -> dict[str, float]:
    """attribute -> weight, from strings "NAME=WEIGHT". Raises InputError for others."""
    weights: dict[str, float] = {}
    for text in given:
        name, _, number = (part.strip() for part in text.rpartition("="))
        try:
            if not name or name in weights:
                raise ValueError
            weights[name] = float(number)
        except ValueError:
            raise InputError(
                f"--attribute: {text!r}{' names it twice' if name in weights else ''}; give NAME=WEIGHT, "
                'an attribute once, as in --attribute "crown color=2"'
            ) from None
    return weights
