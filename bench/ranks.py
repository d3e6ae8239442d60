"""A model of scaling: a step of Qwen3-VL-8B on 1 to 512 H100s, with communication and idle time.

    python -m bench.scale --ranks 1..512 [--json FILE]

Nothing here is measured. Times are the floors of `bench.roofline`; the ranks' waiting times come from simulated steps.
Pairs are distributed in turn, begun and dropped as in `supervisor.draw`, with all ranks at the same token, and balanced
before the replay by the code that training uses. Strong scaling keeps the paper's batch and K over all ranks together;
weak scaling has them on every rank.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bench import roofline
from bench.roofline import BANDWIDTH, COMPLETIONS, HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, LENGTH, PREFIX, TENSOR_CORES
from saga_fast.config import Config
from saga_fast.runtime.distributed import balance_loads
from saga_fast.supervisor.rollout import SYNC_EVERY
from saga_fast.supervisor.supervisor import SLOTS

# NVLink 4 carries 450 GB/s each way from every H100 of a host (NVIDIA's data sheet: 900 GB/s both ways together). Hosts
# of eight, each GPU beside a port of 400 Gb/s InfiniBand, as in NVIDIA's DGX H100: rings use all eight ports at once.
NVLINK, INFINIBAND, GPUS_A_HOST = 450e9, 400e9 / 8, 8
HOP_SECONDS = 10e-6  # of a small message, assumed; a tree of ranks is as deep as the logarithm of their number

# The tower as released (27 blocks, four mergers; 196 patches of 224 pixels), the attention pooler, CUB's proxies.
TOWER_WIDTH, TOWER_FFN, TOWER_DEPTH, PATCHES, DEEPSTACK = 1152, 4304, 27, 196, 3
TOWER = TOWER_DEPTH * (4 * TOWER_WIDTH**2 + 2 * TOWER_WIDTH * TOWER_FFN)
TOWER += (1 + DEEPSTACK) * 4 * TOWER_WIDTH * (4 * TOWER_WIDTH + HIDDEN)
TRAINED = TOWER + 2 * HIDDEN**2 + 100 * 15 * HIDDEN

# Assumed of the rollouts: half of the pairs contribute, and lengths spread by so many tokens between and within pairs.
RATE, BETWEEN, WITHIN = 0.5, 100, 100
STEPS = 40  # simulated for each row


class Step(NamedTuple):
    """A step's seconds by phase, the ranks' idle shares of two phases, the bytes a rank sends, and the bytes of visual
    features it holds, those of all images of a micro-batch."""

    embed: float
    roll_out: float
    replay: float
    communicate: float
    update: float
    idle_roll_out: float
    idle_replay: float
    sent: float
    held: float

    @property
    def seconds(self) -> float:
        return self.embed + self.roll_out + self.replay + self.communicate + self.update


@lru_cache(None)
def decode_seconds(pairs: int, rows: int) -> float:
    """Seconds of one token for each of `rows` rollouts of `pairs` pairs: the kernels, and reads of caches at half of
    their final length."""
    kernels = sum(line.calls * line.floor for line in roofline.decode(rows) if line.kernel != "decode_attention")
    cache = 2 * 2 * LAYERS * KV_HEADS * HEAD_DIM * (pairs * PREFIX + rows * LENGTH / 2)
    return kernels + cache / BANDWIDTH


@lru_cache
def replay_seconds(tokens: int) -> float:
    """Seconds of forward and backward of packed tokens; dequantising costs the same for any number of them."""
    lines = list(roofline.replay())
    fixed = sum(line.calls * line.floor for line in lines if "dequantize" in line.kernel)
    kernels = sum(line.calls * line.floor for line in lines) - fixed
    whole = roofline.GROUPS * (PREFIX + COMPLETIONS * LENGTH)
    return fixed + tokens * kernels / whole if tokens else 0.0


def transfer(ranks: int, received: float, calls: int) -> float:
    """Seconds of ring collectives that bring `received` bytes to each rank."""
    bus = NVLINK if ranks <= GPUS_A_HOST else min(NVLINK, GPUS_A_HOST * INFINIBAND)
    return received / bus + calls * HOP_SECONDS * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0


def step(ranks: int, images: int, wanted: int, rng: np.random.Generator) -> Step:
    """One simulated step of `wanted` contributing pairs, drawn from micro-batches of `images`."""
    tower = 6 * TOWER * PATCHES / TENSOR_CORES  # an image, forward and backward
    kept: list[np.ndarray] = []
    micro_batches, syncs, rolled_out, busy, sent = 0, 0, 0.0, 0.0, 0.0
    while len(kept) < wanted:
        micro_batches += 1
        found, seconds, tokens = draw(ranks, Config().rollout.pairs_per_batch * images // 64, wanted - len(kept), rng)
        kept += found
        syncs, rolled_out, busy = syncs + len(seconds), rolled_out + seconds.max(1).sum(), busy + seconds.mean(1).sum()
        sent += 4 * tokens  # pickled
    packed = [PREFIX + int(pair.sum()) for pair in kept]
    shares = balance_loads(packed, ranks)
    loads = [sum(packed[i] for i in share) for share in shares]
    replayed = [replay_seconds(load) + 2 * len(share) * tower for load, share in zip(loads, shares)]

    # All-gathers bring every rank all but its own part, all-reduces (the sums) twice that.
    features = 2 * (1 + DEEPSTACK) * (PATCHES // 4) * HIDDEN  # bf16
    gathered = sent + micro_batches * images * (features + 4 * HIDDEN)
    summed = 4 * TRAINED + micro_batches * images * 4 * HIDDEN
    sent = (gathered + 2 * summed) * (ranks - 1) / ranks
    return Step(
        embed=micro_batches * math.ceil(images / ranks) * tower,
        roll_out=rolled_out,
        replay=max(replayed),
        communicate=transfer(ranks, sent, calls=2 * syncs + 10 * micro_batches + 6),
        update=28 * TRAINED / BANDWIDTH,  # AdamW reads and writes weight and both moments, and reads the gradient
        idle_roll_out=1 - busy / rolled_out,
        idle_replay=1 - sum(loads) / ranks / max(loads),
        sent=sent,
        held=images * features,
    )


def draw(ranks: int, count: int, wanted: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Of `count` pairs the lengths (G,) of the first `wanted` that contribute; each rank's seconds between syncs,
    (syncs, ranks); and the number of tokens that ranks exchange."""
    lengths = rng.normal(LENGTH, BETWEEN, (count, 1)) + rng.normal(0, WITHIN, (count, Config().rollout.group_size))
    lengths = lengths.clip(1, Config().rollout.max_new_tokens).astype(int)
    contributes = rng.random(count) < RATE
    prefill = 2 * roofline.LANGUAGE_MODEL * PREFIX / TENSOR_CORES
    age = np.full(count, -1)  # tokens since a pair was begun
    begun, seconds = 0, []
    while True:
        judged = age >= lengths.max(1)
        useful = np.flatnonzero(judged & contributes)
        last = useful[wanted - 1] if len(useful) >= wanted else count - 1
        going = (age >= 0) & ~judged & (np.arange(count) <= last)
        if not going.any() and begun > last:
            return [lengths[i] for i in useful[:wanted]], np.array(seconds), int(lengths[judged].sum())
        before, in_slots = begun, np.bincount(np.flatnonzero(going) % ranks, minlength=ranks)
        expected = len(useful) + RATE * going.sum()
        while (
            begun <= last
            and in_slots[begun % ranks] < SLOTS
            and (not in_slots[begun % ranks] or expected + RATE <= wanted - 0.5)
        ):
            in_slots[begun % ranks] += 1
            begun, expected = begun + 1, expected + RATE
        age[before:begun], going[before:begun] = 0, True
        owner = np.arange(count) % ranks
        rows = np.bincount(owner, (going[:, None] & (lengths > age[:, None])).sum(1), ranks).astype(int)
        admitted = np.bincount(owner[before:begun], minlength=ranks)
        decode = [decode_seconds(*both) if both[1] else 0.0 for both in zip(in_slots.tolist(), rows.tolist())]
        seconds.append(admitted * prefill + SYNC_EVERY * np.array(decode))
        age[going] += SYNC_EVERY


@lru_cache
def mean_step(ranks: int, images: int, wanted: int) -> Step:
    rng = np.random.default_rng(0)
    return Step(*np.mean([step(ranks, images, wanted, rng) for _ in range(STEPS)], 0).tolist())


COLUMNS = "{:>6} {:>5} {:>8} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>14} {:>12} {:>11}".format
TITLES = ("ranks", "K", "embed s", "roll out s", "replay s", "comm. s", "step s", "sent GB", "held GB")
TITLES += ("idle, roll out", "idle, replay", "efficiency")


def ranks(first: int, last: int) -> list[dict[str, Any]]:
    """Prints and returns a row for each power of two from `first` to `last`, for both ways to grow."""
    images, wanted = Config().data.classes_per_batch * Config().data.images_per_class, Config().rollout.pairs
    alone, rows = mean_step(1, images, wanted).seconds, []
    for way, grows in (("the paper's batch and K on all ranks together", False), ("as much on every rank", True)):
        print(way, COLUMNS(*TITLES), sep="\n")
        for count in (2**power for power in range(last.bit_length()) if 2**power >= first):
            times = count if grows else 1
            mean = mean_step(count, images * times, wanted * times)
            efficiency = alone * times / count / mean.seconds
            row = {"ranks": count, "pairs": wanted * times, "seconds": mean.seconds, "efficiency": efficiency}
            rows.append({**row, **mean._asdict()})
            seconds = [f"{value:.3f}" for value in (*mean[:4], mean.seconds)]
            shares = [f"{value:.1%}" for value in (mean.idle_roll_out, mean.idle_replay, efficiency)]
            gigabytes = [f"{value / 1e9:.2f}" for value in (mean.sent, mean.held)]
            print(COLUMNS(count, wanted * times, *seconds, *gigabytes, *shares))
    return rows
