"""The ablation of the paper on the drawn birds: frozen, metric loss only, + L_KL, + L_GRPO, all three.

    python -m bench.ablation [--seeds 3] [--jobs 2] [--out runs/ablation] [--json FILE] [-- TRAIN FLAGS]

Every row gets the same tuning: each learning rate of GRID is tried once on birds drawn with another seed, species and
pictures both, and the best by Recall@1 is kept. Then every row takes the same number of optimizer steps over the same
micro-batches of the benchmark, once a seed; the seed draws the pooler, the proxies, the batches and the rollouts. Each
run is a process of its own; finished runs are kept, unfinished ones resumed, so the script can be stopped and started
again. Three tables: tuning, retrieval, and what the losses and gradients did.
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
# Few classes, so that the metric loss has something to lose: on 12 species it peaks early and then overfits, on the
# default's 50 it is still rising when the steps that fit in minutes are over.
SIZE = (
    *("--data.train-classes", "12", "--data.classes-per-batch", "8", "--data.images-per-class", "8"),
    *("--rollout.pairs", "4", "--optim.steps", "60"),
)
GRID = {rate: ("--optim.encoder-lr", rate, "--optim.pooler-lr", f"{5 * float(rate):g}") for rate in ("1e-4", "2e-4")}
OTHER_BIRDS = ("--data.seed", "1")
LOGGED = (  # of metrics.jsonl: mean over the first and the last third of the steps that have it
    *("loss_dml", "loss_kl", "reward_same", "reward_different", "pairs_drawn", "pairs_contributing"),
    *("grad_tower_dml", "grad_tower_lm", "cosine_tower_dml_lm", "grad_pooler_dml", "grad_pooler_kl"),
)


def run(row: str, name: str, flags: tuple[str, ...], out: Path, threads: int) -> Path:
    """The folder of one finished run, which is trained, resumed or found, whichever is left to do."""
    folder = out / f"{row.replace(' ', '').lower()}-{name}"
    if not (folder / "final.json").exists():
        command = [sys.executable, "-m", "saga_fast.train", "drawn-birds", "--out", str(folder)]
        if (folder / "config.json").exists():
            command.append("--resume")
        else:
            # The preset's own λ holds where a row has the term.
            off = [
                flag for term, on in zip(("dml", "lm", "kl"), ROWS[row]) if not on for flag in (f"--lambda.{term}", "0")
            ]
            command += [*off, *flags]
        out.mkdir(parents=True, exist_ok=True)
        with open(out / f"{folder.name}.log", "w") as log:
            subprocess.run(
                command, stdout=log, stderr=log, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
    return folder


def final(folder: Path) -> dict:
    return json.loads((folder / "final.json").read_text())


def logged(folder: Path) -> dict[str, tuple[float, float]]:
    """What `LOGGED` was over the first and over the last third of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for key in LOGGED:
        values = [line[key] for line in lines if key in line]
        if third := len(values) // 3:
            found[key] = (statistics.mean(values[:third]), statistics.mean(values[-third:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="further flags of saga_fast.train, the same for every row")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    size = (*SIZE, *options.flags)

    def runs(tasks: dict[tuple, tuple[str, tuple[str, ...]]]) -> dict[tuple, Path]:
        """{(row, …): (name, flags)} → {(row, …): folder}."""
        with ThreadPoolExecutor(options.jobs) as pool:
            folders = pool.map(lambda key: run(key[0], *tasks[key], options.out, threads), tasks)
            return dict(zip(tasks, folders))

    tuning = runs(
        {(row, rate): (f"tuning-{rate}", (*size, *OTHER_BIRDS, *GRID[rate])) for row in ROWS for rate in GRID}
    )
    tuned = {row: {rate: 100 * final(tuning[row, rate])["after"]["recall_at_1"] for rate in GRID} for row in ROWS}
    best = {row: max(tuned[row], key=tuned[row].get) for row in ROWS}
    print(f"tuning, R@1 on other birds\n{'encoder lr':10}" + "".join(f"{rate:>16}" for rate in GRID))
    for row, found in tuned.items():
        print(
            f"{row:10}" + "".join(f"{value:>15.2f}{'*' if rate == best[row] else ' '}" for rate, value in found.items())
        )

    folders = runs(
        {
            (row, seed): (f"seed{seed}", (*size, *GRID[best[row]], "--seed", str(seed)))
            for seed in range(options.seeds)
            for row in ROWS
        }
    )
    results = {"frozen": [final(folders["DML only", seed])["before"] for seed in range(options.seeds)]}
    results |= {row: [final(folders[row, seed])["after"] for seed in range(options.seeds)] for row in ROWS}
    print(f"\nretrieval, per cent\n{'':10}" + "".join(f"{title:>16}" for title in METRICS))
    figures = {}
    for row, metrics in results.items():
        figures[row] = {key: [100 * one[key] for one in metrics] for key in METRICS.values()}
        spread = {
            key: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for key, v in figures[row].items()
        }
        print(f"{row:10}" + "".join(f"{spread[key][0]:>10.2f} ±{spread[key][1]:4.2f}" for key in METRICS.values()))

    print(f"\nfirst third → last third of the steps, seed 0\n{'':20}" + "".join(f"{row:>20}" for row in ROWS))
    logs = {row: logged(folders[row, 0]) for row in ROWS}
    for key in LOGGED:
        cells = (f"{log[key][0]:.3g} → {log[key][1]:.3g}" if key in log else "" for log in logs.values())
        print(f"{key:20}" + "".join(f"{cell:>20}" for cell in cells))
    write_json(
        options.json,
        {
            "seeds": options.seeds,
            "flags": size,
            "tuning": tuned,
            "chosen": best,
            "per_cent": figures,
            "logged": logs,
        },
    )


if __name__ == "__main__":
    main()
