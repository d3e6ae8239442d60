"""Golden runs: a few fixed tiny runs, and whether they still leave the same bytes.

    python -m tests.golden              # run, and compare with tests/golden/files
    python -m tests.golden --write      # run, and make these files anew: for a change that should change numbers

    birds     the drawn birds with all terms, 6 steps, in one process
    resumed   the same run stopped after step 3 and resumed, which is compared with `birds`, too, on any machine
    ranks     3 steps by two processes under torchrun

Compared are metrics.jsonl without times, final.json, and the SHA-256 of the encoder's weights. Rounding depends on the
processor and on versions: where either is not the golden files', nothing is compared with them, and that is said.
Every run has one thread a process and a fixed plan of its memory. Exit code 0: all equal; 1: something differs; 3:
nothing differs, but some run was compared with no golden file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..saga_fast import small
from . import compare

EQUAL, DIFFERENT, NOT_COMPARED = 0, 1, 3
STOP = 3  # the step after which `resumed` goes on

# What a run does must not depend on how much memory is free: the plan is given.
PLAN = (
    *("--rollout.slots", "8", "--rollout.token-budget", "4096"),
    *("--rollout.recompute", "none", "--rollout.prefix-recompute", "none"),
)
TINY = (
    *("--data.species", "32", "--data.images-per-species", "6"),
    *("--data.classes-per-batch", "8", "--data.images-per-class", "4"),
    *("--rollout.pairs", "4", "--rollout.pairs-per-batch", "16", "--rollout.max-batches", "2"),
    *("--log.checkpoint-every", str(STOP)),
)


def command(out: Path, steps: int, processes: int = 1, resume: bool = False) -> list[str]:
    """What trains the run in the folder `out`."""
    flags = ["--resume"] if resume else [*TINY, *PLAN, "--optim.steps", str(steps)]
    return small.command("-m", "saga_fast.train", "drawn-birds", *flags, "--out", str(out), processes=processes)


def execute(arguments: list[str], log: Path) -> None:
    """Raises SystemExit, with the end of what it said, where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as said:
        done = subprocess.run(arguments, stdout=said, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {done.returncode}\n{log.read_text()[-2000:]}")


def train_all(folder: Path, run: Callable[[list[str], Path], None] = execute) -> dict[str, compare.Left]:
    """Trains every run in `folder`, and says what each left, by name."""
    birds, resumed, ranks = (folder / name for name in ("birds", "resumed", "ranks"))
    run(command(birds, 6), folder / "birds.log")
    small.broken_off(birds, resumed, STOP)
    run(command(resumed, 6, resume=True), folder / "resumed.log")
    run(command(ranks, 3, processes=2), folder / "ranks.log")
    return {path.name: compare.read(path) for path in (birds, resumed, ranks)}


def check(left: dict[str, compare.Left], files: Path = compare.FILES) -> int:
    """Prints what is equal, what differs and what was not compared; the exit code."""
    now = compare.environment()
    outcomes = [compare.against_run("resumed", left["resumed"], "birds", left["birds"])]
    outcomes += [compare.against_golden(name, left[name], now, files) for name in ("birds", "ranks")]
    for outcome in outcomes:
        print(outcome.line)
        for difference in outcome.differences:
            print(f"    {difference}")
    if any(outcome.differences for outcome in outcomes):
        return DIFFERENT
    return EQUAL if all(outcome.compared for outcome in outcomes) else NOT_COMPARED


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="make the golden files anew")
    parser.add_argument("--keep", type=Path, help="new folder to leave the runs in; default a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=options.keep is None)
        left = train_all(folder)
    if not options.write:
        return check(left)
    outcome = compare.against_run("resumed", left["resumed"], "birds", left["birds"])
    print(outcome.line, *outcome.differences, sep="\n    ")
    if outcome.differences:
        print("nothing is written: golden files of a run that does not resume to the same bytes are of no use")
        return DIFFERENT
    for name in ("birds", "ranks"):
        compare.write(name, left[name], compare.environment())
        print(f"{name}: {len(left[name].metrics)} steps written to {compare.FILES / name}.json")
    return EQUAL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
