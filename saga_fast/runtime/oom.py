"""Backoff when the device is out of memory: each phase starts with its whole batch and halves it on each such error.

A phase's results are those of its nominal batch, up to rounding. A batch that is embedded in chunks is embedded twice,
as in gradient caching (GradCache; Gao et al., 2021, arXiv 2101.06983): first without a graph, for the loss over all
rows; then chunk by chunk with one, for the gradient of the loss in each row's outputs.
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
    """limits: for each phase that ran out of memory, the number of items at once from then on."""

    def __init__(self) -> None:
        self.limits: dict[str, int] = {}

    def run(self, phase: str, size: int, work: Callable[[int], Result], minimum: int = 1) -> Result:
        """`work(limit)`, with limit = `size` at first, and half of it after each OutOfMemoryError.

        `work` must be repeatable. Raises OutOfMemoryError if `minimum` does not fit either.
        """
        while True:
            limit = min(size, self.limits.get(phase, size))
            try:
                return work(limit)
            except torch.OutOfMemoryError:
                if limit <= minimum:
                    raise
            # Outside of the handler, where the traceback no longer keeps the failed attempt's tensors alive.
            torch.cuda.empty_cache()
            self.limits[phase] = limit // 2
            warnings.warn(
                f"{phase}: out of memory with {limit} at once, {limit // 2} from now on; the results stay the same",
                stacklevel=2,
            )

    def map_chunks(self, phase: str, count: int, work: Callable[[slice], Result]) -> list[Result]:
        """Results of `work` on consecutive slices of `count` items, each as long as memory allows."""
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
    """A forward of `model` on all rows of `inputs` whose backward may run in chunks.

    outputs: the model's outputs as leaves, where the backward pass of a loss ends; `backward` carries on from them.
    model: rows → tensors with as many rows. parameters: those that get gradients. The graph is kept only if all rows
    were computed at once; else, or if its backward runs out of memory, rows are encoded again. Under `torch.no_grad`
    the outputs need no gradient.
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
        """Backpropagates the outputs' gradients into the parameters, adding to `.grad`. May be called once."""

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
    """Gradients that accumulate inside are added to `.grad` at the end, or discarded on an exception. Where there is
    a gradient already, both are in memory until then."""
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
