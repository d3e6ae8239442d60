"""First part of the recipe: the vision tower and its mergers, trained to classify attributes by temporary heads.

A head is one attention pooling per attribute over the merged tokens, then a linear classifier; each DeepStack level has
its own heads, so that it too carries what the language model reads. A small term in the loss draws the pooling's
attention onto the attribute's mask, which keeps tokens local, as grounding data does for a large MLLM. The heads are
not part of the trained model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast.tiny.birds import ATTRIBUTES, EASY, SIZE, Nuisance, draw, random_attributes, species
from saga_fast.towers import tower_of

HELD_OUT_SEEDS = range(10)
WIDTH, GRID = 192, 7  # width of a merged token; merged tokens a side

VISION: dict[str, Any] = dict(
    depth=4,
    hidden_size=128,
    intermediate_size=384,
    num_heads=4,
    patch_size=8,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=WIDTH,
    num_position_embeddings=(SIZE // 8) ** 2,
    deepstack_visual_indexes=[0, 1, 2],
)


def held_out(count: int = 100) -> set[tuple[str, ...]]:
    """The benchmark's test species for the first seeds, as value tuples: the recipe must not train on them."""
    return {tuple(bird.values()) for seed in HELD_OUT_SEEDS for bird in species(count, seed)[count // 2 :]}


_HELD_OUT = held_out()


def training_attributes(rng: np.random.Generator) -> dict[str, str]:
    """A random combination that is not a held-out species."""
    while True:
        attributes = random_attributes(rng)
        if tuple(attributes.values()) not in _HELD_OUT:
            return attributes


class Batch(NamedTuple):
    pixels: Tensor  # uint8 (B, 3, SIZE, SIZE)
    values: Tensor  # int64 (B, 12), index into ATTRIBUTES[name]
    areas: Tensor  # float32 (B, 12, GRID * GRID): share of each token's cell that shows the attribute


def value_ids(attributes: dict[str, str]) -> list[int]:
    return [ATTRIBUTES[name].index(value) for name, value in attributes.items()]


def cell_areas(masks: dict[str, np.ndarray]) -> np.ndarray:
    """Share of each merged token's cell inside each attribute's mask: float32 (12, GRID * GRID)."""
    cells = np.stack([masks[name] for name in ATTRIBUTES]).reshape(
        len(ATTRIBUTES), GRID, SIZE // GRID, GRID, SIZE // GRID
    )
    return cells.mean((2, 4), dtype=np.float32).reshape(len(ATTRIBUTES), -1)


def render(birds: list[dict[str, str]], nuisance: Nuisance, seeds: Sequence[tuple[int, ...]]) -> Batch:
    """Pictures of these birds, each from its own seed."""
    drawn = [
        draw(bird, nuisance, np.random.default_rng(seed), masks=True) for bird, seed in zip(birds, seeds, strict=True)
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(d.image) for d in drawn])).permute(0, 3, 1, 2).contiguous()
    areas = torch.from_numpy(np.stack([cell_areas(d.masks) for d in drawn]))
    return Batch(pixels, torch.tensor([value_ids(bird) for bird in birds]), areas)


class Pool:
    """The last `capacity` pictures of an endless seeded stream: picture n depends on (seed, n), so a run can resume."""

    def __init__(self, seed: int, capacity: int, nuisance: Nuisance = EASY):
        self.seed, self.capacity, self.nuisance, self.drawn = seed, capacity, nuisance, 0
        parts = len(ATTRIBUTES)
        self.batch = Batch(
            torch.empty(capacity, 3, SIZE, SIZE, dtype=torch.uint8),
            torch.empty(capacity, parts, dtype=torch.int64),
            torch.empty(capacity, parts, GRID * GRID),
        )

    def grow_to(self, count: int) -> None:
        """Draw the stream's pictures up to number `count`, without those that later ones would overwrite."""
        for n in range(max(self.drawn, count - self.capacity), count):
            one = render(
                [training_attributes(np.random.default_rng((self.seed, n)))], self.nuisance, [(self.seed, n, 1)]
            )
            for stored, fresh in zip(self.batch, one):
                stored[n % self.capacity] = fresh[0]
        self.drawn = max(self.drawn, count)

    def sample(self, size: int, rng: np.random.Generator) -> Batch:
        """`size` pictures, each flipped or not, with masks to match."""
        rows = torch.from_numpy(rng.integers(0, min(self.drawn, self.capacity), size))
        flip = torch.from_numpy(rng.random(size) < 0.5)
        pixels, values, areas = (stored[rows] for stored in self.batch)
        areas = areas.unflatten(2, (GRID, GRID))
        pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        areas = torch.where(flip[:, None, None, None], areas.flip(3), areas)
        return Batch(pixels, values, areas.flatten(2))


class Heads(nn.Module):
    """One attention-pooled classifier per attribute: tokens (B, N, D) → logits and attention per attribute."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(ATTRIBUTES), width) * width**-0.5)
        self.key = nn.Linear(width, width, bias=False)
        self.classify = nn.ModuleList(nn.Linear(width, len(values)) for values in ATTRIBUTES.values())

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits, a list of 12 tensors (B, values), and log attention (B, 12, N)."""
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        log_attention = torch.einsum("ad,bnd->ban", self.query, self.key(tokens)).float().log_softmax(-1)
        pooled = torch.einsum("ban,bnd->bad", log_attention.exp().to(tokens.dtype), tokens)
        return [classify(pooled[:, i]) for i, classify in enumerate(self.classify)], log_attention


class TowerTrainer(nn.Module):
    """Tower and heads under one loss."""

    POINT, DEEPSTACK = 0.15, 0.3  # weights of the attention loss, and of each DeepStack level's heads

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower_of(Qwen3VLVisionModel(Qwen3VLVisionConfig(**VISION)))
        self.heads = nn.ModuleList(Heads() for _ in range(1 + len(VISION["deepstack_visual_indexes"])))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and which attributes the heads on the final tokens classify correctly: bool (B, 12)."""
        features = self.tower(batch.pixels)
        total, right = torch.zeros(()), torch.empty(0)
        inside = batch.areas > 0.02
        seen = inside.any(-1)
        for level, (heads, tokens) in enumerate(zip(self.heads, features.levels)):
            logits, log_attention = heads(tokens)
            name = torch.stack([F.cross_entropy(x.float(), batch.values[:, i]) for i, x in enumerate(logits)]).mean()
            mass = log_attention.masked_fill(~inside, -math.inf).logsumexp(-1)
            point = -mass.masked_fill(~seen, 0.0).mean()
            total = total + (name + self.POINT * point) * (1.0 if level == 0 else self.DEEPSTACK)
            if level == 0:
                right = torch.stack([x.argmax(-1) for x in logits], 1) == batch.values
        return total, right


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, constant for the first 60%, then linear down to a fiftieth of the peak."""
    left = (steps - step) / (0.4 * steps)
    return peak * min((step + 1) / warmup, 1.0, max(0.02, left))


class Log:
    """Appends lines of JSON to a file, each with the seconds since this log was opened."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.monotonic()

    def __call__(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"seconds": round(time.monotonic() - self.start, 1), **values}) + "\n")


@dataclass(frozen=True)
class TowerTraining:
    """batch: pictures per step. capacity: of the `Pool`; fresh: new pictures that it draws per step."""

    steps: int = 1100
    batch: int = 48
    peak_lr: float = 1e-3
    capacity: int = 12288
    fresh: int = 24


def train_tower(out: Path, seed: int = 0, training: TowerTraining = TowerTraining()) -> TowerTrainer:
    """Train tower and heads, logging to OUT/tower.jsonl; resumes from OUT/tower.pt and keeps it."""
    steps = training.steps
    torch.manual_seed(seed)
    trainer = TowerTrainer()
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=training.peak_lr, betas=(0.9, 0.98), weight_decay=0.02)
    log, checkpoint, start = Log(out / "tower.jsonl"), out / "tower.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        trainer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    pool = Pool(seed, training.capacity)
    for step in range(start, steps):
        pool.grow_to(3072 + training.fresh * step)
        batch = pool.sample(training.batch, np.random.default_rng((seed, step, 2)))
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, training.peak_lr, 100)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = trainer.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            log(step=step + 1, loss=loss.item(), right=dict(zip(ATTRIBUTES, right.float().mean(0).tolist())))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            scratch = checkpoint.with_suffix(".part")
            torch.save({"model": trainer.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, scratch)
            scratch.replace(checkpoint)
    return trainer
