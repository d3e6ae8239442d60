"""What fits in memory: each phase begins with all it has at once, and halves that when the device is out of memory.

A phase's results are those of its nominal batch, to rounding. What is embedded in pieces is embedded twice, as in
gradient caching (Gao et al., 2021, arXiv 2101.06983): first without a graph, for the loss over all; then piece by piece
with one, for the gradient that the loss asked of each row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


class OomBackoff:
    """`limits`: for each phase that ran out of memory, how much of its batch goes through at once from then on."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}

    def run(self, phase: str, size: int, work: Callable[[int], Result], minimum: int = 1) -> Result:
        """`work(limit)`, again with half the limit for as long as it raises OutOfMemoryError; `size` is the first.

        Raises OutOfMemoryError if `minimum` does not fit either. `work` must be fit to be begun again.
        """
        while True:
            limit = min(size, self.limits.get(phase, size))
            try:
                return work(limit)
            except torch.OutOfMemoryError:
                if limit <= minimum:
                    raise
            # Out of the handler the traceback is gone, and with it what the failed attempt held.
            torch.cuda.empty_cache()
            self.limits[phase] = limit // 2
            warnings.warn(
                f"{phase}: out of memory with {limit} at once, {limit // 2} from now on; results stay those of all",
                stacklevel=2,
            )

    def map_chunks(self, phase: str, count: int, work: Callable[[slice], Result]) -> list[Result]:
        """`work` of consecutive slices of `count` items, each as long as fits."""
        results: list[Result] = []
        first = 0
        while first < count:

            def next_chunk(limit: int, first: int = first) -> tuple[int, Result]:
                return first + limit, work(slice(first, first + limit))

            first, result = self.run(phase, count - first, next_chunk)
            results.append(result)
        return results

    def log(self) -> dict[str, int]:
        return {f"limit_{phase.replace(' ', '_')}": limit for phase, limit in self.limits.items()}


class GradientCachedForward:
    """`outputs`: what `model` makes of all rows of `inputs`, as leaves: a loss's backward ends there, ours goes on.

    model: rows → tensors of as many rows. parameters: those that its gradients fall on. The graph is kept only where
    all rows went through at once; else, or where the backward pass runs out of memory, rows are encoded again. Under
    `torch.no_grad` the outputs are no leaves.
    """

    def __init__(
        self,
        backoff: OomBackoff,
        phase: str,
        model: Callable[[Tensor], Sequence[Tensor]],
        inputs: Tensor,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self.backoff, self.phase, self.model, self.inputs, self.parameters = backoff, phase, model, inputs, parameters
        needs_gradient = torch.is_grad_enabled()

        def forward(rows: slice) -> Sequence[Tensor]:
            with torch.set_grad_enabled(needs_gradient and rows.stop - rows.start == len(inputs)):
                return model(inputs[rows])

        chunks = backoff.map_chunks(phase, len(inputs), forward)
        self.graph = chunks[0] if len(chunks) == 1 else None
        joined = self.graph or [torch.cat(parts) for parts in zip(*chunks)]
        self.outputs = [output.detach().requires_grad_(needs_gradient) for output in joined]

    def backward(self) -> None:
        """Adds to the parameters' gradients what follows from the outputs'. Once only."""

        def backward_rows(rows: slice) -> None:
            with gradients_all_or_none(self.parameters):
                graph, self.graph = self.graph, None
                if graph is None:
                    graph = self.model(self.inputs[rows])
                with_gradient = [
                    (out, leaf.grad[rows]) for out, leaf in zip(graph, self.outputs) if leaf.grad is not None
                ]
                torch.autograd.backward([out for out, _ in with_gradient], [gradient for _, gradient in with_gradient])

        self.backoff.map_chunks(self.phase, len(self.inputs), backward_rows)


@contextmanager
def gradients_all_or_none(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """What is added to `.grad` in here is added at the end, and not at all if an exception leaves; where there was a
    gradient before, both stand in memory until then."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    done = False
    try:
        yield
        done = True
    finally:
        for parameter, gradient in zip(parameters, before):
            if gradient is not None:
                parameter.grad = gradient.add_(parameter.grad) if done and parameter.grad is not None else gradient
            elif not done:
                parameter.grad = None
