"""A folder per class, through the loader: the images, their order, and errors."""

from __future__ import annotations

import os
import random
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saga_fast.data import ClassBalancedSampler, ImageFolder, PixelLoader, load_dataset
from saga_fast.utils import images
from saga_fast.utils.errors import InputError
from saga_fast.utils.images import open_rgb, to_pixels


def fill(root: Path, classes: int = 5, images: int = 4) -> Path:
    """root/class_C/I.png, each of its own color."""
    for c in range(classes):
        (folder := root / f"class_{c}").mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (12, 9), (40 * c, 50 * i, 99)).save(folder / f"{i}.png")
    return root


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:40])
    return path


def test_classes_and_images_are_sorted_and_the_rest_is_passed_over(tmp_path):
    fill(tmp_path)
    (tmp_path / "README.md").write_text("not a class")
    (tmp_path / ".git").mkdir()
    (tmp_path / "class_0" / "Thumbs.db").write_bytes(b"not an image")
    (tmp_path / "class_0" / "deeper.png").mkdir()
    (tmp_path / "class_0" / "0.png").rename(tmp_path / "class_0" / "9.PNG")
    (tmp_path / "class_6_loop").symlink_to(".", target_is_directory=True)
    data = ImageFolder(tmp_path)
    assert data.classes == [f"class_{c}" for c in range(5)]
    assert [path.name for path in data.paths[:4]] == ["1.png", "2.png", "3.png", "9.PNG"]
    assert data.labels == [c for c in range(5) for _ in range(4)] and len(data) == 20
    image, label = data[5]
    assert image.getpixel((0, 0)) == (40, 50, 99) and label == 1


LITTER = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle", ".hidden")


@pytest.mark.filterwarnings("error")
def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path):
    fill(tmp_path)
    for folder in LITTER:
        for inside in (tmp_path, tmp_path / "class_1"):
            Image.new("RGB", (2, 2)).save((inside / folder).mkdir() or inside / folder / "1.png")
            Image.new("RGB", (2, 2)).save(inside / folder / "2.png")
    (tmp_path / "lost+found").chmod(0)
    for name in ("._1.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "class_2" / name).write_bytes(b"\0\5\x16\7")
    train, test = load_dataset("folder", tmp_path)
    assert train.classes + test.classes == [f"class_{c}" for c in range(5)] and len(train) + len(test) == 20


def test_what_is_passed_over_is_told_once_by_kind(tmp_path, monkeypatch):
    fill(tmp_path)
    for i in range(40):
        (tmp_path / "class_0" / f"{i}.HEIC").touch()
        (tmp_path / "class_4" / f"{i}.txt").touch()
    (tmp_path / "class_4" / "LICENSE").touch()
    (tmp_path / "class_1" / "deeper").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "loose.png")
    monkeypatch.setattr(images, "SUFFIXES", tuple(s for s in images.SUFFIXES if s != ".heic"))
    with pytest.warns(UserWarning, match="skipped") as caught:
        load_dataset("folder", tmp_path)
    (line,) = [str(warning.message) for warning in caught]
    assert line == (
        "folder: skipped: .heic: 40 (pip install pillow-heif, and they are read), .txt: 40, "
        "folders deeper down: 1, images in no class folder: 1, without a suffix: 1"
    )
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset("folder", tmp_path)
    for path in (tmp_path / "class_0").glob("[1-9].png"):
        path.unlink()
    with pytest.raises(InputError, match=r"'class_0' has 1 readable.*skipped: .heic: 40 \(pip install pillow-heif,"):
        load_dataset("folder", tmp_path)


def test_train_and_test_share_no_class(tmp_path):
    train, test = load_dataset("folder", fill(tmp_path))
    assert train.classes == ["class_0", "class_1", "class_2"] and test.classes == ["class_3", "class_4"]
    assert test[0][1] == 0 and test[0][0].getpixel((0, 0)) == (120, 0, 99)


def test_odd_names_are_names_like_others(tmp_path):
    odd = [b"new\nline", b"\xff\xfe", "猫".encode() * 85, b"{0}", b"<b>", b"\x1b[2J"]
    for name in odd:
        (folder := tmp_path / os.fsdecode(name)).mkdir()
        for image in (b"a\nb.png", b"\xff.png"):
            Image.new("RGB", (2, 2)).save(folder / os.fsdecode(image))
    (tmp_path / "loop").symlink_to("loop")
    train, test = load_dataset("folder", tmp_path)
    assert sorted(os.fsencode(name) for name in train.classes + test.classes) == sorted(odd)
    assert len(train) == len(test) == 6 and train[0][0].size == (2, 2)
    train.paths[0].write_bytes(b"")
    with pytest.raises(InputError) as caught:
        PixelLoader(train, 8)
    assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="loop.*cannot be listed .Too many levels of symbolic links"):
        load_dataset("folder", tmp_path / "loop")


def test_refusals_name_the_folder_and_the_mend(tmp_path):
    with pytest.raises(InputError, match="nowhere.*No such file"):
        load_dataset("folder", tmp_path / "nowhere")
    with pytest.raises(InputError, match="no class folders"):
        load_dataset("folder", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file.* is a file; accepted are a folder of class folders, and a list"):
        load_dataset("folder", tmp_path / "file")
    fill(tmp_path / "one", classes=1)
    with pytest.raises(InputError, match="only one class, 'class_0'"):
        load_dataset("folder", tmp_path / "one")
    for path in list((fill(tmp_path / "lone") / "class_3").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match="lone.*'class_3' has 1 readable image "):
        load_dataset("folder", tmp_path / "lone")
    with pytest.raises(InputError, match="data.root: missing"):
        load_dataset("folder")
    with pytest.raises(
        InputError, match="'fodler' is unknown; accepted are drawn-birds, cub, cars, aircraft, inat-aves, folder"
    ):
        load_dataset("fodler", tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_loader_gives_the_resized_pixels_kept_or_not(tmp_path, workers, memory_limit):
    data = ImageFolder(fill(tmp_path))
    before = torch.get_rng_state(), random.getstate()
    loader = PixelLoader(data, 8, workers, memory_limit)
    expected = torch.stack([to_pixels(open_rgb(path), 8) for path in data.paths])
    batch = loader.batch([7, 0, 7])
    assert batch.pixels.dtype == torch.uint8 and torch.equal(batch.pixels, expected[[7, 0, 7]])
    assert batch.labels.tolist() == [1, 0, 1] and len(loader) == 20 and loader.skipped == []

    sampler = ClassBalancedSampler(data.labels, 3, 2, seed=1)
    wanted = list(islice(ClassBalancedSampler(data.labels, 3, 2, seed=1), 6))
    for indices, batch in zip(wanted, loader.stream(sampler), strict=False):
        assert batch.indices == indices and torch.equal(batch.pixels, expected[indices])
        assert batch.labels.tolist() == [data.labels[i] for i in indices]
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("memory_limit", [2**30, 0])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_or_skipped_and_counted(tmp_path, memory_limit, workers):
    data = ImageFolder(fill(tmp_path))
    broken = truncate(data.paths[6])
    with pytest.raises(InputError) as caught:
        PixelLoader(data, 8, workers, memory_limit)
    assert str(broken) in str(caught.value) and "--data.skip-unreadable" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match="birds: 1 of 20 images skipped.*2.png"):
        loader = PixelLoader(data, 8, workers, memory_limit, skip_unreadable=True, name="birds")
    assert len(loader) == 19 and len(loader.skipped) == 1 and str(broken) in loader.skipped[0]
    assert loader.labels.tolist() == data.labels[:6] + data.labels[7:] == loader.dataset.labels
    assert torch.equal(loader.batch([6]).pixels[0], to_pixels(open_rgb(data.paths[7]), 8))
    assert np.array_equal(loader.dataset[6][0], open_rgb(data.paths[7]))


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_skipping_may_not_leave_a_lone_image(tmp_path):
    data = ImageFolder(fill(tmp_path, images=2))
    truncate(data.paths[3])
    with pytest.raises(InputError, match="'class_1' has 1 readable image "):
        PixelLoader(data, 8, skip_unreadable=True)


def test_an_image_that_breaks_later_is_named(tmp_path):
    data = ImageFolder(fill(tmp_path))
    loader = PixelLoader(data, 8, workers=1, memory_limit=0)
    broken = truncate(data.paths[0])
    with pytest.raises(InputError, match=f"{broken.name}.*unreadable"):
        list(loader.stream([[1, 2], [0]]))


def test_drawn_birds_need_no_root():
    train, test = load_dataset("drawn-birds", species=8, images_per_species=2)
    assert not set(train.classes) & set(test.classes)
    batch = PixelLoader(train, 32).batch([0, 7])
    assert batch.pixels.shape == (2, 3, 32, 32) and batch.labels.tolist() == [0, 3]
