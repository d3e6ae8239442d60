"""The Python in README.md and docs/ runs as it stands, on a folder of pictures that it can be run on in seconds."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from saga_fast.config import PRESETS

from .small import save_pictures

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))


def examples(page: Path) -> list[str]:
    """Those that no comment just before calls untested."""
    found = re.findall(r"(<!-- untested[^\n]*-->\n)?```python\n(.*?)```", page.read_text(), re.DOTALL)
    return [code for untested, code in found if not untested]


def run(page: Path, code: str) -> None:
    exec(compile(code, str(page), "exec"), {})


def small(preset):
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, classes_per_batch=2, images_per_class=2, workers=0),
        rollout=dataclasses.replace(preset.rollout, group_size=2, pairs=1, pairs_per_batch=2),
        optim=dataclasses.replace(preset.optim, steps=1),
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Holds birds/CLASS/IMAGE, and once README's first example has run what that leaves."""
    folder = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate(["crow", "gull", "ibis", "kite", "rook", "teal", "tern", "wren"]):
        save_pictures(folder / "birds" / name, 2, seed)
    return folder


def test_train_embed_search(pictures, monkeypatch, capsys):
    first, *others = examples(README)
    monkeypatch.chdir(pictures)
    monkeypatch.setitem(PRESETS, "folder", small(PRESETS["folder"]))
    run(README, first)
    recall, *hits = capsys.readouterr().out.strip().splitlines()[-6:]
    assert re.fullmatch(r"Recall@1: [01]\.\d+ -> [01]\.\d+", recall)
    assert hits[0].endswith("birds/wren/0001.png") and len(hits) == 5
    similarities = [float(hit.split()[0]) for hit in hits]
    assert similarities[0] > 0.999 and similarities == sorted(similarities, reverse=True)
    assert others, "the encoder alone"
    for page in (README, *DOCS):  # they read what the first has left
        for code in others if page == README else examples(page):
            run(page, code)
