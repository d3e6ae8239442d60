"""Shared by the benchmarks against rivals: the reference shape, its random model on disk, and measurement in processes.

A measurement is a function that sets up and returns the work, itself a function without arguments. `child` runs both in
a new process and returns the work's time and peak memory, so neither a warm allocator nor a rival's imports count.
saga_fast is imported inside functions: a rival's own environment need not have it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from bench import machine

REPOSITORY = Path(__file__).parents[1]
SPECIAL = ("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A Qwen3-VL layout and the work of one step. Completions are ragged around `short` or `long` tokens."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 4
    head_dim: int = 64
    ffn: int = 2304
    vocabulary: int = 9728
    tower_layers: int = 9
    tower_width: int = 256
    tower_heads: int = 4
    tower_ffn: int = 960
    image_size: int = 224
    prefix: int = 850
    pairs: int = 8
    group: int = 8
    short: int = 256
    long: int = 700

    @property
    def grid(self) -> tuple[int, int]:
        """Merged visual tokens a column and row: patches of 16 pixels, merged 2x2."""
        return self.image_size // 32, self.image_size // 32

    def lengths(self, mean: int, pairs: int | None = None) -> list[list[int]]:
        """[pair][g] tokens, with the end token: uniform from mean/2 to 3/2 mean, then shifted to that mean."""
        generator = torch.Generator().manual_seed(mean)
        drawn = torch.randint(mean // 2, mean + mean // 2 + 1, (pairs or self.pairs, self.group), generator=generator)
        return (drawn + round(mean - drawn.float().mean().item())).clamp_min(1).tolist()

    def pixels(self, pairs: int | None = None) -> Tensor:
        """uint8 (2·pairs, 3, S, S), a and b of pair 0, of pair 1, …"""
        size = (2 * (pairs or self.pairs), 3, self.image_size, self.image_size)
        return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# record: the 8B's proportions; its head, too, costs about 9% of its layers. small: the same in seconds.
SHAPES = {
    "record": Shape(),
    "small": Shape(
        layers=4, width=256, heads=4, kv_heads=2, ffn=768, vocabulary=2048, tower_layers=3, tower_width=128,
        tower_heads=2, tower_ffn=384, image_size=64, prefix=320, pairs=2, group=4, short=32, long=88,
    ),
}  # fmt: skip


def model(shape: Shape, folder: Path) -> Path:
    """A random model of `shape` in `folder`, as a release is: weights in fp32, tokenizer, template, image processor.

    An existing one of the same shape is kept, another is overwritten. Logits have a deviation of 4,
    so that a nucleus is neither one token nor the vocabulary.
    """
    stamp = folder / "shape.json"
    wanted = json.dumps(asdict(shape))
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    tokens = tokenizer(shape.vocabulary)
    config = configuration(shape, tokens)
    torch.manual_seed(0)
    random = Qwen3VLForConditionalGeneration(config)
    torch.nn.init.normal_(random.lm_head.weight, std=4 * shape.width**-0.5)
    random.generation_config = GenerationConfig(eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    random.save_pretrained(folder)
    tokens.save_pretrained(folder)
    area = shape.image_size**2
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"shortest_edge": area, "longest_edge": area},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    stamp.write_text(wanted)
    return folder


def configuration(shape: Shape, tokens: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """transformers' configuration of a model of `shape`, with the special tokens of `tokens`."""
    named = dict(zip(SPECIAL, tokens.convert_tokens_to_ids(list(SPECIAL))))
    axis = shape.head_dim // 2
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, max_position_embeddings=1 << 15,
            rope_parameters={
                "rope_type": "default", "rope_theta": 5e6,
                "mrope_section": [axis - 2 * (axis * 5 // 16), axis * 5 // 16, axis * 5 // 16],
            },
        ),
        vision_config=dict(
            depth=shape.tower_layers, hidden_size=shape.tower_width, intermediate_size=shape.tower_ffn,
            num_heads=shape.tower_heads, patch_size=16, spatial_merge_size=2, out_hidden_size=shape.width,
            num_position_embeddings=(shape.image_size // 16) ** 2,
            deepstack_visual_indexes=[shape.tower_layers * i // 3 - 1 for i in (1, 2, 3)],
        ),
        image_token_id=named["<|image_pad|>"], video_token_id=named["<|video_pad|>"],
        vision_start_token_id=named["<|vision_start|>"], vision_end_token_id=named["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte, unused words that fill the vocabulary, and the special tokens."""
    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    known += [f"word{i}" for i in range(vocabulary - len(known) - len(SPECIAL))]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(known)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[0], extra_special_tokens=list(SPECIAL[1:]),
        chat_template=TEMPLATE,
    )  # fmt: skip


def question(shape: Shape, tokenizer):
    """A `Prompt` whose prefix, images and template included, is exactly `shape.prefix` tokens."""
    from saga_fast.supervisor.prompt import Prompt, build_prefix
    from saga_fast.utils.errors import InputError

    class Long(Prompt):
        padding = 0

        def instruction(self) -> str:
            return super().instruction() + "x" * self.padding

    asked = Long("", "item", "same", (), generic=True)
    shortest = len(build_prefix(tokenizer, asked.instruction(), shape.grid[0] * shape.grid[1]).input_ids)
    if shortest > shape.prefix:
        raise InputError(f"shape: a prefix of {shape.prefix} tokens; the question alone takes {shortest}")
    Long.padding = shape.prefix - shortest
    return asked


def supervisor(shape: Shape, folder: Path, max_new_tokens: int, order: str = "images_first"):
    """(encoder, supervisor) of the dense model in `folder`, as a run makes them."""
    from saga_fast.encoder import Encoder
    from saga_fast.supervisor.mllm import load_mllm
    from saga_fast.supervisor.rollout import Sampling
    from saga_fast.supervisor.supervisor import Supervisor

    mllm = load_mllm(folder, quantize=False)
    encoder = Encoder.from_tower(mllm.visual, "attention", 64, shape.image_size)
    sampling = Sampling(shape.group, max_new_tokens=max_new_tokens)
    return encoder, Supervisor(mllm, question(shape, mllm.tokenizer), order, shape.grid, sampling)


def give_rewards(supervisor: Any) -> None:
    """Random weights describe and judge nothing: half of each pair's rollouts are right from now on, and each describes
    both images, whatever they say. Reading them costs all the same."""
    judge, name = supervisor.judge, (supervisor.prompt.attributes or ("",))[0]

    def given(completions: Sequence[Sequence[Sequence[int]]], same: Sequence[bool]) -> tuple[Tensor, Tensor]:
        rewards, well_formed = judge(completions, same)
        return (torch.arange(rewards.shape[1]) % 2).float().expand_as(rewards).clone(), well_formed

    def written(completions: Sequence[Sequence[int]]) -> list[tuple[dict[str, list[int]], dict[str, list[int]]]]:
        halves = [len(completion) // 2 for completion in completions]
        return [({name: list(range(1, half))}, {name: list(range(half, 2 * half))}) for half in halves]

    supervisor.judge, supervisor.attribute_positions = given, written


@contextmanager
def ending_at(lengths: list[list[int]], eos: int) -> Iterator[None]:
    """Inside, rollouts of pairs 0, 1, … end after `lengths` [pair][g] tokens, neither sooner nor later.

    Sampling runs as usual, but with the end token's logit at -inf, and the end token replaces the one at the given
    position: a random model ends at random.
    """
    import saga_fast.supervisor.rollout as engine

    table, sample = torch.tensor(lengths).flatten(), engine.sample_top_p

    def sample_until(logits, temperature, top_p, seed, rows, step):
        nonlocal table
        table = table.to(rows.device)  # at the first call; a CUDA graph is captured later
        logits[:, eos] = -torch.inf
        token = sample(logits, temperature, top_p, seed, rows, step)
        return torch.where(step + 1 >= table[rows], eos, token)

    engine.sample_top_p = sample_until
    try:
        yield
    finally:
        engine.sample_top_p = sample


class Encoded(nn.Module):
    """In a Qwen3-VL's vision tower's place: what stands for an image's pixels is its number, see `pixel_stand_ins`."""

    dtype = torch.int64  # that numbers are cast to

    def __init__(self, features: Any, merge: int) -> None:
        super().__init__()
        self.features, self.spatial_merge_size = features, merge

    def forward(self, pixels: Tensor, grid_thw: Tensor, **_: Any) -> Any:
        images = pixels[:: int(grid_thw[0].prod()), 0]
        tokens, *levels = (level[images].flatten(0, 1) for level in self.features.levels)
        return BaseModelOutputWithDeepstackFeatures(pooler_output=tokens, deepstack_features=levels)


@contextmanager
def encoded_before(model: Qwen3VLForConditionalGeneration, features: Any) -> Iterator[None]:
    """Inside, transformers' model takes an image's `features` (`VisualFeatures` of all) as they are.

    It is the tower that is replaced, as versions of transformers differ in what else takes encoded images.
    """
    tower = model.model.visual
    model.model.visual = Encoded(features, tower.spatial_merge_size)
    try:
        yield
    finally:
        model.model.visual = tower


def pixel_stand_ins(images: list[int], grid: tuple[int, int]) -> dict[str, Tensor]:
    """What a processor gives of images of `grid` merged tokens, with the image's number for all of its pixels."""
    thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * len(images))
    return {
        "pixel_values": torch.tensor(images).repeat_interleave(int(thw[0].prod()))[:, None],
        "image_grid_thw": thw,
    }


class EndingAt(LogitsProcessor):
    """Logits processor for `generate`, like `ending_at`: row i ends after exactly `lengths[i]` tokens."""

    def __init__(self, lengths: list[int], eos: int) -> None:
        self.lengths, self.eos, self.step = torch.tensor(lengths), eos, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        scores[:, self.eos] = -torch.inf
        ending = self.lengths == self.step
        scores[ending] = -torch.inf
        scores[ending, self.eos] = 0.0
        return scores


def child(
    measurement: str,
    *arguments: Any,
    python: str | Path = sys.executable,
    timeout: float | None = None,
    **variables: str,
) -> dict[str, Any]:
    """Runs `measurement` ("module:function") in a new process of `python`, and returns its result.

    The function takes `arguments` (JSON), sets up, and returns the work, which returns a dict of figures or None. Added
    to it: `seconds` of the work, `cpu_seconds` of its threads together (what to compare on a busy machine),
    `peak_bytes` of resident memory during it, and `growth_bytes`, by how much that is
    more than before it. variables: of its environment. Raises RuntimeError if the process fails, whose output is shown,
    and subprocess.TimeoutExpired if it takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [python, "-m", "bench.record", measurement, json.dumps(arguments), found]
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        variables = {**os.environ, "PYTHONPATH": path, **variables}
        done = subprocess.run(list(map(str, command)), env=variables, stdout=sys.stderr, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{measurement} failed with exit code {done.returncode}")
        return json.loads(found.read_text())


SETTING_UP = 60.0  # seconds, at most, before a measurement's work begins


def child_within(limit: float | None, measurement: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
    """`child`, or {"broken_off_after": limit} if its work is not done after `limit` seconds."""
    try:
        return child(measurement, *arguments, timeout=limit and limit + SETTING_UP, **settings)
    except subprocess.TimeoutExpired:
        return {"broken_off_after": limit}


def measure(work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """The figures of `child`, measured in this process; needs Linux with glibc."""
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _resident("VmRSS")
    started, started_cpu = time.perf_counter(), time.process_time()
    figures = work()
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    peak = _resident("VmHWM")
    return {**spent, "peak_bytes": peak, "growth_bytes": peak - before, **(figures or {})}


def _resident(field: str) -> int:
    """`field` of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def environment() -> dict[str, Any]:
    """Versions, machine and commit: figures are compared only where these are the same."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {**machine(), "processor": cpu[0] if cpu else None, "threads": torch.get_num_threads()}


class Log:
    """Measurements as JSON lines, written one by one, so that an interrupted benchmark resumes.

    path: None keeps them in memory. Lines of another environment or commit are ignored.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.environment = path, environment()
        lines = path.read_text().splitlines() if path and path.exists() else []
        known = (json.loads(line) for line in lines)
        self.known = {json.dumps(line["key"]): line for line in known if line["environment"] == self.environment}

    def once(self, key: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of `key`: those in the file, else of a new measurement."""
        name = json.dumps(key)
        if name not in self.known:
            self.known[name] = {"key": key, "environment": self.environment, "figures": measured()}
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(self.known[name]) + "\n")
        return self.known[name]["figures"]


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    work = getattr(importlib.import_module(module), function)(*json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(measure(work)))
