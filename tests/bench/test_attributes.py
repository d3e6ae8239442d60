"""The metrics of blocks and attention against counting by hand, and the command on an encoder of random weights."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from bench import attributes as bench
from saga_fast.config import PRESETS
from saga_fast.tiny.birds import ATTRIBUTES, SIZE, DrawnBirds
from saga_fast.utils.errors import InputError

from ..saga_fast.small import save_encoder


def test_precision_and_chance_are_counted_right():
    torch.manual_seed(0)
    z, values, labels = torch.randn(40, 3), torch.randint(0, 3, (40,)), torch.arange(40) // 5
    own, itself = labels == labels[:, None], torch.eye(40, dtype=torch.bool)
    for left_out in (itself, own):
        right, share = [], []
        for query in range(40):
            others = [i for i in range(40) if not left_out[query, i]]
            nearest = sorted(others, key=lambda i: -float(z[query] @ z[i]))[:10]
            right.append(np.mean([values[i] == values[query] for i in nearest]))
            share.append(np.mean([values[i] == values[query] for i in others]))
        assert bench.precision(z, values, left_out) == pytest.approx(np.mean(right))
        assert bench.chance(values, left_out) == pytest.approx(np.mean(share))
    assert bench.precision(z, values) == bench.precision(z, values, itself)


@pytest.mark.parametrize("grid", [(7, 7), (4, 8), (3, 5)])
def test_cells_that_a_mask_touches(grid):
    birds = DrawnBirds("test", 4, 3)
    for image in range(len(birds)):
        masks, found = birds.masks(image), birds.touched(image, grid)
        assert found.keys() == {name for name, mask in masks.items() if mask.any()}
        for name, cells in found.items():
            wanted = np.zeros(grid, bool)
            for y, x in zip(*masks[name].nonzero()):
                wanted[int(y / SIZE * grid[0]), int(x / SIZE * grid[1])] = True
            np.testing.assert_array_equal(cells, wanted)


def test_a_look_inside_the_mask_counts_whole_and_one_beside_it_not_at_all():
    birds, grid = DrawnBirds("test", 4, 2), (7, 7)
    seen = [birds.touched(image, grid) for image in range(len(birds))]
    nothing = np.zeros(grid, bool)
    inside = np.stack([attention.get("crown color", nothing) for attention in seen]).astype(float)
    inside /= inside.sum((1, 2), keepdims=True).clip(1)
    attentions = np.stack([inside, np.roll(inside, 3, (1, 2))], 1)
    found = bench.shares_in_masks(attentions, {"crown color": 0}, birds)["crown color"]
    even = np.mean([attention["crown color"].mean() for attention in seen if "crown color" in attention])
    assert found == pytest.approx([1, even])
    beside = np.where(np.stack([attention.get("crown color", nothing) for attention in seen]), 0, 1 / 49)[:, None]
    assert bench.shares_in_masks(beside, {"crown color": 0}, birds)["crown color"][0] == 0


def test_the_command_measures_every_attribute_and_says_what_was_missed(tmp_path, monkeypatch, capsys):
    save_encoder(tmp_path / "encoder", attributes=tuple(ATTRIBUTES))
    save_encoder(tmp_path / "paper")
    monkeypatch.setattr(bench, "birds_of", lambda encoder: DrawnBirds("test", 8, 8))
    flags = ["--encoder", str(tmp_path / "encoder"), "--paper", str(tmp_path / "paper")]
    monkeypatch.setattr(sys, "argv", ["bench.attributes", *flags, "--json", str(tmp_path / "found.json")])
    bench.main()
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 32 and [*found["figures"]] == [*ATTRIBUTES]
    assert all(name in printed for name in (*ATTRIBUTES, "paper's", "mean"))
    for row in found["figures"].values():
        assert all(0 <= share <= 1 for share in row.values()) and len(row) == 9
        # The paper's query is initialised to zero, so its attention is uniform.
        assert row["beta_paper"] == pytest.approx(row["beta_even"], abs=1e-6)
    reached = [goal["reached"] for goal in found["goals"]]
    assert len(reached) == 3 and printed.count("missed: ") == reached.count(False) >= 1
    assert not reached[2], "random queries look at no attribute"
    perfect = {name: dict.fromkeys(row, 0.5) | {"block": 0.9, "beta": 0.8} for name, row in found["figures"].items()}
    assert all(reached for _, reached in bench.goals(perfect))
    perfect["leg color"]["whole"] = 0.9
    (words,) = (words for words, reached in bench.goals(perfect) if not reached)
    assert "11 of 12" in words and words.endswith("not for leg color")


def test_the_birds_are_those_that_the_run_was_measured_on(tmp_path):
    assert len(bench.birds_of(tmp_path / "encoder").classes) == PRESETS["drawn-birds"].data.species // 2
    data = {"name": "drawn-birds", "species": 12, "images_per_species": 3, "seed": 5}
    (tmp_path / "config.json").write_text(json.dumps({"config": {"data": data, "of another version": 1}}))
    birds = bench.birds_of(tmp_path / "encoder")
    assert birds.combinations == DrawnBirds("test", 12, 3, 5).combinations and len(birds) == 18
    (tmp_path / "config.json").write_text(json.dumps({"config": {"data": {**data, "name": "cub"}}}))
    with pytest.raises(InputError, match="its run was on 'cub'; only drawn-birds"):
        bench.birds_of(tmp_path / "encoder")


def test_an_encoder_of_another_kind_is_named(tmp_path):
    save_encoder(tmp_path / "paper")
    with pytest.raises(
        InputError, match="--encoder: .*paper' pools by 'attention'; give one trained with 'attributes'"
    ):
        bench.load(tmp_path / "paper", "--encoder", "attributes")
    save_encoder(tmp_path / "cars", attributes=("crown color", "grille"))
    with pytest.raises(InputError, match="has the attribute 'grille', of which drawings know no truth"):
        bench.load(tmp_path / "cars", "--encoder", "attributes")
