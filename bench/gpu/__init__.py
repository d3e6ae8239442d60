"""Time each op on a GPU, and its rivals: `python -m bench.gpu OP [--json FILE]`.

`bench/gpu/OP.py` has `cases() -> Iterator[Case]`, one op at one shape each; it is a generator, so that a case's tensors
are gone before the next one's are made. A rival that does not import is left out, one that fails or computes
something else is reported and not timed. Every result is held against the case's reference first.

Times are the GPU's own (events), each call from a cold L2, the implementations in turn, so that a card that slows
down slows them all. The cache is flushed just before, which also hides the cost of launching behind it; where that is
more than the work itself, as in a decode step, calls are CUDA graphs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saga_kernels.gpu.shipped import Cost

ROUNDS, ROUNDS_SECONDS = 30, 3.0  # of all implementations, whichever is reached first
FLUSH_BYTES = 512 << 20  # ten times an H100's L2

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    name: what and how large. run: the implementations by name, "ours" among them; each takes `inputs` and returns what
    the op returns. reference: the result in float32 or float64, likewise, called once. work: what the op must do, for
    the shares of bandwidth and arithmetic reached. tolerance: the largest relative error accepted of any
    implementation, in each output (`error`); 0 asks for equal bits. error: another measure of two results than
    `relative_error`, if that fits badly. graph: each implementation is timed as a CUDA graph, where it can be captured.
    """

    name: str
    run: dict[str, Callable[..., Result]]
    reference: Callable[..., Result]
    work: Cost
    tolerance: float
    inputs: tuple[Tensor, ...] = ()
    error: Callable[[Result, Result], float] | None = None
    graph: bool = False


def importable(name: str) -> ModuleType | None:
    """A rival's module, or None where it is not installed or does not load."""
    try:
        return import_module(name)
    except Exception:  # a GPU library that is there but broken raises what it likes
        return None


def widened(run: Callable[..., Result], dtype: torch.dtype = torch.float64) -> Callable[..., Result]:
    """`run` on inputs of a wider dtype: a reference."""
    return lambda *inputs: run(*(x.to(dtype) for x in inputs))


def backward_of(
    run: Callable[..., Result], inputs: Sequence[Tensor], leaves: int, gradients: Tensor | tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of the first `leaves` inputs, given those of the results, from one stored forward pass."""
    inputs = [x.detach().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
    kept: list[Result] = []

    def backward() -> tuple[Tensor, ...]:
        if not kept:
            kept.append(run(*inputs))
        return torch.autograd.grad(kept[0], inputs[:leaves], gradients, retain_graph=True)

    return backward


def relative_error(result: Result, reference: Result) -> float:
    """The largest over the outputs of |result - reference| / |reference| in Euclidean norms; nan counts as infinite."""
    outputs = zip(_tuple(result), _tuple(reference), strict=True)
    errors = [((y.double() - r.double()).norm() / r.double().norm()).item() for y, r in outputs]
    return max(float("inf") if error != error else error for error in errors)


def ceilings() -> Cost:
    """FLOP/s of a large bf16 matmul and bytes/s of a large copy, measured on this card."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(big)
    times = _interleaved({"matmul": lambda: a @ a, "copy": lambda: target.copy_(big)})
    seconds = {name: statistics.median(t) / 1e3 for name, t in times.items()}
    return Cost(int(2 * 8192**3 / seconds["matmul"]), int(2 * len(big) / seconds["copy"]))


def measure(case: Case, ceiling: Cost) -> dict[str, Any]:
    """Check every implementation, then time those that are right."""
    figures: dict[str, dict[str, Any]] = {}
    reference = case.reference(*case.inputs)
    for name, run in case.run.items():
        try:
            error = (case.error or relative_error)(run(*case.inputs), reference)
        except Exception as problem:  # a rival's failure is its figure
            lines = str(problem).strip().splitlines() or [""]
            figures[name] = {"wrong": f"{type(problem).__name__}: {lines[0]}"}
        else:
            figures[name] = {"error": error}
            if not error <= case.tolerance:
                figures[name]["wrong"] = f"relative error {error:.2e}, above {case.tolerance:.0e}"
    del reference
    right = {name: partial(run, *case.inputs) for name, run in case.run.items() if "wrong" not in figures[name]}
    for name, run in right.items():
        figures[name]["peak_bytes"] = _peak(run)
    if case.graph:
        right = {name: _captured(run) for name, run in right.items()}
    for name, milliseconds in _interleaved(right).items():
        median = statistics.median(milliseconds)
        rates = Cost(int(case.work.flops / median * 1e3), int(case.work.bytes / median * 1e3))
        figures[name] |= {
            "ms": median,
            "best_ms": min(milliseconds),
            "worst_ms": max(milliseconds),
            "share_of_flops": rates.flops / ceiling.flops,
            "share_of_bandwidth": rates.bytes / ceiling.bytes,
        }
    floor = max(case.work.flops / ceiling.flops, case.work.bytes / ceiling.bytes) * 1e3
    return {"name": case.name, "floor_ms": floor, **case.work._asdict(), "implementations": figures}


def _interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of every call, by name."""
    flush = torch.empty(FLUSH_BYTES, device="cuda", dtype=torch.uint8)
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = 0.0
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
            spent += times[name][-1] / 1e3
        if spent > ROUNDS_SECONDS:
            break
    return times


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as one launch; unchanged where it cannot be captured in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run
    return graph.replay


def _peak(run: Callable[[], object]) -> int:
    """Peak bytes of a warm call, with its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _tuple(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def table(row: dict[str, Any]) -> Iterator[str]:
    """One case as lines of text."""
    yield f"{row['name']}: floor {row['floor_ms']:.3f} ms"
    for name, figure in row["implementations"].items():
        if "wrong" in figure:
            yield f"    {name:28} WRONG: {figure['wrong']}"
            continue
        yield (
            f"    {name:28} {figure['ms']:9.3f} ms ({figure['best_ms']:.3f} to {figure['worst_ms']:.3f})"
            f"  bandwidth {figure['share_of_bandwidth']:6.1%}  flops {figure['share_of_flops']:6.1%}"
            f"  peak {figure['peak_bytes'] / 2**20:8.1f} MiB  error {figure['error']:.1e}"
        )
