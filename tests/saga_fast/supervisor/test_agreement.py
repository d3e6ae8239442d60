"""Attribute credit against loops."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from saga_fast.losses.policy import add_attribute_credit
from saga_fast.supervisor.agreement import DECAY, ClassReadings, agreement, value_entropy


@pytest.mark.parametrize(
    "a,b,expected",
    [
        ("red", "Red ", 1.0),
        ("red", "blue", 0.0),
        ("pale buff", "buff", 2 / 3),
        ("dark red bars", "red dark spots", 2 / 3),
        ("red red", "red", 2 / 3),
        ("", "", 0.0),
    ],
)
def test_agreement_is_f1_of_words(a, b, expected):
    assert agreement(a, b) == pytest.approx(expected) == agreement(b, a)


def test_a_description_is_rewarded_for_what_rollouts_say_of_the_other_image():
    chance, names = random.Random(0), ("crown", "leg", "tail")
    words = ["red", "blue", "pale blue"]
    group = [tuple({n: chance.choice(words) for n in names} for _ in range(2)) for _ in range(5)]
    del group[2][1]["leg"], group[4][0]["tail"]
    found = ClassReadings().rewards(group, (7, 7), names)
    assert found.shape == (2, 3, 5)
    for item in (0, 1):
        for m, name in enumerate(names):
            for g in range(5):
                mine = group[g][item].get(name)
                scores = [
                    agreement(mine, other[1 - item][name]) if mine and name in other[1 - item] else 0.0
                    for other in group
                ]
                assert found[item, m, g].item() == pytest.approx(sum(scores) / 5)


def test_copying_in_item_2_what_was_written_in_item_1_earns_no_more_than_others_do():
    """Rollout 0 repeats its own odd value; rollouts that say what most say of the other image earn more."""
    group = [({"leg": "green"}, {"leg": "green"})] + [({"leg": "red"}, {"leg": "red"})] * 4
    rewards = ClassReadings().rewards(group, (7, 7), ("leg",))
    assert rewards[:, 0, 0].tolist() == pytest.approx([0.2, 0.2]) and rewards[:, 0, 1].tolist() == pytest.approx(
        [0.8] * 2
    )


def test_a_description_is_rewarded_for_what_earlier_steps_said_of_its_class():
    """Against a list of every reading with its age; of two classes too, whose images say nothing of each other."""
    chance, names, words = random.Random(1), ("crown", "leg"), ["red", "blue", "pale blue", "Red"]
    readings, heard = ClassReadings(), {label: [] for label in range(3)}
    for _ in range(12):
        group = [
            tuple({n: chance.choice(words) for n in names if chance.random() < 0.9} for _ in (0, 1)) for _ in "1234"
        ]
        classes = (chance.randrange(3), chance.randrange(3))
        found = readings.rewards(group, classes, names)
        for item, label in enumerate(classes):
            for m, name in enumerate(names):
                known = [(value[name], DECAY**age) for value, age in heard[label] if name in value]
                if classes[0] == classes[1]:
                    known += [(other[1 - item].get(name), 1.0) for other in group]
                for g in range(4):
                    mine = group[g][item].get(name)
                    total = sum(weight for _, weight in known)
                    agreed = sum(weight * agreement(mine, value) for value, weight in known if mine and value)
                    assert found[item, m, g].item() == pytest.approx(agreed / total if known else 0.0, abs=1e-6)
        readings.add(group, classes)
        for label in set(classes):
            heard[label] = [(value, age + 1) for value, age in heard[label] if DECAY ** (age + 1) > 0.05]
            heard[label] += [(d[i], 0) for d in group for i in (0, 1) if classes[i] == label]


def test_readings_come_back_from_a_checkpoint_as_they_were():
    readings, again = ClassReadings(), ClassReadings()
    readings.add([({"leg": "red"}, {"leg": "blue"})] * 3, (4, 5))
    readings.add([({"leg": "red"}, {"leg": "green"})], (4, 4))
    again.load_state_dict(json.loads(json.dumps(readings.state_dict())))
    assert again.values == readings.values
    assert readings.values == {4: {"leg": {"red": 3 * DECAY + 1, "green": 1.0}}, 5: {"leg": {"blue": 3.0}}}


def test_values_long_unheard_are_forgotten():
    readings = ClassReadings()
    readings.add([({"leg": "red"}, {})], (0, 1))
    for _ in range(40):
        readings.add([({"leg": "blue"}, {})], (0, 1))
    assert list(readings.values[0]["leg"]) == ["blue"]


def test_credit_falls_on_the_tokens_of_the_value():
    credit = torch.zeros(2, 2, 2)
    credit[0, 1, 0], credit[1, 0, 1] = 0.5, -2.0
    written = [({"a": [1], "b": [2, 3]}, {"a": [5]}), ({"a": [0]}, {"a": [4, 5], "b": [6]})]
    coefficients = [torch.full((7,), 10.0), torch.full((7,), 20.0)]
    add_attribute_credit(coefficients, credit, written, ("a", "b"), 0.1)
    assert coefficients[0].tolist() == pytest.approx([10, 10, 9.95, 9.95, 10, 10, 10])
    assert coefficients[1].tolist() == pytest.approx([20, 20, 20, 20, 20.2, 20.2, 20])


def test_entropy_of_what_is_said_falls_to_zero_where_all_is_said_alike():
    groups = [
        [({"crown": "red", "leg": "red"}, {"crown": "Red"})],
        [({"crown": "blue", "leg": "red"}, {"crown": "blue"})],
    ]
    assert value_entropy(groups, ("crown", "leg")) == pytest.approx(math.log(2) / 2)
    assert value_entropy([], ("crown",)) == 0
