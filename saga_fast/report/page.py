"""The values of page.html from a run's files. Jinja escapes all of them, as a model's answers are untrusted text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from PIL import Image

from saga_fast.report.chart import Chart, chart, short
from saga_fast.utils.errors import InputError, first_line
from saga_fast.utils.files import read_regular
from saga_fast.utils.pages import shade

FIGURES = {
    "recall_at_1": "Recall@1",
    "recall_at_2": "Recall@2",
    "recall_at_4": "Recall@4",
    "recall_at_8": "Recall@8",
    "map_at_r": "MAP@R",
    "r_precision": "R-precision",
    "nmi": "NMI",
}

# title, unit, whether the axis starts at 0, field of metrics.jsonl or telemetry.jsonl -> name
CHARTS = (
    ("Metric loss", "loss", False, {"loss_dml": "DML"}),
    ("Policy loss", "loss", False, {"loss_lm": "GRPO"}),
    ("Attention alignment", "nats", False, {"loss_kl": "KL"}),
    ("Reward", "share right", True, {"reward_same": "same class", "reward_different": "different class"}),
    ("Well-formed answers", "share", True, {"well_formed": "well formed"}),
    (
        "Pairs per step",
        "pairs",
        True,
        {"pairs_drawn": "drawn", "pairs_contributing": "contributing", "pairs_replayed": "replayed"},
    ),
    ("Length of an answer", "tokens", True, {"completion_tokens": "mean"}),
    ("Gradient norm before clipping", "norm", True, {"grad_norm": "all"}),
    ("Gradient norm in the tower", "norm", True, {"grad_tower_dml": "DML", "grad_tower_lm": "GRPO"}),
    ("Gradient norm in the pooler", "norm", True, {"grad_pooler_dml": "DML", "grad_pooler_kl": "KL"}),
    (
        "Cosine of the terms' gradients",
        "cosine",
        False,
        {"cosine_tower_dml_lm": "DML, GRPO (tower)", "cosine_pooler_dml_kl": "DML, KL (pooler)"},
    ),
    ("Learning rate of the encoder", "", True, {"lr": "rate"}),
    ("GPU power", "watts", True, {"gpu_power_watts": "power"}),
    ("GPU load", "share", True, {"gpu_utilisation": "load"}),
    ("Energy per step", "joules", True, {"gpu_joules": "GPU"}),
)

KINDS = {
    "fixed": "Wrong before, right after",
    "still_wrong": "Wrong before and after",
    "spoilt": "Right before, wrong after",
}
MENDED = 3  # attributes named beside a query that is right after training only
SHADES = 5  # of a token's share of the gradient, each half of the next


MAX_BYTES = 2**29  # of a file of the run
MALFORMED = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError, UndefinedError,
)  # fmt: skip


class Sprite(NamedTuple):
    """A sheet of equal pictures, embedded once as the CSS class `name`; `rule` is that class."""

    name: str
    columns: int
    rows: int
    rule: Markup

    def at(self, cell: int) -> Markup:
        """CSS that shows one picture, counted in reading order."""
        x, y = cell % self.columns, cell // self.columns
        place = [100 * i / max(1, n - 1) for i, n in ((x, self.columns), (y, self.rows))]
        return Markup(f"background-position:{place[0]:.4g}% {place[1]:.4g}%")


def write_report(run: Path) -> Path:
    """Writes `run`/report.html and returns its path. Raises InputError if `run` is no run, or names its broken file."""
    if not (run / "config.json").is_file():
        raise InputError(f"{run}: holds no config.json; give the folder of a run")
    sprites: list[Sprite] = []
    with _reading(run / "config.json") as path:
        record = _read(path)
        config = json.dumps(record.get("config"), indent=2)
    with _reading(run / "final.json") as path:
        final = _read(path)
        figures = _figures(final) if final else []
    with _reading(run / "telemetry.jsonl") as path:
        telemetry = _lines(path)
        machine = _machine(telemetry)
    with _reading(run / "metrics.jsonl") as path:
        metrics = _lines(path)
        charts = [drawn for drawn in (_chart(metrics + telemetry, *one) for one in CHARTS) if drawn]
        phases, phase_chart = _phases(metrics), _phase_chart(metrics)
    samples = []
    for sample in sorted((run / "samples").glob("step-*.json")):
        with _reading(sample):
            samples.append(_sample(sample, sprites))
    with _reading(run / "gallery" / "gallery.json"):
        shown = _gallery(run / "gallery", sprites)

    here = PackageLoader("saga_fast.report", "")
    folder = Environment(loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    script = here.get_source(folder, "page.js")[0]
    values = {
        "name": run.resolve().name,
        "record": record,
        "config": config,
        "final": final,
        "figures": figures,
        "gallery": shown,
        "charts": charts,
        "samples": samples,
        "steps": len(metrics),
        "phases": phases,
        "phase_chart": phase_chart,
        "machine": machine,
        "sprites": sprites,
        "style": Markup(here.get_source(folder, "page.css")[0]),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "shades": range(1, SHADES + 1),
    }
    with _reading(run / "config.json"):  # its fields are read by the template
        page = folder.get_template("page.html").render(values)
    staging = run / ".report.html.partial"
    try:
        staging.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(staging, run / "report.html")
    except OSError as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        cause = f"cannot be written ({error.strerror})"
        raise InputError(f"{run / 'report.html'}: {cause}; repair it, or copy the run elsewhere") from error
    return run / "report.html"


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turns errors that a malformed file `path` causes inside into an InputError that names it."""
    try:
        yield path
    except InputError:
        raise
    except MALFORMED as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{path}: not what a run writes ({cause}); restore it, or remove it and try again") from error


def _read(path: Path) -> Any:
    """A JSON file, or None where there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(read_regular(path, MAX_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:
        cause = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{path}: cannot be read ({cause}); restore it, or remove it and make the report again"
        ) from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """A file with one JSON object per line. The last line may be incomplete, if the run is in progress or was
    killed."""
    try:
        whole = read_regular(path, MAX_BYTES).decode().split("\n")[:-1] if path.exists() else []
        lines = [json.loads(line) for line in whole]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); correct or remove it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: a line is no JSON ({first_line(error)}); remove that line") from None
    for number, line in enumerate(lines, 1):
        if not (isinstance(line, dict) and "step" in line and all(map(_is_number, line.values()))):
            raise InputError(f"{path}: line {number} is not a step with its numbers; remove that line")
    return lines


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _sprite(path: Path, columns: int, sprites: list[Sprite]) -> Sprite:
    """columns: pictures in a row of the sheet."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except OSError as error:
        raise InputError(f"{path}: is no picture ({error}); remove the JSON file beside it too") from None
    name, data = f"sheet{len(sprites)}", base64.b64encode(path.read_bytes()).decode()
    rows = height * columns // width
    rule = f".{name}{{background-image:url(data:image/jpeg;base64,{data});background-size:{columns}00% {rows}00%}}"
    sprites.append(Sprite(name, columns, rows, Markup(rule)))
    return sprites[-1]


def _figures(final: dict[str, Any]) -> list[dict[str, Any]]:
    before, after = final["before"], final["after"]
    return [
        {"name": title, "before": 100 * before[key], "after": 100 * after[key]}
        for key, title in FIGURES.items()
        if key in before and key in after
    ]


def _gallery(folder: Path, sprites: list[Sprite]) -> dict[str, Any] | None:
    content = _read(folder / "gallery.json")
    if content is None:
        return None
    sprite = _sprite(folder / "gallery.jpg", content["columns"], sprites)

    def shown(cell: int, query: int | None = None) -> dict[str, Any]:
        label = content["cells"][cell][1]
        right = None if query is None else label == content["cells"][query][1]
        return {"place": sprite.at(cell), "class": content["classes"][label], "right": right}

    rows = {
        KINDS[kind]: [
            {
                "query": shown(row["query"]),
                "before": [shown(cell, row["query"]) for cell in row["before"]],
                "after": [shown(cell, row["query"]) for cell in row["after"]],
                "mended": _mended(row.get("attributes")),
            }
            for row in rows
        ]
        for kind, rows in content["rows"].items()
    }
    counts = content["counts"]
    titles = {KINDS[kind]: counts[kind] for kind in KINDS}
    return {"sprite": sprite, "rows": rows, "counts": titles, "kept": counts["kept"], "queries": sum(counts.values())}


def _mended(gains: dict[str, float] | None) -> list[dict[str, Any]]:
    """The attributes that rank the right neighbour before the wrong one, with their shares of the difference."""
    ahead = sorted(((gain, name) for name, gain in (gains or {}).items() if gain > 0), reverse=True)
    total = sum(gain for gain, _ in ahead)
    return [{"name": name, "share": 100 * gain / total} for gain, name in ahead[:MENDED]]


def _chart(lines: list[dict[str, Any]], title: str, unit: str, zero: bool, fields: dict[str, str]) -> Chart | None:
    found = [(name, [line for line in lines if field in line], field) for field, name in fields.items()]
    series = [(name, [line["step"] for line in has], [line[field] for line in has]) for name, has, field in found]
    return chart(title, series, unit, zero)


def _phase_fields(metrics: list[dict[str, Any]]) -> dict[str, str]:
    fields = dict.fromkeys(field for line in metrics for field in line if field.startswith("seconds_"))
    return {field: field.removeprefix("seconds_").replace("_", " ") for field in fields}


def _phases(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    spent = {name: [line[f] for line in metrics if f in line] for f, name in _phase_fields(metrics).items()}
    total = sum(map(sum, spent.values())) or 1.0
    return [
        {"name": name, "total": sum(of), "median": statistics.median(of), "share": 100 * sum(of) / total}
        for name, of in spent.items()
    ]


def _phase_chart(metrics: list[dict[str, Any]]) -> Chart | None:
    return _chart(metrics, "Time per step", "seconds", True, _phase_fields(metrics))


def _machine(telemetry: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the run cost, as (name, figure with its unit)."""
    readings = {
        "Peak memory of the process": ("memory_peak_rss_bytes", lambda v: f"{max(v) / 2**30:.2f} GiB"),
        "Processor time": ("seconds_cpu", lambda v: f"{sum(v):,.0f} s, {statistics.median(v):.1f} s per step"),
        "GPU memory at most": ("gpu_memory_bytes", lambda v: f"{max(v) / 2**30:.2f} GiB"),
        "GPU power": ("gpu_power_watts", lambda v: f"{statistics.mean(v):.0f} W on average, {max(v):.0f} W at most"),
        "GPU load": ("gpu_utilisation", lambda v: f"{100 * statistics.mean(v):.0f} % on average"),
        "GPU energy": ("gpu_joules", lambda v: f"{sum(v) / 1e3:,.1f} kJ, {short(statistics.mean(v))} J per step"),
    }
    read = [
        (name, [line[field] for line in telemetry if field in line], describe)
        for name, (field, describe) in readings.items()
    ]
    return [(name, describe(values)) for name, values, describe in read if values]


def _sample(path: Path, sprites: list[Sprite]) -> dict[str, Any]:
    sample = _read(path)
    sprite = _sprite(path.with_suffix(".jpg"), 2, sprites)
    pairs = [_pair(sample, pair, sprite, 2 * i) for i, pair in enumerate(sample["pairs"])]
    return {
        "step": sample["step"],
        "sprite": sprite,
        "pairs": pairs,
        "shown": next((p for p in pairs if p["maps"]), None),
    }


def _pair(sample: dict[str, Any], pair: dict[str, Any], sprite: Sprite, cell: int) -> dict[str, Any]:
    rollouts = [_rollout(rollout) for rollout in pair["rollouts"]]
    shares = dict.fromkeys(sample["attributes"], 0.0)
    for rollout in pair["rollouts"]:
        for _, name, at in rollout["attributes"]:
            shares[name] += sum(rollout["gradient"][t] for t in at)
    largest = max(shares.values(), default=0) or 1.0
    bars = [
        {"name": name, "share": 100 * share, "width": 100 * share / largest}
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    rest = 100 * (1 - sum(shares.values())) if bars else None
    places = [sprite.at(cell), sprite.at(cell + 1)]
    maps = [_maps(sample, pair, image, place) for image, place in enumerate(places)] if pair["attention"] else None
    return {"same": pair["same"], "places": places, "rollouts": rollouts, "bars": bars, "rest": rest, "maps": maps}


def _maps(sample: dict[str, Any], pair: dict[str, Any], image: int, place: Markup) -> dict[str, Any]:
    """The attention maps of one image: the supervisor's per attribute and on average, and the pooler's."""
    attention, grid = pair["attention"]["images"][image], sample["grid"]
    rollout = pair["rollouts"][pair["attention"]["rollout"]]
    values = {
        name: "".join(rollout["tokens"][t] for t in at) for item, name, at in rollout["attributes"] if item == image
    }
    beta = pair["beta"] and pair["beta"][image]
    names = [name for name in sample["attributes"] if name in attention or (isinstance(beta, dict) and name in beta)]
    return {
        "item": sample["items"][image].replace("_", " "),
        "place": place,
        "mean": _shade(mean_attention(attention), grid) if attention else None,
        "beta": _shade(mean_attention(beta), grid) if beta else None,
        "beside": isinstance(beta, dict),
        "attributes": [
            {
                "name": name,
                "value": values.get(name, ""),
                "shade": _shade(attention[name], grid) if name in attention else None,
                "beta": _shade(beta[name], grid) if isinstance(beta, dict) and name in beta else None,
            }
            for name in names
        ],
    }


def mean_attention(attention: Mapping[str, list[float]] | list[float]) -> list[float]:
    """N weights: the mean over attributes, or the single attention map."""
    return (
        [sum(column) / len(attention) for column in zip(*attention.values())]
        if isinstance(attention, Mapping)
        else attention
    )


def _shade(weights: list[float], grid: tuple[int, int]) -> str:
    if len(weights) != grid[0] * grid[1]:
        raise ValueError(f"{len(weights)} weights for a grid of {grid[1]}x{grid[0]}")
    return shade(np.reshape(weights, grid))


def _rollout(rollout: dict[str, Any]) -> dict[str, Any]:
    """parts: the answer, split where an attribute's value begins or ends: {name, share, tokens: (text, shade)}."""
    owner = {t: (item, name) for item, name, at in rollout["attributes"] for t in at}
    largest = max((rollout["gradient"][t] for t in owner), default=0) or 1.0
    parts: list[dict[str, Any]] = []
    last = None
    for t, (text, gradient) in enumerate(zip(rollout["tokens"], rollout["gradient"], strict=True)):
        of = owner.get(t)
        if not parts or of != last:
            parts.append({"name": of and of[1], "share": 0.0, "tokens": []})
        # Shade 5 is more than half of the largest share, 4 more than a quarter, and so on.
        shade = max(0, math.ceil(SHADES + math.log2(gradient / largest))) if of and gradient > 0 else 0
        parts[-1]["share"] += 100 * gradient
        parts[-1]["tokens"].append((text, shade))
        last = of
    for part in parts:
        if part["name"] is None:
            part["tokens"] = [("".join(text for text, _ in part["tokens"]), 0)]
    return {**rollout, "parts": parts, "count": len(rollout["tokens"])}
