"""Where the groups of a packed sequence lie."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import torch

from .checks import expect


class GroupLayout:
    """Offsets of groups packed end to end: prefix 0, its completions, prefix 1, its completions, ... without padding.

    A prefix token sees its prefix causally; a completion token sees its whole prefix and, causally, its own completion.

    Args:
        prefix_lengths: tokens of each group's prefix.
        completion_lengths: for each group, tokens of each of its completions; empty where only the prefix is there.
        device: where the offset tensors go.

    Attributes:
        tokens: length of the packed sequence. groups: number of groups.
        segment_offsets: int32 (segments + 1,), boundaries of all prefixes and completions in packed order.
        segment_prefix: int32 (segments,), the segment that is this segment's prefix; itself for a prefix.

    Raises:
        ValueError: the lists differ in length, are empty, or hold a length below 1.
    """

    def __init__(
        self,
        prefix_lengths: list[int],
        completion_lengths: list[list[int]],
        device: torch.device | str | None = None,
    ) -> None:
        groups = len(prefix_lengths)
        expect(groups > 0, "prefix_lengths", "no group", "one length or more")
        expect(
            len(completion_lengths) == groups,
            "completion_lengths",
            f"{len(completion_lengths)} groups",
            f"as many as prefix_lengths has, {groups}",
        )
        lengths, home, self._first = [], [], []
        for i, (prefix, completions) in enumerate(zip(prefix_lengths, completion_lengths, strict=True)):
            expect(prefix > 0, f"prefix_lengths[{i}]", prefix, "1 token or more")
            for g, completion in enumerate(completions):
                expect(completion > 0, f"completion_lengths[{i}][{g}]", completion, "1 token or more")
            self._first.append(len(lengths))
            home += [len(lengths)] * (1 + len(completions))
            lengths += [prefix, *completions]
        self._offsets, self._home = [0, *accumulate(lengths)], home
        self._sizes = [len(completions) for completions in completion_lengths]
        self.groups = groups
        self.tokens = self._offsets[-1]
        self.segment_offsets = torch.tensor(self._offsets, dtype=torch.int32, device=device)
        self.segment_prefix = torch.tensor(home, dtype=torch.int32, device=device)

    def prefix_slice(self, i: int) -> slice:
        """The packed rows of group `i`'s prefix."""
        return self._segment(self._first[i])

    def completion_slice(self, i: int, g: int) -> slice:
        """The packed rows of completion `g` of group `i`."""
        expect(0 <= g < self._sizes[i], "g", g, f"0 to {self._sizes[i] - 1}, group {i}'s completions")
        return self._segment(self._first[i] + 1 + g)

    def visible(self, row: int) -> tuple[slice, slice]:
        """The keys that packed row `row` sees: of its prefix (none for a row of one), and of its own segment."""
        expect(0 <= row < self.tokens, "row", row, f"0 to {self.tokens - 1}, the packed tokens")
        segment = bisect_right(self._offsets, row) - 1
        own = slice(self._offsets[segment], row + 1)
        return (self._segment(self._home[segment]) if self._home[segment] != segment else slice(row, row)), own

    def _segment(self, segment: int) -> slice:
        return slice(self._offsets[segment], self._offsets[segment + 1])
