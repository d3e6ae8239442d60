"""Blocks are placed as in a plain search over all holes, and every tensor that is made on the meta device is placed."""

from __future__ import annotations

import random

import torch

from bench.allocator import Placed, Segment


def holes(blocks: dict[int, int], end: int) -> list[tuple[int, int]]:
    """(size, start) of what is free before `end`."""
    found, at = [], 0
    for start in sorted(blocks):
        if start > at:
            found.append((start - at, at))
        at = start + blocks[start]
    return [*found, (end - at, at)] if end > at else found


def test_each_block_takes_the_smallest_hole_that_holds_it_else_the_end():
    draw, segment, blocks, end = random.Random(0), Segment(), {}, 0
    for _ in range(3000):
        if blocks and draw.random() < 0.48:
            start = draw.choice(list(blocks))
            segment.give(start, blocks.pop(start))
            continue
        size, free = draw.randint(1, 40), holes(blocks, end)
        fits = [hole for hole in free if hole[0] >= size]
        if fits:
            expected = min(fits)[1]
        else:  # the last hole, if it is at the end, is lengthened
            expected = free[-1][1] if free and sum(free[-1]) == end else end
            end = expected + size
        start = segment.take(size)
        assert start == expected and segment.end == end
        blocks[start] = size
        assert segment.live == sum(blocks.values())
    assert end > segment.live, "there were holes"


def test_tensors_are_placed_while_they_live():
    mib = 1 << 20
    with Placed() as placed:
        first = torch.empty(2 * mib, dtype=torch.uint8, device="meta")
        view = first[mib:]  # no tensor of its own
        torch.empty(mib - 1024, dtype=torch.uint8, device="meta")  # of another pool
        second = first + 1
        assert (placed.segment.live, placed.segment.end) == (4 * mib, 4 * mib)
        del first, view
        third = torch.empty(mib, dtype=torch.uint8, device="meta")
        assert (placed.segment.live, placed.segment.end, placed.peak) == (3 * mib, 4 * mib, 4 * mib)
        del second, third
        torch.empty(5 * mib, dtype=torch.uint8, device="meta")
        assert (placed.segment.live, placed.segment.end) == (0, 5 * mib)
