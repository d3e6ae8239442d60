import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_check import Part, run

from ..sweep import sweep

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", sweep([["bench.gpu_check", "--out", "nowhere"], ["bench.gpu", "norm"]]))
def test_without_a_gpu_it_says_so(arguments):
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no GPU" in done.stderr
    assert not (REPOSITORY / "nowhere").exists()


def test_a_part_keeps_its_verdict_and_the_end_of_its_output(tmp_path):
    good = run(Part("good", [sys.executable, "-c", "print('fine')"], 60), tmp_path, 100)
    bad = run(Part("bad", [sys.executable, "-c", "raise SystemExit('broken')"], 60), tmp_path, 100)
    assert (good["verdict"], good["output"]) == ("passed", "fine\n")
    assert (bad["verdict"], bad["output"]) == ("failed: exit code 1", "broken\n")
    assert run(Part("late", ["true"], 60), tmp_path, 1) == {"part": "late", "verdict": "not run: no time left"}


def test_a_part_that_hangs_is_killed_with_its_children(tmp_path):
    child = tmp_path / "child"
    hang = f"sleep 600 & echo $! > {child}; wait"
    assert run(Part("hang", ["bash", "-c", hang], 5), tmp_path, 100)["verdict"] == "failed: not done after 5 s"
    status = Path(f"/proc/{child.read_text().strip()}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.1)


def test_times_are_kept_even_of_a_part_that_breaks_off(tmp_path):
    file = tmp_path / "op.json"
    write = f"open({str(file)!r}, 'w').write('{{\"ceiling\": {{}}, \"cases\": [1]}}'); raise SystemExit('broken')"
    figures = run(Part("time op", [sys.executable, "-c", write], 60, json=file), tmp_path, 100)
    assert figures["cases"] == [1] and figures["output"] == "broken\n" and not file.exists()
