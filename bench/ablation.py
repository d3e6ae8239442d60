"""Ablation: the contribution of each term of the method, on drawn birds of species that are not in the training set.

    python -m bench.ablation --json FILE [--out runs/ablation] [--seeds 3] [--jobs 2] [--rows "DML" …] [-- --flag …]
    python -m bench.ablation --json FILE --out runs/ablation-hard -- --data.nuisance hard

Every row is tuned the same way, on birds drawn with another seed, species and pictures both, for fewer steps, by
Recall@1: first the encoder's learning rate, then, where the row has that term, λ_lm at the better rate. Then every row
takes the same number of optimizer steps over the same micro-batches of the benchmark, once a seed; the seed determines
the pooler, the batches and the rollouts. Each run is a process of its own; finished runs are kept, unfinished ones
resumed, so the script can be stopped and started again.

Printed, and written to FILE: the tuning; retrieval, mean and standard deviation over seeds; differences between rows
with the 95 % interval of a paired bootstrap over queries and seeds; the share of values that the supervisor reads
correctly from the encoder's tokens on test species; losses and gradients over the run. FILE holds Recall@1 and MAP@R of
every query of every run, so that the tables can be recomputed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import write_json
from saga_fast.config import Config, DataConfig
from saga_fast.encoder import Encoder
from saga_fast.evaluate import embed_images, load_images
from saga_fast.retrieval.metrics import retrieve
from saga_fast.supervisor.draw import draw_pairs
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.prompt import PROMPTS
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.tiny import SUPERVISOR
from saga_fast.tiny.birds import ATTRIBUTES, DrawnBirds

PAPER, ATTRIBUTE = ("--encoder.pooler", "attention"), ("--encoder.pooler", "attributes")
CREDIT = ("--rollout.credit", "attributes", "--rollout.credit-weight", "5")
VERDICT = ("--rollout.credit", "verdict")
NO_LM, NO_KL = ("--lambda.lm", "0"), ("--lambda.kl", "0")


@dataclass(frozen=True)
class Row:
    """flags: of the trainer. tunes_lm: whether λ_lm is tuned. module: the trainer that runs it."""

    flags: tuple[str, ...]
    tunes_lm: bool = False
    module: str = "saga_fast.train"


ROWS = {
    "DML, paper's pooler": Row((*PAPER, *VERDICT, *NO_LM, *NO_KL)),
    "paper's method": Row((*PAPER, *VERDICT), tunes_lm=True),
    "DML": Row((*ATTRIBUTE, *VERDICT, *NO_LM, *NO_KL)),
    "+ KL": Row((*ATTRIBUTE, *VERDICT, *NO_LM)),
    "+ KL + GRPO (verdict)": Row((*ATTRIBUTE, *VERDICT), tunes_lm=True),
    "all": Row((*ATTRIBUTE, *CREDIT), tunes_lm=True),
    "all, λ untuned": Row((*ATTRIBUTE, *CREDIT, "--lambda.adaptive")),
    "oracle": Row((*ATTRIBUTE, *VERDICT), tunes_lm=True, module="bench.oracle"),
}
METRICS = {"R@1": "recall_at_1", "R@4": "recall_at_4", "MAP@R": "map_at_r", "NMI": "nmi"}
DIFFERENCES = [
    ("all", "DML"),
    ("all", "DML, paper's pooler"),
    ("all", "paper's method"),
    ("all", "+ KL"),
    ("all", "+ KL + GRPO (verdict)"),
    ("all, λ untuned", "+ KL"),
    ("+ KL", "DML"),
    ("oracle", "+ KL"),
]
# Few classes, so that the metric loss has something to lose: on 12 species it peaks early and then overfits, on the
# default's 50 it is still rising when the steps that fit in minutes are over.
SIZE = (
    *("--data.train-classes", "12", "--data.classes-per-batch", "8", "--data.images-per-class", "8"),
    *("--rollout.pairs", "4", "--encoder.embedding-dim", "768", "--lambda.no-adaptive", "--optim.pooler-lr", "2e-3"),
)
STEPS, TUNING_STEPS = 60, 30
RATES, WEIGHTS = ("1e-4", "2e-4"), ("0.3", "1")
OTHER_BIRDS = ("--data.seed", "1")
READ = 48  # pairs of test species that the supervisor reads, half of them of one
LOGGED = (  # of metrics.jsonl: mean over the first and the last third of the steps that have it
    *("loss_dml", "loss_kl", "reward_same", "reward_different", "pairs_drawn", "pairs_contributing", "value_entropy"),
    *("grad_tower_dml", "grad_tower_lm", "cosine_tower_dml_lm", "grad_pooler_dml", "grad_pooler_kl"),
)


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.replace("+", " plus ").lower()).split())


def run(name: str, flags: tuple[str, ...], folder: Path, threads: int) -> Path:
    """The folder of one finished run of the row `name`, trained or resumed first where it is not finished."""
    if not (folder / "final.json").exists():
        row = ROWS[name]
        command = [sys.executable, "-m", row.module, "drawn-birds", "--out", str(folder)]
        command += ["--resume"] if (folder / "config.json").exists() else [*SIZE, *row.flags, *flags]
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, stdout=log, stderr=log, check=True, env=environment)
    return folder


def final(folder: Path) -> dict:
    return json.loads((folder / "final.json").read_text())


def logged(folder: Path) -> dict[str, tuple[float, float]]:
    """Means of the metrics `LOGGED` over the first and over the last third of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for key in LOGGED:
        values = [line[key] for line in lines if key in line]
        if third := len(values) // 3:
            found[key] = (statistics.mean(values[:third]), statistics.mean(values[-third:]))
    return found


def config_of(folder: Path) -> Config:
    return Config.from_dict(json.loads((folder / "config.json").read_text())["config"])


def per_query(folder: Path) -> dict[str, Any]:
    """Of each query of the test half whether its nearest neighbour is of its class, as a string of 0 and 1, and its
    MAP@R in per cent; kept in the run's folder."""
    file = folder / "queries.json"
    if not file.exists():
        data = config_of(folder).data
        _, images = load_images(data, data.image_size)
        scores = retrieve(embed_images(Encoder.from_pretrained(folder / "encoder"), images), images.labels)
        hit = "".join(str(int(row)) for row in scores.hits[:, 0])
        file.write_text(
            json.dumps({"hit": hit, "map_at_r": [round(100 * x, 2) for x in scores.average_precision.tolist()]})
        )
    return json.loads(file.read_text())


def reading(encoder: Encoder, data: DataConfig) -> float:
    """The share of values, per cent, that the supervisor writes correctly when it reads pairs of test species from the
    encoder's tokens; data: of the encoder's run."""
    mllm = load_mllm(SUPERVISOR, True, torch.float32)
    grid = encoder.tower.grid(encoder.image_size, encoder.image_size)
    sampling = Sampling(group_size=4, max_new_tokens=192)
    supervisor = Supervisor(mllm, PROMPTS["drawn-birds"], "images_first", grid, sampling)
    birds = DrawnBirds("test", data.species, data.images_per_species, data.seed, data.nuisance)
    _, images = load_images(data, encoder.image_size)
    pairs = draw_pairs(images.labels, READ, seed=0, first_id=0).flatten()
    batch = images.batch(pairs.tolist())
    with torch.no_grad():
        completions = supervisor.rollout(encoder.tower(batch.pixels), torch.arange(READ))
    right = []
    for two, group in zip(pairs.view(-1, 2).tolist(), completions):
        for items in supervisor.attribute_values(group):
            for image, said in zip(two, items):
                truth = birds.attributes(image)
                right += [said.get(name) == truth[name] for name in ATTRIBUTES]
    return 100 * statistics.mean(right)


def interval(a: np.ndarray, b: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """mean(a - b) and its 95 % interval; a, b: (seeds, queries). A paired bootstrap over both."""
    difference, rng = a - b, np.random.default_rng(0)
    seeds, queries = difference.shape
    means = np.empty(draws)
    for i in range(draws):
        chosen = difference[rng.integers(seeds, size=seeds)].mean(0)
        means[i] = chosen[rng.integers(queries, size=queries)].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="0 to tune only")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="by default all")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="further flags of saga_fast.train, the same for every row")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    further = tuple(options.flags)

    def runs(tasks: dict[tuple[str, str], tuple[str, ...]]) -> dict[tuple[str, str], Path]:
        """{(row, name): flags} → {(row, name): folder}."""

        def one(task: tuple[str, str]) -> Path:
            return run(task[0], (*tasks[task], *further), options.out / slug(" ".join(task)), threads)

        with ThreadPoolExecutor(options.jobs) as pool:
            return dict(zip(tasks, pool.map(one, tasks)))

    size = ("--optim.steps", str(TUNING_STEPS), *OTHER_BIRDS)
    points: dict[str, dict[str, tuple[str, ...]]] = {row: {} for row in options.rows}
    tuned: dict[str, dict[str, float]] = {row: {} for row in options.rows}

    def tune(flags: dict[tuple[str, str], tuple[str, ...]]) -> dict[str, str]:
        """Runs further points, (row, name) → flags; returns the best name of each row so far."""
        folders = runs({(row, f"tuning {name}"): (*size, *flags[row, name]) for row, name in flags})
        for row, name in flags:
            points[row][name] = flags[row, name]
            tuned[row][name] = 100 * final(folders[row, f"tuning {name}"])["after"]["recall_at_1"]
        return {row: max(values, key=values.__getitem__) for row, values in tuned.items()}

    def point(row: str, rate: str, weight: str) -> tuple[str, tuple[str, ...]]:
        tunes_lm = ROWS[row].tunes_lm
        name = f"lr {rate}, λ_lm {weight}" if tunes_lm else f"lr {rate}"
        return name, ("--optim.encoder-lr", rate, *(("--lambda.lm", weight) if tunes_lm else ()))

    tries = [(row, *point(row, rate, WEIGHTS[0])) for row in options.rows for rate in RATES]
    best = tune({(row, name): flags for row, name, flags in tries})
    tries = [
        (row, *point(row, points[row][best[row]][1], weight))
        for row in options.rows
        if ROWS[row].tunes_lm
        for weight in WEIGHTS[1:]
    ]
    best = tune({(row, name): flags for row, name, flags in tries})
    print("tuning, R@1 on other birds")
    for row, found in tuned.items():
        cells = "   ".join(f"{name}: {value:.2f}{'*' if name == best[row] else ''}" for name, value in found.items())
        print(f"{row:24}{cells}")

    about = {
        "seeds": options.seeds,
        "steps": STEPS,
        "tuning_steps": TUNING_STEPS,
        "flags": [*SIZE, *further],
        "rows": {row: ROWS[row].flags for row in points},
        "tuning": tuned,
        "chosen": best,
    }
    if not options.seeds:
        write_json(options.json, about)
        return

    size = ("--optim.steps", str(STEPS))
    folders = runs(
        {
            (row, f"seed {seed}"): (*size, *points[row][best[row]], "--seed", str(seed))
            for seed in range(options.seeds)
            for row in points
        }
    )
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (row, name), folder in folders.items():
        figures = {key: 100 * final(folder)["after"][key] for key in METRICS.values()}
        found.setdefault(row, {})[name] = {**figures, "queries": per_query(folder)}
    first = next(iter(points))
    frozen = [final(folders[first, f"seed {seed}"])["before"] for seed in range(options.seeds)]
    results = {f"frozen ({first})": [{key: 100 * one[key] for key in METRICS.values()} for one in frozen]}
    results |= {row: list(of.values()) for row, of in found.items()}
    print(f"\nretrieval, per cent\n{'':24}" + "".join(f"{title:>16}" for title in METRICS))
    for row, each in results.items():
        cells = [[one[key] for one in each] for key in METRICS.values()]
        spread = [statistics.stdev(cell) if len(cell) > 1 else 0.0 for cell in cells]
        print(f"{row:24}" + "".join(f"{statistics.mean(c):>10.2f} ±{s:4.2f}" for c, s in zip(cells, spread)))

    def table(row: str, metric: str) -> np.ndarray:
        queries = [one["queries"] for one in found[row].values()]
        if metric == "R@1":
            return np.array([[100 * int(hit) for hit in one["hit"]] for one in queries], float)
        return np.array([one["map_at_r"] for one in queries], float)

    print("\ndifferences, points, with 95 % intervals over queries and seeds")
    differences = {}
    for a, b in DIFFERENCES:
        if a in found and b in found:
            differences[f"{a} - {b}"] = {m: interval(table(a, m), table(b, m)) for m in ("R@1", "MAP@R")}
            cells = (
                f"{m} {d:+.2f} [{low:+.2f}, {high:+.2f}]" for m, (d, low, high) in differences[f"{a} - {b}"].items()
            )
            print(f"{f'{a} - {b}':48}" + "   ".join(cells))

    torch.manual_seed(0)
    visual = load_mllm(SUPERVISOR, True, torch.float32).visual
    data = config_of(folders[first, "seed 0"]).data
    read = {"frozen": reading(Encoder.from_tower(visual, "mean", 192, 112).eval(), data)}
    read |= {row: reading(Encoder.from_pretrained(folders[row, "seed 0"] / "encoder"), data) for row in points}
    print(
        "\nvalues read rightly on test species, per cent, seed 0: " + ", ".join(f"{k} {v:.1f}" for k, v in read.items())
    )

    print("\nfirst third → last third of the steps, seed 0")
    logs = {row: logged(folders[row, "seed 0"]) for row in points}
    for key in LOGGED:
        print(f"{key:20}" + ", ".join(f"{r}: {x[key][0]:.3g} → {x[key][1]:.3g}" for r, x in logs.items() if key in x))
    write_json(
        options.json,
        {
            **about,
            "frozen": results[f"frozen ({first})"],
            "runs": found,
            "differences": differences,
            "values_read": read,
            "logged": logs,
        },
    )


if __name__ == "__main__":
    main()
