import pytest

from saga_fast.data import first_classes
from saga_fast.tiny.birds import DrawnBirds
from saga_fast.utils.errors import InputError


def test_first_classes_keeps_their_images_and_no_other_class():
    birds = DrawnBirds("train", species=12, images_per_species=3)
    few = first_classes(birds, 2)
    assert few.classes == birds.classes[:2]
    assert few.labels == [0, 0, 0, 1, 1, 1]
    assert few[4][0].tobytes() == birds[4][0].tobytes()


def test_more_classes_than_there_are():
    with pytest.raises(InputError, match=r"--data.train-classes: 7; the training half has 6 classes"):
        first_classes(DrawnBirds("train", species=12, images_per_species=2), 7)
