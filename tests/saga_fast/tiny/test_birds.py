from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from saga_fast.tiny.birds import (
    ATTRIBUTES,
    BENCHMARK,
    COLORS,
    FAMILY,
    NUISANCES,
    SIZE,
    DrawnBirds,
    Nuisance,
    change,
    differing,
    draw,
    export,
    random_attributes,
    species,
)
from saga_fast.utils.errors import InputError

CLEAN = Nuisance(
    rotation=12, shift=0.04, scale=(0.85, 1.05), head=0.05, light=0, tint=0, clutter=0, occlusion=0, blur=0, noise=0
)


def picture(bird: dict[str, str], seed: int, nuisance: Nuisance = CLEAN) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    drawing = draw(bird, nuisance, np.random.default_rng(seed), masks=True)
    return np.asarray(drawing.image).astype(int), drawing.masks


def test_picture_is_a_function_of_its_seed():
    birds, again = DrawnBirds("train", 8, 3), DrawnBirds("train", 8, 3)
    backwards = [np.asarray(again[i][0]) for i in reversed(range(len(again)))][::-1]
    assert all((np.asarray(birds[i][0]) == backwards[i]).all() for i in range(len(birds)))
    assert (np.asarray(birds[0][0]) != np.asarray(birds[1][0])).any()
    assert (np.asarray(DrawnBirds("train", 8, 3, seed=1)[0][0]) != backwards[0]).any()


def test_masks_do_not_change_the_picture():
    bird = random_attributes(np.random.default_rng(0))
    without = draw(bird, BENCHMARK, np.random.default_rng(5))
    assert (np.asarray(without.image) == picture(bird, 5, BENCHMARK)[0]).all()
    assert without.masks == {}


@pytest.mark.parametrize("seed", range(6))
def test_every_attribute_is_visible_and_its_color_stands_in_its_mask(seed):
    bird = random_attributes(np.random.default_rng(seed))
    pixels, masks = picture(bird, seed)
    for name, mask in masks.items():
        assert mask.shape == (SIZE, SIZE) and mask.dtype == bool
        assert mask.sum() >= 40, name
        if name.endswith("color") and not (name == "wing color" and bird["wing pattern"] != "plain"):
            near = np.abs(pixels[mask] - COLORS[bird[name]]).sum(1) < 60
            assert near.mean() > 0.55, name


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_changing_an_attribute_changes_the_picture_where_its_mask_is(name):
    rng = np.random.default_rng(3)
    inside = []
    for seed in range(4):
        bird = random_attributes(rng)
        other = {**bird, name: next(value for value in ATTRIBUTES[name] if value != bird[name])}
        (a, masks_a), (b, masks_b) = picture(bird, seed), picture(other, seed)
        changed = np.abs(a - b).sum(2) > 30
        assert changed.sum() >= 10
        # An edge's pixel may fall on either side of the half-size mask.
        mask = Image.fromarray((masks_a[name] | masks_b[name]).astype(np.uint8) * 255).resize((SIZE, SIZE))
        grown = np.asarray(mask) > 0
        grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0) | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
        inside.append(changed[grown].sum() / changed.sum())
    assert np.mean(inside) > 0.9


def test_an_occluder_takes_its_area_from_the_masks():
    bird = random_attributes(np.random.default_rng(1))
    leafy = Nuisance(**{**vars(CLEAN), "occlusion": 6})
    visible = [sum(m.sum() for m in picture(bird, seed, leafy)[1].values()) for seed in range(12)]
    clear = [sum(m.sum() for m in picture(bird, seed)[1].values()) for seed in range(12)]
    assert all(v <= c for v, c in zip(visible, clear)) and sum(visible) < 0.95 * sum(clear)


@pytest.mark.parametrize("seed", range(3))
def test_species_come_in_families_that_no_split_cuts(seed):
    birds = species(40, seed)
    assert len({tuple(bird.values()) for bird in birds}) == 40
    train, test = birds[:20], birds[20:]
    for half in (train, test):
        for start in range(0, 20, FAMILY):
            family = half[start : start + FAMILY]
            assert all(1 <= len(differing(a, b)) <= 2 for a, b in itertools.combinations(family, 2))
    assert min(len(differing(a, b)) for a in train for b in test) >= 5


def test_splits_are_disjoint_and_described():
    train, test = DrawnBirds("train", 12, 3), DrawnBirds("test", 12, 3)
    assert len(train) == len(test) == 18 and not set(train.classes) & set(test.classes)
    assert train.labels == [i for i in range(6) for _ in range(3)]
    image, label = test[17]
    assert image.mode == "RGB" and image.size == (SIZE, SIZE) and label == test.labels[17] == 5
    assert test.attributes(17) == species(12)[11] and tuple(test.attributes(17)) == tuple(ATTRIBUTES)
    assert set(test.masks(17)) == set(ATTRIBUTES)
    with pytest.raises(IndexError):
        test[18]


def test_change_changes_exactly_that_many():
    rng = np.random.default_rng(0)
    bird = random_attributes(rng)
    for count in (0, 1, 2, 12):
        assert len(differing(bird, change(bird, count, rng))) == count


def test_each_nuisance_is_harder_than_the_one_before_in_every_strength():
    assert list(NUISANCES) == ["easy", "moderate", "benchmark", "hard"]
    for easier, harder in itertools.pairwise(NUISANCES.values()):
        for name in ("rotation", "shift", "head", "light", "tint", "clutter", "occlusion", "blur", "noise"):
            assert getattr(harder, name) >= getattr(easier, name), name
        assert harder != easier


def test_export_writes_an_image_folder(tmp_path):
    out = tmp_path / "birds"
    assert export(out, species=4, images_per_species=2) == 8
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert files[0] == "test/species_002/000.png" and len(files) == 8
    assert (np.asarray(Image.open(out / files[0])) == np.asarray(DrawnBirds("test", 4, 2)[0][0])).all()
    with pytest.raises(InputError, match="not empty"):
        export(out)


@pytest.mark.parametrize("arguments", [("validation",), ("train", 3), ("train", 8, 1)])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError, match="split|species"):
        DrawnBirds(*arguments)
