"""CUDA graphs of a decode step, one a shape, and no more of them than the memory plan counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

MOST = 32  # shapes whose graphs are kept, those replayed last: a batch that shrinks passes through some two dozen
BYTES = 16 << 20  # what the driver takes for one besides the pool. Assumed, and high; `make gpu-check` measures it


class Graphs:
    """Runs a work, each time as it was captured at its shape; captures it again where that was too long ago.

    All share one pool: what a work takes while it runs stays taken, once for all shapes. capture(work, pool) runs
    `work` into a graph, which has `replay()` and `pool()`; `captured` counts them.
    """

    def __init__(self, most: int = MOST, capture: Callable[[Callable[[], None], Any], Any] | None = None) -> None:
        self.most, self.capture, self.captured = most, capture or capture_cuda, 0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, shape: Hashable, work: Callable[[], None], times: int) -> None:
        """`work` so many times. Nothing of the graphs may be under way on the device when a new shape comes."""
        if shape not in self._kept:
            work()  # compiles what is not yet compiled, and is the first of them
            times -= 1
            pool = next(iter(self._kept.values())).pool() if self._kept else None
            graph = self.capture(work, pool)  # before another goes, so that the pool lives on
            self.captured += 1
            while len(self._kept) >= self.most:
                self._kept.popitem(last=False)
            self._kept[shape] = graph
        self._kept.move_to_end(shape)
        for _ in range(times):
            self._kept[shape].replay()


def capture_cuda(work: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph
