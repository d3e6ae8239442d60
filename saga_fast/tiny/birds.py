"""Drawn birds: a synthetic fine-grained retrieval set with each image's attributes and their segmentation masks.

A bird is twelve attributes and a species is one combination of them. Species come in families of siblings that differ
from one another in one or two attributes, as the hard pairs of real bird sets do. Pose, size, light, clutter,
occlusion, blur and noise are nuisance, set by a `Nuisance`: the tiny supervisor's tower learned from EASY pictures, its
language model from MODERATE ones; BENCHMARK is clearly shifted, HARD hides some of the attributes. Every picture is a
function of (seed, species, index) alone.

    python -m saga_fast.tiny.birds OUT      # export as an image folder: OUT/{train,test}/CLASS/NNN.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from saga_fast.utils.errors import InputError, exit_on_input_error

SIZE = 112  # pixels a side
SUPERSAMPLE = 2

COLORS = {
    "red": (205, 45, 40),
    "yellow": (242, 205, 50),
    "green": (60, 155, 65),
    "blue": (50, 95, 205),
    "black": (40, 38, 42),
    "white": (240, 240, 236),
}
_COLOR_NAMES = tuple(COLORS)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "bill shape": ("cone", "dagger", "hooked"),
    "bill length": ("short", "long"),
    "crown color": _COLOR_NAMES,
    "breast color": _COLOR_NAMES,
    "belly color": _COLOR_NAMES,
    "back color": _COLOR_NAMES,
    "wing pattern": ("plain", "barred", "spotted"),
    "wing color": _COLOR_NAMES,
    "tail shape": ("fan", "forked", "pointed"),
    "tail pattern": ("plain", "banded", "tipped"),
    "leg color": ("red", "yellow", "blue", "black"),
    "eye ring": ("absent", "white", "yellow"),
}
REGION_OF = {  # which drawn part shows an attribute
    "bill shape": "bill",
    "bill length": "bill",
    "crown color": "crown",
    "breast color": "breast",
    "belly color": "belly",
    "back color": "back",
    "wing pattern": "wing",
    "wing color": "wing",
    "tail shape": "tail",
    "tail pattern": "tail",
    "leg color": "legs",
    "eye ring": "eye",
}
_REGION_ID = {name: i + 1 for i, name in enumerate(dict.fromkeys(REGION_OF.values()))}  # 0: none of them

_FACE, _BILL, _TAIL, _TAIL_MARK, _INK = (196, 168, 136), (112, 98, 92), (158, 136, 118), (62, 50, 46), (28, 26, 28)


@dataclass(frozen=True)
class Nuisance:
    """Maximum strengths of everything that is not an attribute; each picture samples its own strengths up to these."""

    rotation: float  # degrees, either way
    shift: float  # of the picture's side, either way
    scale: tuple[float, float]
    head: float  # how far the head moves against the body, in body units (the bird is about 2.2 long)
    light: float  # relative change of brightness, and of its slope across the picture
    tint: float  # relative change of each color channel
    clutter: int  # most shapes behind the bird
    occlusion: int  # most leaves and twigs in front of the bird
    blur: float  # largest Gaussian radius, pixels
    noise: float  # largest standard deviation, of 255


EASY = Nuisance(
    rotation=12,
    shift=0.04,
    scale=(0.85, 1.05),
    head=0.05,
    light=0.2,
    tint=0.1,
    clutter=6,
    occlusion=1,
    blur=0.7,
    noise=10,
)
MODERATE = Nuisance(
    rotation=14,
    shift=0.05,
    scale=(0.83, 1.05),
    head=0.06,
    light=0.25,
    tint=0.14,
    clutter=8,
    occlusion=2,
    blur=1.0,
    noise=14,
)
BENCHMARK = Nuisance(
    rotation=16,
    shift=0.06,
    scale=(0.8, 1.05),
    head=0.07,
    light=0.3,
    tint=0.18,
    clutter=12,
    occlusion=2,
    blur=1.3,
    noise=18,
)
HARD = replace(BENCHMARK, light=0.45, tint=0.3, clutter=16, occlusion=3, blur=1.8, noise=28)
NUISANCES = {"easy": EASY, "moderate": MODERATE, "benchmark": BENCHMARK, "hard": HARD}


class Drawing(NamedTuple):
    image: Image.Image  # RGB, SIZE x SIZE
    masks: dict[str, np.ndarray]  # attribute -> (SIZE, SIZE) bool, the visible part; empty unless asked for


Point = Sequence[float] | np.ndarray  # x and y


def _ellipse(at: Point, rx: float, ry: float, angle: float = 0.0, steps: int = 28) -> np.ndarray:
    """Outline of an ellipse around `at`, turned by `angle` (radians): (steps, 2)."""
    t = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    u, v = rx * np.cos(t), ry * np.sin(t)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([at[0] + c * u - s * v, at[1] + s * u + c * v], 1)


def _clip(polygon: np.ndarray, point: Point, normal: Point) -> np.ndarray:
    """The part of a convex polygon (n, 2) on the side of a line that `normal` points to."""
    side = (polygon - np.asarray(point)) @ np.asarray(normal)
    kept = []
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        if side[i] >= 0:
            kept.append(polygon[i])
        if (side[i] >= 0) != (side[j] >= 0):
            kept.append(polygon[i] + (polygon[j] - polygon[i]) * (side[i] / (side[i] - side[j])))
    return np.array(kept)


class _Canvas:
    """Draws in bird units onto the picture and, with the same strokes, onto a map of region ids.

    region: the part that is painted; names other than those of `REGION_OF` are not recorded.
    """

    def __init__(self, background: Image.Image, matrix: np.ndarray, offset: np.ndarray, masks: bool):
        self.image, self.matrix, self.offset = background, matrix, offset
        self.unit = float(np.sqrt(abs(np.linalg.det(matrix))))
        self.paint = ImageDraw.Draw(background)
        self.regions = Image.new("L", background.size) if masks else None
        self.mark = ImageDraw.Draw(self.regions) if self.regions else None

    def _pixels(self, points: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(p) for p in (points @ self.matrix.T + self.offset).tolist()]

    def fill(self, points: np.ndarray, color: tuple[int, int, int], region: str = "", outline: bool = False) -> None:
        pixels = self._pixels(points)
        self.paint.polygon(pixels, fill=color)
        if self.mark:
            self.mark.polygon(pixels, fill=_REGION_ID.get(region, 0))
        if outline:
            self.paint.line([*pixels, pixels[0]], fill=_INK, width=2)

    def stroke(self, points: np.ndarray, color: tuple[int, int, int], width: float, region: str = "") -> None:
        pixels, width = self._pixels(points), max(1, round(width * self.unit))
        self.paint.line(pixels, fill=color, width=width, joint="curve")
        if self.mark:
            self.mark.line(pixels, fill=_REGION_ID.get(region, 0), width=width, joint="curve")


def _bill(shape: str, long: bool) -> np.ndarray:
    """Outline in bill units, root at the origin, pointing to +x."""
    n = 0.50 if long else 0.25
    if shape == "cone":
        return np.array([(-0.08, -0.19), (n, 0.0), (-0.08, 0.19)])
    if shape == "dagger":
        return np.array([(-0.08, -0.075), (n * 0.7, -0.045), (n, 0.0), (n * 0.7, 0.045), (-0.08, 0.075)])
    hook = [(-0.08, -0.13), (n * 0.55, -0.13), (n * 0.9, -0.06), (n, 0.07), (n * 0.94, 0.24)]  # over, round and down
    return np.array([*hook, (n * 0.72, 0.07), (n * 0.5, 0.04), (-0.08, 0.11)])


def _tail(shape: str) -> np.ndarray:
    """Outline in tail units, root at the origin, pointing to +x, 0.56 long."""
    if shape == "fan":
        return np.array(
            [(0.0, -0.10), (0.44, -0.31), (0.53, -0.17), (0.56, 0.0), (0.53, 0.17), (0.44, 0.31), (0.0, 0.10)]
        )
    if shape == "forked":
        return np.array(
            [(0.0, -0.12), (0.60, -0.29), (0.54, -0.10), (0.22, 0.0), (0.54, 0.10), (0.60, 0.29), (0.0, 0.12)]
        )
    return np.array([(0.0, -0.13), (0.28, -0.15), (0.62, 0.0), (0.28, 0.15), (0.0, 0.13)])


def _turned(points: np.ndarray, angle: float, at: Point) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([(c, s), (-s, c)]) + np.asarray(at)


def _bird(canvas: _Canvas, a: dict[str, str], rng: np.random.Generator, nuisance: Nuisance) -> None:
    """The bird, looking to +x, y down, about 2.2 long and centred on its body."""
    head = np.array([0.42, -0.44]) + rng.uniform(-1, 1, 2) * nuisance.head
    gaze = rng.uniform(-1, 1) * nuisance.head * 3
    tail_at, tail_angle = (-0.50, 0.12), np.pi - 0.12 + rng.uniform(-1, 1) * nuisance.head * 3

    for x in (-0.08, 0.20):
        foot = x + rng.uniform(-1, 1) * nuisance.head
        leg = np.array([(x, 0.34), (foot, 0.76), (foot + 0.16, 0.80)])
        canvas.stroke(leg, COLORS[a["leg color"]], 0.12, "legs")

    tail = _tail(a["tail shape"])
    canvas.fill(_turned(tail, tail_angle, tail_at), _TAIL, "tail", outline=True)
    bands = {"plain": (), "banded": ((0.14, 0.21), (0.30, 0.38)), "tipped": ((0.40, 0.70),)}[a["tail pattern"]]
    for low, high in bands:  # the tail is not convex where forked: each half is
        for half in (tail[tail[:, 1] <= 0], tail[tail[:, 1] >= 0]):
            strip = half if a["tail shape"] == "forked" else tail
            strip = _clip(_clip(strip, (low, 0), (1, 0)), (high, 0), (-1, 0))
            if len(strip) > 2:
                canvas.fill(_turned(strip, tail_angle, tail_at), _TAIL_MARK, "tail")

    tilt = -0.42
    axis, normal = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
    body = _ellipse((0.0, 0.0), 0.60, 0.44, tilt, 40)
    canvas.fill(body, COLORS[a["belly color"]], "belly", outline=True)
    canvas.fill(_clip(body, 0.20 * axis, axis), COLORS[a["breast color"]], "breast", outline=True)
    canvas.fill(_clip(body, -0.13 * normal, -normal), COLORS[a["back color"]], "back", outline=True)

    skull = _ellipse(head, 0.29, 0.28)
    canvas.fill(
        _turned(_bill(a["bill shape"], a["bill length"] == "long"), gaze, head + (0.25, 0.06)),
        _BILL,
        "bill",
        outline=True,
    )
    canvas.fill(skull, _FACE, outline=True)
    up = np.array([np.sin(gaze) - 0.15, -np.cos(gaze)])
    canvas.fill(_clip(skull, head + 0.02 * up, up), COLORS[a["crown color"]], "crown", outline=True)
    eye = head + (0.10, 0.03)
    if a["eye ring"] != "absent":
        canvas.fill(_ellipse(eye, 0.145, 0.145, steps=18), COLORS[a["eye ring"]], "eye")
    canvas.fill(_ellipse(eye, 0.075, 0.075, steps=14), _INK, "eye")

    wing_at, wing_tilt = np.array([-0.16, 0.04]), tilt + 0.16 + rng.uniform(-1, 1) * nuisance.head
    wing = _turned(_WING, wing_tilt, wing_at)
    canvas.fill(wing, COLORS[a["wing color"]], "wing", outline=True)
    mark = COLORS["white"] if a["wing color"] in ("black", "blue", "green", "red") else _INK
    if a["wing pattern"] == "barred":
        for u in (-0.20, 0.0, 0.20):
            bar = _clip(_clip(_WING, (u - 0.035, 0), (1, 0)), (u + 0.035, 0), (-1, 0))
            canvas.fill(_turned(bar, wing_tilt, wing_at), mark, "wing")
    elif a["wing pattern"] == "spotted":
        for u, v in ((-0.22, 0.0), (-0.06, -0.08), (-0.04, 0.09), (0.12, -0.09), (0.13, 0.08), (0.26, 0.0)):
            canvas.fill(_turned(_ellipse((u, v), 0.05, 0.05, steps=10), wing_tilt, wing_at), mark, "wing")


_WING = np.array(
    [
        (-0.52, 0.03),
        (-0.25, -0.13),
        (0.05, -0.20),
        (0.28, -0.17),
        (0.38, 0.0),
        (0.30, 0.16),
        (0.08, 0.21),
        (-0.25, 0.14),
    ]
)


def _blob(rng: np.random.Generator, at: Point, size: float) -> np.ndarray:
    """A leaf or a twig around `at`."""
    thin = rng.uniform(0.12, 0.55)
    return _ellipse(at, size, size * thin, rng.uniform(0, np.pi), 14)


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    base = rng.uniform(90, 190, 3)
    patch = np.clip(base + rng.normal(0, 22, (5, 5, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(patch).resize((side, side), Image.Resampling.BILINEAR)


def draw(attributes: dict[str, str], nuisance: Nuisance, rng: np.random.Generator, masks: bool = False) -> Drawing:
    """A picture of a bird with these attributes, a function of `rng`; `masks` does not change the picture."""
    side = SIZE * SUPERSAMPLE
    angle = np.deg2rad(rng.uniform(-1, 1) * nuisance.rotation)
    unit = side * 0.43 * rng.uniform(*nuisance.scale)
    c, s = np.cos(angle) * unit, np.sin(angle) * unit
    matrix = np.array([(c, -s), (s, c)]) * (rng.choice((-1.0, 1.0)), 1.0)  # facing left or right
    offset = side / 2 + rng.uniform(-1, 1, 2) * nuisance.shift * side

    canvas = _Canvas(_background(rng, side), matrix, offset, masks)
    for _ in range(rng.integers(0, nuisance.clutter + 1)):
        color = np.array(COLORS[_COLOR_NAMES[rng.integers(len(_COLOR_NAMES))]]) * 0.6 + rng.uniform(20, 90, 3)
        canvas.fill(_blob(rng, rng.uniform(-1.3, 1.3, 2), rng.uniform(0.08, 0.35)), tuple(color.astype(int).tolist()))
    canvas.offset = offset - matrix @ np.array([0.0, 0.02])
    _bird(canvas, attributes, rng, nuisance)
    for _ in range(rng.integers(0, nuisance.occlusion + 1)):
        color = rng.uniform((40, 60, 20), (120, 130, 80))
        leaf = _blob(rng, rng.uniform(-0.8, 0.8, 2), rng.uniform(0.12, 0.30))
        canvas.fill(leaf, tuple(color.astype(int).tolist()))

    image = canvas.image.reduce(SUPERSAMPLE)
    radius = rng.uniform(0, nuisance.blur)
    if radius > 0.2:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    pixels = np.asarray(image, np.float32)
    gain = 1 + rng.uniform(-1, 1) * nuisance.light + rng.uniform(-1, 1, 3) * nuisance.tint
    slope = rng.uniform(-1, 1, 2) * nuisance.light / 2
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    light = 1 + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    pixels = pixels * (light[..., None] * gain).astype(np.float32)
    pixels += rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(0, nuisance.noise))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if not masks:
        return Drawing(image, {})
    regions = np.asarray(canvas.regions)[::SUPERSAMPLE, ::SUPERSAMPLE]
    return Drawing(image, {name: regions == _REGION_ID[part] for name, part in REGION_OF.items()})


def random_attributes(rng: np.random.Generator) -> dict[str, str]:
    """A uniformly random combination."""
    return {name: values[rng.integers(len(values))] for name, values in ATTRIBUTES.items()}


def change(attributes: dict[str, str], count: int, rng: np.random.Generator) -> dict[str, str]:
    """A copy with exactly `count` attributes set to another value."""
    changed = dict(attributes)
    for i in rng.choice(len(ATTRIBUTES), count, replace=False):
        name = list(ATTRIBUTES)[i]
        others = [value for value in ATTRIBUTES[name] if value != attributes[name]]
        changed[name] = others[rng.integers(len(others))]
    return changed


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Names of the attributes in which two birds differ, in the order of `ATTRIBUTES`."""
    return [name for name in ATTRIBUTES if a[name] != b[name]]


FAMILY = 4  # species per family


def species(count: int = 100, seed: int = 0) -> list[dict[str, str]]:
    """`count` distinct species: the first half for training, the rest for testing.

    A family is a combination and FAMILY - 1 copies with one attribute changed, so siblings are one or two attributes
    apart; families are at least five apart and none spans the two halves, so a test species has its siblings among the
    test species and none among those trained on.
    """
    rng = np.random.default_rng((seed, 0xB12D))
    founders: list[dict[str, str]] = []
    found: list[dict[str, str]] = []
    for half in (count // 2, count):
        while len(found) < half:
            founder = random_attributes(rng)
            if any(
                len(differing(founder, other)) < 5 + 2 for other in founders
            ):  # a sibling strays by one on each side
                continue
            founders.append(founder)
            family = [founder]
            while len(family) < min(FAMILY, half - len(found)):
                sibling = change(founder, 1, rng)
                if sibling not in family:
                    family.append(sibling)
            found += family
    return found


class DrawnBirds:
    """Half of the species as a data set of (RGB image, label); pictures are drawn when asked for.

    Args:
        split: "train" or "test"; their species, and the families of these, are disjoint.
        species: species in both splits together.
        images_per_species: pictures per species.
        seed: of the species and of the pictures.
        nuisance: how hard the pictures are, one of `NUISANCES`.
    """

    def __init__(
        self,
        split: str,
        species: int = 100,
        images_per_species: int = 30,
        seed: int = 0,
        nuisance: str = "benchmark",
    ):
        if split not in ("train", "test"):
            raise InputError(f"split: found {split!r}; accepted are 'train' and 'test'")
        if species < 4 or images_per_species < 2:
            raise InputError(
                f"drawn birds: found {species} species of {images_per_species} images; "
                "at least 4 species of 2 images are needed, raise both to that"
            )
        half = species // 2
        self.first = 0 if split == "train" else half
        self.combinations = _species(species, seed)[:half] if split == "train" else _species(species, seed)[half:]
        self.classes = [f"species_{self.first + i:03d}" for i in range(len(self.combinations))]
        self.labels = [i for i in range(len(self.combinations)) for _ in range(images_per_species)]
        self.images_per_species, self.seed, self.nuisance = images_per_species, seed, NUISANCES[nuisance]

    def __len__(self) -> int:
        return len(self.labels)

    def _draw(self, index: int, masks: bool) -> Drawing:
        label = self.labels[index]
        rng = np.random.default_rng((self.seed, self.first + label, index % len(self) % self.images_per_species))
        return draw(self.combinations[label], self.nuisance, rng, masks)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._draw(index, masks=False).image, self.labels[index]

    def attributes(self, index: int) -> dict[str, str]:
        """Attribute name -> value of the bird in this picture."""
        return dict(self.combinations[self.labels[index]])

    def masks(self, index: int) -> dict[str, np.ndarray]:
        """Attribute -> (SIZE, SIZE) bool: where it is visible in this picture."""
        return self._draw(index, masks=True).masks

    def touched(self, index: int, grid: tuple[int, int]) -> dict[str, np.ndarray]:
        """Attribute -> (rows, columns) bool: which cells of a grid over this picture it is visible in; attributes that
        cannot be seen are left out."""
        found = {}
        for name, mask in self.masks(index).items():
            if mask.any():
                rows, columns = (pixels * cells // SIZE for pixels, cells in zip(mask.nonzero(), grid))
                found[name] = np.zeros(grid, bool)
                found[name][rows, columns] = True
        return found


_species = cache(species)


def export(
    out: Path, species: int = 100, images_per_species: int = 30, seed: int = 0, nuisance: str = "benchmark"
) -> int:
    """Write both splits as PNG class folders, OUT/{train,test}/CLASS/NNN.png; returns the number of pictures."""
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: found a folder that is not empty; name a new one")
    total = 0
    for split in ("train", "test"):
        birds = DrawnBirds(split, species, images_per_species, seed, nuisance)
        for i, label in enumerate(birds.labels):
            folder = out / split / birds.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            birds[i][0].save(folder / f"{i % images_per_species:03d}.png")
        total += len(birds)
    return total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m saga_fast.tiny.birds", description="Export the drawn birds as image folders."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--species", type=int, default=100)
    parser.add_argument("--images-per-species", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nuisance", choices=NUISANCES, default="benchmark")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        total = export(args.out, args.species, args.images_per_species, args.seed, args.nuisance)
        print(f"{total} images in {args.out}")


if __name__ == "__main__":
    main()
