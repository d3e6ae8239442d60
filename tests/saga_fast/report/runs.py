"""A run's folder made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from saga_fast.config import PRESETS
from saga_fast.retrieval.gallery import gallery

EVIL = '</p><script>document.title="owned"</script><img src=x onerror="document.title=1">&amp;"\''
GRID = (2, 3)


class Pictures:
    """Twelve plain pictures of four classes, as a loader of pixels has them."""

    labels = torch.arange(4).repeat_interleave(3)
    dataset = type("Birds", (), {"classes": ["wren", "owl & co", f"bird {EVIL}", "tern"]})

    def batch(self, indices):
        pixels = torch.stack([torch.full((3, 8, 8), 20 * i, dtype=torch.uint8) for i in indices])
        return type("Batch", (), {"pixels": pixels})


def rollout(verdict: str | None, reward: float, tokens: list[str], attributes: list) -> dict:
    share = [1 / (2 * len(tokens))] * len(tokens)
    return {
        "tokens": tokens,
        "gradient": share,
        "attributes": attributes,
        "verdict": verdict,
        "well_formed": reward > 0,
        "reward": reward,
        "advantage": 2 * reward - 1,
        "log_prob": -0.25,
    }


def make_run(out: Path) -> Path:
    """The folder `out` of a run, with markup in every text that comes from outside."""
    (out / "samples").mkdir(parents=True)
    (out / "gallery").mkdir()
    config = PRESETS["drawn-birds"].to_dict()
    config["supervisor"]["model"] = EVIL
    described = {"config": config, "versions": {"torch": "2"}, "commit": None}
    (out / "config.json").write_text(json.dumps(described))
    lines = [
        {"step": i, "loss_dml": 2 - i / 10, "reward_same": 0.5, "seconds_replay": 1.0, "seconds_roll_out": 3.0}
        for i in range(20)
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo')
    cost = [{"step": i, "seconds_cpu": 2.0, "memory_peak_rss_bytes": 2**30} for i in range(20)]
    (out / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in cost))
    before, after = {"recall_at_1": 0.25, "nmi": 0.5}, {"recall_at_1": 0.75, "nmi": 0.5}
    (out / "final.json").write_text(json.dumps({"before": before, "after": after}))
    tokens = ["{", '"crown', " red", EVIL, "}"]
    uniform = [1 / 6] * 6
    pair = {
        "same": False,
        "beta": [uniform, uniform],
        "attention": {"rollout": 0, "images": [{EVIL: uniform, "crown": [0, 0, 1, 0, 0, 0]}, {EVIL: uniform}]},
        "rollouts": [
            rollout("no", 1.0, tokens, [(0, "crown", [2]), (1, EVIL, [3])]),
            rollout(None, 0.0, [EVIL], []),
        ],
    }
    sample = {"attributes": ["crown", EVIL], "items": ["bird_1", "bird_2"], "grid": GRID, "pairs": [pair, pair]}
    for step in (0, 19):
        (out / f"samples/step-{step:06d}.json").write_text(json.dumps({"step": step, **sample}))
        Image.new("RGB", (16, 16), (90, 120, 40)).save(out / f"samples/step-{step:06d}.jpg")
    found = torch.tensor([[(i + 1) % 12, (i + 5) % 12] for i in range(12)])
    described, sheet = gallery(Pictures(), found, (torch.arange(12) // 3 * 3)[:, None] + torch.tensor([[1, 2]]))
    sheet.save(out / "gallery/gallery.jpg")
    (out / "gallery/gallery.json").write_text(json.dumps(described))
    return out
