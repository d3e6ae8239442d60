"""Figures of GPUs in the docs are those of the committed files."""

import json
import re
from pathlib import Path

from bench import gpu_table

RESULTS = Path(__file__).parents[2] / "bench/results"


def test_the_page_holds_the_table_of_the_committed_files():
    page = gpu_table.PAGE.read_text()
    assert page.count(gpu_table.MARKS[0]) == page.count(gpu_table.MARKS[1]) == 1
    assert gpu_table.written(page) == page, "run python -m bench.gpu_table --write"


def test_of_each_figure_the_newest_is_told_be_it_worse():
    runs = json.loads((RESULTS / "nvidia-h200/full_size_before.json").read_text())["runs"]
    newest = next(run["cases"]["step"] for run in reversed(runs) if "step" in run["cases"])
    (line,) = (line for line in gpu_table.table() if line.startswith("| optimizer step"))
    assert f"| {newest['seconds']:.1f} s (" in line and newest["seconds"] > min(
        run["cases"]["step"]["seconds"] for run in runs if "step" in run["cases"]
    )


def test_what_was_broken_off_is_not_told(tmp_path, monkeypatch):
    """Neither a step some of whose phases are missing nor a layer some of whose products are."""
    (folder := tmp_path / "bench/results/a-card").mkdir(parents=True)
    machine = dict.fromkeys(("gpu", "driver", "torch", "triton", "transformers"), "a")
    decode = {"seconds": 1, "floor": 1}
    cases = {"decode, 8 rows": decode, "decode, 64 rows": {**decode, "under_way": True}, "replay": {"failed": "no"}}
    products = [
        {"name": f"nf4_matmul {name}, {rows} rows", "implementations": {"ours": {"ms": 0.5}}}
        for name in ("q, k, v", "gate, up", "o", "down")
        for rows in (1, 8)
    ]
    monkeypatch.setattr(gpu_table, "REPOSITORY", tmp_path)
    for name, figures in {"full_size": {"cases": cases}, "nf4": {"cases": products[:-1]}}.items():
        (folder / f"{name}.json").write_text(json.dumps({"machine": machine, **figures}))
    _, _, *rows = gpu_table.table()
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| decode step, 8 rows, each 288 tokens on, behind a prefix of 850", "1000.0 ms (an H100's floor: 1000.0)"],
        ["| a layer's NF4 products, ours, μs at 1 rows", "2000"],
    ]


def test_every_card_has_a_folder_and_every_file_says_what_it_was_measured_on():
    """A file of figures that a GPU gave lies in the folder of that GPU."""
    for file in RESULTS.rglob("*.json"):
        names = set(re.findall(r'"gpu": "([^"]+)"', file.read_text()))
        folder = file.parent.name if file.parent != RESULTS else None
        assert {re.sub("[^a-z0-9]+", "-", name.lower()) for name in names} == ({folder} if folder else set()), file
