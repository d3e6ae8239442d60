"""Trains the tiny supervisor from random weights, in under two hours on two CPU cores.

    python -m saga_fast.tiny.recipe --out DIR         # train, measure, write DIR/supervisor with its card; resumes
    python -m saga_fast.tiny.recipe --evaluate DIR    # measure the model folder DIR and print the numbers of its card

Three parts, as training tower and language model at once from scratch leaves the verdict at chance: `tower.py` trains
the vision tower to classify attributes by temporary heads; `language.py` trains the language model to write the answer
from the frozen tower's tokens; `calibration.py` calibrates its verdict. All draw random combinations of attributes and
never a test species of the benchmark.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from saga_fast.tiny import SUPERVISOR
from saga_fast.tiny.birds import ATTRIBUTES
from saga_fast.tiny.calibration import calibrate
from saga_fast.tiny.card import curves_svg, measure, write_card
from saga_fast.tiny.language import save, train_language
from saga_fast.tiny.tower import train_tower
from saga_fast.utils.errors import InputError, exit_on_input_error


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(out: Path, seed: int) -> Path:
    """Train all parts, then measure and write the card; returns the model folder."""
    out.mkdir(parents=True, exist_ok=True)
    tower = train_tower(out, seed)
    if not (out / "language" / "config.json").exists():
        save(*train_language(out, tower, seed), out / "language")
    folder = out / "supervisor"
    save(*calibrate(out / "language", out, seed), folder)
    card(folder, out, seed)
    return folder


def card(folder: Path, logs: Path, seed: int) -> None:
    """Measure the model in `folder`; write its README.md, card.json and curves.svg from that and the training logs."""
    tower, language, calibration = (read_log(logs / f"{part}.jsonl") for part in ("tower", "language", "calibration"))
    curves = {
        "tower": [
            {"step": line["step"], "loss": line["loss"], "accuracy": sum(line["right"].values()) / len(ATTRIBUTES)}
            for line in tower
        ],
        "language": [
            {"step": line["step"], "loss": line["loss"], "point": line["point"]}
            for line in language
            if not line["question"][1]
        ],
        "calibration": [
            {"step": line["step"], "verdict": line["verdict"], "tokens": line["tokens"]}
            for line in calibration
            if not line["question"][1]
        ],
    }
    found = measure(folder)
    (folder / "card.json").write_text(json.dumps({"seed": seed, "curves": curves, **found}, indent=1))
    (folder / "curves.svg").write_text(curves_svg(curves))
    (folder / "README.md").write_text(write_card(found, curves, seed))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m saga_fast.tiny.recipe", description="Train or measure the tiny supervisor."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--out", type=Path, help="train here, resuming what is there; the model ends up in OUT/supervisor"
    )
    what.add_argument(
        "--evaluate", type=Path, nargs="?", const=SUPERVISOR, help="measure this model folder and print JSON"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    with exit_on_input_error():
        if args.out:
            print(f"the supervisor is in {train(args.out, args.seed)}")
            return
        if not (args.evaluate / "config.json").exists():
            raise InputError(f"--evaluate {args.evaluate}: found no config.json; name a model folder")
        print(json.dumps(measure(args.evaluate), indent=1))


if __name__ == "__main__":
    main()
