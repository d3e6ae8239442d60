"""Augmentation of pictures with known pixels, and that it is a function of seed and batch alone."""

from __future__ import annotations

import pytest
import torch

from saga_fast.config import AugmentConfig, Config
from saga_fast.data import Augmentation, Batch, augmented
from saga_fast.utils.errors import InputError


def ramp(count: int, size: int = 64) -> torch.Tensor:
    """uint8 (count, 3, size, size): red grows to the right, green downwards, blue is 100 everywhere."""
    across = torch.linspace(0, 255, size).expand(size, size)
    return (
        torch.stack([across, across.T, torch.full((size, size), 100.0)]).round().to(torch.uint8).repeat(count, 1, 1, 1)
    )


def test_a_crop_is_a_window_of_the_image_no_smaller_and_no_slimmer_than_asked():
    found = Augmentation(least_area=0.3)(ramp(200), 0).float()
    width, height = found[:, 0, 32, -2] - found[:, 0, 32, 1], found[:, 1, -2, 32] - found[:, 1, 1, 32]
    width, height = width / 255 * 63 / 61, height / 255 * 63 / 61
    assert (width > 0).all() and (height > 0).all(), "nothing is mirrored"
    area, ratio = width * height, width / height
    assert area.min() > 0.27 and area.min() < 0.35 and area.max() > 0.9
    assert 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.38
    left = found[:, 0, 32, 0] / 255
    assert left.min() < 0.02 and left.max() > 0.3, "the window is not always in one place"
    assert (found[:, 0].std(1) < 1).all() and (found[:, 2] == 100).all(), "rows stay rows, blue stays blue"


def test_a_flip_alone_mirrors_half_of_the_images_to_the_pixel():
    images = ramp(200)
    found = Augmentation(flip=True)(images, 0)
    mirrored = torch.tensor([torch.equal(image, images[0].flip(2)) for image in found])
    same = torch.tensor([torch.equal(image, images[0]) for image in found])
    assert (mirrored | same).all() and 70 < mirrored.sum() < 130


def test_light_changes_brightness_contrast_and_saturation_of_a_whole_image():
    images = torch.full((200, 3, 8, 8), 100, dtype=torch.uint8)
    images[:, :, 4:] = 140
    found = Augmentation(light=0.4)(images, 0).float()
    assert (found == found[:, :1]).all(), "grey stays grey"
    brightness = found.mean((1, 2, 3)) / 120
    assert 0.6 <= brightness.min() < 0.65 and 1.35 < brightness.max() <= 1.41
    contrast = (found[:, 0, 7, 0] - found[:, 0, 0, 0]) / 40 / brightness
    assert 0.55 < contrast.min() < 0.68 and 1.32 < contrast.max() < 1.45
    colored = Augmentation(light=0.4)(ramp(200), 0).float()
    spread = colored.amax(1) - colored.amin(1)
    assert len(spread.mean((1, 2)).round().unique()) > 50


def test_nothing_asked_for_leaves_the_pixels_alone():
    images = ramp(3)
    assert Augmentation()(images, 0) is images


def test_a_batch_is_augmented_alike_wherever_a_run_begins():
    batches = [Batch([i], ramp(4), torch.zeros(4)) for i in range(5)]
    settings = Augmentation(least_area=0.5, flip=True, light=0.2)
    whole = [batch.pixels for batch in augmented(batches, settings, seed=3)]
    resumed = [batch.pixels for batch in augmented(batches[2:], settings, seed=3, first=2)]
    assert all(map(torch.equal, whole[2:], resumed))
    different = [*whole, next(augmented(batches, settings, seed=4)).pixels]
    assert len({pixels.numpy().tobytes() for pixels in different}) == 6
    assert len({image.numpy().tobytes() for image in whole[0]}) == 4, "images of a batch are augmented apart"


@pytest.mark.parametrize("field,value", [("least_area", 0.0), ("least_area", 1.5), ("light", 1.0), ("light", -0.1)])
def test_senseless_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"augment.{field.replace('_', '-')}: {value}; give"):
        Config(augment=AugmentConfig(**{field: value}))
