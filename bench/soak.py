"""Does a long run leak, or grow slower? A tiny run for thousands of steps, with its memory, open files and pace.

    python -m bench.soak [--steps 2000] [--json FILE]

Every step embeds, rolls a pair out, replays it, updates, and logs; checkpoints are due as often as in a real run. Only
the verdicts are made up, one rollout right and one wrong, as answers are cut after two tokens to make steps cheap.
Memory and open files are read after every step; slopes are least squares over the steps after the first tenth. Wall
clock says little where others use the machine: CPU seconds of this process are given beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench import write_json
from saga_fast.config import parse
from saga_fast.report import samples
from saga_fast.runtime.run import Run
from saga_fast.runtime.signals import Stopped
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.supervisor.verdict import Verdict
from saga_fast.train import train

FLAGS = (
    *("--data.species", "16", "--data.images-per-species", "4", "--data.image-size", "32"),
    *("--data.classes-per-batch", "2", "--data.images-per-class", "2"),
    *("--rollout.pairs", "1", "--rollout.group-size", "2", "--rollout.pairs-per-batch", "2"),
    *("--rollout.max-new-tokens", "2", "--rollout.max-batches", "1", "--lambda.kl", "0"),
    *("--log.checkpoint-every", "50", "--log.evaluate-every", "500"),
)


def soak(steps: int, out: Path) -> dict[str, np.ndarray]:
    """Per step: resident MiB, open files, and clocks in seconds (wall, CPU of this process) at its end."""
    seen: dict[str, list[float]] = {"resident": [], "files": [], "wall": [], "cpu": []}
    record = Run.record
    page = os.sysconf("SC_PAGE_SIZE")

    def watched(self: Run, *step) -> None:
        record(self, *step)
        seen["resident"].append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20)
        seen["files"].append(len(os.listdir("/proc/self/fd")))
        seen["wall"].append(time.perf_counter())
        seen["cpu"].append(time.process_time())

    def one_right_one_wrong(self: Supervisor, completions, same) -> tuple[torch.Tensor, torch.Tensor]:
        rewards = torch.tensor([1.0, 0.0]).expand(len(completions), 2).contiguous()
        return rewards, rewards.bool()

    judge, parse_answer = Supervisor.judge, samples.parse
    Run.record, Supervisor.judge = watched, one_right_one_wrong
    samples.parse = lambda *_: Verdict(same=True, well_formed=True)
    try:
        config = parse(["--out", str(out), *FLAGS, "--optim.steps", str(steps)]).config
        with contextlib.suppress(Stopped):  # SIGTERM or Ctrl-C: report on the steps so far
            train(config, out)
    finally:
        Run.record, Supervisor.judge, samples.parse = record, judge, parse_answer
    return {name: np.array(values) for name, values in seen.items()}


def figures(seen: dict[str, np.ndarray]) -> dict[str, float]:
    steps = len(seen["wall"])
    late = np.arange(steps) >= steps // 10
    end = min(200, steps // 2)
    found: dict[str, float] = {"steps": steps}
    for name in ("resident", "files"):
        values = seen[name]
        slope = np.polyfit(np.arange(steps)[late], values[late], 1)[0]
        found |= {f"{name}_first": values[late][0], f"{name}_last": values[-1], f"{name}_slope_per_1000": 1000 * slope}
    for name in ("wall", "cpu"):
        clock = seen[name]
        # The first step has no start on this clock: intervals between ends.
        found[f"{name}_per_step_first_{end}"] = (clock[end] - clock[0]) / end
        found[f"{name}_per_step_last_{end}"] = (clock[-1] - clock[-1 - end]) / end
    return {name: round(float(value), 5) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=Path("bench/results/soak.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(soak(arguments.steps, Path(folder) / "run"))
    print(f"{'':28}{'first':>12}{'last':>12}{'slope per 1,000 steps':>24}")
    for name, title in (("resident", "resident memory, MiB"), ("files", "open files")):
        first, last, slope = (found[f"{name}_{what}"] for what in ("first", "last", "slope_per_1000"))
        print(f"{title:28}{first:>12.2f}{last:>12.2f}{slope:>+24.2f}")
    end = min(200, found["steps"] // 2)
    for name, title in (("cpu", "CPU ms a step"), ("wall", "wall ms a step")):
        first, last = (1000 * found[f"{name}_per_step_{which}_{end:.0f}"] for which in ("first", "last"))
        print(f"{title:28}{first:>12.2f}{last:>12.2f}{last / first - 1:>+23.1%}")
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()
