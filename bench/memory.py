"""Predicted memory of a step, by component and phase, for each recomputation policy of the replay; without weights
and GPU.

    python -m bench.memory [--model qwen3-vl-8b] [--cards 24 40 80] [--json FILE]
    python -m bench.memory --check          # predicted and measured, for the small models, on the CPU

`--model` is a file of bench/models, or any configuration of a Qwen3-VL that transformers reads. The default settings
suit a 24 GB card (8-bit optimizer states, checkpointed tower); the flags change them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Qwen3VLConfig

from bench import record, write_json
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.runtime.memory import (
    GIB,
    Predictor,
    Step,
    SupervisorParts,
    on_meta,
    prefill_bytes,
    quantize_head,
    replay_bytes,
)
from saga_fast.runtime.oom import gradients_all_or_none
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.pair import PairPrefix
from saga_fast.supervisor.prompt import Prefix
from saga_fast.supervisor.replay import Group, Plan
from saga_fast.supervisor.rollout import RolloutEngine, Sampling
from saga_fast.utils.errors import InputError, exit_on_input_error

MODELS = Path(__file__).parent / "models"


def step_of(arguments: argparse.Namespace) -> Step:
    """The step as shapes: the decoder on the meta device, the tower's weights allocated but never written."""
    file = MODELS / f"{arguments.model}.json"
    file = file if file.exists() else Path(arguments.model)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in MODELS.glob("*.json")))
        raise InputError(f"--model: {arguments.model} is neither a configuration file nor one of {known}")
    config = Qwen3VLConfig(**json.loads(file.read_text()))
    text = config.text_config
    with torch.device("meta"):
        encoder = Encoder(
            config.vision_config.to_diff_dict(), "attention", arguments.embedding_dim, arguments.image_size
        )
        language_model = AutoModel.from_config(text, dtype=torch.bfloat16)
        head = nn.Linear(text.hidden_size, text.vocab_size, bias=False, dtype=torch.bfloat16)
        proxies = nn.Linear(arguments.embedding_dim, arguments.proxies, bias=False)
    encoder.to_empty(device="cpu")
    if config.tie_word_embeddings:
        head.weight = language_model.embed_tokens.weight
    decoder = on_meta(FrozenDecoder(language_model, head), quantize=not arguments.dense)
    if arguments.quantize_head:
        quantize_head(decoder)
    rows, columns = encoder.tower.grid(arguments.image_size, arguments.image_size)
    count, start = rows * columns, 5
    spans = (start, start + count), (start + count + 2, start + 2 * count + 2)
    prefix = PairPrefix.of(Prefix([0] * arguments.prefix, spans), (rows, columns), "meta")
    sampling = Sampling(arguments.group_size, max_new_tokens=arguments.max_new_tokens)
    return Step(
        encoder, SupervisorParts(decoder, prefix, sampling), arguments.batch, arguments.pairs, proxies,
        8 if arguments.states == "8bit" else 32, not arguments.no_checkpointing,
    )  # fmt: skip


def plan_table(predictor: Predictor) -> list[dict[str, Any]]:
    """Memory of a replay by policy, whole groups and slices, with its time relative to the fastest."""
    plans = predictor.plans()
    slots = 2 * predictor.step.pairs
    fastest = predictor.seconds(plans[0], slots)
    print(f"\n{'token budget':>12}  {'recomputed':12}{'of the prefix':14}{'replay, GiB':>12}{'step':>8}")
    rows = []
    for plan in plans:
        size, cost = predictor.replay_peak(plan), predictor.seconds(plan, slots) / fastest
        print(f"{plan.token_budget:12}  {plan.recompute:12}{plan.prefix_recompute:14}{size / GIB:12.2f}{cost:8.2f}")
        rows.append({**vars(plan), "replay_bytes": size, "relative_time": cost})
    return rows


def cards(predictor: Predictor, sizes: list[float]) -> list[dict[str, Any]]:
    rows = []
    for size in sizes:
        print(f"\n{size:g} GB card:")
        try:
            plan, slots, footprint = predictor.choose(int(size * GIB))
        except InputError as error:
            print(f"  {error}")
            continue
        print(f"{footprint.table()}\n  {plan}, {slots} pairs roll out at a time")
        rows.append({"card": size, "peak_bytes": footprint.peak, "slots": slots, **vars(plan), **footprint._asdict()})
    return rows


def check(repeats: int) -> dict[str, Any]:
    """Predicted and measured growth of resident memory, each measurement in a process of its own.

    Measured twice: where the allocator gives back what is freed, as a GPU's takes it again, and with glibc's own
    settings, whose heap is left with holes. What is predicted is the first.
    """
    cases = [("record", "replay", {"token_budget": 1 << 16, "recompute": policy}) for policy in ("none", "mlp", "full")]
    cases += [("record", "replay", {"token_budget": 1, "prefix_recompute": "full"})]
    cases += [("record", "tower", {"images": 16}), ("record", "roll out", {"slots": 4})]
    print(f"{'':64}{'predicted, MB':>14}{'measured, MB':>14}{'ratio':>8}{'with holes':>14}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = record.model(record.SHAPES["record"], Path(folder))
        for shape, phase, settings in cases:
            grown = []
            for allocator in ({"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}, {}):
                case = "bench.memory:measured", shape, str(model), phase, settings
                runs = [record.child(*case, **allocator) for _ in range(repeats)]
                grown.append(statistics.median(run["growth_bytes"] for run in runs))
            predicted, (exact, holes) = runs[0]["predicted"], grown
            name = f"{shape}, {phase} {' '.join(f'{k}={v}' for k, v in settings.items())}"
            print(f"{name:64}{predicted / 1e6:14.0f}{exact / 1e6:14.0f}{predicted / exact:8.2f}{holes / 1e6:14.0f}")
            rows.append(
                {"case": name, "predicted_bytes": predicted, "measured_bytes": exact, "with_holes_bytes": holes}
            )
    return {"check": rows, "ratios": {row["case"]: row["predicted_bytes"] / row["measured_bytes"] for row in rows}}


def measured(shape: str, folder: str, phase: str, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """For `record.child`: sets a phase up, predicts its memory, and returns the phase as a function."""
    sizes = record.SHAPES[shape]
    encoder, supervisor = record.supervisor(sizes, Path(folder), sizes.short)
    pixels = sizes.pixels()
    if phase == "tower":
        predictor = Predictor(Step(encoder, None, settings["images"], 1, autocast=False))
        predicted = predictor.footprint(Plan(), 0).phases["A. embed"]

        def work() -> dict[str, Any]:
            with gradients_all_or_none(list(encoder.parameters())):
                encoder.tower(pixels[: settings["images"]]).tokens.sum().backward()
            return {"predicted": predicted}

        for parameter in encoder.parameters():  # gradients are resident
            parameter.grad = torch.ones_like(parameter)
        return work
    with torch.no_grad():
        features = encoder.tower(pixels)
    if phase == "roll out":
        slots = settings["slots"]
        cache = slots * RolloutEngine.slot_bytes(supervisor.decoder, len(supervisor.prefix), supervisor.sampling)
        predicted = cache + prefill_bytes(supervisor.decoder, supervisor.prefix)

        def work() -> dict[str, Any]:
            engine = RolloutEngine(supervisor.prefix_cache, supervisor.sampling, supervisor.eos_token_ids, slots)
            for block in (*engine.prefix_k, *engine.prefix_v, *engine.own_k, *engine.own_v):
                block.zero_()  # resident
            images = features.select(torch.arange(2 * slots))
            engine.admit(images, list(range(slots)))
            return {"predicted": predicted}

        return work
    supervisor.plan = Plan(**settings)
    (lengths,) = sizes.lengths(sizes.short, 1)

    def replay_of(lengths: list[int]) -> None:
        leaves = VisualFeatures(_leaf(features.tokens[:2]), tuple(_leaf(level[:2]) for level in features.deepstack))
        supervisor.replay(leaves, [Group([[300] * n for n in lengths], [torch.full((n,), 0.1) for n in lengths], {})])

    replay_of([2] * len(lengths))  # libraries take memory once
    longest = lengths if settings["token_budget"] > 1 else [max(lengths)]
    predicted = replay_bytes(supervisor.decoder, supervisor.prefix, supervisor.plan, [longest], len(features.deepstack))

    def work() -> dict[str, Any]:
        replay_of(lengths)
        return {"predicted": predicted}

    return work


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-vl-8b", help="name in bench/models, or a configuration file")
    parser.add_argument("--cards", type=float, nargs="*", default=[24, 40, 80], help="GiB")
    parser.add_argument("--batch", type=int, default=64, help="images of a micro-batch")
    parser.add_argument("--pairs", type=int, default=8, help="K")
    parser.add_argument("--group-size", type=int, default=8, help="G")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--prefix", type=int, default=850, help="tokens of the prompt, images included")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--embedding-dim", type=int, default=4096)
    parser.add_argument("--proxies", type=int, default=1500, help="of the metric loss, in all")
    parser.add_argument("--states", choices=("8bit", "32bit"), default="8bit")
    parser.add_argument("--no-checkpointing", action="store_true", help="of the tower")
    parser.add_argument("--dense", action="store_true", help="language model in bf16, as in the paper")
    parser.add_argument("--quantize-head", action="store_true", help="embedding and head in NF4")
    parser.add_argument("--check", action="store_true", help="predicted beside measured on the CPU")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each, with --check")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    if arguments.check:
        write_json(arguments.json, check(arguments.repeats))
        return
    with exit_on_input_error():
        predictor = Predictor(step_of(arguments))
        print(f"{arguments.model}: resident memory")
        for name, size in predictor.resident.items():
            print(f"  {name:34}{size / GIB:8.2f} GiB")
        figures = {"resident": predictor.resident, "plans": plan_table(predictor)}
        figures["cards"] = cards(predictor, arguments.cards)
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
