"""`sample_top_p` on a GPU: the nucleus found without a sort, in five launches and no wait for the GPU.

A token's weight exp((x - max) / temperature) is turned into an integer (fixed point, as many bits as the sum of a row
leaves room for: 2^-44 of the likeliest token at 151,936). From there on all is integer arithmetic: sums do not depend
on their order, so neither does a draw, however a row is split among programs; and the nucleus and the inversion of its
cumulative distribution are exact for these weights, ties included. The reference rounds probabilities to float32 and
sums in float64, so the two can differ where a sum is within rounding, some 1e-6 of the whole, of top_p or of the random
number; and it calls two tokens equal if their float32 probabilities are, here their logits must be.

Each row is split, so that 8 rows fill a GPU as 256 do:
    survey   maximum and sum of each split
    weigh    mass above 7 pivots, evenly spaced in logit; then again, with 7 more where the mass crosses top_p
    gather   tokens of the one interval of 64 where it crosses, close together; the mass of those above
    draw     one program a row: bisect among these to the least logit of the nucleus, find the split the random
             number falls into, and scan that
If logits are flat, many tokens are gathered and `draw` takes longer; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shipped import Cost, Shipped, launch_options

SPLITS = 32  # of a row
BLOCK = 512  # tokens a step in a split: 8 sums of 64 bits for each are as much as 128 threads keep in registers
WARPS = 4
WIDE = 64  # tokens of every split a step in the draw
SCAN = 2048  # tokens a step in the split where the draw falls
DRAW_WARPS = 8
ROUNDS = tl.constexpr(2)  # of weighing
PIVOTS = tl.constexpr(8)  # the last is -inf, for the whole mass
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a start for maxima: -inf - -inf would be nan
INFINITY = tl.constexpr(float("inf"))


def forward(
    logits: Tensor,
    temperature: float,
    top_p: float,
    seed: int,
    rows: Tensor,
    step: Tensor,
    splits: int = SPLITS,
    block: int = BLOCK,
    wide: int = WIDE,
    scan: int = SCAN,
) -> Tensor:
    """(N,) int64 tokens of logits (N, V), contiguous, in float32, bfloat16 or float16.

    A row without a finite distribution (nan, +inf, only -inf) draws -1, an id no token has.
    """
    if temperature == 0:
        return logits.argmax(-1)
    n, vocabulary = logits.shape
    span = triton.cdiv(vocabulary, splits * block) * block
    token = rows.new_empty(n)
    if n == 0:
        return token

    def partial(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(*shape, dtype=dtype)

    top, total, least, greatest = partial(4, n, splits)
    bracket, pivot = partial(n, ROUNDS.value, 2), partial(n, ROUNDS.value, PIVOTS.value)
    mass = partial(n, ROUNDS.value, splits, PIVOTS.value, dtype=torch.int64)
    above, count = partial(n, splits, dtype=torch.int64), partial(n, splits, dtype=torch.int32)
    gathered = partial(n, splits * span, dtype=logits.dtype)

    scale = 1 / temperature
    unit = 2.0 ** (62 - vocabulary.bit_length())  # the sum of V weights stays below 2^62
    tail = min(int((1 - top_p) * 2**63), 2**63 - 1)
    spread = vocabulary / (1 - top_p) if top_p < 1 else float("inf")
    grid, options = (n, splits), launch_options(WARPS)
    shape = (vocabulary, span, scale)
    constants = {"SPLITS": splits, "BLOCK": block}
    _survey[grid](logits, top, total, *shape, **constants, **options)
    for i in range(ROUNDS.value):
        _weigh[grid](
            logits, top, total, bracket, pivot, mass, *shape, unit, tail, spread, **constants, ROUND=i, **options
        )
    _gather[grid](
        logits, top, total, bracket, pivot, mass, gathered, count, above, least, greatest,
        *shape, unit, tail, **constants, **options,
    )  # fmt: skip
    _draw[(n,)](
        logits, top, total, mass, gathered, count, above, least, greatest, rows, step, token,
        *shape, unit, tail, seed, SPLITS=splits, WIDE=wide, SCAN=scan, **launch_options(DRAW_WARPS),
    )  # fmt: skip
    return token


@triton.jit
def _survey(logits, top, total, vocabulary, span, scale, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Per split: the maximum and the sum of exp((x - maximum) * scale), which is nan where a logit is nan or +inf."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum((split + 1) * span, vocabulary)
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(split * span, end, BLOCK):
        x = _load(logits + row * vocabulary, first + tl.arange(0, BLOCK), end)
        new = tl.maximum(peak, x)
        sums = sums * tl.exp((peak - new) * scale) + tl.exp((x - new) * scale)
        peak = new
    highest = tl.max(peak, 0)
    tl.store(top + row * SPLITS + split, highest)
    tl.store(total + row * SPLITS + split, tl.sum(sums * tl.exp((peak - highest) * scale), 0))


@triton.jit
def _weigh(
    logits,
    top,
    total,
    bracket,
    pivot,
    mass,
    vocabulary,
    span,
    scale,
    unit,
    tail: tl.int64,
    spread,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Of each split: the mass at or above each pivot. A row's first program stores its bracket and pivots: computed
    again, in another kernel, they could be rounded differently.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak, sums = _row_of(top, total, row, scale, SPLITS)
    low, high = -INFINITY, INFINITY
    at = row * ROUNDS + ROUND
    if ROUND > 0:
        low, high = _narrow(bracket, pivot, mass, at - 1, tail, SPLITS)
    pivots = _pivots(low, high, peak, sums, scale, spread)
    if split == 0:
        tl.store(bracket + at * 2, low)
        tl.store(bracket + at * 2 + 1, high)
        tl.store(pivot + at * PIVOTS + tl.arange(0, PIVOTS), pivots)
    end = tl.minimum((split + 1) * span, vocabulary)
    masses = tl.zeros([PIVOTS, BLOCK], tl.int64)
    for first in range(split * span, end, BLOCK):
        x = _load(logits + row * vocabulary, first + tl.arange(0, BLOCK), end)
        weight = _weight(x, peak, scale, unit)
        masses += tl.where(x[None, :] >= pivots[:, None], weight[None, :], 0)
    tl.store(mass + (at * SPLITS + split) * PIVOTS + tl.arange(0, PIVOTS), tl.sum(masses, 1))


@triton.jit
def _gather(
    logits,
    top,
    total,
    bracket,
    pivot,
    mass,
    gathered,
    count,
    above,
    least,
    greatest,
    vocabulary,
    span,
    scale,
    unit,
    tail: tl.int64,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per split: its logits inside the bracket, in token order, their number and extremes; the mass above it."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak, _ = _row_of(top, total, row, scale, SPLITS)
    low, high = _narrow(bracket, pivot, mass, row * ROUNDS + ROUNDS - 1, tail, SPLITS)
    end = tl.minimum((split + 1) * span, vocabulary)
    to = gathered + (row * SPLITS + split) * span
    found = 0
    over = tl.zeros([BLOCK], tl.int64)
    smallest = tl.full([BLOCK], INFINITY, tl.float32)
    largest = tl.full([BLOCK], -INFINITY, tl.float32)
    for first in range(split * span, end, BLOCK):
        x = _load(logits + row * vocabulary, first + tl.arange(0, BLOCK), end)
        weight = _weight(x, peak, scale, unit)
        inside = (x >= low) & (x < high) & (weight > 0)  # a token without weight is never drawn
        place = found + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(to + place, x.to(gathered.dtype.element_ty), inside)
        found += tl.sum(inside.to(tl.int32), 0)
        over += tl.where(x >= high, weight, 0)
        smallest = tl.minimum(smallest, tl.where(inside, x, INFINITY))
        largest = tl.maximum(largest, tl.where(inside, x, -INFINITY))
    at = row * SPLITS + split
    tl.store(count + at, found)
    tl.store(above + at, tl.sum(over, 0))
    tl.store(least + at, tl.min(smallest, 0))
    tl.store(greatest + at, tl.max(largest, 0))


@triton.jit
def _draw(
    logits,
    top,
    total,
    mass,
    gathered,
    count,
    above,
    least,
    greatest,
    rows,
    step,
    token,
    vocabulary,
    span,
    scale,
    unit,
    tail: tl.int64,
    seed: tl.int64,
    SPLITS: tl.constexpr,
    WIDE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Finds the least logit of the nucleus and each split's mass in it, then the token at the random number."""
    row = tl.program_id(0).to(tl.int64)
    peak, sums = _row_of(top, total, row, scale, SPLITS)
    sound = (sums > 0) & (sums < INFINITY)
    split = tl.arange(0, SPLITS)
    at = row * SPLITS + split
    counts, over = tl.load(count + at), tl.load(above + at)
    longest = tl.max(counts, 0)
    last = (row * ROUNDS + ROUNDS - 1) * SPLITS + split
    target = _target(tl.sum(tl.load(mass + last * PIVOTS + PIVOTS - 1), 0), tail)
    near = gathered + (at * span)[:, None]
    column = tl.arange(0, WIDE)[None, :]

    # The threshold is one of the gathered logits from low to high. Halve the distance; then move the end that stays
    # behind to the next logit there is, so a step always excludes one, and equal logits end the search at once.
    low, high = tl.min(tl.load(least + at), 0), tl.max(tl.load(greatest + at), 0)
    high = tl.where(sound, high, low)
    over_all = tl.sum(over, 0)
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where((middle > low) & (middle <= high), middle, high)
        reached = tl.zeros([SPLITS, WIDE], tl.int64)
        up = tl.full([SPLITS, WIDE], INFINITY, tl.float32)
        down = tl.full([SPLITS, WIDE], -INFINITY, tl.float32)
        for first in range(0, longest, WIDE):
            inside = first + column < counts[:, None]
            x = tl.load(near + first + column, inside, -INFINITY).to(tl.float32)
            upper = x >= middle
            reached += tl.where(upper, _weight(x, peak, scale, unit), 0)
            up = tl.minimum(up, tl.where(upper, x, INFINITY))
            down = tl.maximum(down, tl.where(upper, -INFINITY, x))
        if over_all + tl.sum(tl.sum(reached, 1), 0) >= target:
            low = tl.min(tl.min(up, 1), 0)
        else:
            high = tl.max(tl.max(down, 1), 0)

    # Nothing gathered: everything is kept, and -inf has no weight. Of the tokens at the threshold, as many are kept
    # as it takes to reach the target.
    threshold = tl.where(longest > 0, low, -INFINITY)
    beyond = tl.zeros([SPLITS, WIDE], tl.int64)
    equal = tl.zeros([SPLITS, WIDE], tl.int32)
    for first in range(0, longest, WIDE):
        inside = first + column < counts[:, None]
        x = tl.load(near + first + column, inside, -INFINITY).to(tl.float32)
        beyond += tl.where(x > threshold, _weight(x, peak, scale, unit), 0)
        equal += (x == threshold).to(tl.int32)
    over += tl.sum(beyond, 1)
    ties = tl.where(counts > 0, tl.sum(equal, 1), 0).to(tl.int64)
    weight = tl.maximum(_weight(threshold, peak, scale, unit), 1)
    wanted = tl.where(longest > 0, (target - tl.sum(over, 0) + weight - 1) // weight, 0)
    kept_ties = tl.minimum(tl.maximum(wanted - (tl.cumsum(ties, 0) - ties), 0), ties)
    kept = over + kept_ties * weight

    point = _fraction(seed, tl.load(rows + row), tl.load(step + row), tl.sum(kept, 0))
    chosen = tl.sum((tl.cumsum(kept, 0) <= point).to(tl.int32), 0)
    done = tl.sum(tl.where(split < chosen, kept, 0), 0)
    ties_left = tl.sum(tl.where(split == chosen, kept_ties, 0), 0)
    drawn = tl.full([], 0x7FFFFFFF, tl.int32)
    end = tl.minimum((chosen + 1) * span, vocabulary)
    for first in range(chosen * span, end, SCAN):
        place = first + tl.arange(0, SCAN)
        x = _load(logits + row * vocabulary, place, end)
        tie = (x == threshold).to(tl.int64)
        keep = (x > threshold) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties_left))
        part = tl.where(keep, _weight(x, peak, scale, unit), 0)
        passed = done + tl.cumsum(part, 0) > point
        drawn = tl.minimum(drawn, tl.min(tl.where(passed, place, 0x7FFFFFFF), 0))
        done += tl.sum(part, 0)
        ties_left -= tl.sum(tie, 0)
    tl.store(token + row, tl.where(sound, drawn, -1).to(tl.int64))


@triton.jit
def _load(row, place, end):
    return tl.load(row + place, place < end, float("-inf")).to(tl.float32)


@triton.jit
def _weight(x, peak, scale, unit):
    """Fixed-point weight of logits, at most `unit`: the same in every kernel, as nothing here can be fused."""
    return (tl.exp((x - peak) * scale) * unit).to(tl.int64)


@triton.jit
def _row_of(top, total, row, scale, SPLITS: tl.constexpr):
    """A row's maximum and its sum of exp((x - maximum) * scale), from its splits'."""
    at = row * SPLITS + tl.arange(0, SPLITS)
    tops = tl.load(top + at)
    peak = tl.max(tops, 0)
    return peak, tl.sum(tl.load(total + at) * tl.exp((tops - peak) * scale), 0)


@triton.jit
def _target(everything, tail):
    """Mass the nucleus must reach, ceil(everything * top_p), from tail = (1 - top_p) * 2^63."""
    return everything - tl.umulhi(everything << 1, tail)


@triton.jit
def _pivots(low, high, peak, sums, scale, spread):
    """Descending logits that cut a bracket into PIVOTS intervals, -inf the last.

    V tokens as light as (1 - top_p) / V of the whole cannot hold 1 - top_p of it, so the nucleus ends above those.
    Where rounding makes that false the search is only longer.
    """
    index = tl.arange(0, PIVOTS)
    upper = tl.minimum(high, peak)
    lower = tl.maximum(low, peak - tl.maximum(tl.log(spread / sums), 0.0) / scale)
    pivots = upper - (upper - lower) * ((index + 1).to(tl.float32) / PIVOTS)
    return tl.where(index < PIVOTS - 1, pivots, -INFINITY)


@triton.jit
def _narrow(bracket, pivot, mass, at, tail, SPLITS: tl.constexpr):
    """The interval [low, high) of a round's pivots where the mass crosses the target; [-inf, -inf) if all is kept."""
    low, high = tl.load(bracket + at * 2), tl.load(bracket + at * 2 + 1)
    index = tl.arange(0, PIVOTS)
    pivots = tl.load(pivot + at * PIVOTS + index)
    at = (at * SPLITS + tl.arange(0, SPLITS))[:, None] * PIVOTS + index[None, :]
    masses = tl.sum(tl.load(mass + at), 0)
    everything = tl.max(masses, 0)
    target = _target(everything, tail)
    crossing = tl.sum((masses < target).to(tl.int32), 0)
    low = tl.maximum(low, tl.max(tl.where(index == crossing, pivots, -INFINITY), 0))
    high = tl.minimum(high, tl.min(tl.where(index == crossing - 1, pivots, INFINITY), 0))
    whole = target == everything
    return tl.where(whole, -INFINITY, low), tl.where(whole, -INFINITY, high)


@triton.jit
def _fraction(seed, row, step, whole):
    """floor(u * whole), u the 53 random bits of (seed, row, step) over 2^53, whole below 2^62."""
    c0, c1 = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32 & 0xFFFFFFFF).to(tl.uint32)
    c2, c3 = (step & 0xFFFFFFFF).to(tl.uint32), (step >> 32 & 0xFFFFFFFF).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, c0, c1, c2, c3)
    bits = ((first >> 5).to(tl.int64) << 26) + (second >> 6).to(tl.int64)
    return tl.umulhi(bits << 10, whole << 1)


def shipped(arch: int) -> Iterator[Shipped]:
    """Five launches a dtype that the head's matmul gives, whatever the chip."""
    f32, i64 = "*fp32", "*i64"
    row = {"top": f32, "total": f32}
    shape = {"vocabulary": "i32", "span": "i32", "scale": "fp32"}
    exact = {"unit": "fp32", "tail": "i64"}
    blocks = {"SPLITS": SPLITS, "BLOCK": BLOCK}
    for dtype in ("bf16", "fp16"):
        logits, gathered = {"logits": f"*{dtype}"}, {"gathered": f"*{dtype}"}
        near = {**gathered, "count": "*i32", "above": i64, "least": f32, "greatest": f32}
        masses = {"bracket": f32, "pivot": f32, "mass": i64}
        weigh = {**logits, **row, **masses, **shape, **exact, "spread": "fp32"}
        gather = {**logits, **row, **masses, **near, **shape, **exact}
        ids = {"rows": i64, "step": i64, "token": i64}
        draw = {**logits, **row, "mass": i64, **near, **ids, **shape, **exact, "seed": "i64"}
        aligned = ("vocabulary", "span")
        yield Shipped(f"survey {dtype}", _survey, {**logits, **row, **shape}, blocks, WARPS, aligned=aligned)
        for i in range(ROUNDS.value):
            yield Shipped(f"weigh {i} {dtype}", _weigh, weigh, {**blocks, "ROUND": i}, WARPS, aligned=aligned)
        yield Shipped(f"gather {dtype}", _gather, gather, blocks, WARPS, aligned=aligned)
        constants = {"SPLITS": SPLITS, "WIDE": WIDE, "SCAN": SCAN}
        yield Shipped(f"draw {dtype}", _draw, draw, constants, DRAW_WARPS, aligned=aligned)


def cost(n: int, vocabulary: int, itemsize: int = 2) -> Cost:
    """The logits are read by survey, weigh (twice) and gather, and one split of them by the draw: all but the first
    from the L2 where they fit in it. Operations a token: 10, 8 + 6 * 8 twice, 20.
    """
    reads = 2 + ROUNDS.value + 1 / SPLITS
    flops = n * vocabulary * (30 + ROUNDS.value * (8 + 6 * PIVOTS.value))
    return Cost(flops, int(n * vocabulary * itemsize * reads) + n * SPLITS * (40 + ROUNDS.value * 16 * PIVOTS.value))
