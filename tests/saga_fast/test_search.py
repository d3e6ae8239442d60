"""Search against brute force over single embeddings, in its three forms."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from saga_fast import evaluate, export
from saga_fast.embed import embed
from saga_fast.encoder import Encoder
from saga_fast.retrieval import index as indices
from saga_fast.retrieval import server
from saga_fast.search import AttentionOverlay, Hit, Searcher, main, page, search
from saga_fast.utils.errors import InputError
from saga_fast.utils.files import sha256

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
    with pytest.raises(InputError, match="^k: 0; give 1 or more"):
        search(index, query, k=0)


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
    assert "not found any more" in reader.text and str(gone) in reader.text and str(evil) in reader.text
    assert not re.search(r"https?://|url\(", html)
    assert "caf\\udce9.png" in page(["caf\udce9.png"], [[]])


def test_another_encoder_is_refused_and_a_moved_one_found(world, tmp_path):
    encoder, pictures, index = world
    save_encoder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"was made by another encoder \(SHA-256 .*other'"):
        Searcher(index, tmp_path / "other")
    shutil.copytree(index, tmp_path / "index")
    shutil.copytree(encoder, tmp_path / "moved")
    about = json.loads((tmp_path / "index/index.json").read_text())
    (tmp_path / "index/index.json").write_text(json.dumps({**about, "encoder": str(tmp_path / "was/here")}))
    with pytest.raises(InputError, match="^--encoder: the one that .* no longer in '.*was/here'; say where it is now"):
        search(tmp_path / "index", [pictures[0]])
    assert Searcher(tmp_path / "index", tmp_path / "moved").search(pictures[0])[0][0].path == str(pictures[0])


@pytest.mark.parametrize("name", [indices.FAISS, indices.FILES, indices.INFO_FILE])
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
        (["--index", "{index}", "{picture}", "--serve", "0"], "--serve: given with QUERY"),
        (["--index", "{index}", "--serve", "65536"], "--serve: 65536; give 0 to 65535"),
        (
            ["--index", "{index}", "--serve", "0", "--host", "203.0.113.1"],
            "--serve: 203.0.113.1:0 cannot be listened on",
        ),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, arguments, message):
    _, pictures, index = world
    with pytest.raises(InputError) as error:
        main([argument.format(picture=pictures[0], index=index, tmp=tmp_path) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def serving(world) -> Iterator[tuple[server.Server, Searcher]]:
    searcher = Searcher(world[2])
    with server.Server(searcher, (server.LOOPBACK, 0)) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving, searcher
        serving.shutdown()
        thread.join()


def ask(
    serving: server.Server, body: bytes | None, where: str = "/", method: str = "POST", **headers
) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(server.LOOPBACK, serving.server_port, timeout=20)
    connection.request(method, where, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    said = json.loads(answer.read())
    assert answer.headers["Content-Type"] == "application/json"
    return answer.status, said


def test_served_are_the_hits_of_a_search(world, serving):
    """Several at once, each its own."""
    served, searcher = serving
    pictures = world[1][:6]
    wanted = searcher.search(pictures, k=3)
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda path: ask(served, path.read_bytes(), "/?k=3"), pictures))
    for (status, said), hits in zip(answers, wanted):
        assert status == 200 and [hit["path"] for hit in said["hits"]] == [hit.path for hit in hits]
        similarities = [hit["similarity"] for hit in said["hits"]]
        np.testing.assert_allclose(similarities, [hit.similarity for hit in hits], atol=1e-6)
    assert len(ask(served, pictures[0].read_bytes())[1]["hits"]) == 10
    assert "POST" in ask(served, None, method="GET")[1]["usage"]


@pytest.mark.parametrize(
    "body,where,headers,status,message",
    [
        (b"no picture", "/", {}, 400, "'picture': unreadable image"),
        (b"", "/", {}, 400, "'picture': unreadable image"),
        (b"{picture}", "/etc/passwd", {}, 404, "POST a picture"),
        (b"{picture}", "/?k=0", {}, 400, "k: '0'; give 1 or more"),
        (b"{picture}", "/?k=-1", {}, 400, "k: '-1'; give 1 or more"),
        (b"{picture}", "/?k=" + "9" * 5000, {}, 400, "give 1 or more"),
        (b"{picture}", "/?k=", {}, 400, "k: ''; give 1 or more"),
        (b"{picture}", "/?k=1&k=2", {}, 400, "k: given 2 times; give it once"),
        (b"{picture}", "/?n=5", {}, 400, "'n': unknown field; accepted are k, explain, attribute, only"),
        (b"{picture}", "/?explain=yes", {}, 400, "explain: 'yes'; give 0 or 1"),
        (b"{picture}", "/?explain=1", {}, 400, "has no block per attribute (attention pooling)"),
        (b"{picture}", "/?only=legs", {}, 400, "has no block per attribute (attention pooling)"),
        (b"{picture}", "/?attribute=legs", {}, 400, "attribute: 'legs'; give NAME=WEIGHT"),
        (b"{picture}", "/", {"Host": "evil.example"}, 403, "Host: served are 127.0.0.1 and localhost"),
        (b"", "/", {"Content_Length": str(server.MAX_BYTES + 1)}, 413, "bytes at most"),
        (b"", "/", {"Content_Length": "9" * 5000}, 413, "bytes at most"),
        (b"", "/", {"Content_Length": "-1"}, 411, "Content-Length: missing"),
        (b"", "/", {"Content_Length": "\u00b2"}, 411, "Content-Length: missing"),
    ],
)
def test_a_bad_request_is_told_and_the_next_is_answered(world, serving, body, where, headers, status, message):
    picture = world[1][0].read_bytes()
    found, said = ask(serving[0], picture if body == b"{picture}" else body, where, **headers)
    assert found == status and message in said["error"]
    assert ask(serving[0], picture, Host="localhost:1")[0] == 200


def test_no_file_is_opened_for_a_request(world, serving, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("saga_fast.encoder.open_rgb", lambda *_: pytest.fail("opened"))
    assert ask(serving[0], str(world[1][0]).encode())[0] == 400


def test_more_uploads_than_there_is_room_for_are_put_off(world, serving):
    served = serving[0]
    picture = world[1][0].read_bytes()
    for _ in range(10):  # who was answered has left his place
        assert ask(served, picture)[0] == 200
        assert all([served.upload_slots.acquire(blocking=False) for _ in range(server.MAX_UPLOADS)])
        for body in (picture, bytes(4 * 2**20)):  # the larger is still on its way as it is put off
            assert ask(served, body) == (503, {"error": "8 pictures at once; try again"})
        for _ in range(server.MAX_UPLOADS):
            served.upload_slots.release()


def test_attributes_are_explained_and_weighed_on_request(apart):
    searcher, picture = Searcher(apart[2]), apart[1][0]
    with server.Server(searcher, (server.LOOPBACK, 0)) as served:
        (thread := threading.Thread(target=served.serve_forever)).start()
        try:
            for where, asked in (
                ("/?k=3&explain=1", {"explain": True}),
                ("/?k=3&only=legs", {"only": "legs"}),
                ("/?k=3&attribute=crown%20color=2.5&attribute=legs=0", {"weights": {"crown color": 2.5, "legs": 0}}),
            ):
                wanted = [hit.fields() for hit in searcher.search(picture, 3, **asked)[0]]
                assert ask(served, picture.read_bytes(), where) == (200, {"hits": wanted})
            status, said = ask(served, picture.read_bytes(), "/?attribute=lags=1")
            assert status == 400 and said["error"].startswith("attribute: 'lags' is no attribute of this encoder; did")
        finally:
            served.shutdown()
            thread.join()


@pytest.mark.slow
def test_ctrl_c_ends_the_service(world):
    command = [sys.executable, "-m", "saga_fast.search", "--index", str(world[2]), "--serve", "0"]
    # Shells start background jobs, and these tests with them, with SIGINT ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, preexec_fn=heard)
    port = int(re.fullmatch(r"15 files at http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())[1])
    with pytest.raises(InputError, match=f"--serve: 127.0.0.1:{port} cannot be listened on .Address already in use"):
        server.serve(None, port)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "ended" in out and "Traceback" not in err


def break_encoder(folder: Path, value: float) -> None:
    """Weights that no training left: all of the projection are `value`, and the manifest agrees."""
    weights = load_file(folder / "model.safetensors")
    weights["pooler.project.weight"].fill_(value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["model.safetensors"] = sha256(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "value,message", [(float("nan"), "pooler.project.weight has numbers"), (3e38, "its vectors are")]
)
def test_numbers_that_are_not_finite_are_refused_everywhere(world, tmp_path, value, message):
    """As weights, or as what they lead to."""
    broken = shutil.copytree(world[0], tmp_path / "broken")
    break_encoder(broken, value)
    data = ["--data.species", "4", "--data.images-per-species", "2"]
    for call in (
        lambda: embed(broken, world[1], tmp_path / "index"),
        lambda: evaluate.main(["--encoder", str(broken), *data]),
        lambda: export.main(["--encoder", str(broken), "--out", str(tmp_path / "encoder.onnx")]),
    ):
        with pytest.raises(InputError, match=f"{message} .*not finite; it is damaged, or its training diverged"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    searcher = Searcher(world[2])
    with torch.no_grad():
        searcher.encoder.pooler.project.weight.fill_(value)
    with pytest.raises(InputError, match="its vectors are not finite"):
        searcher.search(world[1][:1])


NAMES = ("crown color", "wing pattern", "bill <b>", "legs", "tail shape")  # of 16 numbers: 4, 3, 3, 3, 3
WEIGHTS = {"crown color": 2.5, "wing pattern": 0, "legs": 0.5}


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> tuple[Path, list[Path], Path]:
    """(encoder, pictures, index) of an encoder that keeps attributes apart"""
    folder = tmp_path_factory.mktemp("apart")
    save_encoder(folder / "encoder", attributes=NAMES)
    pictures = save_pictures(folder / "pictures", 15)
    embed(folder / "encoder", [folder / "pictures"], folder / "index")
    return folder / "encoder", pictures, folder / "index"


@torch.inference_mode()
def block_cosines(encoder: Path, query, pictures: list[Path]) -> dict[str, np.ndarray]:
    """path -> (5,) of the embeddings of single pictures, each block divided by its length once more."""
    model = Encoder.from_pretrained(encoder)

    def blocks(picture) -> list[np.ndarray]:
        parts = np.split(model(picture)[0].double().numpy(), [4, 7, 10, 13])
        return [part / np.linalg.norm(part) for part in parts]

    asked = blocks(query)
    return {str(p): np.array([a @ b for a, b in zip(asked, blocks(p))]) for p in pictures}


def test_an_explained_search_tells_each_block_s_cosine_best_first(apart, tmp_path):
    encoder, pictures, index = apart
    (query,) = save_pictures(tmp_path, 1, seed=5)
    wanted = block_cosines(encoder, query, pictures)
    (plain,), (hits,) = search(index, [query], k=6), search(index, [query], k=6, explain=True)
    assert [hit[:2] for hit in hits] == [hit[:2] for hit in plain] and plain[0].attributes is None
    for hit in hits:
        told = hit.attributes
        np.testing.assert_allclose([told[name] for name in NAMES], wanted[hit.path], atol=1e-6)
        assert list(told.values()) == sorted(told.values(), reverse=True)
        assert np.mean(list(told.values())) == pytest.approx(hit.similarity, abs=1e-6)


@pytest.mark.parametrize("faiss", [None, "IVF2,Flat", "HNSW8", "IVF2,SQ8"])
def test_a_weighed_search_is_a_plain_one_over_weighed_cosines(apart, tmp_path, faiss):
    encoder, pictures, index = apart
    if faiss:
        embed(encoder, [pictures[0].parent], index := tmp_path / "index", faiss)
    (query,) = save_pictures(tmp_path / "query", 1, seed=5)
    cosines = block_cosines(encoder, query, pictures)
    searcher = Searcher(index)
    for arguments, weights in (
        ({"weights": WEIGHTS}, [2.5, 0, 1, 0.5, 1]),
        ({"weights": {"legs": 1e300}}, [0, 0, 0, 1, 0]),
        ({"weights": {"legs": 1}}, [1, 1, 1, 1, 1]),
        ({"only": "tail shape"}, [0, 0, 0, 0, 1]),
    ):
        wanted = sorted(((np.average(c, weights=weights), path) for path, c in cosines.items()), reverse=True)[:5]
        (hits,) = searcher.search([query], k=5, explain=True, **arguments)
        assert [hit.path for hit in hits] == [path for _, path in wanted]
        np.testing.assert_allclose([hit.similarity for hit in hits], [s for s, _ in wanted], atol=1e-6)
        np.testing.assert_allclose([hits[0].attributes[name] for name in NAMES], cosines[hits[0].path], atol=1e-6)


def test_weights_as_flags_and_the_explanation_as_text_and_json(apart, capsys):
    _, pictures, index = apart
    flags = ["--index", str(index), str(pictures[0]), "-k", "3", "--explain"]
    main([*flags, "--json", *(f for name, w in WEIGHTS.items() for f in ("--attribute", f"{name}={w}"))])
    ((found,), (wanted,)) = json.loads(capsys.readouterr().out), search(index, pictures[:1], 3, weights=WEIGHTS)
    assert [hit["path"] for hit in found["hits"]] == [hit.path for hit in wanted]
    assert all(set(hit) == {"path", "similarity", "attributes"} for hit in found["hits"])
    assert [*found["hits"][1]["attributes"].values()] == sorted(found["hits"][1]["attributes"].values(), reverse=True)
    main(flags)
    lines = capsys.readouterr().out.splitlines()
    for line, hit in zip((line for line in lines if not line.startswith("    ")), [None, *range(3)]):
        assert (hit is None) == (not line.startswith("  "))
    (hits,) = search(index, pictures[:1], 3, explain=True)
    told = [", ".join(f"{cosine:.2f} {name}" for name, cosine in hit.attributes.items()) for hit in hits]
    text = re.sub(r",\n +", ", ", "\n".join(lines))
    assert all(f"\n          {one}" in text for one in told) and max(map(len, lines[1:])) <= max(
        100, len(str(pictures[0])) + 10
    )
    main([*flags[:-1], "--json"])
    assert set(json.loads(capsys.readouterr().out)[0]["hits"][0]) == {"path", "similarity"}


def test_the_explained_page_has_bars_and_lays_attention_over_the_pictures(apart, tmp_path, capsys):
    encoder, pictures, index = apart
    main(["--index", str(index), *map(str, pictures[:2]), "-k", "4", "--explain", "--html", "--show", "bill <b>"])
    reader = Reader()
    reader.feed(html := capsys.readouterr().out)
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in reader.tags} and not re.search(r"https?://", html)
    bars = [a for tag, a in reader.tags if tag == "li"]
    assert len(bars) == 2 * 4 * 5 and sum(a.get("class") == "shown" for a in bars) == 2 * 4
    widths = [float(a["style"].removeprefix("width:").removesuffix("%")) for tag, a in reader.tags if tag == "i"]
    results = search(index, pictures[:2], 4, explain=True)
    cosines = [cosine for hits in results for hit in hits for cosine in hit.attributes.values()]
    np.testing.assert_allclose(widths, [100 * max(0, cosine) for cosine in cosines], atol=0.06)
    assert reader.text.count("query, clear where the attention of bill <b> is high") == 2
    shades = [a["src"] for tag, a in reader.tags if tag == "img" and a.get("class") == "shade"]
    assert len(shades) == 2 * 5 and shades[0] == shades[1], "the first hit is the query itself"
    with torch.no_grad(), Image.open(io.BytesIO(base64.b64decode(shades[2].partition(",")[2]))) as picture:
        beta = Encoder.from_pretrained(encoder).attention(results[0][1].path)[0, 2].numpy()
        dark = np.asarray(picture)[..., 1]
    np.testing.assert_allclose(dark, 170 * (1 - beta / max(beta.max(), 4 / 16)), atol=0.51)


def test_the_most_decisive_attribute_is_the_one_that_sets_the_hits_apart(apart):
    _, pictures, index = apart
    searcher = Searcher(index)
    (hits,) = searcher.search(pictures[:1], 3, explain=True)
    (every,) = searcher.search(pictures[:1], 15, explain=True)
    above = {n: np.mean([h.attributes[n] for h in hits]) - np.mean([h.attributes[n] for h in every]) for n in NAMES}
    best = max(above, key=above.get)
    assert searcher.overlay(pictures[0], hits).attribute == best
    rest = {name: above[name] for name in NAMES if name != best}
    assert searcher.overlay(pictures[0], hits, weights={best: 0}).attribute == max(rest, key=rest.get)
    gone = [hits[0], Hit("gone.png", 0.5, hits[1].attributes)]
    look = searcher.overlay(pictures[0], gone, "legs")
    assert look.attribute == "legs" and look.query == look.hits[0] != look.hits[1] is None
    assert "not found any more" in page(["q"], [gone], [AttentionOverlay("legs", None, [None, None])])


def test_an_index_from_before_there_were_attributes_gets_them_by_embedding_again(apart, tmp_path):
    encoder, pictures, index = apart
    shutil.copytree(index, tmp_path / "index")
    about = json.loads((tmp_path / "index/index.json").read_text())
    assert about.pop("blocks") == dict(zip(NAMES, [4, 3, 3, 3, 3]))
    (tmp_path / "index/index.json").write_text(json.dumps(about))
    assert search(tmp_path / "index", pictures[:1])[0][0].path == str(pictures[0])
    for asked in ({"explain": True}, {"weights": WEIGHTS}, {"only": "legs"}):
        with pytest.raises(InputError, match="index.json' names no attributes.*embed again"):
            search(tmp_path / "index", pictures[:1], **asked)
    done = embed(encoder, [pictures[0].parent], tmp_path / "index")
    assert (done.new, done.unchanged) == (0, 15) and "unchanged" not in done.line
    assert search(tmp_path / "index", pictures[:1], explain=True) == search(index, pictures[:1], explain=True)
    assert "unchanged" in embed(encoder, [pictures[0].parent], tmp_path / "index").line
    (tmp_path / "index/index.json").write_text(json.dumps({**about, "blocks": {"legs": 16}}))
    with pytest.raises(InputError, match="its attributes are not the encoder's"):
        search(tmp_path / "index", pictures[:1], explain=True)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--attribute", "crown colour=2"], "'crown colour' is no attribute of this encoder; did you mean 'crown"),
        (["--attribute", "legs=-1"], "the weight of 'legs' is -1; give a finite number, 0 or more"),
        (["--attribute", "legs=inf"], "the weight of 'legs' is inf"),
        (["--attribute", "legs=nan"], "the weight of 'legs' is nan"),
        ([f for name in NAMES for f in ("--attribute", f"{name}=0")], "--attribute: all weights are 0"),
        (["--attribute", "legs"], "--attribute: 'legs'; give NAME=WEIGHT"),
        (["--attribute", "legs=much"], "--attribute: 'legs=much'; give NAME=WEIGHT"),
        (["--attribute", "=2"], "--attribute: '=2'; give NAME=WEIGHT"),
        (["--attribute", "legs=2", "--attribute", "legs=3"], "'legs=3' names it twice"),
        (["--only", "leg"], "--only: 'leg' is no attribute of this encoder; did you mean 'legs'?"),
        (["--only", ""], "--only: empty; give a value"),
        (["--only", "legs", "--attribute", "legs=2"], "--only: given with --attribute; choose one"),
        (["--show", "legs"], "--show: needs --explain and --html"),
        (["--explain", "--html", "--show", "lags"], "--show: 'lags' is no attribute of this encoder"),
    ],
)  # fmt: skip
def test_bad_weights_are_one_line(apart, capsys, flags, message):
    _, pictures, index = apart
    with pytest.raises(InputError) as error:
        main(["--index", str(index), str(pictures[0]), *flags])
    assert message in str(error.value) and "\n" not in str(error.value) and not capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--explain"], ["--attribute", "legs=2"], ["--only", "legs"]])
def test_an_encoder_without_attributes_is_named(world, flags):
    _, pictures, index = world
    with pytest.raises(InputError, match=r"has no block per attribute \(attention pooling\); train one with"):
        main(["--index", str(index), str(pictures[0]), *flags])
