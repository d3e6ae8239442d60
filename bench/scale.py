"""How the cost of a step grows: with G, prefix, completion length, pairs, image size and vocabulary, one at a time.

    python -m bench.scale [--repeats 3] [--json FILE] [--plot FILE.svg]
    python -m bench.scale --ranks 1..512 [--json FILE]      # the number of GPUs, on paper: see ranks.py

A small random Qwen3-VL, fp32. For each value a process of its own measures, in the median, the tower (forward and
backward), the prefix (a rollout of one token: prefill and what does not grow with the answer), the rollout and the
replay, and how much memory rollout and replay take. The slope is that of the straight line through log cost over log
value: 0 is flat, 1 is proportional. With `--json FILE` each measurement is kept in FILE's .jsonl beside it, and an
interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch

from bench import write_json, write_plot
from bench.ranks import ranks
from bench.record import SHAPES, Log, Shape, child, ending_at, measure, model, supervisor
from bench.step import learn

BASE = replace(SHAPES["small"], pairs=4, group=8, short=64)
COSTS = {
    "tower": "tower_seconds",
    "prefix": "prefix_seconds",
    "rollout": "rollout_seconds",
    "replay": "replay_seconds",
    "rollout memory": "rollout_bytes",
    "replay memory": "replay_bytes",
}
COLORS = ("#06c", "#093", "#c60", "#c06", "#999", "#555")


def sized(side: int) -> Shape:
    """Images of `side` pixels, whose tokens come on top of the question's."""
    shape = replace(BASE, image_size=side)
    more = shape.grid[0] * shape.grid[1] - BASE.grid[0] * BASE.grid[1]
    return replace(shape, prefix=BASE.prefix + 2 * more)


AXES: dict[str, dict[int, Shape]] = {
    "G": {n: replace(BASE, group=n) for n in (2, 4, 8, 16, 32)},
    "prefix": {n: replace(BASE, prefix=n) for n in (320, 640, 1280, 2560)},
    "completion": {n: replace(BASE, short=n) for n in (32, 64, 128, 256)},
    "pairs": {n: replace(BASE, pairs=n) for n in (2, 4, 8, 16)},
    "image side": {n: sized(n) for n in (64, 128, 256, 384)},
    "vocabulary": {n: replace(BASE, vocabulary=n) for n in (512, 2048, 8192, 32768)},
}


def costs(settings: dict[str, Any], repeats: int) -> Callable[[], dict[str, float]]:
    """The work: every cost of one shape, seconds in the median, memory of the first time."""
    shape = Shape(**settings)
    with tempfile.TemporaryDirectory() as folder:
        encoder, judge = supervisor(shape, model(shape, Path(folder)), 2 * shape.short)
    pixels, ids = shape.pixels(), torch.arange(shape.pairs)
    lengths = shape.lengths(shape.short)
    advantages = torch.tensor([1.0, -1.0]).repeat(shape.pairs, shape.group // 2)
    with torch.no_grad():
        features = encoder.tower(pixels)
    completions: list[list[list[int]]] = []

    def tower() -> None:
        encoder.tower(pixels).tokens.sum().backward()

    def rollout(lengths: list[list[int]]) -> None:
        with torch.no_grad(), ending_at(lengths, judge.eos_token_ids[0]):
            completions[:] = judge.rollout(features, ids)

    def replay() -> None:
        learn(encoder, judge, pixels, completions, advantages)

    work = {
        "prefix": lambda: rollout([[1] * shape.group] * shape.pairs),
        "rollout": lambda: rollout(lengths),
        "replay": replay,
        "tower": tower,
    }

    def measured() -> dict[str, float]:
        figures = {}
        for name, task in work.items():
            found = [measure(task) for _ in range(repeats)]
            figures[f"{name}_seconds"] = median(run["seconds"] for run in found)
            figures[f"{name}_bytes"] = found[0]["growth_bytes"]
        return figures

    return measured


def slope(points: dict[int, dict[str, float]], cost: str) -> float:
    """d log cost / d log value, by least squares."""
    return linear_regression([math.log(x) for x in points], [math.log(found[cost]) for found in points.values()]).slope


def plot(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """An SVG of a panel an axis: seconds over value, both logarithmic, one line a cost."""
    seconds = {name: key for name, key in COSTS.items() if key.endswith("seconds")}
    every = [point[key] for points in found.values() for point in points.values() for key in seconds.values()]
    low, high = math.log(min(every)), math.log(max(every))

    def panel(x: float, y: float, axis: str, points: dict[int, dict[str, float]]) -> Iterator[str]:
        first, last = math.log(min(points)), math.log(max(points))
        yield f'<rect x="{x}" y="{y}" width="200" height="150" fill="none" stroke="#ccc"/>'
        yield f'<text x="{x}" y="{y - 6}">{axis} {min(points)} to {max(points)}</text>'
        for (name, key), color in zip(seconds.items(), COLORS):
            at = [
                (
                    x + 200 * (math.log(value) - first) / (last - first),
                    y + 150 * (high - math.log(point[key])) / (high - low),
                )
                for value, point in points.items()
            ]
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
            yield f'<text x="{x + 203}" y="{at[-1][1] + 4:.1f}" fill="{color}">{name} {slope(points, key):.2f}</text>'

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="430" font-family="sans-serif" font-size="11">'
    ]
    parts.append(
        f'<text x="20" y="16">seconds, {min(every):.2g} to {max(every):.2g}, and slopes; both logarithmic</text>'
    )
    for i, (axis, points) in enumerate(found.items()):
        parts += panel(20 + 300 * (i % 3), 45 + 195 * (i // 3), axis, points)
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--ranks", metavar="FIRST..LAST", help="numbers of GPUs, on paper, and nothing else")
    options = parser.parse_args()
    if options.ranks:
        write_json(options.json, {"rows": ranks(*map(int, options.ranks.split("..")))})
        return
    log = Log(options.json and options.json.with_suffix(".jsonl"))
    found: dict[str, dict[int, dict[str, float]]] = {}
    slopes: dict[str, dict[str, float]] = {}
    print(f"{'slope of':>24} " + " ".join(f"{name:>14}" for name in COSTS))
    for axis, shapes in AXES.items():
        found[axis] = {}
        for value, shape in shapes.items():
            settings = asdict(shape)
            key = {"scale": settings, "repeats": options.repeats}
            found[axis][value] = log.once(key, lambda s=settings: child("bench.scale:costs", s, options.repeats))
        slopes[axis] = {name: slope(found[axis], key) for name, key in COSTS.items()}
        values = f"{axis} {min(shapes)}–{max(shapes)}"
        print(f"{values:>24} " + " ".join(f"{slopes[axis][name]:14.2f}" for name in COSTS), flush=True)
    print(f"cost of the prefix over G: slope {slopes['G']['prefix']:.2f} (flat is 0)")
    ratios = {"prefix_flat_in_g": slopes["G"]["prefix"]}
    write_json(options.json, {"environment": log.environment, "slopes": slopes, "costs": found, "ratios": ratios})
    write_plot(options.plot, plot(found))


if __name__ == "__main__":
    main()
