"""The index against vectors embedded one by one; changed, removed, damaged and interrupted files; two processes."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from saga_fast import embed as module
from saga_fast.embed import embed, expand, main
from saga_fast.encoder import Encoder
from saga_fast.retrieval import index as indices
from saga_fast.utils.errors import InputError

from .small import command, save_encoder, save_pictures


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    save_encoder(folder := tmp_path_factory.mktemp("encoders") / "one")
    return folder


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    return save_pictures(tmp_path / "pictures", 12)


def content(index: Path) -> dict[str, np.ndarray]:
    """{path: vector} of an index, as faiss holds it, after checking that every file of it agrees."""
    known = indices.read_info(index)
    files, vectors = indices.read_files(index, known), indices.read_vectors(index, known)
    searched = indices.read_faiss(index, known)
    assert searched.ntotal == len(files) == len(vectors)
    if known.kind == "Flat":
        assert np.array_equal(searched.reconstruct_n(0, len(files)), vectors)
    for file in files:
        assert (file.size, file.mtime) == (os.stat(file.path).st_size, os.stat(file.path).st_mtime_ns)
    return {file.path: vector for file, vector in zip(files, vectors)}


@torch.inference_mode()
def expected(encoder: Path, paths: list[Path]) -> dict[str, np.ndarray]:
    model = Encoder.from_pretrained(encoder)
    return {str(path): model(Image.open(path)).numpy()[0] for path in paths}


def assert_holds(index: Path, encoder: Path, paths: list[Path]) -> None:
    found, wanted = content(index), expected(encoder, paths)
    assert list(found) == sorted(wanted)
    for path, vector in wanted.items():
        np.testing.assert_allclose(found[path], vector, atol=1e-6)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The number of images in each call of the encoder."""
    calls, forward = [], Encoder.forward

    def counting(self, images):
        if isinstance(images, torch.Tensor):  # not `expected`, which opens one picture at a time
            calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Encoder, "forward", counting)
    return calls


def test_the_index_holds_every_picture(encoder, pictures, tmp_path, capsys):
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "pictures" / ".hidden.png").write_bytes(pictures[0].read_bytes())
    pictures += save_pictures(tmp_path / "pictures" / "deeper" / "still", 3, seed=1)
    main(["--encoder", str(encoder), str(tmp_path / "pictures"), "--index", str(tmp_path / "index")])
    assert_holds(tmp_path / "index", encoder, pictures)
    assert "15 embedded, 0 unchanged, 0 gone, 0 unreadable" in (printed := capsys.readouterr().out)
    assert "15 vectors, faiss Flat: exact, every vector is compared" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "pictures"], "something was left over"


def test_workers_decode_to_the_same_index(encoder, pictures, tmp_path):
    embed(encoder, str(tmp_path / "pictures"), tmp_path / "a", workers=0)
    embed(encoder, [tmp_path / "pictures"], tmp_path / "b", workers=2)
    for name in (indices.VECTORS, indices.FILES, indices.FAISS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_index_is_made_anew_where_nothing_else_is_lost(encoder, pictures, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (link := tmp_path / "index").symlink_to(tmp_path / "disk" / "birds")
    for count in (9, 12):
        embed(encoder, pictures[:count], link)
        assert link.is_symlink() and len(content(link)) == count
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["birds"]
    (link / ".DS_Store").touch()
    embed(encoder, pictures[:9], link)
    (link / "notes.txt").write_text("mine")
    with pytest.raises(
        InputError, match="^--index: .* also holds 'notes.txt', which would be lost as the index is mad"
    ):
        embed(encoder, [tmp_path / "pictures"], link)
    assert (link / "notes.txt").read_text() == "mine" and {path.name for path in tmp_path.rglob(".*")} == {".DS_Store"}
    monkeypatch.chdir(link)
    with pytest.raises(InputError, match="is the working directory, which stays as it is; name a folder in it"):
        embed(encoder, [tmp_path / "pictures"], ".")


def test_only_what_is_new_or_changed_is_embedded(encoder, pictures, tmp_path, counted):
    index, folder = tmp_path / "index", tmp_path / "pictures"
    embed(encoder, [folder], index)
    before = {path.name: path.stat().st_mtime_ns for path in index.iterdir()}
    counted.clear()
    done = embed(encoder, [folder], index)
    assert done[:4] == (0, 12, 0, []) and not counted
    assert before == {path.name: path.stat().st_mtime_ns for path in index.iterdir()}

    Image.new("RGB", (40, 30), "teal").save(pictures[3])
    os.utime(pictures[4], ns=(1, 1))
    pictures.pop(5).unlink()
    others = save_pictures(tmp_path / "others", 2, seed=2)
    done = embed(encoder, [tmp_path / "others"], index)
    assert done[:4] == (4, 9, 1, []) and counted == [4]
    assert_holds(index, encoder, pictures + others)


def test_an_interrupted_call_loses_at_most_a_chunk(encoder, pictures, tmp_path, counted, monkeypatch):
    """Killed in the midst of the eighth batch of two: at least six pictures of finished chunks need no second look."""
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "CHUNK", 4)
    embed(encoder, pictures[:2], index := tmp_path / "index")

    class Killed(BaseException):
        pass

    forward = Encoder.forward

    def dies(self, images):
        if len(counted) == 5:
            raise Killed
        return forward(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "forward", dies)
        with pytest.raises(Killed):
            embed(encoder, [tmp_path / "pictures"], index)
    assert len(content(index)) == 2, "the earlier index stands"
    assert sum(counted) == 2 + 8
    counted.clear()
    done = embed(encoder, [tmp_path / "pictures"], index)
    assert sum(counted) == 2 and done[:2] == (10, 2)
    assert_holds(index, encoder, pictures)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_killed_process_goes_on(encoder, pictures, tmp_path):
    """kill -9 after the first chunk is on disk."""
    script = (
        "import os, saga_fast.embed as e\n"
        "e.BATCH, e.CHUNK, write = 2, 2, e.Chunks.write\n"
        "def once(*chunk):\n    write(*chunk)\n    os.kill(os.getpid(), 9)\n"
        "e.Chunks.write = once\n"
        f"e.embed({str(encoder)!r}, [{str(tmp_path / 'pictures')!r}], {str(tmp_path / 'index')!r})"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert not (tmp_path / "index").exists()
    (chunk,) = (tmp_path / ".index.chunks").iterdir()
    shutil.copy(chunk, chunk.with_name(chunk.name.replace(".safetensors", "-torn.safetensors")))
    os.truncate(chunk.with_name(chunk.name.replace(".safetensors", "-torn.safetensors")), 90)
    (chunk.parent / "0123456789abcdef-x.safetensors").write_text("another encoder's")
    assert embed(encoder, [tmp_path / "pictures"], tmp_path / "index").new == 12
    assert_holds(tmp_path / "index", encoder, pictures)
    assert not list(tmp_path.glob(".*"))


def test_unreadable_files_are_listed_at_the_end(encoder, pictures, tmp_path, capsys):
    index = tmp_path / "index"
    embed(encoder, [tmp_path / "pictures"], index)
    pictures[2].write_bytes(b"no picture any more")
    (tmp_path / "pictures" / "zzz.jpg").write_bytes(b"never was one")
    main(["--encoder", str(encoder), str(tmp_path / "pictures"), "--index", str(index)])
    out, err = capsys.readouterr()
    listed = [line for line in err.splitlines() if line.startswith("unreadable: ")]
    assert len(listed) == 2 and "0002.png" in listed[0] and "zzz.jpg" in listed[1]
    assert "0 embedded, 11 unchanged, 0 gone, 2 unreadable" in out
    assert_holds(index, encoder, [path for path in pictures if path != pictures[2]])


def test_a_kill_while_the_index_is_renamed_loses_nothing(encoder, pictures, tmp_path):
    embed(encoder, pictures[:5], index := tmp_path / "index")
    index.rename(tmp_path / ".index.old")
    assert embed(encoder, pictures, index)[:2] == (7, 5)
    assert_holds(index, encoder, pictures)


def test_what_is_no_image_is_told_and_what_systems_leave_behind_is_not(encoder, pictures, tmp_path, capsys, recwarn):
    folder = tmp_path / "pictures"
    for litter in ("@eaDir", "__MACOSX/deeper"):
        save_pictures(folder / litter, 2, seed=2)
    (folder / "lost+found").mkdir()
    for name in ("a.txt", "b.TXT", "sub/c.tga", "Thumbs.db", "._0001.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    done = embed(encoder, [folder], tmp_path / "index")
    assert done[:3] == (12, 0, 0) and not done.unreadable
    assert [str(told.message) for told in recwarn.list] == ["IMAGES: passed over: .txt: 2, .tga: 1"]
    assert sorted(expand([f"{folder}/**"], skipped := Counter())) == [str(path) for path in pictures]
    assert skipped == {".txt": 2, ".tga": 1}
    assert list(expand([f"{folder}/@eaDir/*1.png"])) == [f"{folder}/@eaDir/0001.png"], "it was named"


def test_folders_files_patterns_and_stdin(pictures, tmp_path, monkeypatch):
    folder, names = tmp_path / "pictures", [str(path) for path in pictures]
    (folder / "odd").write_bytes(pictures[0].read_bytes())
    (folder / "notes.txt").write_text("no picture")
    assert sorted(expand([folder])) == names
    assert sorted(expand([f"{folder}/*"])) == sorted(expand([f"{tmp_path}/**/*.png"])) == names
    assert list(expand([folder / "odd", pictures[1]])) == [str(folder / "odd"), names[1]], "what is named is taken"
    (folder / "a[1].png").write_bytes(pictures[0].read_bytes())
    assert list(expand([folder / "a[1].png"])) == [str(folder / "a[1].png")], "a file's name, not a pattern"
    listed = io.TextIOWrapper(io.BytesIO(f"{names[0]}\n{folder}/gone.png\n\n".encode() + b"caf\xe9.png\n"))
    monkeypatch.setattr(sys, "stdin", listed)
    assert list(expand(["-"])) == [names[0], f"{folder}/gone.png", os.fsdecode(b"caf\xe9.png")]
    with pytest.raises(InputError, match="IMAGES: '.*nowhere' is not there"):
        list(expand([tmp_path / "nowhere"]))


def test_names_that_are_not_text_stay_what_they_are(encoder, pictures, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path / "pictures") + b"/caf\xe9 \n.png")
    shutil.copy(pictures[0], odd)
    embed(encoder, [tmp_path / "pictures"], tmp_path / "index")
    assert odd in content(tmp_path / "index")


def test_the_kind_of_index_follows_the_number_and_can_be_asked_for(encoder, pictures, tmp_path, monkeypatch):
    assert indices.choose(99_999) == "Flat"
    assert [indices.choose(n) for n in (100_000, 10**6, 10**7)] == ["IVF1024,Flat", "IVF4096,Flat", "IVF16384,Flat"]
    index = tmp_path / "index"
    assert "HNSW8: as asked" in embed(encoder, pictures, index, faiss="HNSW8").line
    assert isinstance(faiss.read_index(str(index / indices.FAISS)), faiss.IndexHNSW)
    assert "HNSW8: as it was" in embed(encoder, pictures, index).line
    os.utime(pictures[0], ns=(1, 1))
    assert "HNSW8: as asked" in embed(encoder, pictures, index).line, "what was asked for is kept"
    assert "Flat: exact" in embed(encoder, pictures, index, faiss="Flat").line

    embed(encoder, pictures, other := tmp_path / "other")
    assert indices.read_info(other).asked is None
    embed(encoder, pictures, other, faiss="Flat")
    assert indices.read_info(other).asked == "Flat", "asked for, though it is that kind already"
    assert "Flat: as it was" in embed(encoder, pictures, other).line


def test_an_inverted_file_searches_as_many_cells_as_it_must():
    random = np.random.default_rng(0)
    vectors = random.standard_normal((20, 6)).repeat(12, 0) + 0.6 * random.standard_normal((240, 6))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    kind, line, index = indices.build(vectors, "IVF16,Flat")
    chosen, recalls = index.nprobe, {}
    similarity = vectors @ vectors.T - 2 * np.eye(240)
    for index.nprobe in (1, 2, 4, 8, 16):
        hits = 0
        for row, found in enumerate(index.search(vectors, 11)[1]):
            hits += len(set(np.argsort(-similarity[row])[:10]) & set(found))
        recalls[index.nprobe] = hits / 2400
    assert chosen == min(cells for cells, recall in recalls.items() if recall >= indices.TARGET_RECALL) < 16
    assert f"{chosen} of 16 cells are searched, which finds {recalls[chosen]:.1%}" in line and kind == "IVF16,Flat"
    index.nprobe = chosen
    assert faiss.deserialize_index(faiss.serialize_index(index)).nprobe == chosen


WORKER = """
import json, os, sys
from saga_fast.embed import embed
encoder, pictures, index = sys.argv[1:]
done = embed(encoder, [pictures], index.format(rank=os.environ["RANK"]))
print(json.dumps(done[:3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("index", ["shared", "host{rank}/index"])
def test_two_processes_make_the_index_of_one(encoder, tmp_path, index):
    """On one disk, and on a disk each: then the second's chunks travel to the first."""
    pictures = save_pictures(tmp_path / "pictures", 9)
    pictures[4].write_bytes(b"broken")
    embed(encoder, [tmp_path / "pictures"], tmp_path / "alone")
    (tmp_path / "worker.py").write_text(WORKER)
    program = [tmp_path / "worker.py", encoder, tmp_path / "pictures", tmp_path / index]
    done = subprocess.run(command(*map(str, program), processes=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\n", "") == 2 * json.dumps([8, 0, 0])
    together, alone = content(tmp_path / index.format(rank=0)), content(tmp_path / "alone")
    assert list(together) == list(alone)
    for path in alone:
        np.testing.assert_allclose(together[path], alone[path], atol=1e-6)
    assert not (tmp_path / "host1/index").exists() and not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("name", [indices.FAISS, indices.VECTORS, indices.FILES, indices.INFO_FILE])
@pytest.mark.parametrize("how", ["missing", "cut", "flipped", "foreign"])
def test_a_damaged_index_says_which_file(encoder, pictures, tmp_path, name, how):
    index = tmp_path / "index"
    embed(encoder, pictures[:3], index)
    file = index / name
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    changed = {"cut": file.read_bytes()[:-5], "flipped": bytes(content), "foreign": b'{"a": [1]}'}
    file.unlink() if how == "missing" else file.write_bytes(changed[how])
    known = None
    with pytest.raises(InputError) as error:
        known = indices.read_info(index)
        for read in (indices.read_faiss, indices.read_vectors, indices.read_files):
            read(index, known)
    assert str(index) in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    if name == indices.FAISS:  # which the vectors make again
        assert "exact" in embed(encoder, pictures[:3], index).line
        assert_holds(index, encoder, pictures[:3])
    else:
        with pytest.raises(InputError, match=name):
            embed(encoder, pictures[:3], index)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["{pictures}"], "--index: missing"),
        (["{pictures}", "--index", "{tmp}/index", "--encoder", ""], "--encoder: empty; give a value"),
        (["{pictures}", "--index", "{tmp}/index", "--encoder", "{tmp}"], "holds no config.json"),
        (["--index", "{tmp}/index"], "IMAGES: none found in nothing"),
        (["{tmp}/nowhere", "--index", "{tmp}/index"], "nowhere' is not there"),
        (["{tmp}/*.png", "--index", "{tmp}/index"], "IMAGES: none found in"),
        (["{tmp}/*.none", "--index", "{tmp}/index"], "IMAGES: none found in"),
        (["{tmp}/broken.png", "--index", "{tmp}/index"], "none of 1 can be read, the first is"),
        (["{pictures}", "--index", "{tmp}/other"], "is there and holds no index.json"),
        (["{pictures}", "--index", "{tmp}/broken.png"], "is there and holds no index.json"),
        (["{pictures}", "--index", "{tmp}/broken.png/index"], "cannot be written to"),
        (["{pictures}", "--index", "{tmp}/index", "--faiss", "Flatt"], "could not parse index string Flatt"),
        (["{pictures}", "--index", "{tmp}/index", "--faiss", "IVF64,Flat"], "cannot be trained on 12 vectors"),
        (["{pictures}", "--index", "{tmp}/index", "--faiss", "PCA8,Flat"], "it takes the mean away, after which inner"),
        (["{pictures}", "--index", "{tmp}/index", "--faiss", "L2norm,IDMap,Flat"], "have numbers of their own"),
        (["{pictures}", "--index", "{tmp}/index", "--workers", "-1"], "--workers: -1"),
        (["{pictures}", "--indx", "{tmp}/index"], "--indx: unknown flag; did you mean --index?"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(encoder, pictures, tmp_path, arguments, message):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    if "*.png" in arguments[0]:
        (tmp_path / "broken.png").unlink()
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.format(tmp=tmp_path, pictures=tmp_path / "pictures") for argument in arguments]
    if "--encoder" not in arguments:
        arguments += ["--encoder", str(encoder)]
    with pytest.raises(InputError) as error:
        main(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(".index.chunks" in path.parts for path in left) and ("trained" in message or not left)


@pytest.mark.slow
def test_two_calls_into_one_index_take_turns(encoder, pictures, tmp_path, monkeypatch):
    """The second exits with one line that names the first process; the first one's index is complete."""
    first = command("-m", "saga_fast.embed", "--encoder", str(encoder), str(tmp_path / "pictures"))
    write, second = module.Chunks.write, []

    def meanwhile(*chunk):
        second.append(subprocess.run([*first, "--index", str(tmp_path / "index")], capture_output=True, text=True))
        write(*chunk)

    monkeypatch.setattr(module.Chunks, "write", meanwhile)
    assert embed(encoder, [tmp_path / "pictures"], tmp_path / "index").new == 12
    (refused,) = second
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"index' is in use by process {os.getpid()} on " in refused.stderr
    assert_holds(tmp_path / "index", encoder, pictures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "pictures"]


def test_another_encoders_index_is_refused(encoder, pictures, tmp_path):
    embed(encoder, pictures, tmp_path / "index")
    save_encoder(tmp_path / "other", seed=1)
    before = {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    with pytest.raises(InputError, match="was made by another encoder .* name another index"):
        embed(tmp_path / "other", pictures, tmp_path / "index")
    assert before == {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}


@pytest.mark.parametrize("owner,name", [(module.Chunks, "write"), (indices, "write"), (indices, "build")])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(encoder, pictures, tmp_path, monkeypatch, owner, name):
    """A limit on the size of files stands in for the disk's, from chunks, the index's vectors, or faiss's file on."""
    embed(encoder, pictures[:3], tmp_path / "index")
    before = {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    real, (soft, hard) = getattr(owner, name), resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def when_full(*arguments):
        built = real(*arguments) if name == "build" else None
        limit(100)
        if name == "build":  # what is written next does not fit
            return built
        try:
            return real(*arguments)
        finally:
            limit(soft)  # the screen is a file too

    monkeypatch.setattr(owner, name, when_full)
    try:
        with pytest.raises(InputError, match="^--index: .*cannot be written to .*; free space") as error:
            embed(encoder, pictures, tmp_path / "index")
    finally:
        limit(soft)
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    assert not (tmp_path / ".index.partial").exists()
    monkeypatch.setattr(owner, name, real)
    assert embed(encoder, pictures, tmp_path / "index").new == 9
    assert_holds(tmp_path / "index", encoder, pictures)
