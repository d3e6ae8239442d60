"""Rollouts beside transformers' `generate`, from the same weights, for the same pairs and completion lengths.

    python -m bench.rollout [--shape record|small] [--repeats 3] [--models DIR] [--json FILE] [--plot FILE.svg]

Both sides: fp32, dense weights, G completions for each of 8 pairs at temperature 0.7 and top-p 0.95, images encoded
beforehand (`generate` finds them where its vision tower was). `generate` (SDPA) is tried pair by pair
(`num_return_sequences=G`) and with all rows in one call, with a dynamic and with a static cache, and the fastest goes
on; one that takes longer than the fastest before it is broken off. Before any timing greedy completions must be equal,
token for token. Tokens a second count what is kept of each completion.

Then the ops at the vocabulary of Qwen3-VL: `sample_top_p` beside transformers' own top-p, `token_logprob` beside a
log-softmax of whole logits, and the share that sampling has in a decode step. Each measurement is a process of its own;
with `--json FILE` each is kept in FILE's .jsonl beside it, and an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, TopPLogitsWarper

from bench import write_json, write_plot
from bench.bars import bars
from bench.record import (
    SHAPES,
    EndingAt,
    Log,
    Shape,
    child,
    child_within,
    encoded_before,
    ending_at,
    model,
    pixel_stand_ins,
    supervisor,
)
from saga_fast.supervisor.rollout import RolloutEngine, Sampling
from saga_fast.utils.errors import exit_on_input_error
from saga_kernels import sample_top_p, token_logprob

GOAL, SHARE = 4.0, 0.1  # times the tokens a second of `generate`; sampling's part of a decode step
VOCABULARY = 151_936
TEMPERATURE, TOP_P = 0.7, 0.95
# Pairs a call, and the cache; what has been the fastest comes first, so that the others are soon broken off.
RIVALS = {
    f"generate, {calls}, {cache} cache": (calls, cache)
    for calls in ("all rows", "pair by pair")
    for cache in ("static", "dynamic")
}


def ours(folder: str, shape_name: str, mean: int) -> Callable[[], dict[str, float]]:
    """The work of our rollouts."""
    shape = SHAPES[shape_name]
    lengths = shape.lengths(mean)
    encoder, judge = supervisor(shape, Path(folder), max(map(max, lengths)))
    judge.slots = shape.pairs
    with torch.no_grad():
        features = encoder.tower(shape.pixels())

    def work() -> dict[str, float]:
        started = time.perf_counter()
        with ending_at(lengths, judge.eos_token_ids[0]):
            completions = judge.rollout(features, torch.arange(shape.pairs))
        seconds = time.perf_counter() - started
        assert [list(map(len, group)) for group in completions] == lengths
        return {"tokens_per_second": sum(map(sum, lengths)) / seconds}

    return work


def theirs(folder: str, shape_name: str, mean: int, calls: str, cache: str) -> Callable[[], dict[str, float]]:
    """The work of `generate`."""
    shape = SHAPES[shape_name]
    lengths = shape.lengths(mean)
    encoder, judge = supervisor(shape, Path(folder), 1)
    rival = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        features = encoder.tower(shape.pixels())
    prefix, eos = judge.prefix.input_ids, judge.eos_token_ids[0]
    del encoder, judge
    settings = dict(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, cache_implementation=cache)
    at_once = shape.pairs if calls == "all rows" else 1

    def work() -> dict[str, float]:
        started = time.perf_counter()
        for first in range(0, shape.pairs, at_once):
            pairs = range(first, first + at_once)
            rows = [count for i in pairs for count in lengths[i]]
            inputs = generate_inputs(prefix, shape.grid, pairs, shape.group, rival.config.image_token_id)
            ending = [EndingAt(rows, eos)]
            with encoded_before(rival, features):
                out = rival.generate(**inputs, **settings, max_new_tokens=max(rows), logits_processor=ending)
            assert [(row == eos).nonzero()[0].item() + 1 for row in out[:, len(prefix) :]] == rows
        return {"tokens_per_second": sum(map(sum, lengths)) / (time.perf_counter() - started)}

    return work


def generate_inputs(
    prefix: Tensor, grid: tuple[int, int], pairs: range, group: int, image_token: int
) -> dict[str, Any]:
    """What `generate` wants for G rollouts of each of `pairs`, inside `encoded_before`. Several pairs' images it cannot
    multiply itself."""
    rows = [i for i in pairs for _ in range(group if len(pairs) > 1 else 1)]
    input_ids = prefix.repeat(len(rows), 1)
    return dict(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        mm_token_type_ids=(input_ids == image_token).int(),
        **pixel_stand_ins([2 * i + side for i in rows for side in (0, 1)], grid),
        num_return_sequences=group if len(pairs) == 1 else 1,
    )


def greedy(folder: str, shape_name: str, tokens: int) -> Callable[[], dict[str, Any]]:
    """Whether both sides say the same, token for token, of every pair, where nothing is drawn."""
    shape = SHAPES[shape_name]
    encoder, judge = supervisor(shape, Path(folder), 1)
    rival = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    prefix, eos, image_token = judge.prefix.input_ids, judge.eos_token_ids, rival.config.image_token_id

    @torch.no_grad()
    def work() -> dict[str, Any]:
        features = encoder.tower(shape.pixels())
        sampling = Sampling(1, temperature=0.0, max_new_tokens=tokens)
        found = RolloutEngine(judge.prefix_cache, sampling, eos, shape.pairs).run(features, torch.arange(shape.pairs))
        inputs = generate_inputs(prefix, shape.grid, range(shape.pairs), 1, image_token)
        with encoded_before(rival, features):
            out = rival.generate(**inputs, do_sample=False, max_new_tokens=tokens)[:, len(prefix) :].tolist()
        ends = [row.index(eos[0]) + 1 if eos[0] in row else tokens for row in out]
        return {
            "equal": [completion for (completion,) in found] == [row[:end] for row, end in zip(out, ends)],
            "tokens": sum(ends),
            "different_pairs": len({tuple(row) for row in out}),
        }

    return work


def ops(rows: int, width: int, repeats: int) -> Callable[[], dict[str, float]]:
    """Median seconds of sampling and of log π at the real vocabulary, and of the code that they replace."""
    generator = torch.Generator().manual_seed(0)
    # A few likely tokens and a long tail, as a language model's.
    rank = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(rows)])
    logits = 25 - 1.5 * (1 + rank).float().log()
    h, head = torch.randn(rows, width, generator=generator), torch.randn(VOCABULARY, width, generator=generator)
    targets, coefficients = torch.randint(VOCABULARY, (rows,), generator=generator), torch.ones(rows)
    ids, warp = torch.arange(rows), TopPLogitsWarper(TOP_P)

    def log_softmax() -> None:
        leaf = h.clone().requires_grad_()
        (leaf @ head.T / TEMPERATURE).log_softmax(-1).gather(1, targets[:, None]).sum().backward()

    timed: dict[str, Callable[[], Any]] = {
        "sample_top_p": lambda: sample_top_p(logits, TEMPERATURE, TOP_P, 0, ids, 0),
        "transformers_top_p": lambda: warp(ids[:, None], logits / TEMPERATURE).softmax(-1).multinomial(1),
        "token_logprob": lambda: token_logprob(h, head, targets, coefficients, TEMPERATURE),
        "log_softmax": log_softmax,
    }

    def work() -> dict[str, float]:
        spent: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(1 + repeats):
            for name, op in timed.items():
                started = time.perf_counter()
                op()
                spent[name].append(time.perf_counter() - started)
        return {name: median(seconds[1:]) for name, seconds in spent.items()}  # the first is to warm up

    return work


def share(folder: str, settings: dict[str, Any], syncs: int) -> Callable[[], dict[str, float]]:
    """Seconds of a decode step of all rows, and of the sampling in it."""
    shape = Shape(**settings)
    encoder, judge = supervisor(shape, model(shape, Path(folder)), 1024)
    judge.slots = shape.pairs
    spent = 0.0
    sample = judge.engine._sample

    def timed(*arguments: Tensor) -> Tensor:
        nonlocal spent
        started = time.perf_counter()
        token = sample(*arguments)
        spent += time.perf_counter() - started
        return token

    judge.engine._sample = timed
    with torch.no_grad():
        judge.engine.admit(encoder.tower(shape.pixels()), range(shape.pairs))

    def work() -> dict[str, float]:
        nonlocal spent
        spent, started = 0.0, time.perf_counter()
        for _ in range(syncs):
            judge.engine.advance()
        steps = 16 * syncs
        return {"step": (time.perf_counter() - started) / steps, "sampling": spent / steps}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="record")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="by default all of them")
    parser.add_argument("--models", type=Path, help="keeps the random models; a temporary folder unless given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with exit_on_input_error(), tempfile.TemporaryDirectory() as scratch:
        shape, models = SHAPES[options.shape], options.models or Path(scratch)
        folder = model(shape, models / options.shape)
        log = Log(options.json and options.json.with_suffix(".jsonl"))

        def measured(side: str, repeat: int, limit: float | None = None) -> dict[str, Any] | None:
            """The figures; None, of `generate`, if its work was not done after `limit` seconds."""

            def run() -> dict[str, Any]:
                function = "ours" if side == "ours" else "theirs"
                work = f"bench.rollout:{function}", str(folder), options.shape, shape.short, *RIVALS.get(side, ())
                return child_within(limit, *work)

            figures = log.once({"shape": options.shape, "side": side, "repeat": repeat}, run)
            if "broken_off_after" in figures:
                print(f"{side:>34} {repeat}: slower than {figures['broken_off_after']:.0f} seconds", flush=True)
                return None
            print(f"{side:>34} {repeat}: {figures['tokens_per_second']:7.1f} tokens/s", flush=True)
            return figures

        equal = log.once(
            {"shape": options.shape, "check": True},
            lambda: child("bench.rollout:greedy", str(folder), options.shape, 48),
        )
        assert equal["equal"] and equal["different_pairs"] > 1, f"ours and generate differ: {equal}"
        print(f"equal: {equal['tokens']} greedy tokens of {shape.pairs} pairs")
        found = {"ours": [measured("ours", 0)]}
        limit = None
        for side in options.rivals:
            if figures := measured(side, 0, limit):
                found[side], limit = [figures], min(figures["seconds"], limit or math.inf)
        fastest = max(found.keys() - {"ours"}, key=lambda side: found[side][0]["tokens_per_second"])
        for repeat in range(1, options.repeats):
            for side in ("ours", fastest):
                found[side].append(measured(side, repeat))
        at_vocabulary = {
            f"{rows} rows": log.once(
                {"ops": rows, "width": shape.width},
                lambda: child("bench.rollout:ops", rows, shape.width, options.repeats),  # noqa: B023
            )
            for rows in (shape.group, shape.pairs * shape.group)
        }
        wide = asdict(replace(shape, vocabulary=VOCABULARY))
        step = log.once({"step": wide}, lambda: child("bench.rollout:share", str(models / "wide"), wide, 2))
        report(options.json, options.plot, options.shape, found, fastest, equal, at_vocabulary, step, log.environment)


def report(
    path: Path | None,
    plot: Path | None,
    shape_name: str,
    found: dict[str, list[dict[str, Any]]],
    fastest: str,
    equal: dict[str, Any],
    at_vocabulary: dict[str, dict[str, Any]],
    step: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """The tables, and everything in JSON. Ratios are ours over the fastest `generate`, of medians."""
    names = ("tokens_per_second", "seconds", "cpu_seconds", "peak_bytes", "growth_bytes")
    medians = {side: {name: median(run[name] for run in runs) for name in names} for side, runs in found.items()}
    print(f"\n{'':>34} {'tokens/s':>9} {'seconds':>9} {'peak':>8} {'growth':>8}")
    for side, figures in medians.items():
        memory = " ".join(f"{figures[name] / 2**30:5.2f} GB" for name in names[3:])
        print(f"{side:>34} {figures['tokens_per_second']:9.1f} {figures['seconds']:9.1f} {memory}")
    print(f"\nat a vocabulary of {VOCABULARY:,}, ms")
    for rows, figures in at_vocabulary.items():
        timed = (f"{name} {1e3 * figures[name]:.1f}" for name in figures if not name.endswith(("seconds", "bytes")))
        print(f"{rows:>10}: " + ", ".join(timed))
    ratios = {
        "rollout": medians["ours"]["tokens_per_second"] / medians[fastest]["tokens_per_second"],
        "rollout_peak_bytes": medians[fastest]["peak_bytes"] / medians["ours"]["peak_bytes"],
        "sampling_share_of_step": step["sampling"] / step["step"],
    }
    part = f"{100 * ratios['sampling_share_of_step']:.1f} % of a step of {1e3 * step['step']:.0f} ms"
    print(f"ours over {fastest}: {ratios['rollout']:.2f} (goal {GOAL:g}); sampling: {part} (goal {100 * SHARE:g})")
    figures = {
        "shape": {"name": shape_name, **asdict(SHAPES[shape_name])},
        "environment": environment,
        "equal": equal,
        "fastest": fastest,
        "slower, or not tried": sorted(RIVALS.keys() - medians.keys()),
        "medians": medians,
        "measurements": found,
        "at_vocabulary": at_vocabulary,
        "step_at_vocabulary": step,
        "ratios": ratios,
        "goals": {"rollout": GOAL, "sampling_share_of_step": SHARE},
    }
    write_json(path, figures)
    panels = {
        "tokens a second": {side: figures["tokens_per_second"] for side, figures in medians.items()},
        "MB beyond the weights": {side: figures["growth_bytes"] / 1e6 for side, figures in medians.items()},
    }
    write_plot(plot, bars(f"Rollouts, {shape_name}", panels))


if __name__ == "__main__":
    main()
