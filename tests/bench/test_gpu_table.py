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
    runs = json.loads((RESULTS / "nvidia-h200/full_size.json").read_text())["runs"]
    newest = next(run["cases"]["step"] for run in reversed(runs) if "step" in run["cases"])
    (line,) = (line for line in gpu_table.table() if line.startswith("| optimizer step"))
    assert f"| {newest['seconds']:.1f} s (" in line and newest["seconds"] > min(
        run["cases"]["step"]["seconds"] for run in runs if "step" in run["cases"]
    )


def test_every_card_has_a_folder_and_every_file_says_what_it_was_measured_on():
    """A file of figures that a GPU gave lies in the folder of that GPU."""
    for file in RESULTS.rglob("*.json"):
        names = set(re.findall(r'"gpu": "([^"]+)"', file.read_text()))
        folder = file.parent.name if file.parent != RESULTS else None
        assert {re.sub("[^a-z0-9]+", "-", name.lower()) for name in names} == ({folder} if folder else set()), file
