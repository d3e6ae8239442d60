"""The page of a run: one self-contained file, model output as text only, keyboard use, also in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saga_fast.report import write_report
from saga_fast.report.__main__ import main
from saga_fast.report.chart import chart
from saga_fast.report.page import _shade
from saga_fast.report.samples import sampled_steps
from saga_fast.retrieval.gallery import compare, gallery, neighbours
from saga_fast.utils.errors import InputError

from .runs import EVIL, GRID, Pictures, make_run

VOID = {"meta", "img", "br", "link"}


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "birds <b>")


@pytest.fixture
def attribute_run(run) -> Path:
    """The same of an encoder that keeps attributes apart: a β each, and what mended each query."""
    for path in (run / "samples").glob("*.json"):
        sample = json.loads(path.read_text())
        beta = [{"crown": [0, 0, 0, 1, 0, 0], EVIL: [1 / 6] * 6}] * 2
        path.write_text(json.dumps({**sample, "pairs": [{**pair, "beta": beta} for pair in sample["pairs"]]}))
    path = run / "gallery/gallery.json"
    described = json.loads(path.read_text())
    for row in described["rows"]["fixed"]:
        row["attributes"] = {"crown": 0.3, EVIL: 0.45, "legs": -0.6, "wing": 0.15, "tail": 0.1, "bill": 0.0}
    path.write_text(json.dumps(described))
    return run


class Outline(html.parser.HTMLParser):
    """Elements with their attributes, and the text of each; fails where tags do not close as they opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # SVG
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def every(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(run) -> str:
    return write_report(run).read_text()


def test_nothing_from_outside_is_markup(page):
    outline = Outline(page)
    (script,) = (text for tag, text in outline.text if tag == "script")
    assert "owned" not in script, "an answer became a script"
    assert "owned" in "".join(text for tag, text in outline.text if tag != "script"), "the answer is not shown"
    assert page.count(EVIL) == 0
    assert not [a for _, a in outline.elements for name in a if name.startswith("on")]
    # Should something slip through, the browser runs the page's own script alone.
    policy = next(a["content"] for a in outline.every("meta") if "content" in a and "script-src" in a["content"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_one_file_holds_it_all(page):
    outline = Outline(page)
    addresses = [a[k] for _, a in outline.elements for k in ("src", "href") if k in a]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert all(url.startswith("data:image/") for url in re.findall(r"url\(([^)]*)", page))
    assert not re.search(r"@import|<link|//cdn|https?://", page)
    targets = {a["id"] for _, a in outline.elements if "id" in a}
    assert {a["href"][1:] for a in outline.every("a")} <= targets


def test_keyboards_and_screen_readers_find_their_way(page):
    outline = Outline(page)
    ids = Counter(a["id"] for _, a in outline.elements if "id" in a)
    assert max(ids.values()) == 1
    tabs = [a for a in outline.every("button") if a.get("role") == "tab"]
    panels = {a["id"]: a for _, a in outline.elements if a.get("role") == "tabpanel"}
    assert len(tabs) == len(panels) == 2 + 4 + 8  # steps, pairs, answers
    for tab in tabs:
        assert panels[tab["aria-controls"]]["aria-labelledby"] == tab["id"]
        assert panels[tab["aria-controls"]]["tabindex"] == "0"
    assert all(a.get("aria-label") for _, a in outline.elements if a.get("role") == "img")
    assert all("alt" in a for a in outline.every("img"))
    assert [a["lang"] for a in outline.every("html")] == ["en"]
    assert any("width=device-width" in a.get("content", "") for a in outline.every("meta"))
    assert ":focus-visible" in page and "prefers-color-scheme: dark" in page
    # Where there is no script, every panel shows.
    assert not any("hidden" in a for a in panels.values())


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_wcag_aa_by_day_and_by_night(page):
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root {(.*?)}", page, re.S)]
    assert len(palettes) == 2 and palettes[0].keys() == palettes[1].keys()
    for palette in palettes:

        def contrast(one: str, other: str, palette=palette) -> float:
            light, dark = sorted((luminance(palette[one]), luminance(palette[other])), reverse=True)
            return (light + 0.05) / (dark + 0.05)

        for ink in ("text", "soft", "link", "right", "wrong"):
            assert contrast(ink, "page") >= 4.5 and contrast(ink, "card") >= 4.5, ink
        assert min(contrast("text", f"h{shade}") for shade in range(1, 6)) >= 4.5
        assert min(contrast(f"c{line}", "page") for line in range(4)) >= 3  # graphics need less


def test_it_says_what_the_run_found(page):
    text = " ".join(" ".join(text for tag, text in Outline(page).text if tag not in ("style", "script")).split())
    assert "Recall@1 25.00 75.00 +50.00" in text and "NMI 50.00 50.00 +0.00" in text
    assert "20 steps" in text and "not finished" not in text
    # Three seconds of four are spent rolling out; the half line at the end of metrics.jsonl is not counted.
    assert "roll out 60.0 3.00 75 %" in text and "replay 20.0 1.00 25 %" in text
    assert "Peak memory of the process 1.00 GiB" in text and "Processor time 40 s, 2.0 s per step" in text
    # Each of the first answer's five tokens has a tenth of the pair's gradient.
    assert "all other text 80.0 %" in text and "crown 10.0 %" in text
    assert "no verdict, wrong" in text and "no, right" in text


def test_each_attribute_of_the_pooler_stands_beside_the_supervisor_s(page, attribute_run):
    before, after = Outline(page), Outline(write_report(attribute_run).read_text())
    labels = Counter(a["aria-label"] for a in after.every("span") if "aria-label" in a)
    for name in ("crown", EVIL):
        assert labels[f"the pooler's attention, {name}"] == 2 * 2  # steps, images
    # The first image's crown was described, the second's was not.
    assert labels["the supervisor's attention, crown"] == labels["the supervisor did not describe crown"] == 2
    assert not any("the pooler's attention, " in a.get("aria-label", "") for a in before.every("span"))
    shades = {a["src"] for a in after.every("img")}
    assert (
        _shade([0, 0, 0, 1, 0, 0], GRID) in shades
        and _shade([1 / 12] * 2 + [1 / 12, 7 / 12] + [1 / 12] * 2, GRID) in shades
    )


def test_it_says_which_attributes_mended_a_query(page, attribute_run):
    assert "What now sets" not in page
    outline = Outline(write_report(attribute_run).read_text())
    text = " ".join("".join(text for tag, text in outline.text if tag not in ("style", "script")).split())
    fixed = json.loads((attribute_run / "gallery/gallery.json").read_text())["rows"]["fixed"]
    # Of all that speaks for the right one, 1.0, the three that do most; what speaks against it is none of it.
    assert len(fixed) > 1 and text.count(f"{EVIL} 45 %, crown 30 %, wing 15 %") == len(fixed)
    assert "legs" not in text and "tail 10 %" not in text


def test_a_mended_query_keeps_by_how_much_each_attribute_prefers_the_right_one():
    before = torch.tensor([[(i + 3) % 12, (i + 5) % 12] for i in range(12)])  # another class's
    after = torch.tensor([[i // 3 * 3 + (i + 1) % 3, (i + 4) % 12] for i in range(12)])  # its own
    agrees = np.random.default_rng(0).uniform(-1, 1, (12, 12, 2))
    described, _ = gallery(Pictures(), before, after, lambda a, b: dict(zip(["crown", "legs"], agrees[a, b].tolist())))
    assert len(described["rows"]["fixed"]) == 8
    for row in described["rows"]["fixed"]:
        query, wrong, right = (
            described["cells"][cell][0] for cell in (row["query"], row["before"][0], row["after"][0])
        )
        assert [*row["attributes"]] == ["crown", "legs"]
        wanted = agrees[query, right] - agrees[query, wrong]
        np.testing.assert_allclose([*row["attributes"].values()], wanted, atol=6e-5)
    described, _ = gallery(Pictures(), before, after)
    assert all("attributes" not in row for row in described["rows"]["fixed"])


def test_the_darkest_shade_is_the_largest_share(run):
    path = run / "samples/step-000000.json"
    sample = json.loads(path.read_text())
    answer = sample["pairs"][0]["rollouts"][0]
    answer |= {"tokens": [*"abcdef"], "gradient": [0.4, 0.21, 0.19, 0.02, 0.5, 0.0]}
    answer["attributes"] = [(0, "crown", [0, 1]), (1, "crown", [2, 3, 5])]
    path.write_text(json.dumps(sample))
    page = write_report(run).read_text()
    # e is the largest of all, but no attribute's; b is more than half of a, d a twentieth.
    assert '<span class="h5">a</span><span class="h5">b</span>' in page
    assert '<span class="h4">c</span><span class="h1">d</span></b>e<b' in page and '">f</b>' in page


def test_a_run_that_has_only_begun_has_a_report_too(run):
    kept = run / "config.json"
    for path in run.iterdir():
        if path != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_report(run).read_text()
    assert "0 steps, not finished" in page and 'id="gallery"' not in page and 'id="rollouts"' not in page
    Outline(page)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("config.json", None, "holds no config.json"),
        ("final.json", "{", "final.json: cannot be read"),
        ("metrics.jsonl", "{\n{}\n", "metrics.jsonl: a line is no JSON"),
        ("metrics.jsonl", "\xff\n", "metrics.jsonl: a line is no JSON"),
        ("samples/step-000000.json", "[", "step-000000.json: cannot be read"),
        ("samples/step-000000.jpg", "?", "step-000000.jpg: is no picture"),
        ("gallery/gallery.jpg", "?", "gallery.jpg: is no picture"),
    ],
)
def test_a_broken_file_is_named_and_no_report_is_left(run, name, content, message):
    (run / name).unlink() if content is None else (run / name).write_text(content, "latin-1")
    command = [sys.executable, "-m", "saga_fast.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(run.glob("*report.html*"))


def test_a_page_that_cannot_be_written_is_named(run, capsys):
    (run / "report.html").mkdir()
    with pytest.raises(
        InputError, match="report.html: cannot be written .Is a directory.; repair it, or copy the run els"
    ):
        main([str(run)])
    assert not list(run.glob(".*"))
    (run / "report.html").rmdir()
    main([str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    for words, message in (([], "RUN: missing"), ([""], "RUN: missing"), ([str(run), "x"], "x: belongs to no flag")):
        with pytest.raises(InputError, match=message):
            main(words)


def test_charts_keep_to_their_frame_and_average_long_runs():
    steps = list(range(10_000))
    drawn = chart("noise", [("a", steps, [(-1) ** i for i in steps]), ("b", steps, [float("nan")] * 10_000)])
    assert [name for name, _ in drawn.lines] == ["a"]
    path = re.search(r'class="line c0" d="M([^"]*)"', drawn.svg)[1]
    points = np.array([[float(n) for n in point.split()] for point in path.split("L")])
    assert len(points) <= 240 and points.min() >= 0 and points[:, 0].max() <= 360 and points[:, 1].max() <= 200
    assert np.ptp(points[:, 1]) < 1, "ups and downs of one step average out"
    assert (np.diff(points[:, 0]) > 0).all()
    assert chart("nothing", [("a", [], [])]) is None
    for values in ([3.0], [3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [-5e6, 5e6]):
        assert "nan" not in chart("few", [("a", list(range(len(values))), values)]).svg


def test_neighbours_and_what_became_of_them():
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0, 1])  # the sixth is alone in its class
    points = torch.nn.functional.normalize(torch.randn(2, 8, 3), dim=-1)
    was, became = (neighbours(part) for part in points)
    for part, found in zip(points, (was, became)):
        products = part @ part.T
        for i, row in enumerate(found.tolist()):
            others = sorted((j for j in range(8) if j != i), key=lambda j: -products[i, j])
            assert row == others[:5]
    kinds = compare(labels, was, became)
    for i in range(8):
        right = [labels[found[i, 0]] == labels[i] for found in (was, became)]
        kind = {(True, True): "kept", (False, True): "fixed", (False, False): "still_wrong", (True, False): "spoilt"}
        members = [name for name, queries in kinds.items() if i in queries.tolist()]
        assert members == ([] if i == 5 else [kind[tuple(map(bool, right))]])


def test_which_steps_are_sampled():
    assert sampled_steps(24, None) == {0, 12, 23}
    assert sampled_steps(10, 4) == {0, 4, 8, 9}
    assert sampled_steps(1, None) == {0}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page: Path, *flags: str) -> str:
    """What headless Chromium prints; sandboxes ask for rights that root in a container has not."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_tabs_answer_the_keyboard(run, page, tmp_path):
    dom = Outline(browse(run / "report.html", "--dump-dom"))
    assert [text for tag, text in dom.text if tag == "title"] == ["birds <b> · saga_fast"]
    hidden = [a["id"] for _, a in dom.elements if a.get("role") == "tabpanel" and "hidden" in a]
    assert len(hidden) == 1 + 3 + 4, "the first panel of each shows"

    # A script that drives the page; the policy, which would refuse it, is taken out of this copy.
    drive = """<script>
      const at = (id) => document.getElementById(id);
      const press = (id, key) => at(id).dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      at("pair-tab-1-1").focus(); press("pair-tab-1-1", "ArrowRight");
      const moved = [document.activeElement.id, at("pair-1-1").hidden, at("pair-1-2").hidden];
      press("answer-1-2-1", "ArrowRight");
      const inner = [at("answer-1-2-1").hidden, at("answer-1-2-2").hidden, at("pair-1-2").hidden];
      press("pair-tab-1-2", "End"); press("pair-tab-2-2", "ArrowRight");
      const round = at("pair-tab-1-1").getAttribute("aria-selected");
      at("look-tab-2").click();
      const evil = document.querySelectorAll("[onerror]").length;
      document.title = JSON.stringify([moved, inner, round, at("look-2").hidden, evil]);
    </script></body>"""
    copy = tmp_path / "driven.html"
    copy.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", drive))
    title = next(text for tag, text in Outline(browse(copy, "--dump-dom")).text if tag == "title")
    expected = [["pair-tab-1-2", True, False], [True, False, False], "true", False, 0]
    assert json.loads(title) == expected

    refused = tmp_path / "refused.html"
    refused.write_text(page.replace("</body>", drive))
    assert "saga_fast" in next(t for tag, t in Outline(browse(refused, "--dump-dom")).text if tag == "title")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_it_fits_a_phone_and_the_dark(run, page, tmp_path):
    shots = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{name}.png"
        browse(
            run / "report.html",
            f"--screenshot={shot}",
            "--window-size=800,900",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        with Image.open(shot) as picture:
            shots[name] = np.asarray(picture.convert("L"))
    assert np.median(shots["light"]) > 240 and np.median(shots["dark"]) < 50

    measure = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    (tmp_path / "inner.html").write_text(re.sub(r"<meta http-equiv=[^>]*>", "", page).replace("</body>", measure))
    frame = tmp_path / "phone.html"
    frame.write_text(
        '<iframe src="inner.html" width="360" height="800" style="border:0" '
        'onload="document.title = this.contentDocument.documentElement.scrollWidth"></iframe>'
    )
    dom = browse(frame, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=3000")
    assert re.search(r"<title>(\d+)", dom)[1] == "360", "something sticks out of a phone's screen"
