"""A folder's lock: one process at a time, and free after its process dies. Folders that are replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saga_fast.utils.errors import InputError
from saga_fast.utils.files import expect_replaceable, hidden, locked, recover, replace

HOLDER = """
import sys
from pathlib import Path
from saga_fast.utils.files import locked
with locked(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_a_dead_one_is_no_hindrance(tmp_path):
    process = holder(tmp_path / "runs/one")
    message = rf"^--out: .*one' is in use by process {process.pid} on \S+ since 2\d\d\d-.*; wait for it to end"
    with pytest.raises(InputError, match=message), locked(tmp_path / "runs/one", "--out"):
        pass
    with locked(tmp_path / "runs/two", "--out"):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / "runs/.one.lock").exists()
    with locked(tmp_path / "runs/one", "--out"):
        assert str(os.getpid()) in (tmp_path / "runs/.one.lock").read_text()
    assert not list(tmp_path.glob("**/.*"))


def test_a_fork_of_the_holder_does_not_hold(tmp_path):
    """A data loader's workers outlive a killed run by seconds."""
    code = HOLDER.replace('    print("held"', "    print(os.fork() or time.sleep(60)")
    command = [sys.executable, "-c", f"import os, time\n{code}", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    os.kill(child, 0)  # is alive
    with locked(tmp_path / "run", "--out"):
        pass
    os.kill(child, 9)


def test_two_threads_of_a_process_are_two(tmp_path):
    refused: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path / "index", "--index"):
                pass
        except InputError as error:
            refused.append(str(error))

    with locked(tmp_path / "index", "--index"):
        for _ in range(2):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert len(refused) == 2 and "another call in this process" in refused[0]


def test_nothing_is_left_of_a_call_that_did_nothing(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a/b/run", "--out"):
        raise RuntimeError
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a/b/run", "--out"):
        (tmp_path / "a/b/run").mkdir()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["run"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(InputError, match="^--out: .*run' cannot be written to"), locked(tmp_path / "file/run", "--out"):
        pass
    (tmp_path / ".run.lock").symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written to"), locked(tmp_path / "run", "--out"):
        pass
    assert (tmp_path / "file").read_text() == "keep"


def test_a_link_is_replaced_where_it_leads_to(tmp_path):
    """As to another disk, to which nothing can be renamed from beside the link."""
    (tmp_path / "disk").mkdir()
    (link := tmp_path / "run").symlink_to(tmp_path / "disk" / "one")
    for content in ("first", "second"):
        (staging := hidden(link, "partial")).mkdir()
        (staging / "file").write_text(content)
        assert staging == tmp_path / "disk/.one.partial"
        replace(staging, link)
        assert link.is_symlink() and (tmp_path / "disk/one/file").read_text() == content
    (tmp_path / "disk/one").rename(tmp_path / "disk/.one.old")
    recover(link)
    assert (link / "file").read_text() == "second" and len(list((tmp_path / "disk").iterdir())) == 1
    process = holder(link)
    with pytest.raises(InputError, match="in use by process"), locked(tmp_path / "disk/one", "--out"):
        pass
    process.kill()
    process.wait()


def test_what_cannot_be_renamed_over_is_named(tmp_path, monkeypatch):
    expect_replaceable(tmp_path / "none", "--out")
    expect_replaceable(tmp_path, "--out")
    (tmp_path / "link").symlink_to(tmp_path / "n\udce9")
    for odd in (tmp_path / "n\udce9", tmp_path / "n\udce9/run", tmp_path / "link"):
        with pytest.raises(InputError, match="^--out: .* is not UTF-8 where it lies; name another, or rename it"):
            expect_replaceable(odd, "--out")
    monkeypatch.chdir(tmp_path)
    for folder in (Path("."), tmp_path):
        with pytest.raises(
            InputError, match="^--out: .* is the working directory, which stays as it is; name a folder"
        ):
            expect_replaceable(folder, "--out")
    with pytest.raises(InputError, match="^--index: '/proc' is a mount point, which stays as it is; name a folder in"):
        expect_replaceable(Path("/proc"), "--index")
