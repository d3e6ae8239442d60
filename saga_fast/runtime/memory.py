"""Predicts the peak memory of an optimizer step, and chooses the fastest plan that fits into free memory.

What is resident for the whole run is counted from shapes. What autograd saves of the tower is measured on one image and
on two. The frozen decoder runs on the meta device, which computes nothing: the same code of prefill and replay, with
every tensor counted while it lives. Workspace within an op is not counted, except for the largest, the logits. Not
predicted is what the allocator keeps of freed memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from saga_fast.config import Config
from saga_fast.encoder import Encoder, VisualFeatures
from saga_fast.runtime import distributed
from saga_fast.supervisor import graphs
from saga_fast.supervisor.bidirectional_images import Attention, add_bidirectional
from saga_fast.supervisor.decoder import FUSED_ROWS, DecoderLayer, FrozenDecoder, Projection
from saga_fast.supervisor.frozen_pass import Recompute
from saga_fast.supervisor.pair import PairPrefix, PrefixCache
from saga_fast.supervisor.replay import Group, Plan, replay_groups
from saga_fast.supervisor.rollout import PREFILL_TOKENS, RolloutEngine, Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.towers import VisionTower
from saga_fast.utils.errors import InputError
from saga_kernels import GroupLayout, NF4Weight, group_attention
from saga_kernels.logprob import CHUNK_LOGITS, CHUNK_ROWS
from saga_kernels.nf4 import BLOCK, NESTED_BLOCK

GIB = 2**30
MARGIN = 0.1  # share of free memory left alone: fragments of the allocator, the CUDA context
BANDWIDTH, FLOPS = 3.35e12, 800e12  # of an H100, per second: by its data sheet, and of a large bf16 matmul
LANGUAGE_MODEL = ("language model's layers", "embedding and head")
# Seconds, by number of rows, of the products of one layer of the 8B, which has `LAYER` weights, on an H200: fused NF4,
# and dense bf16 (bench/results/nvidia-h200/nf4.json). They rank ways to decode.
LAYER = 192_937_984
FUSED = {1: 82.1e-6, 4: 84.5e-6, 8: 86.1e-6, 16: 102.0e-6, 32: 124.1e-6, 64: 171.0e-6, 128: 275.2e-6}
DENSE = {1: 138.5e-6, 4: 139.4e-6, 8: 142.1e-6, 16: 138.3e-6, 32: 140.1e-6, 64: 140.1e-6, 128: 144.2e-6}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that are made inside, on `device`. bytes: now; peak: the most since it was set.

    workspace: op → bytes that it allocates internally, as a function of its arguments.
    """

    def __init__(self, device: str, workspace: dict[OpOverload, Callable[..., int]] | None = None) -> None:
        super().__init__()
        self.device, self.workspace = device, workspace or {}
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {x.untyped_storage()._cdata for x in _tensors((args, kwargs or {}))}
        out = function(*args, **(kwargs or {}))
        if workspace := self.workspace.get(function):
            self.peak = max(self.peak, self.bytes + workspace(*args))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type == self.device and key not in before and key not in self._known:
                self._known.add(key)
                self.bytes += (size := storage.nbytes())
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))


def size_of(value: Any) -> int:
    """Bytes of the tensors in nested dataclasses and lists, each storage once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(value))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class SupervisorParts(NamedTuple):
    """The parts of a supervisor that take memory."""

    decoder: FrozenDecoder
    prefix: PairPrefix
    sampling: Sampling

    @classmethod
    def of(cls, supervisor: Supervisor) -> SupervisorParts:
        return cls(supervisor.decoder, supervisor.prefix, supervisor.sampling)


@dataclass(frozen=True)
class Step:
    """The parts of a step. supervisor: None where neither of its terms has a weight; rollouts and replay then raise
    ValueError. trained: trainable modules beside the encoder (proxies of the metric loss).

    states_bits: of each of AdamW's two moments. checkpointing: of the tower. pairs: K. batch: images of a micro-batch.
    embeds: whether the metric loss keeps the tower's graph; without it only a micro-batch's features stay in memory.
    """

    encoder: Encoder
    supervisor: SupervisorParts | None
    batch: int
    pairs: int
    trained: nn.Module | None = None
    states_bits: int = 32
    checkpointing: bool = False
    autocast: bool = True
    embeds: bool = True

    @property
    def decoder(self) -> FrozenDecoder:
        return self._parts.decoder

    @property
    def prefix(self) -> PairPrefix:
        return self._parts.prefix

    @property
    def sampling(self) -> Sampling:
        return self._parts.sampling

    @property
    def _parts(self) -> SupervisorParts:
        if self.supervisor is None:
            raise ValueError("a step without a supervisor has neither rollouts nor a replay")
        return self.supervisor


class FixedPlan(NamedTuple):
    """The values of a memory plan that the user sets; None for those to choose. slots: of the rollout engine; the
    others are those of `Plan`."""

    token_budget: int | None = None
    recompute: Recompute | None = None
    prefix_recompute: Recompute | None = None
    slots: int | None = None
    resident: bool | None = None

    @classmethod
    def of(cls, config: Config) -> FixedPlan:
        rollout, resident = config.rollout, {"auto": None, "on": True, "off": False}[config.supervisor.resident]
        return cls(rollout.token_budget, rollout.recompute, rollout.prefix_recompute, rollout.slots, resident)


NOTHING_FIXED = FixedPlan()


class Footprint(NamedTuple):
    """Bytes. resident: all the time, by component. phases: what each phase takes on top."""

    resident: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.phases.values())

    def table(self) -> str:
        width = max(map(len, (*self.resident, *self.phases)))
        lines = [f"  {name:{width}}  {size / GIB:6.2f} GiB" for name, size in self.resident.items()]
        lines += [f"+ {name:{width}}  {size / GIB:6.2f} GiB" for name, size in self.phases.items()]
        return "\n".join([*lines, f"= {'peak':{width}}  {self.peak / GIB:6.2f} GiB"])


class Predictor:
    """Predicts the footprint of a step, for any replay plan and number of rollout slots."""

    def __init__(self, step: Step) -> None:
        self.step = step
        encoder, tower = step.encoder, step.encoder.tower
        trainable = list(encoder.parameters()) + (list(step.trained.parameters()) if step.trained else [])
        weights = sum(p.numel() for p in trainable) * 4
        self.resident = {
            "tower, pooler, proxies: weights": weights,
            "their gradients": weights,
            f"AdamW's states, {step.states_bits} bits": weights * 2 * step.states_bits // 32,
        }
        if step.supervisor is not None:
            head = step.decoder.head
            self.resident[LANGUAGE_MODEL[0]] = size_of([step.decoder.layers, step.decoder.norm])
            self.resident[LANGUAGE_MODEL[1]] = size_of([step.decoder.embedding, head])
            self.on_gpu = step.decoder.device.type != "cpu"  # a decoder on the meta device counts as a GPU's
            layer = step.decoder.layers[0]
            self.parts = [
                out * width for out, width in (layer.qkv.shape, layer.o.shape, layer.gate_up.shape, layer.down.shape)
            ]
            # Bytes of the dense copy of the NF4 layers.
            packed = not layer.down.is_dense
            self.dense = packed * step.decoder.depth * sum(self.parts) * step.decoder.dtype.itemsize
        self.block = 0
        if step.checkpointing:  # the blocks' inputs, and what the largest block recomputes
            tower.checkpoint_blocks()
            self.fixed, self.per_image = tower_activation_bytes(tower, encoder.image_size, step.autocast)
            self.block = recomputed_block_bytes(tower, encoder.image_size, step.autocast)
            tower.checkpoint_blocks(False)
        else:
            self.fixed, self.per_image = tower_activation_bytes(tower, encoder.image_size, step.autocast)
        rows, columns = tower.grid(encoder.image_size, encoder.image_size)
        self.levels = len(getattr(getattr(tower.model, "config", None), "deepstack_visual_indexes", ()))
        self.image_features = rows * columns * tower.width * (1 + self.levels) * (2 if step.autocast else 4)
        # PyTorch's AdamW works on all parameters at once, bitsandbytes' on one.
        self.update = weights if step.states_bits == 32 else 0
        self._prefill: int | None = None
        self._replays: dict[Plan, int] = {}

    def footprint(self, plan: Plan, slots: int) -> Footprint:
        step = self.step
        # Gradients of one backward pass, before they are added to `.grad`: they grow as activations are freed.
        added = self.resident["their gradients"]
        embed_peak = max(self._tower(step.batch), added) if step.embeds else 2 * step.batch * self.image_features
        phases = {"A. embed": embed_peak, "update": self.update}
        resident = dict(self.resident)
        if step.supervisor is not None:
            cache = slots * RolloutEngine.slot_bytes(step.decoder, len(step.prefix), step.sampling)
            resident["keys and values of rollouts"] = cache
            if plan.resident:
                resident[f"{LANGUAGE_MODEL[0]}, dense"] = self.dense
            if self.on_gpu:  # the memory of a captured step stays allocated
                resident["captured decode steps"] = self.sampling_bytes(slots) + graphs.MOST * graphs.BYTES
            phases["B. roll out"] = self.rollout_peak(slots)
            images = 2 * step.pairs  # whose features are saved, then concatenated
            phases["C. replay"] = 2 * images * self.image_features + max(
                self.replay_peak(plan), self._tower(images), added
            )
        return Footprint(resident, dict(sorted(phases.items())))

    def _tower(self, images: int) -> int:
        return self.fixed + images * (self.per_image + self.block + 2 * self.image_features)

    def rollout_peak(self, slots: int) -> int:
        """Bytes: features of the micro-batch, and the larger of a prefill and a sampling step. The slots are
        resident."""
        step = self.step
        if self._prefill is None:
            self._prefill = prefill_bytes(step.decoder, step.prefix)
        return step.batch * self.image_features + max(self._prefill, self.sampling_bytes(slots))

    def sampling_bytes(self, slots: int) -> int:
        """Bytes of a decode step's logits, and of the temporaries of sampling."""
        rows, vocabulary = slots * self.step.sampling.group_size, self.step.decoder.head.shape[0]
        return rows * vocabulary * (self.step.decoder.dtype.itemsize + 8)

    def replay_peak(self, plan: Plan) -> int:
        """Bytes of a replay of K groups whose completions have the largest length."""
        step = self.step
        length, members = step.sampling.max_new_tokens, step.sampling.group_size
        rest = len(step.prefix) - step.prefix.static_length
        groups = max(1, min(step.pairs, plan.token_budget // (rest + members * length)))
        if rest + members * length > plan.token_budget:  # slices are equal: one is enough
            members = max(1, min(members, plan.token_budget // length))
            plan = dataclasses.replace(plan, token_budget=max(1, members * length))
        if plan not in self._replays:
            lengths = [[length] * members] * groups
            self._replays[plan] = replay_bytes(step.decoder, step.prefix, plan, lengths, self.levels)
        return self._replays[plan]

    def seconds(self, plan: Plan, slots: int) -> float:
        """Estimated time of a step's rollouts and replay on an H100 or H200, to rank plans; other GPUs rank them alike.

        2 K pairs are started; a decode step's products take the times in `FUSED` and `DENSE`, its head the time to read
        it. A replay's tokens pass through the layers' matmuls forward, backward, and once more where they are
        recomputed, at the peak rate; each visit dequantises the weights, unless they are resident.
        """
        step, depth, parts = self.step, self.step.decoder.depth, self.parts
        recomputed_share = {"none": 0.0, "mlp": parts[2] / sum(parts), "full": 1 - parts[3] / sum(parts)}
        prefix, length = len(step.prefix) - step.prefix.static_length, step.sampling.max_new_tokens
        members = step.sampling.group_size
        size = prefix + members * length
        if size <= plan.token_budget:
            visits = -(-step.pairs // (plan.token_budget // size))
            passes = step.pairs * size * (2 + recomputed_share[plan.recompute])
        else:
            visits = step.pairs * (1 + -(-members // max(1, plan.token_budget // length)))
            passes = prefix * (2 + recomputed_share[plan.prefix_recompute]) + members * length * (
                2 + recomputed_share[plan.recompute]
            )
            passes *= step.pairs
        dequantised = 0 if plan.resident else self.dense  # bytes written per visit
        replayed = 2 * depth * sum(parts) * passes / FLOPS + 2 * visits * dequantised / BANDWIDTH
        rows = slots * members
        many = plan.resident and rows > FUSED_ROWS["cuda"]
        products = _interpolate(FUSED if self.dense and not many else DENSE, rows) * depth * sum(parts) / LAYER
        decoded = products + self.resident[LANGUAGE_MODEL[1]] / BANDWIDTH
        return replayed + -(-2 * step.pairs // slots) * length * decoded

    def plans(self, fixed: FixedPlan = NOTHING_FIXED) -> list[Plan]:
        """Replay plans with the `fixed` values, the fastest first. Where `resident` is not fixed, layers may be
        resident on a GPU, but not on a CPU, where that is not measured."""
        step, policies = self.step, get_args(Recompute)
        residences = (False, self.on_gpu) if fixed.resident is None else (fixed.resident,)
        length = step.sampling.max_new_tokens
        size = len(step.prefix) - step.prefix.static_length + step.sampling.group_size * length
        whole = {n * size for n in (step.pairs, -(-step.pairs // 2), 1)}
        slices = {n * length for n in (step.sampling.group_size // 2, 2, 1) if n}
        found = {
            Plan(
                budget,
                policy,
                policy if budget >= size and not fixed.prefix_recompute else prefix_policy,
                resident and self.dense > 0,
            )
            for budget in ([fixed.token_budget] if fixed.token_budget else whole | slices)
            for policy in ([fixed.recompute] if fixed.recompute else policies)
            for prefix_policy in ([fixed.prefix_recompute] if fixed.prefix_recompute else policies)
            for resident in residences
        }
        return sorted(found, key=lambda plan: (self.seconds(plan, 1), plan.resident, -plan.token_budget, str(plan)))

    def fit(self, free: int) -> Footprint:
        """The footprint of a step without a supervisor. Raises InputError if it does not fit into `free` bytes."""
        footprint = self.footprint(Plan(1), 0)
        if footprint.peak > free * (1 - MARGIN):
            raise self._refusal(footprint, free)
        return footprint

    def choose(
        self, free: int, fixed: FixedPlan = NOTHING_FIXED, may_replan: bool = False
    ) -> tuple[Plan, int, Footprint]:
        """The fastest plan and number of slots, up to twice K, that fit into `free` bytes.

        may_replan: fixed values may be dropped where they do not fit, as a resumed run may be on another machine.
        Raises InputError, with the numbers, where no plan fits.
        """
        step, room = self.step, int(free * (1 - MARGIN))
        counts = sorted({max(1, 2 * step.pairs // n) for n in (1, 2, 3, 4, 5, 8, 16)})
        every = itertools.product(self.plans(fixed), [fixed.slots] if fixed.slots else counts)
        candidates = sorted(every, key=lambda candidate: self.seconds(*candidate))
        for plan, count in candidates:
            footprint = self.footprint(plan, count)
            if footprint.peak <= room:
                return plan, count, footprint
        if may_replan and any(fixed):
            return self.choose(free)
        least = min((self.footprint(*candidate) for candidate in candidates), key=lambda footprint: footprint.peak)
        raise self._refusal(least, free, bool(fixed.resident))

    def _refusal(self, least: Footprint, free: int, resident: bool = False) -> InputError:
        step = self.step
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in (*least.resident.items(), *least.phases.items()))
        remedies = ["--supervisor.resident off"] if resident and self.dense else []
        remedies += [] if step.checkpointing else ["--encoder.checkpointing"]
        remedies += ["--optim.states 8bit"] if step.states_bits == 32 else []
        remedies += ["fewer --rollout.max-new-tokens"] if step.supervisor else []
        remedies += [f"{'or ' if remedies else ''}fewer images with --data.classes-per-batch"]
        return InputError(
            f"memory: a step takes {least.peak / GIB:.2f} GiB at least ({parts}); {free / GIB:.2f} GiB are free, of "
            f"which {MARGIN:.0%} is left alone: pass {', '.join(remedies)}"
        )


def _interpolate(table: dict[int, float], rows: int) -> float:
    """The value of `table` at `rows`, by linear interpolation."""
    sizes = sorted(table)
    above = next((i for i, size in enumerate(sizes) if size >= rows and i), len(sizes) - 1)
    low, high = sizes[above - 1], sizes[above]
    return table[low] + (table[high] - table[low]) * (rows - low) / (high - low)


def free_bytes(device: torch.device) -> int:
    """Bytes: on a GPU what is free and what this process has reserved; on a CPU this rank's share of what is free on
    the host and within this process's control groups (a container's limit)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return min(psutil.virtual_memory().available, cgroup_bytes()) // distributed.local_world_size()


def cgroup_bytes(membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the process's control groups (versions 1 and 2), and the groups around them, still allow; infinite
    without a limit. Page cache counts as free, as it does for the host."""
    free = math.inf
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = mounted, ("memory.max", "memory.current")
        if controllers:
            root, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        # In a container the path may be the host's, of which only the root is visible.
        inner = root / path.lstrip("/")
        for group in (inner, *(outer for outer in inner.parents if outer.is_relative_to(root))):
            with contextlib.suppress(OSError, ValueError, KeyError):  # missing, or "max", which is no limit
                limit, used = (int((group / name).read_text()) for name in names)
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                free = min(free, max(0, limit - used + int(stat["active_file"]) + int(stat["inactive_file"])))
    return free


def recomputed_block_bytes(tower: VisionTower, image_size: int, autocast: bool) -> int:
    """Peak bytes per image in the backward of a tower with checkpointed blocks: activations and gradients of the
    largest block. Measured on one image and on two."""
    first = next(parameter for parameter in tower.parameters() if parameter.requires_grad)
    device = first.device.type

    def peak(images: int) -> int:
        pixels = torch.zeros(images, 3, image_size, image_size, dtype=torch.uint8, device=device)
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=False):
            levels = tower(pixels).levels
        gradients = [torch.ones_like(level) for level in levels]
        with LiveBytes(device) as live:
            # The gradient of the first parameter passes through every block, and needs none of their weights'
            # gradients.
            torch.autograd.grad(levels, first, gradients)
            return live.peak

    return max(0, peak(2) - peak(1))


def tower_activation_bytes(tower: VisionTower, image_size: int, autocast: bool) -> tuple[int, int]:
    """(bytes per batch, bytes per image) that autograd saves in the forward of a tower, whose blocks may be
    checkpointed."""
    device = next(tower.parameters()).device
    weights = {x.untyped_storage().data_ptr() for x in (*tower.parameters(), *tower.buffers())}

    def saved_bytes(images: int) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if (at := x.untyped_storage().data_ptr()) not in weights:
                storages[at] = x.untyped_storage().nbytes()
            return x

        pixels = torch.zeros(images, 3, image_size, image_size, dtype=torch.uint8, device=device)
        with (
            torch.enable_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        ):
            out = tower(pixels)
        del out
        return sum(storages.values())

    one, two = saved_bytes(1), saved_bytes(2)
    return max(0, 2 * one - two), two - one


def on_meta(value: Any, quantize: bool = False) -> Any:
    """A copy of a decoder, or a part of it, on the meta device. quantize: dense matrices of its layers become NF4."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, FrozenDecoder):
        decoder = copy.copy(value)
        decoder.device = torch.device("meta")
        decoder.layers = [on_meta(layer, quantize) for layer in value.layers]
        decoder.rotary = copy.deepcopy(value.rotary).to("meta")
        decoder.norm, decoder.embedding = on_meta(value.norm), on_meta(value.embedding)
        decoder.head = decoder.embedding if value.head is value.embedding else on_meta(value.head)
        return decoder
    if isinstance(value, Projection) and quantize and isinstance(value.weights[0], Tensor):
        return Projection(tuple(map(as_nf4, value.weights)), on_meta(value.bias))
    if isinstance(value, tuple):
        return tuple(on_meta(part, quantize) for part in value)
    if isinstance(value, DecoderLayer | Projection | NF4Weight | PairPrefix):
        fields = {name: on_meta(part, quantize) for name, part in vars(value).items()}
        return dataclasses.replace(value, **fields)
    return value


def quantize_head(decoder: FrozenDecoder) -> None:
    """Replaces embedding and head of a decoder on the meta device by NF4 ones, as `FrozenDecoder` has them."""
    tied = decoder.head is decoder.embedding
    decoder.embedding = as_nf4(decoder.embedding, nested=False)
    decoder.head = decoder.embedding if tied else as_nf4(decoder.head, nested=False)


def as_nf4(weight: Tensor, nested: bool = True) -> NF4Weight:
    """An (out, in) matrix in NF4 on the meta device. nested: double quantisation of absmax; embedding and head have
    none."""

    def empty(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    blocks = weight.numel() // BLOCK
    if not nested:
        packed, absmax = empty(weight.numel() // 2, torch.uint8), empty(blocks, torch.float32)
        return NF4Weight(packed, absmax, None, None, None, tuple(weight.shape), weight.dtype)
    return NF4Weight(
        empty(weight.numel() // 2, torch.uint8), empty(blocks, torch.uint8), empty(256, torch.float32),
        empty(-(-blocks // NESTED_BLOCK), torch.float32), torch.empty((), device="meta"),
        tuple(weight.shape), weight.dtype,
    )  # fmt: skip


def replay_bytes(
    decoder: FrozenDecoder, prefix: PairPrefix, plan: Plan, lengths: Sequence[Sequence[int]], levels: int
) -> int:
    """Peak bytes of `replay_groups`, gradients at the features included, for groups of these completion `lengths`."""
    on_cpu = prefix.input_ids.device.type == "cpu"

    def logits(h: Tensor, head: Tensor, *_: Any) -> int:  # in float32
        chunk = max(1, CHUNK_LOGITS // len(head)) if on_cpu else CHUNK_ROWS
        return min(len(h), chunk) * len(head) * 4

    with LiveBytes("meta", {torch.ops.saga_kernels.token_logprob.default: logits}) as live:
        decoder = on_meta(decoder)
        if plan.resident:
            decoder.reside()
        prefix_cache = PrefixCache(decoder, on_meta(prefix))
        images, tokens = 2 * len(lengths), prefix.images.shape[1]
        width = decoder.embedding.shape[1]
        features = [
            torch.empty(images, tokens, width, dtype=decoder.dtype, device="meta").requires_grad_()
            for _ in range(1 + levels)
        ]
        groups = [
            Group([[0] * n for n in group], [torch.empty(n, device="meta") for n in group], {}) for group in lengths
        ]
        live.peak = before = live.bytes
        replay_groups(prefix_cache, VisualFeatures(features[0], tuple(features[1:])), groups, 1.0, -1, plan)
        return live.peak - before


def prefill_bytes(decoder: FrozenDecoder, prefix: PairPrefix) -> int:
    """Peak bytes of prefilling as many prefixes as the engine prefills at once, without the cache."""
    rest = len(prefix) - prefix.static_length
    pairs = max(1, PREFILL_TOKENS // len(prefix))
    with LiveBytes("meta") as live, torch.no_grad():
        decoder = on_meta(decoder)
        layout = GroupLayout([rest] * pairs, [[]] * pairs, device="meta")
        h = torch.empty(layout.tokens, decoder.embedding.shape[1], dtype=decoder.dtype, device="meta")
        positions = torch.zeros(3, layout.tokens, dtype=torch.int64, device="meta")
        live.peak = before = live.bytes
        images = on_meta(prefix).images_of(pairs, prefix.static_length)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, lse = group_attention(q, k, v, layout)
            if images is not None:
                add_bidirectional(Attention(q, k, v, o, lse), images)
            return o

        decoder.forward(h, positions, attend)
        return live.peak - before
