"""The GPU beside the CPU, on the whole of what a run does: `python -m bench.against_cpu WHAT [--json FILE]`.

    tiny-step   one optimizer step of the embedded default, fp32: losses and gradients
    bf16-step   the same of a random Qwen3-VL whose widths the compiled NF4 kernel takes, in bf16
    tiny-run    some steps of the embedded default: Recall@1 before and after, to the last digit
    graphs      rollouts by CUDA graphs and without, of that random model: the same tokens; what a graph takes

Each side is a process of its own. In a step the GPU is given the CPU's draws, as one draw that rounding turns changes
all that follows; everything else is its own. What bf16 may change is measured, not assumed: the GPU in bf16 may be
twice as far from the CPU in fp32 as the CPU in bf16 is. Without a GPU both sides are the CPU: to see that it runs.
Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record, write_json
from bench.record import Shape
from saga_fast.config import PRESETS, Config
from saga_fast.supervisor import rollout
from saga_fast.supervisor.graphs import BYTES, Graphs
from saga_fast.supervisor.rollout import RolloutEngine, Sampling

# A model with whole chunks of 128 in every product, and heads of the 8B's size.
SMALL = Shape(
    layers=2, width=256, heads=2, kv_heads=1, head_dim=128, ffn=512, vocabulary=1024, tower_layers=3, tower_width=128,
    tower_heads=2, tower_ffn=256, image_size=64, prefix=320, pairs=4, group=4, short=32, long=56,
)  # fmt: skip
RUN_STEPS = 12
TOLERANCE = 1e-2  # of a gradient in fp32, relative: sums of another order, and TF32 in cuDNN's convolution
LOSS = 1e-3  # of a loss in fp32, relative


def tiny() -> Config:
    """The embedded default on few images, so that a step is a step and little else."""
    config = PRESETS["drawn-birds"]
    data = dataclasses.replace(
        config.data, species=16, images_per_species=6, classes_per_batch=8, images_per_class=4, workers=0
    )
    few = dataclasses.replace(config.rollout, pairs=2, pairs_per_batch=8, max_batches=1, slots=8)
    loud = dataclasses.replace(config.lambda_, adaptive=False)  # which would not listen before some steps are done
    optim = dataclasses.replace(config.optim, steps=4)
    return dataclasses.replace(config, data=data, rollout=few, lambda_=loud, optim=optim)


def random_model(folder: Path, precision: str) -> Config:
    """The same of the model SMALL, in NF4."""
    config = tiny()
    model = str(record.model(SMALL, folder))
    few = dataclasses.replace(config.rollout, max_new_tokens=SMALL.long, slots=4)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, image_size=SMALL.image_size),
        encoder=dataclasses.replace(config.encoder, embedding_dim=96),
        supervisor=dataclasses.replace(config.supervisor, model=model, resident="off"),
        rollout=few,
        optim=dataclasses.replace(config.optim, precision=precision),
    )


def step(config: Config, draws: dict[tuple[int, int], int] | None = None, given: bool = False) -> dict[str, Any]:
    """One optimizer step: its line of the log, the gradients, clipped, on the CPU, and what was drawn, by rollout and
    place. draws: is drawn instead. given: rewards are, as random weights earn none."""
    from saga_fast.train import optimizer_step, set_up

    with tempfile.TemporaryDirectory() as folder:
        t, _, _ = set_up(config, Path(folder) / "run", resume=False)
        if given:
            record.give_rewards(t.supervisor)
        t.encoder.train()
        with drawing(draws) as drawn:
            log = optimizer_step(t, 0, 0.5, lambda buffer: None)
        gradients = {n: p.grad.float().cpu() for n, p in t.encoder.named_parameters() if p.grad is not None}
        return {"log": log, "gradients": gradients, "drawn": drawn()}


@contextmanager
def drawing(draws: dict[tuple[int, int], int] | None) -> Iterator[Callable[[], dict[tuple[int, int], int]]]:
    """Inside, what is sampled is noted, or is `draws` where they say something. Yields what gives the notes."""
    sample, notes = rollout.sample_top_p, []
    table: Tensor | None = None
    if draws is not None:
        rows, steps = (1 + max(key[i] for key in draws) for i in (0, 1))
        table = torch.full((rows, steps), -1)
        for at, token in draws.items():
            table[at] = token

    def noted(logits: Tensor, temperature: float, top_p: float, seed: int, rows: Tensor, step: Tensor) -> Tensor:
        nonlocal table
        token = sample(logits, temperature, top_p, seed, rows, step)
        if table is None:
            notes.append((rows.clone(), step.clone(), token.clone()))
            return token
        table = table.to(rows.device)  # at the first call; a CUDA graph is captured later
        inside = (rows < len(table)) & (step < table.shape[1])
        known = table[rows.clamp(max=len(table) - 1), step.clamp(max=table.shape[1] - 1)]
        return torch.where(inside & (known >= 0), known, token)

    rollout.sample_top_p = noted
    try:
        yield lambda: {
            at: n for r, s, t in notes for *at, n in zip(r.tolist(), s.tolist(), t.tolist()) for at in [tuple(at)]
        }
    finally:
        rollout.sample_top_p = sample


def side(cuda: bool, function: str, *arguments: Any) -> Any:
    """What `function` of this module returns in a process of its own that sees the GPU, or none."""
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "asked.pt", Path(folder) / "told.pt"
        torch.save(arguments, asked)
        hidden = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "bench.against_cpu", "--side", function, str(asked), str(told)]
        done = subprocess.run(command, env={**os.environ, **hidden}, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(f"{function} on the {'GPU' if cuda else 'CPU'}: exit code {done.returncode}")
        return torch.load(told, weights_only=False)


def tiny_side(draws: dict | None) -> dict[str, Any]:
    return step(tiny(), draws)


def small_side(folder: str, precision: str, draws: dict | None) -> dict[str, Any]:
    return step(random_model(Path(folder), precision), draws, given=True)


def difference(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Of two steps: the relative distance of their gradients, of tower and pooler, and of each loss and the drift."""
    found = {}
    for part in ("tower", "pooler"):
        names = [name for name in other["gradients"] if name.startswith(part)]
        a, b = (torch.cat([side["gradients"][name].flatten() for name in names]) for side in (mine, other))
        found[f"gradient_{part}"] = ((a - b).norm() / b.norm()).item()
    for name, value in other["log"].items():
        if name.startswith("loss_"):
            found[name] = abs(mine["log"][name] - value) / max(abs(value), 1e-3)
    return found


def tiny_step() -> dict[str, Any]:
    cpu = side(False, "tiny_side", None)
    gpu = side(True, "tiny_side", cpu["drawn"])
    found = difference(gpu, cpu)
    limits = {name: LOSS if name.startswith("loss_") else TOLERANCE for name in found}
    return judged(found, limits, gpu, cpu)


def bf16_step() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        wide = side(False, "small_side", folder, "fp32", None)
        narrow = side(False, "small_side", folder, "bf16", wide["drawn"])
        gpu = side(True, "small_side", folder, "bf16", wide["drawn"])
    noise, found = difference(narrow, wide), difference(gpu, wide)
    limits = {name: 2 * noise[name] + LOSS for name in found}
    return {**judged(found, limits, gpu, wide), "of_bf16_on_the_cpu": noise}


def judged(found: dict[str, float], limits: dict[str, float], gpu: dict, cpu: dict) -> dict[str, Any]:
    wrong = [
        f"{name}: {found[name]:.2e}, above {limits[name]:.2e}" for name in found if not found[name] <= limits[name]
    ]
    same = "pairs_drawn", "pairs_replayed", "reward", "applied"
    wrong += [
        f"{k}: {gpu['log'].get(k)}, {cpu['log'].get(k)} on the CPU"
        for k in same
        if gpu["log"].get(k) != cpu["log"].get(k)
    ]
    if not cpu["log"]["pairs_replayed"]:
        wrong.append("no pair contributed: nothing was replayed")
    return {"differences": found, "limits": limits, "wrong": wrong, "gpu": gpu["log"], "cpu": cpu["log"]}


def run_side(steps: int) -> dict[str, Any]:
    from saga_fast.train import train

    config = PRESETS["drawn-birds"]
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=steps))
    with tempfile.TemporaryDirectory() as folder:
        final = train(config, Path(folder) / "run")
    return {when: final[when] for when in ("before", "after")}


def tiny_run(steps: int) -> dict[str, Any]:
    """Both sides at once."""
    with ThreadPoolExecutor(2) as pool:
        gpu, cpu = pool.map(lambda cuda: side(cuda, "run_side", steps), (True, False))
    wrong = [
        f"Recall@1 {when}: {gpu[when]['recall_at_1']}, {cpu[when]['recall_at_1']} on the CPU"
        for when in ("before", "after")
        if gpu[when]["recall_at_1"] != cpu[when]["recall_at_1"]
    ]
    if cpu["before"]["recall_at_1"] == cpu["after"]["recall_at_1"]:
        wrong.append("nothing was learnt")
    return {"steps": steps, "wrong": wrong, "gpu": gpu, "cpu": cpu}


def graphs() -> dict[str, Any]:
    """Pairs come and go, so that rows, slots and lengths change; once with few graphs, some of them captured anew."""
    from bench.full_size import Rig

    rig = Rig(SMALL)
    features, lengths = rig.features(SMALL.pairs), SMALL.lengths(SMALL.long)
    sampling, ids = Sampling(SMALL.group, max_new_tokens=max(map(max, lengths))), torch.arange(SMALL.pairs)
    found: dict[str, Any] = {}
    said = {}
    for name, most in (("without", None), ("graphs", 32), ("three graphs", 3)):
        engine = RolloutEngine(rig.prefix_cache, sampling, (rig.eos,), 2)
        engine.graphs = Graphs(most or 32, Eager if most is None or rig.device.type == "cpu" else None)
        rig.wait()
        before = free()
        with record.ending_at(lengths, rig.eos):
            said[name] = engine.run(features, ids)
        rig.wait()
        kept = len(engine.graphs)
        found[name] = {"captured": engine.graphs.captured, "kept": kept}
        if before is not None and most:
            found[name]["bytes_each"] = (before - free()) / kept  # the pool among them
        del engine
        if rig.device.type == "cuda":
            torch.cuda.empty_cache()
    wrong = [f"{name}: other tokens than without" for name in said if said[name] != said["without"]]
    wrong += [f"{name}: {f['kept']} kept" for name, f in found.items() if f["kept"] > (3 if "three" in name else 32)]
    if not found["three graphs"]["captured"] > 3:
        wrong.append("three graphs: nothing was captured anew")
    return {"cases": found, "wrong": wrong, "assumed_bytes_each": BYTES}


class Eager:
    """In a graph's place: runs the work again."""

    def __init__(self, work: Callable[[], None], pool: Any) -> None:
        self.replay = work

    def pool(self) -> None:
        return None


def free() -> int | None:
    """Bytes that the driver has left, where there is a GPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0]


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "tiny-step": tiny_step,
    "bf16-step": bf16_step,
    "tiny-run": tiny_run,
    "graphs": graphs,
}


def main() -> int:
    if sys.argv[1:2] == ["--side"]:
        function, asked, told = sys.argv[2:]
        torch.save(globals()[function](*torch.load(asked, weights_only=False)), told)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--steps", type=int, default=RUN_STEPS, help="of tiny-run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = tiny_run(options.steps) if options.what == "tiny-run" else CASES[options.what]()
    write_json(options.json, found)
    print(json.dumps({name: value for name, value in found.items() if name not in ("gpu", "cpu")}, indent=2))
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
