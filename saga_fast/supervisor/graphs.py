"""CUDA graphs of a decode step, one per shape, and no more of them than the memory plan counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

MOST = 32  # graphs kept, the most recently replayed ones: a shrinking batch passes through about two dozen shapes
BYTES = 16 << 20  # of the driver per graph, besides the pool: an upper estimate; `make gpu-check` measures it


class Graphs:
    """Runs a function by the graph captured at its shape; captures it again if that graph has been dropped.

    All graphs share one memory pool, which stays allocated, once for all shapes. capture(work, pool) records `work`
    into a graph, which has `replay()` and `pool()`; `captured` counts them.
    """

    def __init__(self, most: int = MOST, capture: Callable[[Callable[[], None], Any], Any] | None = None) -> None:
        self.most, self.capture, self.captured = most, capture or capture_cuda, 0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def run(self, shape: Hashable, work: Callable[[], None], times: int) -> None:
        """Runs `work` this many times. No graph may be running on the device when a new shape comes."""
        if shape not in self._kept:
            work()  # compiles kernels where needed, and counts as the first run
            times -= 1
            pool = next(iter(self._kept.values())).pool() if self._kept else None
            graph = self.capture(work, pool)  # before another is dropped, so that the pool stays alive
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
