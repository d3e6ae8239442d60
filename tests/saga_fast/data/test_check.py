"""`python -m saga_fast.data check` lists every kind of fault by name, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from saga_fast.data import PUBLISHED, Published
from saga_fast.data.__main__ import main

from . import released

layouts = pytest.mark.parametrize("layout", released.RELEASES)


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    """What is published of the miniatures: two classes of three images a half."""
    for name in PUBLISHED:
        per_class = 3 if name == "inat-aves" else None
        monkeypatch.setitem(PUBLISHED, name, Published(4, 6, 6, images_per_class=per_class))


def run(capsys, name: str, root: Path, *flags: str) -> tuple[int, list[str], str]:
    """(exit code, lines before the counts, stderr)"""
    code = 0
    try:
        main(["check", name, "--root", str(root), "--workers", "0", *flags])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out.partition("\n  ")[0].splitlines(), err


def build(layout: str, root: Path) -> tuple[str, Path]:
    name, make = released.RELEASES[layout]
    return name, make(root)


@layouts
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_whole_set_has_nothing_wrong(layout, workers, tmp_path, capsys):
    name, root = build(layout, tmp_path)
    main(["check", name, "--root", str(root), "--workers", workers])
    out, err = capsys.readouterr()
    assert out.split() == [
        *("classes", "images", "train", "2", "6", "test", "2", "6"),
        *f"{name} in {root}: nothing wrong".split(),
    ]
    assert f"opening {name} train" in err and "/6" in err


@layouts
def test_broken_images_are_listed_and_skipping_them_is_a_choice(layout, tmp_path, capsys):
    name, root = build(layout, tmp_path)
    first, *_, last = sorted(
        path for path in root.rglob("*.jpg") if "Mammalia" not in str(path) and "Plant" not in str(path)
    )
    last.write_bytes(last.read_bytes()[:-20])
    first.write_text("<html>")
    code, lines, _ = run(capsys, name, root)
    assert code == 2 and len(lines) == 2
    assert any(line.startswith(f"{str(first)!r}: unreadable image (none of JPEG") for line in lines)
    assert any(line.lower().startswith(f"{str(last)!r}: unreadable image (truncated".lower()) for line in lines)
    code, skipped, _ = run(capsys, name, root, "--skip-unreadable")
    assert code == 0 and skipped == lines


@pytest.mark.parametrize("layout", [layout for layout in released.RELEASES if layout != "inat-aves"])
def test_missing_and_extra_images_are_listed(layout, tmp_path, capsys):
    name, root = build(layout, tmp_path)
    path = sorted(root.rglob("*.jpg"))[0]
    path.rename(path.with_name("other.jpeg"))
    (path.parent / "._other.jpg").touch()  # what some systems leave beside a file
    (path.parent / "notes.txt").touch()
    code, lines, _ = run(capsys, name, root)
    other = str(path.with_name("other.jpeg"))
    assert code == 2 and lines == [f"{str(path)!r}: missing", f"{other!r}: extra, in no list"]


def test_counts_are_compared_half_by_half_and_class_by_class(tmp_path, capsys):
    root = released.inat_aves(tmp_path)
    path = sorted(root.rglob("*Aves_Pass*/*.jpg"))[-1]
    path.unlink()
    code, lines, _ = run(capsys, "inat-aves", root)
    assert code == 2
    assert lines == ["5 test images, published 6", f"2 images of {path.parent.name}, published 3"]
    code, lines, _ = run(capsys, "cub", released.cub(tmp_path / "more", classes=6))
    assert code == 2
    assert lines == [
        "6 classes, published 4",
        "9 training images, published 6",
        "9 test images, published 6",
    ]


def test_skipping_may_not_leave_a_lone_image(tmp_path, capsys):
    root = released.cub(tmp_path)
    for path in sorted((root / "images" / "003.X_Bird").iterdir())[:2]:
        path.write_bytes(b"")
    code, _, err = run(capsys, "cub", root, "--skip-unreadable")
    assert code == 2 and "'003.X_Bird' has 1 readable image " in err


def test_a_folder_of_ones_own_has_no_published_counts(tmp_path, capsys):
    for name in "abcd":
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (9, 9)).save(tmp_path / name / f"{i}.png")
    assert run(capsys, "folder", tmp_path)[:2] == (0, [])
    (tmp_path / "a" / "x.\x1b\udce9").write_bytes(b"")
    assert run(capsys, "folder", tmp_path.rename(tmp_path.parent / "r\udce9"))[1] == ["passed over: .\\x1b\\udce9: 1"]


def test_a_broken_list_is_one_line(tmp_path, capsys):
    root = released.cub(tmp_path)
    (root / "images.txt").write_text("1\n")
    code, _, err = run(capsys, "cub", root)
    assert code == 2 and err.startswith("error: ") and "images.txt' line 1: found '1'" in err


@pytest.mark.parametrize(
    "words,message",
    [
        (["check", "cub"], "--root: missing; name the folder"),
        (["check", "cub", "--root", ""], "--root: empty; give a value"),
        (["check", "cub", "--rot", "x"], "--rot: unknown flag; did you mean --root?"),
        (["check", "cub", "--root", "x", "--workers", "-1"], "workers: -1; give 0 or more"),
        (["check", "birds", "--root", "x"], "data: say `check`, then one of cub, cars, aircraft, inat-aves, folder"),
        (["cub", "--root", "x"], "data: say `check`"),
        ([], "data: say `check`"),
    ],
)
def test_a_command_line_that_cannot_be_meant(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_as_it_is_typed(tmp_path):
    """With the counts really published, four classes are too few."""
    command = [sys.executable, "-m", "saga_fast.data", "check", "cub", "--root", str(released.cub(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "4 classes, published 200" in done.stdout and "Traceback" not in done.stderr
