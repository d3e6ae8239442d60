"""The table of GPU figures in the docs, from the committed results: `python -m bench.gpu_table [--write]`.

It has the newest figure of each kind from each card's folder in bench/results, with the conditions of its measurement.
docs/kernels.md has this table between two marks; --write puts it there, and a test compares them, so that every figure
has its file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs/kernels.md"
MARKS = "<!-- bench.gpu_table -->\n", "<!-- end -->\n"
ROWS = (1, 8, 16, 32, 64, 128)
PRODUCTS = 4  # of a layer
WAYS = {  # of a product in `bench.gpu.nf4`, and what it is called here
    "ours": "ours",
    "ours, by wgmma": "ours by wgmma",
    "cuBLAS, dense bfloat16": "cuBLAS on dense bf16",
    "bitsandbytes, default": "bitsandbytes",
}

Figures = dict[str, Any]
# The columns about a case of `bench.full_size`.
SAYS: dict[str, tuple[str, Callable[[Figures], str]]] = {
    **{
        f"decode, {rows}": (
            f"decode step, {rows}, each 288 tokens on, behind a prefix of 850",
            lambda f: f"{1e3 * f['seconds']:.1f} ms (an H100's floor: {1e3 * f['floor']:.1f})",
        )
        for rows in ("8 rows", "64 rows", "128 rows", "64 rows, resident", "128 rows, resident")
    },
    "replay": (
        "replay of 8 groups, anchor attention included",
        lambda f: f"{f['seconds']:.1f} s for {f['tokens']:,} tokens (an H100's floor: {f['floor']:.1f})",
    ),
    "rollout": (
        "rollouts, 64 rows around 256 tokens",
        lambda f: f"{f['tokens_per_second']:,.0f} tokens/s",
    ),
    "generate": (
        "transformers' `generate` with bitsandbytes, the same",
        lambda f: f"{f['tokens_per_second']:,.0f} tokens/s",
    ),
    "step": (
        "optimizer step, median of the warm ones",
        lambda f: f"{f['seconds']:.1f} s ({', '.join(f'{n} {s:.2f}' for n, s in f['phases'].items())})",
    ),
}


def table() -> Iterator[str]:
    """Lines of markdown."""
    yield "| what | measured | card | driver | PyTorch, Triton, transformers | commit |"
    yield "|---|---|---|---|---|---|"
    for folder in sorted(path for path in (REPOSITORY / "bench/results").iterdir() if path.is_dir()):
        newest: dict[str, tuple[Figures, Figures]] = {}
        for run in (*_runs(folder / "full_size_before.json"), *_runs(folder / "full_size.json")):
            newest |= {name: (figures, run) for name, figures in run["cases"].items() if _whole(figures)}
        for name, (what, says) in SAYS.items():
            if name in newest:
                figures, run = newest[name]
                yield f"| {what} | {says(figures)} | {_measured_on(run)} |"
        for run in _runs(folder / "full_size_24.json"):
            if "peak_bytes" in run:
                sizes = (run[name] / 2**30 for name in ("peak_bytes", "reserved_bytes"))
                said = "{:.1f} GiB, {:.1f} reserved; foretold {:.1f}".format(
                    *sizes, run["foretold"]["peak_bytes"] / 2**30
                )
                seconds = f"; {run['seconds']:.1f} s" if "seconds" in run else ""
                yield f"| a step within {run['card_gib']:g} GiB | {said}{seconds} | {_measured_on(run)} |"
        for run in _runs(folder / "nf4.json"):
            for way, name in WAYS.items():
                layer = {rows: us for rows in ROWS if (us := _layer(run, rows, way)) is not None}
                if not layer:
                    continue
                told = ", ".join(f"{us:.0f}" for us in layer.values())
                at = f"{', '.join(map(str, layer))} rows"
                yield f"| a layer's NF4 products, {name}, μs at {at} | {told} | {_measured_on(run)} |"


def _runs(file: Path) -> list[Figures]:
    """The oldest first: a file may hold several."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    return found.get("runs") or [found]


def _whole(figures: Figures) -> bool:
    """Of a case: it neither failed nor was broken off."""
    return "failed" not in figures and "under_way" not in figures


def _layer(run: Figures, rows: int, way: str) -> float | None:
    """Microseconds of all products of one layer; None where one of them is missing."""
    cases = [case for case in run["cases"] if case["name"].endswith(f", {rows} rows")]
    times = [case["implementations"].get(way, {}).get("ms") for case in cases]
    return 1e3 * sum(times) if len(times) == PRODUCTS and None not in times else None


def _measured_on(run: Figures) -> str:
    machine = run["machine"]
    versions = ", ".join(str(machine[name]) for name in ("torch", "triton", "transformers"))
    commit = run.get("commit") or machine.get("commit") or "not noted"
    return f"{machine['gpu']} | {machine.get('driver') or 'not noted'} | {versions} | {commit}"


def written(page: str) -> str:
    """`page` with the table as it is now."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return before + MARKS[0] + "\n".join(table()) + "\n" + MARKS[1] + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(REPOSITORY)}")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text()))
    print(*table(), sep="\n")


if __name__ == "__main__":
    main()
