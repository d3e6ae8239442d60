"""A folder's lock: one process at a time, and free after its process dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saga_fast.utils.errors import InputError
from saga_fast.utils.files import locked

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
