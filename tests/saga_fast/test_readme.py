"""The example in README.md runs as it stands, on a folder of pictures that it can be run on in seconds."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from saga_fast.config import PRESETS

from .small import save_pictures

README = Path(__file__).parents[2] / "README.md"


def small(preset):
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, classes_per_batch=2, images_per_class=2, workers=0),
        rollout=dataclasses.replace(preset.rollout, group_size=2, pairs=1, pairs_per_batch=2),
        optim=dataclasses.replace(preset.optim, steps=1),
    )


def test_train_embed_search(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for seed, name in enumerate(["crow", "gull", "ibis", "kite", "rook", "teal", "tern", "wren"]):
        save_pictures(tmp_path / "birds" / name, 2, seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "folder", small(PRESETS["folder"]))
    exec(compile(example, str(README), "exec"), {})
    first, *hits = capsys.readouterr().out.strip().splitlines()[-6:]
    assert re.fullmatch(r"Recall@1: [01]\.\d+ -> [01]\.\d+", first)
    assert hits[0].endswith("birds/wren/0001.png") and len(hits) == 5
    similarities = [float(hit.split()[0]) for hit in hits]
    assert similarities[0] > 0.999 and similarities == sorted(similarities, reverse=True)
