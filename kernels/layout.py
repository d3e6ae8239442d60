"""Offsets of the groups of a packed sequence."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor

from .checks import expect


class GroupLayout:
    """Offsets of groups packed end to end: prefix 0, its completions, prefix 1, its completions, ... without padding.

    A prefix token attends causally to its prefix; a completion token to its whole prefix and, causally, to its own
    completion. All tokens have keys and values. Where the keys and values of the beginning of a prefix, or all of it,
    are cached, only its last tokens have queries. Queries are packed in the same order.

    Args:
        prefix_lengths: tokens of each group's prefix.
        completion_lengths: for each group, tokens of each of its completions; empty for a prefix alone.
        prefix_queries: how many of each prefix's last tokens have queries; all of them by default.
        device: of the offset tensors.

    Attributes:
        tokens: keys of the packed sequence. queries: its queries. groups: number of groups.
        segment_offsets: int32 (segments + 1,), boundaries of all prefixes and completions in packed order.
        segment_prefix: int32 (segments,), the segment that is this segment's prefix; itself for a prefix.
        query_offsets: int32 (segments + 1,), the same boundaries among the queries.

    Raises:
        ValueError: the lists differ in length, are empty, or hold a length below 1; more queries than prefix tokens.
    """

    def __init__(
        self,
        prefix_lengths: list[int],
        completion_lengths: list[list[int]],
        prefix_queries: list[int] | None = None,
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
        query_counts = prefix_lengths if prefix_queries is None else prefix_queries
        expect(
            len(query_counts) == groups,
            "prefix_queries",
            f"{len(query_counts)} groups",
            f"as many as prefix_lengths, {groups}",
        )
        lengths: list[int] = []
        queries: list[int] = []
        segment_prefix: list[int] = []
        self._first: list[int] = []
        for i, (prefix, query_count, completions) in enumerate(
            zip(prefix_lengths, query_counts, completion_lengths, strict=True)
        ):
            expect(prefix > 0, f"prefix_lengths[{i}]", prefix, "1 token or more")
            expect(
                0 <= query_count <= prefix, f"prefix_queries[{i}]", query_count, f"0 to {prefix}, the prefix's tokens"
            )
            for g, completion in enumerate(completions):
                expect(completion > 0, f"completion_lengths[{i}][{g}]", completion, "1 token or more")
            self._first.append(len(lengths))
            segment_prefix += [len(lengths)] * (1 + len(completions))
            lengths += [prefix, *completions]
            queries += [query_count, *completions]
        self._offsets, self._queries, self._segment_prefix = (
            [0, *accumulate(lengths)],
            [0, *accumulate(queries)],
            segment_prefix,
        )
        self._sizes = [len(completions) for completions in completion_lengths]
        self.groups, self.tokens, self.queries = groups, self._offsets[-1], self._queries[-1]
        self.segment_offsets, self.segment_prefix, self.query_offsets = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in (self._offsets, segment_prefix, self._queries)
        )

    @property
    def offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """segment_offsets, segment_prefix, query_offsets: as the ops take them."""
        return self.segment_offsets, self.segment_prefix, self.query_offsets

    def prefix_slice(self, i: int) -> slice:
        """The rows of group `i`'s prefix among the keys."""
        return _between(self._offsets, self._first[i])

    def prefix_queries(self, i: int) -> slice:
        """The rows of group `i`'s prefix among the queries: of its last tokens."""
        return _between(self._queries, self._first[i])

    def completion_slice(self, i: int, g: int) -> slice:
        """The rows of completion `g` of group `i` among the keys."""
        return _between(self._offsets, self._completion(i, g))

    def completion_queries(self, i: int, g: int) -> slice:
        """The rows of completion `g` of group `i` among the queries."""
        return _between(self._queries, self._completion(i, g))

    def key_rows(self) -> tuple[Tensor, Tensor]:
        """Rows among the keys, int64, ascending: of the tokens with a query (queries,), and of the cached tokens, which
        have none (tokens - queries,)."""
        query_rows, cached_rows = [], []
        for first, last, *rows in zip(self._offsets, self._offsets[1:], self._queries, self._queries[1:]):
            split = last - (rows[1] - rows[0])
            cached_rows.append(torch.arange(first, split))
            query_rows.append(torch.arange(split, last))
        device = self.segment_offsets.device
        return torch.cat(query_rows).to(device), torch.cat(cached_rows).to(device)

    def visible(self, query: int) -> tuple[slice, slice]:
        """The keys visible to a row of the queries: of its prefix (empty for a prefix's own row), and of its
        segment."""
        expect(0 <= query < self.queries, "query", query, f"0 to {self.queries - 1}, the packed queries")
        segment = bisect_right(self._queries, query) - 1
        start, stop = self._offsets[segment], self._offsets[segment + 1]
        token = stop - self._queries[segment + 1] + query
        prefix = self._segment_prefix[segment]
        return (_between(self._offsets, prefix) if prefix != segment else slice(start, start)), slice(start, token + 1)

    def _completion(self, i: int, g: int) -> int:
        expect(0 <= g < self._sizes[i], "g", g, f"0 to {self._sizes[i] - 1}, group {i}'s completions")
        return self._first[i] + 1 + g


def _between(offsets: list[int], segment: int) -> slice:
    return slice(offsets[segment], offsets[segment + 1])
