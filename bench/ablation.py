"""The ablation of the paper on the drawn birds: frozen, metric loss only, + L_KL, + L_GRPO, all three.

    python -m bench.ablation [--seeds 3] [--jobs 2] [--out runs/ablation] [--json FILE] [-- TRAIN FLAGS]

Every row takes the same number of optimizer steps over the same micro-batches; the seed draws the pooler, the proxies,
the batches and the rollouts. Rows differ in the weights λ of the loss terms and in nothing else. Each run is a process
of its own; finished runs are kept, unfinished ones resumed, so the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import write_json

ROWS = {
    "DML only": (1, 0, 0),
    "+ KL": (1, 0, 1),
    "+ GRPO": (1, 1, 0),
    "all": (1, 1, 1),
}
METRICS = {"R@1": "recall_at_1", "R@4": "recall_at_4", "MAP@R": "map_at_r", "NMI": "nmi"}


def run(row: str, seed: int, out: Path, threads: int, flags: list[str]) -> dict:
    """final.json of one run, which is trained, resumed or read, whichever is left to do."""
    folder = out / f"{row.replace(' ', '').lower()}-seed{seed}"
    if not (folder / "final.json").exists():
        dml, lm, kl = ROWS[row]
        command = [sys.executable, "-m", "saga_fast.train", "drawn-birds", "--out", str(folder)]
        if (folder / "config.json").exists():
            command.append("--resume")
        else:
            # The preset's own λ holds where a row has the term.
            off = [("dml", dml), ("lm", lm), ("kl", kl)]
            command += [flag for name, on in off if not on for flag in (f"--lambda.{name}", "0")]
            command += ["--seed", str(seed), *flags]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / f"{folder.name}.log", "w") as log:
            subprocess.run(
                command, stdout=log, stderr=log, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
    return json.loads((folder / "final.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="further flags of saga_fast.train, the same for every row")
    options = parser.parse_args()

    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    tasks = [(row, seed) for seed in range(options.seeds) for row in ROWS]
    with ThreadPoolExecutor(options.jobs) as pool:
        finals = dict(zip(tasks, pool.map(lambda task: run(*task, options.out, threads, options.flags), tasks)))

    results = {"frozen": [finals["DML only", seed]["before"] for seed in range(options.seeds)]}
    results |= {row: [finals[row, seed]["after"] for seed in range(options.seeds)] for row in ROWS}
    print(f"{'':10}" + "".join(f"{title:>16}" for title in METRICS))
    figures = {}
    for row, runs in results.items():
        figures[row] = {key: [100 * metrics[key] for metrics in runs] for key in METRICS.values()}
        spread = {
            key: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for key, v in figures[row].items()
        }
        print(f"{row:10}" + "".join(f"{spread[key][0]:>10.2f} ±{spread[key][1]:4.2f}" for key in METRICS.values()))
    write_json(options.json, {"seeds": options.seeds, "flags": options.flags, "per_cent": figures})


if __name__ == "__main__":
    main()
