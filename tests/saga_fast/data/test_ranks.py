"""The ranks of a run compare their data before training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saga_fast.config import DataConfig
from saga_fast.data import ImageFolder, checksum, dataset, first_classes
from saga_fast.evaluate import load_images
from saga_fast.runtime import distributed
from saga_fast.utils.errors import InputError, exit_on_input_error

from ..small import command
from .released import CLASSES, fill


def load(root: Path, fails: int, ranks: int) -> subprocess.CompletedProcess:
    """`load_images` in each of `ranks` processes; in rank `fails` one file gives an error of its disk, once."""
    script = f"from tests.saga_fast.data import test_ranks; test_ranks.rank({str(root)!r}, {fails})"
    (program := root.with_name("program.py")).write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    return subprocess.run(command(str(program), processes=ranks), capture_output=True, text=True, env=environment)


def rank(root: str, fails: int) -> None:
    read, failed = dataset.open_rgb, []

    def flaky(path):
        if distributed.rank() == fails and path.name == "3.jpg" and not failed:
            failed.append(path)
            raise InputError(f"{str(path)!r}: unreadable image (Input/output error); replace or remove it")
        return read(path)

    dataset.open_rgb = flaky
    with exit_on_input_error(), distributed.process_group():
        load_images(DataConfig(root=Path(root), skip_unreadable=True, workers=0), 16)
    if distributed.rank() == 0:
        print("all hold the same")


@pytest.mark.slow
def test_a_moments_fault_of_one_ranks_disk_is_one_line_that_names_the_rank(tmp_path):
    done = load(fill(tmp_path / "images", *CLASSES, images=5), fails=1, ranks=3)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    (line,) = errors
    assert line.startswith("error: data: the ranks hold different training images, 10 on ranks 0, 2, 9 on rank 1 (on ")
    assert "(on rank 1: '" in line and "class_0/3.jpg': unreadable image (Input/output error)" in line
    assert done.returncode and "all hold the same" not in done.stdout


@pytest.mark.slow
def test_ranks_that_hold_the_same_go_on(tmp_path):
    done = load(fill(tmp_path / "images", *CLASSES, images=5), fails=-1, ranks=2)
    assert done.returncode == 0 and "all hold the same" in done.stdout, done.stderr


@pytest.mark.parametrize(("half", "what"), [(0, "training"), (1, "test")])
def test_either_half_is_compared_though_no_file_was_skipped(tmp_path, monkeypatch, half, what):
    """As where two hosts have copies of their own, and one has an image more."""
    asked = []

    def all_gather_object(value):
        held, count, skipped = value
        asked.append(held)
        return [value, ("another", count + 1, skipped) if len(asked) == half + 1 else value]

    monkeypatch.setattr(distributed, "all_gather_object", all_gather_object)
    with pytest.raises(InputError, match=f"hold different {what} images, 10 on rank 0, 11 on rank 1; start again"):
        load_images(DataConfig(root=fill(tmp_path, *CLASSES, images=5), workers=0), 16)


def test_the_checksum_is_of_files_their_order_and_labels(tmp_path):
    data = ImageFolder(fill(tmp_path, *CLASSES, images=5))
    few = first_classes(data, 2)
    assert checksum(few) == checksum(first_classes(ImageFolder(tmp_path), 2)) != checksum(data)
    few.indices[0], few.indices[1] = few.indices[1], few.indices[0]
    assert checksum(few) != checksum(first_classes(data, 2))
    root = tmp_path.rename(tmp_path.with_name("moved"))
    names = [checksum(ImageFolder(root), lambda path: path.name)]
    root = root.rename(tmp_path)
    names.append(checksum(ImageFolder(root), lambda path: path.name))
    assert names[0] == names[1] == checksum(data, lambda path: path.name)
    data.labels[3] = 1
    assert checksum(data) != checksum(ImageFolder(tmp_path))
