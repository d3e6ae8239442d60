"""One optimizer step beside TRL's GRPOTrainer, from the same weights, on the same pairs and completion lengths.

    python -m bench.step --trl-python PATH [--shape record|small] [--repeats 3] [--models DIR]
        [--json FILE] [--plot FILE.svg]

TRL reads images through torchvision, so it has an environment of its own:

    python -m venv trl && trl/bin/pip install torch torchvision trl

Both sides: fp32, dense weights, 8 pairs that contribute (rewards are given, right and wrong in turn; TRL has no dynamic
sampling, so neither side draws pairs it would drop), sampling at temperature 0.7 and top-p 0.95, language model frozen,
tower trained by AdamW, token-level loss without KL. The metric loss and L_KL, which TRL lacks, are left out of ours.
Both generate for all 64 rows at once and learn one group at a time; TRL is tried with and without gradient
checkpointing, with a static and a dynamic cache, and the fastest one goes on; one that takes longer than the fastest
before it is broken off. Before any timing both must agree, on TRL's own completions, on every log π and on the tower's
gradient. Each measurement is a process of its own, ours and TRL's in turn; with `--json FILE` each is kept in FILE's
.jsonl beside it, and an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench import write_json, write_plot
from bench.bars import bars
from bench.record import SHAPES, Log, child, child_within, ending_at, model, question, supervisor
from saga_fast.encoder import Encoder
from saga_fast.losses.policy import token_coefficients
from saga_fast.supervisor.replay import Group, Plan, ReplayResult
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.utils.errors import InputError, exit_on_input_error
from saga_kernels import group_advantage

GOAL = 5.0  # times as fast as TRL
LOG_PROB, GRADIENT = 1e-3, 1e-3  # nats, and of the gradient's norm: what fp32 may differ by
# Gradient checkpointing or not, and how `generate` holds keys and values.
RIVALS = {"TRL, static cache": (False, "static"), "TRL": (False, None), "TRL, checkpointed": (True, "static")}
MEND = (
    "make it by `python -m venv trl && trl/bin/pip install torch torchvision trl`, and say --trl-python trl/bin/python"
)


def step(folder: str, shape_name: str, mean: int) -> Callable[[], dict[str, float]]:
    """The work of one step of ours: roll out, judge, replay, update."""
    shape = SHAPES[shape_name]
    lengths, pixels = shape.lengths(mean), shape.pixels()
    plan = Plan(max(shape.prefix + sum(group) for group in lengths))  # a group at a time, as TRL's micro-batches
    encoder, judge = supervisor(shape, Path(folder), max(map(max, lengths)))
    judge.plan = plan
    optimizer = torch.optim.AdamW(encoder.tower.parameters(), lr=2e-5)

    def work() -> dict[str, float]:
        started = time.perf_counter()
        with torch.no_grad(), ending_at(lengths, judge.eos_token_ids[0]):
            completions = judge.rollout(encoder.tower(pixels), torch.arange(shape.pairs))
        rolled_out = time.perf_counter()
        judge.judge(completions, [True] * shape.pairs)  # a random model gives no verdict; reading it costs all the same
        advantages, _, _ = group_advantage((torch.arange(shape.group) % 2).float().expand(shape.pairs, -1))
        learn(encoder, judge, pixels, completions, advantages)
        torch.nn.utils.clip_grad_norm_(encoder.tower.parameters(), 1.0)
        optimizer.step()
        assert [list(map(len, group)) for group in completions] == lengths
        return {"rollout": rolled_out - started, "replay": time.perf_counter() - rolled_out}

    return work


def learn(
    encoder: Encoder,
    judge: Supervisor,
    pixels: Tensor,
    completions: Sequence[Sequence[Sequence[int]]],
    advantages: Tensor,
) -> ReplayResult:
    """Adds L_GRPO's gradient to the tower, as phase C of a training step does."""
    features = encoder.tower(pixels)
    leaves = features.detach()
    for leaf in (leaves.tokens, *leaves.deepstack):
        leaf.requires_grad_()
    counts = [list(map(len, group)) for group in completions]
    total = sum(map(sum, counts))
    coefficients = [token_coefficients(a, count, total).split(count) for a, count in zip(advantages, counts)]
    replayed = judge.replay(leaves, [Group(c, weights, {}) for c, weights in zip(completions, coefficients)])
    tensors = [features.tokens, *features.deepstack]
    torch.autograd.backward(tensors, [leaf.grad for leaf in (leaves.tokens, *leaves.deepstack)])
    return replayed


def compare(file: str, folder: str, shape_name: str, pairs: int, mean: int) -> Callable[[], dict[str, Any]]:
    """Ours on what TRL dumped into `file`: largest |Δ log π|, |Δ gradient| / |gradient|, and what must be the same."""
    shape, theirs = SHAPES[shape_name], torch.load(file)
    encoder, judge = supervisor(shape, Path(folder), 1)

    def work() -> dict[str, Any]:
        mask = theirs["completion_mask"].bool()
        rollouts = [ids[kept].tolist() for ids, kept in zip(theirs["completion_ids"], mask)]
        completions = [rollouts[i * shape.group : (i + 1) * shape.group] for i in range(pairs)]
        advantages = theirs["advantages"].unflatten(0, (pairs, -1))
        replayed = learn(encoder, judge, shape.pixels(pairs), completions, advantages)
        log_probs = torch.cat([log_prob for group in replayed.log_probs for log_prob in group])
        ours = {name: p.grad for name, p in encoder.tower.model.named_parameters() if p.grad is not None}
        return {
            "same_prompts": bool((theirs["prompt_ids"] == judge.prefix.input_ids).all()),
            "same_lengths": [list(map(len, group)) for group in completions] == shape.lengths(mean, pairs),
            "same_parameters": ours.keys() == theirs["gradients"].keys(),
            "log_prob": (log_probs - theirs["log_probs"][mask]).abs().max().item(),
            "gradient": _distance(ours, theirs["gradients"]),
        }

    return work


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    shared = ours.keys() & theirs.keys()
    difference = sum((ours[name] - theirs[name]).double().square().sum() for name in shared)
    return (difference / sum(theirs[name].double().square().sum() for name in shared)).sqrt().item()


def check(python: Path, folder: Path, shape_name: str, mean: int, asked: str) -> dict[str, Any]:
    """Both sides on one pair, whole; raises AssertionError where they disagree."""
    work = [str(folder), shape_name, 1, mean]
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/trl.pt"
        child("bench.step_trl:dump", file, *work, asked, python=python)
        found = child("bench.step:compare", file, *work)
    agree = found["same_prompts"] and found["same_lengths"] and found["same_parameters"]
    assert agree and found["log_prob"] < LOG_PROB and found["gradient"] < GRADIENT, f"ours and TRL differ: {found}"
    return found


def expect_trl(python: Path | None) -> Path:
    """Raises InputError unless `python` can import TRL and torchvision."""
    if python is None:
        raise InputError(f"--trl-python: not given; {MEND}")
    try:
        done = subprocess.run([python, "-c", "import trl, torchvision"], capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"--trl-python: {python} does not run ({error.strerror}); {MEND}") from None
    if done.returncode:
        raise InputError(f"--trl-python: {python} lacks TRL ({done.stderr.strip().splitlines()[-1]}); {MEND}")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="record")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS), help="by default all of them")
    parser.add_argument("--models", type=Path, help="keeps the random model; a temporary folder unless given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with exit_on_input_error(), tempfile.TemporaryDirectory() as scratch:
        python = expect_trl(options.trl_python)
        shape = SHAPES[options.shape]
        folder = model(shape, (options.models or Path(scratch)) / options.shape)
        asked = question(shape, AutoTokenizer.from_pretrained(folder)).instruction()
        log = Log(options.json and options.json.with_suffix(".jsonl"))

        def measured(side: str, repeat: int, limit: float | None = None) -> dict[str, Any] | None:
            """The figures; None, of TRL, if its step was not done after `limit` seconds."""

            def run() -> dict[str, Any]:
                work = [str(folder), options.shape]
                if side == "ours":
                    return child("bench.step:step", *work, shape.short)
                work += [shape.pairs, shape.short, asked, *RIVALS[side]]
                return child_within(limit, "bench.step_trl:step", *work, python=python)

            figures = log.once({"shape": options.shape, "side": side, "repeat": repeat}, run)
            if "broken_off_after" in figures:
                print(f"{side:>18} {repeat}: slower than {figures['broken_off_after']:.0f} s", flush=True)
                return None
            print(f"{side:>18} {repeat}: {figures['seconds']:7.1f} s", flush=True)
            return figures

        equal = log.once(
            {"shape": options.shape, "check": True},
            lambda: check(python, folder, options.shape, shape.short, asked),
        )
        print(f"equal: log π to {equal['log_prob']:.1e}, the tower's gradient to {equal['gradient']:.1e} of its norm")
        found, limit = {"ours": [measured("ours", 0)]}, None
        for side in options.rivals:
            if figures := measured(side, 0, limit):
                found[side], limit = [figures], min(figures["seconds"], limit or math.inf)
        fastest = min(found.keys() - {"ours"}, key=lambda side: found[side][0]["seconds"])
        for repeat in range(1, options.repeats):
            for side in ("ours", fastest):
                found[side].append(measured(side, repeat))
        report(options.json, options.plot, options.shape, found, fastest, equal, log.environment)


def report(
    path: Path | None,
    plot: Path | None,
    shape_name: str,
    found: dict[str, list[dict[str, Any]]],
    fastest: str,
    equal: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """The table, and everything in JSON. Ratios are TRL's fastest over ours, of medians."""
    names = ("seconds", "rollout", "replay", "peak_bytes", "growth_bytes")
    medians = {side: {name: median(run[name] for run in runs) for name in names} for side, runs in found.items()}
    print(f"\n{'':>18} {'step':>8} {'rollout':>8} {'replay':>8} {'peak':>8} {'growth':>8}")
    for side, figures in medians.items():
        seconds = " ".join(f"{figures[name]:6.1f} s" for name in names[:3])
        print(f"{side:>18} {seconds} " + " ".join(f"{figures[name] / 2**30:5.2f} GB" for name in names[3:]))
    ratios = {name: medians[fastest][name] / medians["ours"][name] for name in names}
    ratios["step"] = ratios.pop("seconds")
    print(f"TRL over ours: step {ratios['step']:.2f} (goal {GOAL:g}), " + f"peak memory {ratios['peak_bytes']:.2f}")
    figures = {
        "shape": {"name": shape_name, **asdict(SHAPES[shape_name])},
        "environment": environment,
        "slower, or not tried": sorted(RIVALS.keys() - medians.keys()),
        "rival": {"fastest": fastest, **found[fastest][0]["versions"]},
        "equal": equal,
        "medians": medians,
        "measurements": found,
        "ratios": ratios,
        "goals": {"step": GOAL},
    }
    write_json(path, figures)
    panels = {name: {side: row[name] for side, row in medians.items()} for name in ("seconds", "rollout", "replay")}
    panels["MB beyond the weights"] = {side: row["growth_bytes"] / 1e6 for side, row in medians.items()}
    write_plot(plot, bars(f"One step, {shape_name}", panels))


if __name__ == "__main__":
    main()
