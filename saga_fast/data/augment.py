"""Augmentation of training images: random resized crops, mirroring, and changes of light.

Random numbers depend only on the run's seed, the number of the micro-batch and the position in it: a resumed run gets
the same images as an uninterrupted one, and all ranks agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saga_fast.data.loader import Batch

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: weights of red, green and blue in brightness


@dataclass(frozen=True)
class Augmentation:
    """least_area: the smallest share of an image's area that a crop keeps, 1 for whole images; a crop's aspect ratio is
    3 : 4 to 4 : 3, and it is resized to the image's size. flip: mirror an image with probability 1/2. light:
    brightness, contrast and saturation are multiplied by 1 - light to 1 + light."""

    least_area: float = 1.0
    flip: bool = False
    light: float = 0.0

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """uint8 (B, 3, S, S) → the same, augmented by random numbers of `seed`."""
        if self == Augmentation():
            return pixels
        random, count = torch.Generator().manual_seed(seed), len(pixels)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=random)

        x = pixels.float()
        # All random numbers are always drawn, so that one setting does not change the random numbers of another.
        area, ratio = uniform(self.least_area, 1), uniform(-math.log(4 / 3), math.log(4 / 3)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        across, down, mirrored = uniform(-1, 1), uniform(-1, 1), uniform(0, 1) < 0.5
        factors = [uniform(1 - self.light, 1 + self.light)[:, None, None, None] for _ in range(3)]
        if self.least_area < 1 or self.flip:
            if self.least_area == 1:
                width, height = torch.ones(count), torch.ones(count)
            # For affine_grid, in coordinates from -1 to 1: half the crop's sides, and its centre.
            crop = torch.zeros(count, 2, 3)
            crop[:, 0, 0], crop[:, 0, 2] = torch.where(mirrored & self.flip, -width, width), across * (1 - width)
            crop[:, 1, 1], crop[:, 1, 2] = height, down * (1 - height)
            grid = F.affine_grid(crop, list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, "bilinear", "border", align_corners=False)
        if self.light > 0:
            luma = torch.tensor(LUMA)[:, None, None]
            brightness, contrast, saturation = factors
            x = x * brightness
            mean = (x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
            x = mean + (x - mean) * contrast
            grey = (x * luma).sum(1, keepdim=True)
            x = grey + (x - grey) * saturation
        return x.round_().clamp_(0, 255).to(torch.uint8)


def augmented(batches: Iterable[Batch], augmentation: Augmentation, seed: int, first: int = 0) -> Iterator[Batch]:
    """The augmented micro-batches; the first is number `first` of the run."""
    for number, batch in enumerate(batches, first):
        (mixed,) = np.random.SeedSequence((seed, number)).generate_state(1)  # 32 bits, as a generator uses no more
        yield batch._replace(pixels=augmentation(batch.pixels, int(mixed)))
