import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace

import pytest

from bench import scale


def points(power):
    return {n: {key: 3.0 * n**power for key in scale.COSTS.values()} for n in (2, 4, 16)}


@pytest.mark.parametrize("power", [0, 1, 1.5])
def test_slope_is_the_power_of_a_power_law(power):
    assert scale.slope(points(power), "rollout_seconds") == pytest.approx(power)


def test_axes_change_one_thing_and_share_the_base():
    base = asdict(scale.BASE)
    for axis, shapes in scale.AXES.items():
        assert scale.BASE in shapes.values()
        changed = {name for shape in shapes.values() for name, value in asdict(shape).items() if value != base[name]}
        assert changed == {"image_size", "prefix"} if axis == "image side" else len(changed) == 1
    words = {shape.prefix - 2 * shape.grid[0] * shape.grid[1] for shape in scale.AXES["image side"].values()}
    assert len(words) == 1


def test_every_cost_is_measured():
    tiny = replace(scale.BASE, layers=3, pairs=1, group=2, short=4)
    figures = scale.costs(asdict(tiny), 1)()
    assert figures.keys() >= set(scale.COSTS.values())
    assert all(figures[key] > 0 for key in scale.COSTS.values() if key.endswith("seconds"))


def test_plot_has_a_panel_an_axis_and_a_line_a_cost():
    picture = ElementTree.fromstring(scale.plot({axis: points(1) for axis in scale.AXES}))
    count = {tag: len(picture.findall(f"{{http://www.w3.org/2000/svg}}{tag}")) for tag in ("rect", "polyline")}
    assert count == {"rect": len(scale.AXES), "polyline": 4 * len(scale.AXES)}
