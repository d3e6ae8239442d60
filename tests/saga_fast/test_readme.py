"""The Python in README.md and docs/ runs as it stands, on a folder of pictures that it can be run on in seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saga_fast.config import PRESETS

from .small import changed, save_classes

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))


def examples(page: Path) -> list[str]:
    """Those that no comment just before calls untested."""
    found = re.findall(r"(<!-- untested[^\n]*-->\n)?```python\n(.*?)```", page.read_text(), re.DOTALL)
    return [code for untested, code in found if not untested]


def run(page: Path, code: str) -> None:
    exec(compile(code, str(page), "exec"), {})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Holds birds/CLASS/IMAGE, and once README's first example has run what that leaves."""
    folder = tmp_path_factory.mktemp("examples")
    save_classes(folder / "birds", ["crow", "gull", "ibis", "kite", "rook", "teal", "tern", "wren"], 2)
    return folder


def test_train_embed_search(pictures, monkeypatch, capsys):
    first, *others = examples(README)
    monkeypatch.chdir(pictures)
    few = {"classes_per_batch": 2, "images_per_class": 2, "workers": 0}
    monkeypatch.setitem(PRESETS, "folder", changed(PRESETS["folder"], data=few, optim={"steps": 1}))
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
