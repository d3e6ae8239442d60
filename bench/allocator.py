"""What PyTorch's caching allocator has to reserve for a step, beside what the step takes at most: no weights, no GPU.

    python -m bench.allocator [--steps 3] [--card 141] [--json FILE]

The memory plan counts tensors; an allocator also has holes between them. Here the tower, the prefill, the replay and
the update of Qwen3-VL-8B run on the meta device, which computes nothing, and every tensor of a megabyte or more is
placed as the allocator places it in a segment that grows: into the smallest hole that holds it, else at the end, where
the segment grows and never shrinks. Lengths are drawn anew each step, from half the longest to the longest. Ways of
ordering the work are compared: what is reserved beyond the first step is what a later step waits for.
"""

from __future__ import annotations

import argparse
import weakref
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from bench import memory, write_json
from saga_fast.encoder import VisualFeatures
from saga_fast.runtime.memory import GIB, Predictor, Step, _tensors
from saga_fast.runtime.oom import gradients_all_or_none
from saga_fast.supervisor import replay as replay_module
from saga_fast.supervisor.pair import PrefixCache
from saga_fast.supervisor.replay import Group, Plan, replay_groups
from saga_fast.supervisor.rollout import RolloutEngine

UNIT, SMALL = 512, 1 << 20  # sizes are rounded up to the one; what is smaller than the other has a pool of its own


class Segment:
    """A segment that grows. `end`: bytes reserved; `live`: bytes taken."""

    def __init__(self) -> None:
        self.end = self.live = 0
        self._by_size: list[tuple[int, int]] = []  # holes: size, start
        self._starts: dict[int, int] = {}  # start → size
        self._ends: dict[int, int] = {}  # end → start

    def take(self, size: int) -> int:
        """The start of a new block."""
        self.live += size
        at = bisect_left(self._by_size, (size, 0))
        if at < len(self._by_size):
            hole, start = self._by_size[at]
        elif self.end in self._ends:  # the last hole, and what is missing
            start = self._ends[self.end]
            hole = self._starts[start]
            self.end = start + size
            self._drop(start)
            return start
        else:
            start, self.end = self.end, self.end + size
            return start
        self._drop(start)
        if hole > size:
            self._put(start + size, hole - size)
        return start

    def give(self, start: int, size: int) -> None:
        self.live -= size
        if start in self._ends:
            before = self._ends[start]
            size += self._starts[before]
            self._drop(before)
            start = before
        if (after := start + size) in self._starts:
            size += self._starts[after]
            self._drop(after)
        self._put(start, size)

    def _put(self, start: int, size: int) -> None:
        insort(self._by_size, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _drop(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        self._by_size.pop(bisect_left(self._by_size, (size, start)))


class Placed(TorchDispatchMode):
    """Places every tensor that is made inside on the meta device, while it lives. peak: most bytes taken."""

    def __init__(self) -> None:
        super().__init__()
        self.segment, self.peak = Segment(), 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in _tensors((args, kwargs or {}))}
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, -(-storage.nbytes() // UNIT) * UNIT
            if tensor.device.type == "meta" and size >= SMALL and key not in before and key not in self._known:
                self._known.add(key)
                start = self.segment.take(size)
                self.peak = max(self.peak, self.segment.live)
                weakref.finalize(storage, self._free, key, start, size)
        return out

    def _free(self, key: int, start: int, size: int) -> None:
        self._known.discard(key)
        self.segment.give(start, size)


def steps(
    step: Step, plan: Plan, slots: int, count: int, largest_first: bool, together: bool
) -> Iterator[dict[str, Any]]:
    """Of each phase of each step, the bytes taken at most so far and reserved. together: the metric loss's gradients
    are moved to one block that stands all the time, and their own are freed, before the rollouts."""
    encoder, decoder, prefix = step.encoder, step.decoder, step.prefix
    drawn, pairs, group = torch.Generator().manual_seed(0), step.pairs, step.sampling.group_size
    most = step.sampling.max_new_tokens
    with Placed() as placed, _ordered(largest_first):
        weights = [torch.empty_like(parameter) for parameter in encoder.parameters()]
        standing = [torch.empty(int(size), dtype=torch.uint8, device="meta") for size in _language_model(step)]
        block = torch.empty(sum(w.numel() for w in weights), device="meta") if together else None
        parameters = list(encoder.parameters())
        states: list[Tensor] = []
        engine = None
        question = PrefixCache(decoder, prefix)
        for number in range(count):

            def told(phase: str, number: int = number) -> dict[str, Any]:
                return {"step": number, "phase": phase, "peak_bytes": placed.peak, "reserved_bytes": placed.segment.end}

            features = _through_tower(step, step.batch, parameters, pooled=True)
            taken = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            if block is not None:
                taken = [x.copy_(g).view_as(g) for x, g in zip(block.split([g.numel() for g in taken]), taken)]
            yield told("embed")
            engine = engine or RolloutEngine(question, step.sampling, (0,), slots)
            for _ in range(-(-2 * pairs // slots)):
                engine._prefill(VisualFeatures.of([x[:8] for x in features]), slice(0, 4))
            yield told("roll out")
            mean = torch.randint(most // 2, most, (pairs, group), generator=drawn).tolist()
            groups = [Group([[0] * n for n in row], [torch.empty(n, device="meta") for n in row], {}) for row in mean]
            leaves = VisualFeatures.of(
                [
                    torch.empty(2 * pairs, *x.shape[1:], dtype=decoder.dtype, device="meta").requires_grad_()
                    for x in features
                ]
            )
            replay_groups(question, leaves, groups, 1.0, -1, plan)
            with gradients_all_or_none(parameters):
                _through_tower(step, 2 * pairs, parameters, pooled=False)
            yield told("replay")
            for parameter, gradient in zip(parameters, taken):
                parameter.grad = gradient.add_(parameter.grad) if parameter.grad is not None else gradient
            del taken, gradient, features, leaves, groups
            states = states or [torch.empty(w.numel(), dtype=torch.uint8, device="meta") for w in (*weights, *weights)]
            for parameter in parameters:
                parameter.grad = None
            yield told("update")
    del standing


def _through_tower(step: Step, images: int, parameters: list[Tensor], pooled: bool) -> list[Tensor]:
    """Forward and backward of the tower, and of the pooler if `pooled`; the features."""
    encoder = step.encoder
    pixels = torch.empty(images, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8, device="meta")

    # Autocast knows no meta device: the casts that it makes of fp32 weights are made here.
    def cast(module: nn.Module) -> dict[str, Tensor]:
        return {name: parameter.bfloat16() for name, parameter in module.named_parameters()}

    levels = list(functional_call(encoder.tower, cast(encoder.tower), (pixels,)).levels)
    out = levels
    if pooled:
        out = [functional_call(encoder.pooler, cast(encoder.pooler), (levels[0],)), *levels[1:]]
    torch.autograd.backward(out, [torch.empty_like(x) for x in out])
    return [x.detach() for x in levels]


def _language_model(step: Step) -> list[float]:
    predictor = Predictor(step)
    layers, ends = (predictor.resident[name] for name in ("language model's layers", "embedding and head"))
    return [layers / step.decoder.depth] * step.decoder.depth + [ends / 2] * 2


@contextmanager
def _ordered(largest_first: bool) -> Iterator[None]:
    kept = replay_module._largest_first
    if not largest_first:
        replay_module._largest_first = lambda sizes, budget: list(replay_module._packs(sizes, budget))
    try:
        yield
    finally:
        replay_module._largest_first = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--card", type=float, default=141, help="GiB, for which the memory plan chooses")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    step = memory.step_of(memory.parser().parse_args([] if options.card < 80 else ["--no-checkpointing"]))
    plan, slots, footprint = Predictor(step).choose(int(options.card * GIB))
    print(f"{plan}, {slots} pairs at once; foretold {footprint.peak / GIB:.1f} GiB")
    step.encoder.to("meta")
    if step.checkpointing:
        step.encoder.tower.checkpoint_blocks()
    found = {}
    for order in (False, True):
        for together in (False, True):
            name = f"{'largest first' if order else 'as drawn'}, gradients {'together' if together else 'as they come'}"
            found[name] = list(steps(step, plan, slots, options.steps, order, together))
            print(name)
            for line in found[name]:
                taken, reserved = line["peak_bytes"] / GIB, line["reserved_bytes"] / GIB
                at = f"step {line['step']} {line['phase']:10}"
                print(f"  {at} taken at most {taken:6.1f}  reserved {reserved:6.1f} GiB")
    write_json(
        options.json,
        {"card": options.card, "plan": vars(plan), "slots": slots, "foretold": footprint.peak, "ways": found},
    )


if __name__ == "__main__":
    main()
