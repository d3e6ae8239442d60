"""The predicted memory of a step, against the memory of real tensors."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.runtime import memory
from saga_fast.runtime.memory import (
    GIB,
    FixedPlan,
    LiveBytes,
    Predictor,
    Step,
    SupervisorParts,
    on_meta,
    replay_bytes,
    tower_activation_bytes,
)
from saga_fast.supervisor import graphs
from saga_fast.supervisor.decoder import FUSED_ROWS, Projection
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.prompt import PROMPTS, build_prefix
from saga_fast.supervisor.replay import Group, Plan, replay_groups
from saga_fast.supervisor.rollout import RolloutEngine, Sampling
from saga_fast.tiny import SUPERVISOR
from saga_fast.towers import load_tower
from saga_fast.utils.errors import InputError

from ...sweep import sweep

WHOLE = [Plan(1 << 16, policy) for policy in ("none", "mlp", "full")]
SLICES = [Plan(1, "none", "none"), Plan(1, "mlp", "full")]
LENGTHS = [[40, 40], [40, 40]]


@pytest.fixture(scope="module")
def tiny():
    mllm = load_mllm(SUPERVISOR)
    prefix = build_prefix(mllm.tokenizer, PROMPTS["drawn-birds"].instruction(), 49)
    encoder = Encoder.from_tower(mllm.visual, "attention", 192, 112)
    return encoder, mllm.decoder, PairPrefix.of(prefix, (7, 7))


SHORT = Sampling(4, max_new_tokens=64)


def step(tiny, sampling=SHORT, **settings) -> Step:
    encoder, decoder, prefix = tiny
    parts = SupervisorParts(decoder, prefix, sampling)
    return Step(encoder, parts, **{"batch": 8, "pairs": 4, "autocast": False, **settings})


@pytest.mark.parametrize("plan", sweep(WHOLE + SLICES), ids=str)
def test_a_replay_is_predicted_on_the_meta_device(tiny, plan):
    _, decoder, prefix = tiny
    prefix_cache, width = PrefixCache(decoder, prefix), decoder.embedding.shape[1]
    drawn = [torch.randn(4, 49, width).requires_grad_() for _ in range(4)]
    groups = [Group([[3] * n for n in group], [torch.ones(n) for n in group], {}) for group in LENGTHS]
    logits = 4 * decoder.head.shape[0] * min(sum(map(sum, LENGTHS)), plan.token_budget)
    with LiveBytes("cpu", {torch.ops.saga_kernels.token_logprob.default: lambda *_: logits}) as live:
        replay_groups(prefix_cache, VisualFeatures(drawn[0], tuple(drawn[1:])), groups, 1.0, -1, plan)
    assert replay_bytes(decoder, prefix, plan, LENGTHS, 3) == pytest.approx(live.peak, rel=0.02)


def test_recomputing_and_slicing_take_less(tiny):
    _, decoder, prefix = tiny
    whole = [replay_bytes(decoder, prefix, plan, LENGTHS, 3) for plan in WHOLE]
    assert whole == sorted(whole, reverse=True) and len(set(whole)) == 3
    sliced = [replay_bytes(decoder, prefix, plan, LENGTHS[:1], 3) for plan in SLICES]
    assert sliced == sorted(sliced, reverse=True) and sliced[0] < whole[0]


def test_what_autograd_keeps_of_the_tower_grows_by_the_image(tiny):
    tower = tiny[0].tower
    fixed, each = tower_activation_bytes(tower, 112, autocast=False)
    pixels = torch.zeros(6, 3, 112, 112, dtype=torch.uint8)
    tower(pixels)  # positions are made once
    with LiveBytes("cpu") as live:
        out = tower(pixels)
    kept = live.bytes - sum(x.untyped_storage().nbytes() for x in (out.tokens, *out.deepstack))
    assert fixed + 6 * each == pytest.approx(kept, rel=0.1)


@pytest.mark.slow
def test_more_memory_buys_time_and_too_little_is_refused_with_the_numbers(tiny):
    long = Sampling(8, max_new_tokens=256)  # so that the tower is not what takes most
    predictor = Predictor(step(tiny, long))
    ample, slots, footprint = predictor.choose(GIB)
    assert (ample.recompute, slots) == ("none", 8) and footprint.peak <= GIB
    scarce, fewer, tight = predictor.choose(int(footprint.peak * 0.9))
    assert tight.peak <= 0.9 * footprint.peak
    assert predictor.seconds(scarce, fewer) > predictor.seconds(ample, slots)
    with pytest.raises(InputError, match=r"^memory: a step takes 0\.\d\d GiB at least \(.*8bit"):
        predictor.choose(GIB // 50)


def test_what_the_user_fixes_stays(tiny):
    plan, slots, _ = Predictor(step(tiny)).choose(GIB, FixedPlan(100, "mlp", "full", 3))
    assert (plan, slots) == (Plan(100, "mlp", "full"), 3)


def test_states_checkpointing_and_slots_count(tiny):
    _, decoder, prefix = tiny
    plan, wide = Plan(1 << 16), Predictor(step(tiny, batch=64)).footprint(Plan(1 << 16), 2)
    narrow = Predictor(step(tiny, batch=64, states_bits=8, checkpointing=True)).footprint(plan, 2)
    assert 4 * narrow.resident["AdamW's states, 8 bits"] == wide.resident["AdamW's states, 32 bits"]
    assert narrow.phases["A. embed"] < 0.5 * wide.phases["A. embed"]
    more = Predictor(step(tiny, batch=64)).footprint(plan, 3)
    slot = RolloutEngine.slot_bytes(decoder, len(prefix), Sampling(4, max_new_tokens=64))
    assert sum(more.resident.values()) - sum(wide.resident.values()) == slot


def test_without_a_loss_on_embeddings_the_tower_keeps_no_graph(tiny):
    with_loss, without = (Predictor(step(tiny, embeds=embeds)) for embeds in (True, False))
    phases = [predictor.footprint(Plan(), 2).phases for predictor in (with_loss, without)]
    assert phases[1]["A. embed"] == 2 * 8 * without.image_features < phases[0]["A. embed"]
    assert phases[1]["C. replay"] == phases[0]["C. replay"]


@pytest.mark.slow
def test_a_plan_that_does_not_fit_any_more_is_chosen_anew_for_a_resumed_run(tiny):
    """What an 80 GB card held, on one of half the size."""
    predictor = Predictor(step(tiny))
    free = 2 * predictor.footprint(plan := Plan(1 << 16, "none"), 8).peak
    fixed = FixedPlan(plan.token_budget, plan.recompute, plan.prefix_recompute, 8)
    assert predictor.choose(free, fixed, may_replan=True)[:2] == predictor.choose(free, fixed)[:2] == (plan, 8)
    small = int(predictor.choose(free, FixedPlan(1, "full", "full", 1))[2].peak * 1.2)
    with pytest.raises(InputError, match="memory: a step takes"):
        predictor.choose(small, fixed)
    assert predictor.choose(small, fixed, may_replan=True) == predictor.choose(small)
    with pytest.raises(InputError, match="memory: a step takes"):
        predictor.choose(1, fixed, may_replan=True)


def group(folder: Path, limit: str | int, used: int, cached: tuple[int, int], version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used)):
        (folder / name).write_text(f"{value}\n")
    stat = f"anon 5\nactive_file {cached[0]}\ninactive_file {cached[1]}\nkernel 1\n"
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_is_what_there_is(version, tmp_path):
    mine, mounted = tmp_path / "cgroup", tmp_path / "mounted"
    root = mounted if version == 2 else mounted / "memory"
    mine.write_text("0::/pod/job\n" if version == 2 else "12:cpu,cpuacct:/pod\n7:memory:/pod/job\n0::/\n")
    assert memory.cgroup_bytes(mine, mounted) == memory.cgroup_bytes(tmp_path / "none", mounted) == math.inf
    group(root / "pod/job", "max", 70, (0, 0), version)
    assert memory.cgroup_bytes(mine, mounted) == math.inf
    group(root / "pod", 100, 70, (10, 5), version)
    assert memory.cgroup_bytes(mine, mounted) == 45, "the group around it limits it too; page cache can go"
    group(root / "pod/job", 80, 70, (1, 1), version)
    assert memory.cgroup_bytes(mine, mounted) == 12
    group(root / "pod/job", 60, 70, (1, 1), version)
    assert memory.cgroup_bytes(mine, mounted) == 0
    shutil.rmtree(root / "pod")  # as seen from within the container
    group(root, 90, 70, (0, 0), version)
    assert memory.cgroup_bytes(mine, mounted) == 20


def test_a_rank_has_its_share_of_its_own_host(monkeypatch):
    """Sixteen ranks, eight a host."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=800))
    monkeypatch.setattr(memory, "cgroup_bytes", lambda: math.inf)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 16)
    assert memory.free_bytes(cpu) == 100
    monkeypatch.setattr(memory, "cgroup_bytes", lambda: 400)
    assert memory.free_bytes(cpu) == 50


@pytest.mark.parametrize("name", ["efficientnet-lite0", "tiny"])
def test_a_checkpointed_tower_takes_what_is_predicted(tiny, name):
    """Its inputs to all blocks, and the largest block's own activations with their gradients, for the whole batch."""
    model = load_tower(name) if name != "tiny" else load_mllm(SUPERVISOR).visual
    encoder = Encoder.from_tower(model, "mean", 64, 64 if name != "tiny" else 112)
    pixels = torch.zeros(6, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
    first, peaks = next(encoder.tower.parameters()), {}
    encoder.tower(pixels)  # positions are made once
    for on in (False, True):
        predictor = Predictor(Step(encoder, None, 6, 1, checkpointing=on, autocast=False))
        encoder.tower.checkpoint_blocks(on)
        with LiveBytes("cpu") as live:
            levels = encoder.tower(pixels).levels
            torch.autograd.grad(sum(level.sum() for level in levels), first)
        peaks[on] = live.peak
        predicted = predictor.fixed + 6 * (predictor.per_image + predictor.block + predictor.image_features)
        assert predicted == pytest.approx(live.peak, rel=0.3)
    assert peaks[True] < 0.6 * peaks[False]


def test_a_step_without_a_supervisor_fits_or_is_refused_with_the_numbers():
    encoder = Encoder.from_tower(load_tower("efficientnet-lite0"), "mean", 64, 64)
    predictor = Predictor(Step(encoder, None, 8, 1, states_bits=8, checkpointing=True, autocast=False))
    footprint = predictor.fit(GIB)
    assert "C. replay" not in footprint.phases and footprint.peak < GIB
    assert predictor.fit(int(footprint.peak * 1.12)) == footprint
    with pytest.raises(InputError, match=r"^memory: a step takes 0.\d\d GiB at least .*: pass fewer images"):
        predictor.fit(footprint.peak)


def test_layers_that_stand_dense_count_and_are_chosen_only_on_a_gpu_with_room_where_they_are_faster(tiny):
    """On the meta device a decoder is a GPU's in name."""
    encoder, decoder, prefix = tiny
    many = Sampling(8, max_new_tokens=64)  # 8 slots of 8 rollouts are more rows than the fused product is for
    parts = SupervisorParts(on_meta(decoder), prefix, many)
    predictor = Predictor(dataclasses.replace(step(tiny), supervisor=parts))
    dense, total = "language model's layers, dense", sum(math.prod(p.shape) for p in _projections(decoder))
    plan, slots, ample = predictor.choose(GIB)
    assert (plan.resident, slots) == (True, 8) and ample.resident[dense] == total * decoder.dtype.itemsize
    without = predictor.footprint(dataclasses.replace(plan, resident=False), slots)
    more = ample.peak - without.peak
    assert 0.5 * ample.resident[dense] <= more <= ample.resident[dense], "scratch for a layer is spared"
    # Of the same plan and slots, as much as it takes without them.
    fixed = FixedPlan(plan.token_budget, plan.recompute, plan.prefix_recompute, slots)
    free = int(without.peak / (1 - memory.MARGIN)) + 2
    assert not predictor.choose(free, fixed)[0].resident
    assert predictor.choose(free + int(1.2 * more), fixed)[0].resident
    assert not predictor.choose(GIB, FixedPlan(resident=False))[0].resident
    two = parts._replace(sampling=Sampling(2, max_new_tokens=64))
    few = Predictor(dataclasses.replace(step(tiny), supervisor=two))
    way = few.choose(GIB)
    assert 2 * way[1] <= FUSED_ROWS["cuda"]
    nearly = dataclasses.replace(way[0], resident=not way[0].resident)
    assert few.seconds(way[0], way[1]) <= few.seconds(nearly, way[1])
    on_cpu = SupervisorParts(decoder, prefix, many)
    assert not Predictor(dataclasses.replace(step(tiny), supervisor=on_cpu)).choose(GIB)[0].resident, "not on a CPU"
    assert Predictor(step(tiny)).choose(GIB, FixedPlan(resident=True))[0].resident, "but where it is asked for"


def with_decoder(tiny, decoder) -> Step:
    whole = step(tiny)
    return dataclasses.replace(whole, supervisor=whole.supervisor._replace(decoder=decoder))


def _projections(decoder):
    return [part for layer in decoder.layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down)]


def test_layers_asked_to_stand_dense_where_they_do_not_fit_are_refused_and_a_resumed_run_goes_without(tiny):
    predictor = Predictor(with_decoder(tiny, on_meta(tiny[1])))
    least = min(predictor.footprint(plan, 1).peak for plan in predictor.plans(FixedPlan(resident=False)))
    free = int(1.001 * least / (1 - memory.MARGIN))
    with pytest.raises(
        InputError, match=r"^memory: .*language model's layers, dense 0\.\d\d.*--supervisor.resident off"
    ):
        predictor.choose(free, FixedPlan(resident=True))
    assert not predictor.choose(free, FixedPlan(resident=True), may_replan=True)[0].resident


def test_dense_layers_have_none_to_keep(tiny):
    decoder = copy.copy(tiny[1])
    decoder.layers = [_dense(layer) for layer in decoder.layers]
    predictor = Predictor(with_decoder(tiny, on_meta(decoder)))
    plan, _, footprint = predictor.choose(GIB, FixedPlan(resident=True))
    assert not plan.resident and "language model's layers, dense" not in footprint.resident


def _dense(layer):
    """The layer as a dense checkpoint of the values NF4 stands for would make it."""
    parts = {name: value for name, value in vars(layer).items() if isinstance(value, Projection)}
    return dataclasses.replace(
        layer, **{name: Projection((part.dense(torch.empty(part.shape)),), part.bias) for name, part in parts.items()}
    )


def test_captured_steps_count_on_a_gpu_alone(tiny):
    on_gpu = Predictor(with_decoder(tiny, on_meta(tiny[1])))
    captured = on_gpu.footprint(Plan(), 2).resident["captured decode steps"]
    assert captured == on_gpu.sampling_bytes(2) + graphs.MOST * graphs.BYTES
    assert "captured decode steps" not in Predictor(step(tiny)).footprint(Plan(), 2).resident


def test_the_times_that_rank_ways_to_decode_are_the_measured_ones():
    measured: dict[tuple[str, int], float] = {}
    file = Path(__file__).parents[3] / "bench/results/nvidia-h200/nf4.json"
    for case in json.loads(file.read_text())["cases"]:
        if case["name"].startswith("nf4_matmul"):
            rows = int(case["name"].rsplit(", ", 1)[1].split()[0])
            for way in ("ours", "cuBLAS, dense bfloat16"):
                key = way, rows
                measured[key] = measured.get(key, 0.0) + case["implementations"][way]["ms"] / 1e3
    assert {rows for _, rows in measured} == memory.FUSED.keys() == memory.DENSE.keys()
    for (way, rows), seconds in measured.items():
        assert (memory.FUSED if way == "ours" else memory.DENSE)[rows] == pytest.approx(seconds, rel=1e-3)
    faster = {rows for rows in memory.FUSED if memory.FUSED[rows] < memory.DENSE[rows]}
    assert max(faster) <= FUSED_ROWS["cuda"] < min(memory.FUSED.keys() - faster)
