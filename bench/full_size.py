"""An optimizer step at the size of Qwen3-VL-8B, phase by phase, on one GPU: beside its floors, and rollouts beside
transformers with bitsandbytes.

    python -m bench.full_size [--parts PART …] [--json FILE]
    python -m bench.full_size --card-gib 24 [--seconds 40] [--json FILE]

Weights are random, the language model's in NF4 with nested absmax, bf16 elsewhere, the tower's in fp32 under autocast,
as in a run. Every part is warmed up (kernels compile, graphs are captured) and then timed, waiting for the device.
Before any timing, log π of a replay must be no further from transformers' than transformers' own two attentions are
from each other, give or take (`check`). The step is the trainer's own code on pairs that are given: 16 of 8 rollouts
of about 700 tokens, every other one of which contributes. By default all parts are measured but `generate, static
cache`, for which transformers compiles the model, and that takes minutes.

With --card-gib the process may take no more than such a card leaves it, and two steps run by the memory plan's own
choice: seconds, most bytes allocated and reserved, and the allocator's retries, phase by phase, beside the
prediction. A phase that takes longer than --seconds is stopped, and its results so far are reported.

FILE is written anew after every part, and after every phase of a step.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from bench import record, roofline, write_json
from bench.record import EndingAt, Shape, encoded_before, ending_at
from bench.rollout import TEMPERATURE, TOP_P, generate_inputs
from saga_fast.config import Config
from saga_fast.data import Batch
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.losses import metric_loss
from saga_fast.runtime.memory import GIB, Predictor, Step, SupervisorParts, free_bytes
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.mllm import Mllm
from saga_fast.supervisor.pair import PrefixCache
from saga_fast.supervisor.prompt import build_prefix
from saga_fast.supervisor.replay import Group, Plan
from saga_fast.supervisor.rollout import SYNC_EVERY, RolloutEngine, Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.train import Pair, Training, combine_gradients, embed_batch, replay_buffer, take_gradients
from saga_fast.utils.errors import exit_on_input_error
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
STEPS = 3  # timed, the first to warm up
# The goals: seconds of a decode step of 64 rows, of a replay of 8 groups, twice the floor of one H100, and of a whole
# step; and times the tokens a second of transformers with bitsandbytes.
GOALS = {"decode": 4.5e-3, "replay": 2 * 1.8, "step": 9.0, "rollout": 10.0}
PLAN = Plan(1 << 13)  # a group at a time, which a card of 80 GB can hold whole
CONTEXT = 0.5 / 24  # of a card, what the driver takes for itself


Note = Callable[[dict[str, Any]], None]


def ignore(found: dict[str, Any]) -> None:
    pass


class Rig:
    """A random model of `shape` on the device, taken apart as a run does, and whole for transformers.

    note: is told the figures of a part that is not done yet."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.note: Note = ignore
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
        longest = max(max(map(max, shape.lengths(shape.long, DRAWN * shape.pairs))), 2 * shape.short)
        sampling = Sampling(shape.group, max_new_tokens=longest)
        self.supervisor = Supervisor(self.mllm, asked, "images_first", shape.grid, sampling)
        self.supervisor.plan = PLAN
        record.give_rewards(self.supervisor)
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

    def engine(self, pairs: int, longest: int, resident: bool = False) -> RolloutEngine:
        """For rollouts of `pairs` at once, of up to `longest` tokens. resident: the layers are, see `FrozenDecoder`."""
        question = self.prefix_cache
        if resident:
            decoder = copy.copy(self.mllm.decoder)
            decoder.reside()
            question = PrefixCache(decoder, self.supervisor.prefix)
        return RolloutEngine(question, Sampling(self.shape.group, max_new_tokens=longest), (self.eos,), pairs)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of `work`, to its end on the device, and what it returns."""
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int | None:
        """Most bytes allocated since it was last asked."""
        if self.device.type != "cuda":
            return None
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    def kernels(self, work: Callable[[], Any], most: int = 30) -> list[dict[str, Any]]:
        """Where the device's time goes in `work`: its kernels, the longest first."""
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
    """Its linear layers become bitsandbytes' own, in NF4 with nested absmax."""
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
            layer.support_avx512bf16_for_cpu = False  # a way of its own on CPUs, which rounds to bf16
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


def decode(rig: Rig, pairs: int, resident: bool = False) -> dict[str, Any]:
    """A decode step of `pairs`·G rows that have about half of their longest completion behind them."""
    longest, rows = 2 * rig.shape.long, pairs * rig.shape.group
    engine, features = rig.engine(pairs, longest, resident), rig.features(pairs)
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
    """Tokens a second of rollouts of all pairs at once, the graphs captured before."""
    lengths = rig.shape.lengths(rig.shape.short)
    engine, features = rig.engine(rig.shape.pairs, max(map(max, lengths))), rig.features(rig.shape.pairs)
    with torch.no_grad(), ending_at(lengths, rig.eos):
        runs = [rig.timed(lambda: engine.run(features, torch.arange(rig.shape.pairs))) for _ in range(3)]
    assert all([list(map(len, group)) for group in completions] == lengths for _, completions in runs)
    cold, *warm = (seconds for seconds, _ in runs)
    seconds = statistics.median(warm)
    return {
        "tokens_per_second": sum(map(sum, lengths)) / seconds, "seconds": seconds, "cold_seconds": cold,
        "graphs": engine.graphs and engine.graphs.captured,
    }  # fmt: skip


def generate(rig: Rig, cache: str | None) -> dict[str, Any]:
    """The same rollouts by transformers, all rows in one call, its linear layers bitsandbytes'."""
    shape, lengths = rig.shape, rig.shape.lengths(rig.shape.short)
    features = rig.features(shape.pairs)
    rows = [count for group in lengths for count in group]
    prefix = rig.supervisor.prefix.input_ids.cpu()
    inputs = generate_inputs(prefix, shape.grid, range(shape.pairs), shape.group, rig.model.config.image_token_id)
    inputs = {name: x.to(rig.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    settings = dict(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, cache_implementation=cache)

    def work(counts: list[int]) -> Tensor:
        ending = EndingAt(counts, rig.eos)
        ending.lengths = ending.lengths.to(rig.device)
        return rig.model.generate(**inputs, **settings, max_new_tokens=max(counts), logits_processor=[ending])

    with torch.no_grad(), encoded_before(rig.model, features):
        work([4] * len(rows))  # warm
        seconds, out = rig.timed(lambda: work(rows))
    assert [(row == rig.eos).nonzero()[0].item() + 1 for row in out[:, len(prefix) :]] == rows
    return {"tokens_per_second": sum(rows) / seconds, "seconds": seconds}


def groups(rig: Rig) -> list[Group]:
    """One a pair, half of whose rollouts are rewarded and describe both images."""
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
    """All groups, their backward and the anchor attention included."""
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


class Phases:
    """The phases of a step: `found` has of each its seconds, the most bytes allocated and reserved in it, and how often
    the allocator had to give back what it kept and try again. note: called after each, to write that down."""

    def __init__(self, rig: Rig, limit: float | None, note: Callable[[], None]) -> None:
        self.rig, self.limit, self.note = rig, limit, note
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, name: str, work: Callable[[], Any], how_far: Callable[[], dict[str, Any]] = dict) -> Any:
        """What `work` returns. Raises TookTooLong. how_far: figures of it, also of one that is broken off."""
        self.rig.peak()
        before, started = retries(), time.perf_counter()
        self.found[name] = {}
        try:
            with within(self.limit, name):
                return self.rig.timed(work)[1]
        except TookTooLong:
            self.found[name]["broken_off"] = True
            raise
        finally:
            self.found[name] |= {"seconds": time.perf_counter() - started, **how_far()}
            if self.rig.device.type == "cuda":
                self.found[name] |= {
                    "reserved_bytes": torch.cuda.max_memory_reserved(),
                    "peak_bytes": self.rig.peak(),
                    "allocator_retries": retries() - before,
                }
            self.note()


class TookTooLong(Exception):
    pass


@contextmanager
def within(seconds: float | None, name: str) -> Iterator[None]:
    """Breaks off what is inside after `seconds`, between two launches. Main thread only."""

    def stop(*_: Any) -> None:
        raise TookTooLong(f"{name}: not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def retries() -> int:
    """How often the allocator has given back what it kept, to try again."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if torch.cuda.is_available() else 0


def training(rig: Rig) -> Training:
    """What a step needs besides its batch, with the optimizer's states in 8 bits."""
    dml = metric_loss("potential-field", CLASSES, rig.shape.width).to(rig.device)
    parameters = [*rig.encoder.train().parameters(), *dml.parameters()]
    adamw = bitsandbytes.optim.AdamW8bit if rig.device.type == "cuda" else torch.optim.AdamW
    optimizer = adamw(parameters, lr=2e-5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return Training(Config(), rig.encoder, rig.supervisor, dml, optimizer, schedule, lambda: rig.autocast)


def one_step(rig: Rig, t: Training, engine: RolloutEngine, phases: Phases) -> None:
    """Phases A, B and C of `saga_fast.train` and the update. Rewards are given, and what is drawn at all is drawn."""
    shape, supervisor = rig.shape, rig.supervisor
    drawn = DRAWN * shape.pairs
    lengths, labels = shape.lengths(shape.long, drawn), torch.arange(IMAGES) // (IMAGES // CLASSES)
    batch = Batch(list(range(IMAGES)), shape.pixels(IMAGES // 2), labels)
    syncs, advance = 0, engine.advance

    def counted() -> list[Any]:
        nonlocal syncs
        syncs += 1
        return advance()

    def roll_out() -> list[Pair]:
        pairs = torch.arange(2 * drawn, device=rig.device).view(-1, 2) % IMAGES
        with torch.no_grad():
            completions = engine.run(features.select(pairs.flatten()), torch.arange(drawn))
        rewards, _ = supervisor.judge(completions, [True] * drawn)
        advantages, _, _ = group_advantage(rewards)
        return [
            Pair(
                images.cpu(), batch.pixels[images.cpu()], features.select(images), completions[i], rewards[i],
                advantages[i],
            )
            for i, images in enumerate(pairs)
        ][::DRAWN]  # fmt: skip

    def update() -> None:
        combine_gradients(t, gradient_dml, take_gradients(t.parameters))
        nn.utils.clip_grad_norm_(t.parameters, t.config.optim.clip).item()
        t.optimizer.step()
        t.optimizer.zero_grad(set_to_none=True)

    engine.drop(engine.pair_ids)  # of a step that was broken off
    t.optimizer.zero_grad(set_to_none=True)
    _, features, _ = phases.run("embed", lambda: embed_batch(t, batch))
    gradient_dml = take_gradients(t.parameters)
    engine.advance = counted
    try:
        with ending_at(lengths, rig.eos):
            buffer = phases.run("roll out", roll_out, lambda: {"decode_steps": SYNC_EVERY * syncs})
    finally:
        engine.advance = advance
    phases.run("replay", lambda: replay_buffer(t, buffer))
    phases.run("update", update)


def expandable() -> bool | None:
    """Whether the allocator's segments grow, as `saga_fast` asks."""
    if not torch.cuda.is_available():
        return None
    return all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())


def steps(rig: Rig, room: int, checkpointing: bool, count: int, limit: float | None, note: Note) -> dict[str, Any]:
    """Steps as the memory plan has them in `room` bytes. limit: seconds of a phase. note: called after each."""
    supervisor, t = rig.supervisor, training(rig)
    settings = Step(
        rig.encoder, SupervisorParts.of(supervisor), IMAGES, rig.shape.pairs, t.dml, 8, checkpointing,
        rig.autocast._enabled,
    )  # fmt: skip
    supervisor.plan, supervisor.slots, footprint = Predictor(settings).choose(room)
    rig.encoder.tower.checkpoint_blocks(checkpointing)
    if supervisor.plan.resident:
        supervisor.decoder.reside()
    print(f"{footprint.table()}\n{supervisor.slots} pairs roll out at once; {supervisor.plan}", flush=True)
    drawn = rig.shape.lengths(rig.shape.long, DRAWN * rig.shape.pairs)
    found: dict[str, Any] = {
        "room_bytes": room, "plan": dataclasses.asdict(supervisor.plan), "slots": supervisor.slots,
        "checkpointing": checkpointing, "foretold": {"peak_bytes": footprint.peak, **footprint._asdict()},
        "every_step": [],
        "drawn_tokens": sum(map(sum, drawn)), "replayed_tokens": sum(map(sum, drawn[::DRAWN])),
    }  # fmt: skip
    note(found)
    engine = supervisor.engine
    try:
        for _ in range(count):
            phases = Phases(rig, limit, lambda: note(found))
            found["every_step"].append(phases.found)
            one_step(rig, t, engine, phases)
            print({name: f"{figures['seconds']:.1f} s" for name, figures in phases.found.items()}, flush=True)
    finally:
        found |= {
            "halved": t.oom.limits,
            "expandable": expandable(),
            "graphs": engine.graphs and engine.graphs.captured,
        }
        if rig.device.type == "cuda":
            every = [phase for run in found["every_step"] for phase in run.values() if "peak_bytes" in phase]
            found |= {name: max((phase[name] for phase in every), default=0) for name in MEMORY}
            found["peak_over_foretold"] = found["peak_bytes"] / footprint.peak
        note(found)
    cold, *warm = [{name: figures["seconds"] for name, figures in run.items()} for run in found["every_step"]]
    found |= {
        "seconds": statistics.median(sum(run.values()) for run in warm), "cold_seconds": sum(cold.values()),
        "phases": {name: statistics.median(run[name] for run in warm) for name in cold},
    }  # fmt: skip
    note(found)
    return found


def step(rig: Rig) -> dict[str, Any]:
    """In all the memory that there is, nothing of the tower computed again."""
    found = steps(rig, free_bytes(rig.device), False, STEPS, None, rig.note)
    assert not found["halved"], f"a phase did not fit: {found['halved']}"
    return found


def on_card(rig: Rig, gib: float, limit: float, note: Note) -> dict[str, Any]:
    """Two steps in what a card of `gib` leaves to a process, as the memory plan has them."""
    room = int(gib * (1 - CONTEXT) * GIB)
    if rig.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / torch.cuda.get_device_properties(0).total_memory))
    found = steps(rig, room, True, 2, limit, lambda found: note({"card_gib": gib, **found}))
    found["card_gib"] = gib
    if rig.device.type == "cuda":
        with within(limit, "profile"):
            found["kernels"] = {"replay of a group": rig.kernels(lambda: replay_one(rig))}
    note(found)
    return found


MEMORY = ("peak_bytes", "reserved_bytes")


def replay_one(rig: Rig) -> None:
    leaves = rig.features(1).map(lambda level: level.clone().requires_grad_())
    rig.supervisor.replay(leaves, groups(rig)[:1])


PARTS: dict[str, Callable[[Rig], dict[str, Any]]] = {
    "check": check,
    "decode, 64 rows": partial(decode, pairs=8),
    "decode, 128 rows": partial(decode, pairs=16),
    "step": step,
    "rollout": rollout,
    "replay": replays,
    "decode, 64 rows, resident": partial(decode, pairs=8, resident=True),
    "decode, 128 rows, resident": partial(decode, pairs=16, resident=True),
    "decode, 8 rows": partial(decode, pairs=1),
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
    parser.add_argument("--card-gib", type=float, help="two steps within what a card of so many GiB leaves a process")
    parser.add_argument("--seconds", type=float, default=40, help="of a phase at most, with --card-gib")
    options = parser.parse_args()
    started = time.perf_counter()
    rig = Rig(SHAPES[options.shape])
    print(f"model: {time.perf_counter() - started:.0f} s", flush=True)
    if options.card_gib:
        try:
            with exit_on_input_error():
                on_card(
                    rig, options.card_gib, options.seconds,
                    lambda found: write_json(options.json, {"shape": options.shape, **found}),
                )  # fmt: skip
        except TookTooLong as late:
            print(late, flush=True)
            return 1
        return 0
    found: dict[str, Any] = {}

    def write() -> None:
        write_json(options.json, {"shape": options.shape, "cases": found, "ratios": ratios(found), "goals": GOALS})

    for name in options.parts:
        started = time.perf_counter()

        def note(figures: dict[str, Any], name: str = name) -> None:
            found[name] = {**figures, "under_way": True}
            write()

        rig.note = note
        try:
            found[name] = PARTS[name](rig)
        except Exception as problem:  # the other parts can be measured all the same
            traceback.print_exc()
            found[name] = {"failed": f"{type(problem).__name__}: {problem}"}
        summary = {key: value for key, value in found[name].items() if key not in ("kernels", "runs", "every_step")}
        print(f"{name} ({time.perf_counter() - started:.0f} s): {summary}", flush=True)
        write()
    return int(any("failed" in figures for figures in found.values()))


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase, and times the tokens a second of the fastest `generate`: what the goals are of."""
    right = {name: figures for name, figures in found.items() if "failed" not in figures and "seconds" in figures}
    named = {"decode": "decode, 64 rows", "replay": "replay", "step": "step"}
    summary = {name: right[case]["seconds"] for name, case in named.items() if case in right}
    rivals = [figures["tokens_per_second"] for name, figures in right.items() if name.startswith("generate")]
    if rivals and "rollout" in right:
        summary["rollout"] = right["rollout"]["tokens_per_second"] / max(rivals)
    return summary


if __name__ == "__main__":
    raise SystemExit(main())
