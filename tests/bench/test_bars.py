import xml.etree.ElementTree as ElementTree

import pytest

from bench.bars import bars


def test_a_bar_is_as_long_as_its_value_and_ours_stands_out():
    picture = ElementTree.fromstring(
        bars("a < b", {"seconds": {"theirs": 4.0, "ours, whole": 1.0}, "MB": {"ours": 3.0}})
    )
    rects = picture.findall("{http://www.w3.org/2000/svg}rect")
    lengths = [float(rect.get("width")) for rect in rects]
    assert lengths[1] == pytest.approx(lengths[0] / 4) and lengths[2] == lengths[0]
    assert [rect.get("fill") == rects[1].get("fill") for rect in rects] == [False, True, True]
