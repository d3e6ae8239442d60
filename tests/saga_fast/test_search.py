"""Search against brute force over single embeddings, in its three forms."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saga_fast.embed import embed
from saga_fast.encoder import Encoder
from saga_fast.retrieval import index as indices
from saga_fast.search import Searcher, main, page, search
from saga_fast.utils.errors import InputError

from .small import save_encoder, save_pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, list[Path], Path]:
    """(encoder, pictures, index)"""
    folder = tmp_path_factory.mktemp("world")
    save_encoder(folder / "encoder")
    pictures = save_pictures(folder / "pictures", 15)
    embed(folder / "encoder", [folder / "pictures"], folder / "index")
    return folder / "encoder", pictures, folder / "index"


@torch.inference_mode()
def nearest(encoder: Path, query, pictures: list[Path]) -> list[tuple[str, float]]:
    model = Encoder.from_pretrained(encoder)
    z = model(query)[0].double()
    found = [(str(path), float(model(Image.open(path))[0].double() @ z)) for path in pictures]
    return sorted(found, key=lambda hit: -hit[1])


def test_finds_what_brute_force_finds(world, tmp_path):
    encoder, pictures, index = world
    (query,) = save_pictures(tmp_path, 1, seed=5)
    hits, again = search(index, [query, Image.open(pictures[7])], k=4)
    for found, picture in ((hits, query), (again, pictures[7])):
        wanted = nearest(encoder, picture, pictures)[:4]
        assert [hit.path for hit in found] == [path for path, _ in wanted]
        np.testing.assert_allclose([hit.similarity for hit in found], [s for _, s in wanted], atol=1e-5)
    assert again[0].path == str(pictures[7]) and again[0].similarity == pytest.approx(1, abs=1e-5)
    assert len(search(index, [query], k=99)[0]) == 15


def test_a_searcher_reads_the_index_once(world, tmp_path):
    encoder, pictures, index = world
    shutil.copytree(index, tmp_path / "index")
    searcher = Searcher(tmp_path / "index")
    shutil.rmtree(tmp_path / "index")
    queries = [pictures[3], Image.open(pictures[7])]
    with ThreadPoolExecutor(4) as threads:
        several = list(threads.map(lambda _: searcher.search(queries, k=4), range(8)))
    assert all(found == search(index, queries, k=4) for found in several)
    assert searcher.search(pictures[3], k=4) == searcher.search([pictures[3]], k=4)


def test_prints_lines_or_json(world, capsys):
    encoder, pictures, index = world
    main(["--index", str(index), str(pictures[0]), str(pictures[1]), "-k", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(pictures[0]) and lines[4] == str(pictures[1]) and len(lines) == 8
    assert re.fullmatch(rf"  (1\.0000|0\.9999)  {pictures[0]}", lines[1])
    main(["--index", str(index), str(pictures[0]), "-k", "3", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    wanted = nearest(encoder, pictures[0], pictures)[:3]
    assert found["query"] == str(pictures[0])
    assert [hit["path"] for hit in found["hits"]] == [path for path, _ in wanted]


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_escapes_names(world, tmp_path, capsys):
    encoder, pictures, _ = world
    evil = tmp_path / "<script>alert(1)<" / "\"><img src=x onerror='a()'>.png"
    evil.parent.mkdir()
    shutil.copy(pictures[0], evil)
    gone = tmp_path / "gone.png"
    shutil.copy(pictures[1], gone)
    embed(encoder, [tmp_path], tmp_path / "index")
    gone.unlink()
    main(["--index", str(tmp_path / "index"), str(evil), "--html"])
    reader = Reader()
    reader.feed(html := capsys.readouterr().out)
    assert html.startswith("<!doctype html>")
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert [image["alt"] for image in images] == [str(evil)] * 2
    assert all(set(image) == {"alt", "src"} and image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert "not there any more" in reader.text and str(gone) in reader.text and str(evil) in reader.text
    assert not re.search(r"https?://|url\(", html)
    assert "caf\\udce9.png" in page(["caf\udce9.png"], [[]])


def test_another_encoder_is_refused_and_a_moved_one_found(world, tmp_path):
    encoder, pictures, index = world
    save_encoder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"was made by another encoder \(SHA-256 .*other'"):
        search(index, [pictures[0]], encoder=tmp_path / "other")
    shutil.copytree(index, tmp_path / "index")
    shutil.copytree(encoder, tmp_path / "moved")
    about = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps({**about, "encoder": str(tmp_path / "was/here")}))
    with pytest.raises(InputError, match="was/here"):
        search(tmp_path / "index", [pictures[0]])
    assert search(tmp_path / "index", [pictures[0]], encoder=tmp_path / "moved")[0][0].path == str(pictures[0])


@pytest.mark.parametrize("name", [indices.FAISS, indices.FILES, indices.ABOUT])
def test_a_damaged_index_says_which_file(world, tmp_path, name):
    _, pictures, index = world
    shutil.copytree(index, tmp_path / "index")
    file = tmp_path / "index" / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(InputError, match=name):
        search(tmp_path / "index", [pictures[0]])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["{picture}"], "--index: missing"),
        (["--index", "{index}"], "QUERY: missing"),
        (["--index", "{tmp}", "{picture}"], "holds no index"),
        (["--index", "{index}", "{picture}", "-k", "0"], "-k: 0; give 1 or more"),
        (["--index", "{index}", "{picture}", "--json", "--html"], "--json: given with --html; choose one"),
        (["--index", "{index}", "{tmp}/nowhere.png"], "nowhere.png': unreadable image (no such file)"),
        (["--index", "{index}", "{index}/index.json"], "index.json': unreadable image"),
        (["--index", "{index}", "{picture}", "--kk", "3"], "--kk: unknown flag"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, arguments, message):
    _, pictures, index = world
    with pytest.raises(InputError) as error:
        main([argument.format(picture=pictures[0], index=index, tmp=tmp_path) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
