"""An optimizer step at the size of Qwen3-VL-8B, phase by phase, on one GPU, compared with the roofline's floors; and
rollouts compared with transformers and bitsandbytes.

    python -m bench.full_size [--parts PART …] [--json FILE]

Weights are random, the language model's in NF4 with nested absmax, bf16 elsewhere, the tower's in fp32 under autocast,
as in a run. Every part is warmed up (kernels compile, graphs are captured) and then timed, waiting for the device.
Before any timing, the difference of a replay's log π from transformers' must be about as small as that between
transformers' own two attentions (`check`). The step is the trainer's own code on fixed pairs: 16 of 8 rollouts of about
700 tokens, every other one of which contributes. FILE is rewritten after every part. By default all parts
are measured but `generate, static cache`, for which transformers compiles the model, and that takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from bench import record, roofline, write_json
from bench.record import EndingAt, Shape, ending_at
from bench.rollout import TEMPERATURE, TOP_P, generate_inputs
from saga_fast.config import Config
from saga_fast.data import Batch
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.losses import metric_loss
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.mllm import Mllm
from saga_fast.supervisor.prompt import build_prefix
from saga_fast.supervisor.replay import Group, Plan
from saga_fast.supervisor.rollout import SYNC_EVERY, RolloutEngine, Sampling
from saga_fast.supervisor.supervisor import AttributePositions, Supervisor
from saga_fast.train import Pair, Training, combine_gradients, embed_batch, replay_buffer, take_gradients
from saga_kernels import group_advantage

SHAPES = {
    "8b": Shape(
        layers=36, width=4096, heads=32, kv_heads=8, head_dim=128, ffn=12_288, vocabulary=151_936, tower_layers=27,
        tower_width=1152, tower_heads=16, tower_ffn=4304,
    ),
    "small": record.SHAPES["small"],  # to see that it runs, on a CPU too
}  # fmt: skip
DRAWN = 2  # pairs drawn for one that contributes
IMAGES, CLASSES = 64, 16  # of a micro-batch
STEPS = 4  # timed, the first to warm up
# The goals: seconds of a decode step and of a replay of 8 groups, twice the floor of one H100; of a whole step; and
# times the tokens a second of transformers with bitsandbytes.
GOALS = {"decode": 2 * 1.5e-3, "replay": 2 * 1.8, "step": 8.0, "rollout": 10.0}
PLAN = Plan(1 << 13)  # a group at a time, which a card of 80 GB can hold whole


class Given(Supervisor):
    """A supervisor whose rollouts count as descriptions of both images, whatever their text: the weights are random."""

    def attribute_positions(self, completions: Sequence[Sequence[int]]) -> list[AttributePositions]:
        half, name = min(map(len, completions)) // 2, self.prompt.attributes[0]
        return [({name: list(range(1, half))}, {name: list(range(half, 2 * half))})] * len(completions)


class Rig:
    """A random model of `shape` on the device, taken apart as a run does, and whole for transformers."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)
        tokens = record.tokenizer(shape.vocabulary)
        torch.manual_seed(0)
        with self.device:
            model = Qwen3VLForConditionalGeneration._from_config(record.configuration(shape, tokens), dtype=self.dtype)
            nn.init.normal_(model.lm_head.weight, std=4 * shape.width**-0.5)
            model.requires_grad_(False)
            quantize(model.model.language_model)
            self.encoder = Encoder.from_tower(model.model.visual, "attention", shape.width, shape.image_size)
        model.generation_config = GenerationConfig(eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
        self.model = model.eval()
        self.eos = tokens.eos_token_id
        decoder = FrozenDecoder(model.model.language_model, model.lm_head)
        self.mllm = Mllm(model.model.visual, decoder, tokens, (self.eos,), record.SPECIAL[4])
        asked = record.question(shape, tokens)
        self.supervisor = Given(self.mllm, asked, "images_first", shape.grid, Sampling(shape.group), plan=PLAN)
        self.prefix = build_prefix(tokens, asked.instruction(), shape.grid[0] * shape.grid[1])

    @property
    def prefix_cache(self):
        return self.supervisor.prefix_cache

    @torch.no_grad()
    def features(self, pairs: int) -> VisualFeatures:
        with self.autocast:
            return self.encoder.tower(self.shape.pixels(pairs).to(self.device)).map(lambda x: x.to(self.dtype))

    def completions(self, mean: int, pairs: int) -> list[list[list[int]]]:
        """Random tokens [pair][g], ragged around `mean`."""
        generator = torch.Generator().manual_seed(0)
        words = (300, self.shape.vocabulary - 16)
        lengths = self.shape.lengths(mean, pairs)
        return [[torch.randint(*words, (n,), generator=generator).tolist() for n in group] for group in lengths]

    def engine(self, pairs: int, longest: int) -> RolloutEngine:
        """For rollouts of `pairs` at once, of up to `longest` tokens."""
        return RolloutEngine(self.prefix_cache, Sampling(self.shape.group, max_new_tokens=longest), (self.eos,), pairs)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds of `work`, synchronised with the device; its result)."""
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int | None:
        """Peak of allocated bytes since the last call."""
        if self.device.type != "cuda":
            return None
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    def kernels(self, work: Callable[[], Any], most: int = 30) -> list[dict[str, Any]]:
        """Device time of `work` by kernel, the longest first."""
        if self.device.type != "cuda":
            return []
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            work()
            torch.cuda.synchronize()
        rows = [row for row in profile.key_averages() if row.self_device_time_total and not row.self_cpu_time_total]
        rows.sort(key=lambda row: -row.self_device_time_total)
        return [{"name": r.key[:90], "calls": r.count, "ms": r.self_device_time_total / 1e3} for r in rows[:most]]


def quantize(language_model: nn.Module) -> None:
    """Replaces the linear layers by bitsandbytes' own, in NF4 with nested absmax."""
    for name, linear in list(language_model.named_modules()):
        if isinstance(linear, nn.Linear):
            dtype, weight = linear.weight.dtype, linear.weight.data
            layer = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            packed = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
            layer.weight = packed.to(weight.device)
            language_model.set_submodule(name, layer)


def check(rig: Rig) -> dict[str, Any]:
    """Mean |Δ log π| of a replayed group to transformers, and of transformers' eager attention to its SDPA."""
    (completions,) = rig.completions(rig.shape.short, 1)
    features = rig.features(1)
    leaves = features.map(lambda level: level.clone().requires_grad_())
    found = rig.supervisor.replay(leaves, [Group(completions, [torch.ones(len(c)) / len(c) for c in completions], {})])
    ours = torch.cat(found.log_probs[0])

    @torch.no_grad()
    def theirs(attention: str) -> Tensor:
        rig.model.set_attn_implementation(attention)
        pair, log_probs = rig.supervisor.prefix, []
        for completion in completions:
            ids = torch.cat((pair.input_ids, torch.tensor(completion, device=rig.device)))
            at = pair.next_position + torch.arange(len(completion), device=rig.device).expand(3, -1)
            visual = torch.zeros(len(ids), dtype=torch.bool, device=rig.device)
            visual[pair.images.flatten()] = True
            embedded = rig.model.get_input_embeddings()(ids)
            embedded = embedded.index_copy(0, pair.images.flatten(), features.tokens.flatten(0, 1).to(rig.dtype))
            hidden = rig.model.model.language_model(
                inputs_embeds=embedded[None], position_ids=torch.cat((pair.positions, at), 1)[:, None], use_cache=False,
                visual_pos_masks=visual[None],
                deepstack_visual_embeds=[level.flatten(0, 1).to(rig.dtype) for level in features.deepstack],
            ).last_hidden_state[0, len(pair) - 1 : -1]  # fmt: skip
            logits = rig.model.lm_head(hidden).float() / TEMPERATURE
            log_probs.append(logits.log_softmax(-1).gather(1, ids[len(pair) :, None])[:, 0])
        return torch.cat(log_probs)

    sdpa, eager = theirs("sdpa"), theirs("eager")
    rig.model.set_attn_implementation("sdpa")
    difference, noise = (ours - sdpa).abs().mean().item(), (eager - sdpa).abs().mean().item()
    assert difference <= 2 * noise + 1e-4, f"log π differs from transformers' by {difference}, its own by {noise}"
    gradient = torch.stack([leaf.grad.norm() for leaf in leaves.levels])
    assert gradient.isfinite().all() and (gradient > 0).all(), f"gradients at the visual inputs: {gradient.tolist()}"
    return {"log_prob_difference": difference, "transformers_own": noise, "log_prob": sdpa.mean().item()}


def decode(rig: Rig, pairs: int) -> dict[str, Any]:
    """A decode step of `pairs`·G rows that have about half of their longest completion behind them."""
    longest, rows = 2 * rig.shape.long, pairs * rig.shape.group
    engine, features = rig.engine(pairs, longest), rig.features(pairs)
    with ending_at([[longest] * rig.shape.group] * pairs, rig.eos):
        prefill, _ = rig.timed(lambda: engine.admit(features, range(pairs)))
        syncs = rig.shape.short // SYNC_EVERY + 2
        for _ in range(syncs):
            engine.advance()
        seconds = [rig.timed(engine.advance)[0] / SYNC_EVERY for _ in range(4)]
        kernels = rig.kernels(engine.advance)
    lines = [line for line in roofline.decode(rows)]
    return {
        "rows": rows, "own_tokens": SYNC_EVERY * syncs, "seconds": statistics.median(seconds), "runs": seconds,
        "prefill_cold": prefill, "floor": sum(line.calls * line.floor for line in lines), "kernels": kernels,
    }  # fmt: skip


def rollout(rig: Rig) -> dict[str, Any]:
    """Tokens per second of rollouts of all pairs at once, with graphs captured before."""
    lengths = rig.shape.lengths(rig.shape.short)
    engine, features = rig.engine(rig.shape.pairs, max(map(max, lengths))), rig.features(rig.shape.pairs)
    with torch.no_grad(), ending_at(lengths, rig.eos):
        runs = [rig.timed(lambda: engine.run(features, torch.arange(rig.shape.pairs))) for _ in range(3)]
    assert all([list(map(len, group)) for group in completions] == lengths for _, completions in runs)
    cold, *warm = (seconds for seconds, _ in runs)
    seconds = statistics.median(warm)
    return {
        "tokens_per_second": sum(map(sum, lengths)) / seconds, "seconds": seconds, "cold_seconds": cold,
        "graphs": len(engine.graphs),
    }  # fmt: skip


def generate(rig: Rig, cache: str | None) -> dict[str, Any]:
    """The same rollouts by transformers, all rows in one call, its linear layers bitsandbytes'."""
    shape, lengths = rig.shape, rig.shape.lengths(rig.shape.short)
    features = rig.features(shape.pairs)
    rows = [count for group in lengths for count in group]
    prefix = rig.supervisor.prefix.input_ids.cpu()
    inputs = generate_inputs(
        prefix, features, shape.grid, range(shape.pairs), shape.group, rig.model.config.image_token_id
    )
    inputs = {name: x.to(rig.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    settings = dict(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, cache_implementation=cache)

    def work(counts: list[int]) -> Tensor:
        ending = EndingAt(counts, rig.eos)
        ending.lengths = ending.lengths.to(rig.device)
        return rig.model.generate(**inputs, **settings, max_new_tokens=max(counts), logits_processor=[ending])

    with torch.no_grad():
        work([4] * len(rows))  # warm
        seconds, out = rig.timed(lambda: work(rows))
    assert [(row == rig.eos).nonzero()[0].item() + 1 for row in out[:, len(prefix) :]] == rows
    return {"tokens_per_second": sum(rows) / seconds, "seconds": seconds}


def groups(rig: Rig) -> list[Group]:
    """One group per pair: half of its rollouts have reward 1 and describe both images."""
    completions = rig.completions(rig.shape.long, rig.shape.pairs)
    total, made = sum(len(c) for group in completions for c in group), []
    for group in completions:
        coefficients = [torch.full((len(c),), (-1.0) ** g / total) for g, c in enumerate(group)]
        attribute_positions = rig.supervisor.attribute_positions(group)
        spans = [[[at for tokens in item.values() for at in tokens] for item in items] for items in attribute_positions]
        target_positions = {g: (spans[g][0], spans[g][1]) for g in range(1, len(group), 2)}
        made.append(Group(group, coefficients, target_positions))
    return made


def replays(rig: Rig) -> dict[str, Any]:
    """Replay of all groups, with backward and anchor attention."""
    work = groups(rig)
    features = rig.features(rig.shape.pairs)
    leaves = features.map(lambda level: level.clone().requires_grad_())
    run = partial(rig.supervisor.replay, leaves, work)
    rig.peak()
    cold, seconds = (rig.timed(run)[0] for _ in range(2))
    return {
        "seconds": seconds, "cold_seconds": cold, "peak_bytes": rig.peak(),
        "tokens": sum(rig.shape.prefix + sum(map(len, group.completions)) for group in work),
        "floor": sum(line.calls * line.floor for line in roofline.replay()),
        "kernels": rig.kernels(lambda: rig.supervisor.replay(leaves, work[:1])),
    }  # fmt: skip


def step(rig: Rig) -> dict[str, Any]:
    """Phases A, B and C of `saga_fast.train` and the update, with fixed rewards and every drawn pair used."""
    shape, config, supervisor = rig.shape, Config(), rig.supervisor
    drawn = DRAWN * shape.pairs
    lengths, labels = shape.lengths(shape.long, drawn), torch.arange(IMAGES, device=rig.device) // (IMAGES // CLASSES)
    batch = Batch(list(range(IMAGES)), shape.pixels(IMAGES // 2), labels.cpu())
    encoder = rig.encoder.train()
    dml = metric_loss("potential-field", CLASSES, shape.width).to(rig.device)
    parameters = [*encoder.parameters(), *dml.parameters()]
    adamw = bitsandbytes.optim.AdamW8bit if rig.device.type == "cuda" else torch.optim.AdamW
    optimizer = adamw(parameters, lr=2e-5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    t = Training(config, encoder, supervisor, dml, optimizer, schedule, lambda: rig.autocast)
    engine = rig.engine(drawn, max(map(max, lengths)))
    rewards = (torch.arange(shape.group) % 2).float()
    advantages, _, _ = group_advantage(rewards.expand(drawn, -1))

    def work() -> dict[str, float]:
        spent = {}

        def phase(name: str, run: Callable[[], Any]) -> Any:
            spent[name], result = rig.timed(run)
            return result

        def rollout_pairs() -> list[Pair]:
            pairs = torch.arange(2 * drawn, device=rig.device).view(-1, 2) % IMAGES
            with torch.no_grad():
                completions = engine.run(features.select(pairs.flatten()), torch.arange(drawn))
            supervisor.judge(
                completions, [True] * drawn
            )  # random words give no verdict; reading them costs all the same
            return [
                Pair(
                    images.cpu(),
                    batch.pixels[images.cpu()],
                    features.select(images),
                    completions[i],
                    rewards,
                    advantages[i],
                )
                for i, images in enumerate(pairs)
            ][::DRAWN]

        def update() -> None:
            combine_gradients(t, gradient_dml, take_gradients(parameters))
            nn.utils.clip_grad_norm_(parameters, config.optim.clip).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        _, features, _ = phase("embed", lambda: embed_batch(t, batch))
        gradient_dml = take_gradients(parameters)
        with ending_at(lengths, rig.eos):
            buffer = phase("roll out", rollout_pairs)
        phase("replay", lambda: replay_buffer(t, buffer))
        phase("update", update)
        return spent

    rig.peak()
    # The second step may still grow memory, as what the first left lies between its blocks.
    cold, *warm = (rig.timed(work) for _ in range(STEPS))
    assert not t.oom.limits, f"a phase did not fit: {t.oom.limits}"
    return {
        "seconds": statistics.median(seconds for seconds, _ in warm), "cold_seconds": cold[0],
        "phases": {name: statistics.median(spent[name] for _, spent in warm) for name in cold[1]},
        "runs": [{"seconds": seconds, **spent} for seconds, spent in (cold, *warm)],
        "drawn_tokens": sum(map(sum, lengths)), "replayed_tokens": sum(map(sum, lengths[::DRAWN])),
        "peak_bytes": rig.peak(), "reserved_bytes": torch.cuda.memory_reserved(),
    }  # fmt: skip


PARTS: dict[str, Callable[[Rig], dict[str, Any]]] = {
    "check": check,
    "decode, 8 rows": partial(decode, pairs=1),
    "decode, 64 rows": partial(decode, pairs=8),
    "decode, 128 rows": partial(decode, pairs=16),
    "rollout": rollout,
    "replay": replays,
    "step": step,
    "generate": partial(generate, cache=None),
    "generate, static cache": partial(generate, cache="static"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS)[:-1], help="by default all but the last"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    rig = Rig(SHAPES[options.shape])
    print(f"model: {time.perf_counter() - started:.0f} s", flush=True)
    found: dict[str, Any] = {}
    for name in options.parts:
        started = time.perf_counter()
        try:
            found[name] = PARTS[name](rig)
        except Exception as problem:  # the other parts can be measured all the same
            traceback.print_exc()
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"}
        summary = {key: value for key, value in found[name].items() if key not in ("kernels", "runs")}
        print(f"{name} ({time.perf_counter() - started:.0f} s): {summary}", flush=True)
        write_json(options.json, {"shape": options.shape, "cases": found, "ratios": ratios(found), "goals": GOALS})
    return int(any("failed" in figures for figures in found.values()))


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase, and the rollouts' tokens per second over those of the fastest `generate`; the goals are in
    these."""
    right = {name: figures for name, figures in found.items() if "failed" not in figures}
    named = {"decode": "decode, 64 rows", "replay": "replay", "step": "step"}
    summary = {name: right[case]["seconds"] for name, case in named.items() if case in right}
    rivals = [figures["tokens_per_second"] for name, figures in right.items() if name.startswith("generate")]
    if rivals and "rollout" in right:
        summary["rollout"] = right["rollout"]["tokens_per_second"] / max(rivals)
    return summary


if __name__ == "__main__":
    raise SystemExit(main())
