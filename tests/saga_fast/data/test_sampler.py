"""Class-balanced sampling: balance, no repeats, and exact resumption."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saga_fast.data import ClassBalancedSampler
from saga_fast.utils.errors import InputError

LABELS = [label for label, size in enumerate([2, 3, 5, 7, 30, 4, 6]) for _ in range(size)]


def test_every_batch_has_c_classes_of_k_distinct_images():
    for batch in islice(ClassBalancedSampler([i % 10 for i in range(60)], 4, 5), 50):
        groups = [batch[i : i + 5] for i in range(0, 20, 5)]
        assert all(len({i % 10 for i in group}) == 1 and len(set(group)) == 5 for group in groups)
        assert len({group[0] % 10 for group in groups}) == 4


@settings(max_examples=40, deadline=None)
@given(classes=st.integers(1, 7), images=st.integers(1, 8), seed=st.integers(0, 99), batches=st.integers(1, 60))
def test_no_class_and_no_image_is_ever_more_than_one_turn_ahead(classes, images, seed, batches):
    dealt = [i for batch in islice(ClassBalancedSampler(LABELS, classes, images, seed), batches) for i in batch]
    visits = Counter(LABELS[i] for i in dealt[::images])
    assert max(visits.values()) - min(visits[label] for label in set(LABELS)) <= 1
    uses = Counter(dealt)
    for label in set(LABELS):
        turns = [uses[i] for i, other in enumerate(LABELS) if other == label]
        assert max(turns) - min(turns) <= 1


def test_a_small_class_repeats_its_images_only_after_all_were_used():
    for batch in islice(ClassBalancedSampler([0, 0, 0, 1, 1, 1], 2, 5), 20):
        for group in (batch[:5], batch[5:]):
            assert set(group[:3]) == set(group) and len(set(group)) == 3


def test_the_seed_decides_the_order():
    first, same, other = (list(islice(ClassBalancedSampler(LABELS, 3, 2, seed), 5)) for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("dealt", [0, 1, 17])
def test_resumes_exactly_through_json(dealt):
    sampler = ClassBalancedSampler(LABELS, 3, 4, seed=5)
    list(islice(sampler, dealt))
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = list(islice(sampler, 20))
    resumed = ClassBalancedSampler(LABELS, 3, 4, seed=5)
    next(resumed)
    resumed.load_state_dict(state)
    assert list(islice(resumed, 20)) == expected
    resumed.load_state_dict(sampler.state_dict(dealt))  # a position behind what was dealt
    assert list(islice(resumed, 20)) == expected


def test_refuses_the_state_of_another_run():
    state = ClassBalancedSampler(LABELS, 3, 4, seed=5).state_dict()
    for other in (ClassBalancedSampler(LABELS, 3, 4, seed=6), ClassBalancedSampler(LABELS[:-1], 3, 4, seed=5)):
        with pytest.raises(InputError, match="another training set"):
            other.load_state_dict(state)


def test_refuses_the_state_of_other_images_with_the_same_labels():
    state = ClassBalancedSampler(LABELS, 3, 4, contents="owls").state_dict()
    ClassBalancedSampler(LABELS, 3, 4, contents="owls").load_state_dict(state)
    for contents in ("crows", ""):
        with pytest.raises(InputError, match="--data.root: the run was saved with another training set"):
            ClassBalancedSampler(LABELS, 3, 4, contents=contents).load_state_dict(state)
    earlier = ClassBalancedSampler(LABELS, 3, 4).state_dict()  # as earlier versions wrote it
    ClassBalancedSampler(LABELS, 3, 4, contents="owls").load_state_dict(earlier)


def test_an_epoch_is_as_many_images_as_the_set_has():
    assert ClassBalancedSampler([i % 50 for i in range(1500)]).batches_per_epoch == 1500 // 64
    assert ClassBalancedSampler(LABELS, 7, 30).batches_per_epoch == 1


def test_refuses_too_few_classes_and_lone_images():
    with pytest.raises(InputError, match="data.classes-per-batch: 16, where 7 classes are left .*pass .*batch 7"):
        ClassBalancedSampler(LABELS)
    with pytest.raises(InputError, match="where 1 classes are left to train on; add classes"):
        ClassBalancedSampler([0, 0], 2)
    with pytest.raises(InputError, match="class number 1 has 1 image"):
        ClassBalancedSampler([0, 0, 1, 2, 2], 2, 2)
