"""A part that fails, hangs or is missing is told, and the rest goes on."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bench.parts import Part, Stage, carry_out, plan, run

REPOSITORY = Path(__file__).parents[2]


def says(text: str, code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]


def test_a_part_that_fails_hangs_or_is_missing_costs_itself_alone(tmp_path):
    figures = tmp_path / "op.json"
    write = f"open({str(figures)!r}, 'w').write('[1]'); import time; time.sleep(600)"
    parts = [
        Part("good", says("fine"), 60),
        Part("bad", says("broken", 3), 60),
        Part("hangs", [sys.executable, "-c", write], 6, writes=figures),
        Part("no program", says("never"), 60, program="no-such-sanitizer"),
        Part("no command", ["/no/such/python"], 60),
    ]
    file, log = tmp_path / "check.json", tmp_path / "log"
    assert carry_out([Stage(parts, at_once=2), Stage([Part("last", says("done"), 60)])], file, log, 60, {"x": 1}) == 4
    written = json.loads(file.read_text())
    found = {part["part"]: part for part in written["parts"]}
    assert written["x"] == 1 and "torch" in written["machine"]
    assert {name: part["verdict"] for name, part in found.items()} == {
        "good": "passed",
        "bad": "failed: exit code 3",
        "hangs": "failed: not done after 6 s",
        "no program": "not run: there is no no-such-sanitizer here",
        "no command": "not run: [Errno 2] No such file or directory: '/no/such/python'",
        "last": "passed",
    }
    assert found["bad"]["output"] == "broken\n" and "output" not in found["good"]
    assert found["hangs"]["figures"] == "op.json" and figures.read_text() == "[1]", "what came before stands"
    assert "fine" in log.read_text() and "==== last" in log.read_text()


def test_nothing_is_begun_without_what_it_needs_or_without_time(tmp_path):
    file, log = tmp_path / "check.json", tmp_path / "log"
    stages = [Stage([Part("build", says("no", 1), 60)], needed=True), Stage([Part("test", says("yes"), 60)])]
    assert carry_out(stages, file, log, 60, {}) == 2
    assert json.loads(file.read_text())["parts"][1]["verdict"] == "not run: build failed"
    assert carry_out(stages[1:], file, log, 2, {}) == 1
    assert json.loads(file.read_text())["parts"][0]["verdict"] == "not run: no time left"
    assert carry_out(stages[1:], file, log, 60, {}) == 0


def test_every_result_is_written_as_it_comes(tmp_path):
    """Before the next part of the same stage ends."""
    file = tmp_path / "check.json"
    look = f"import json, time; time.sleep(3); print(len(json.load(open({str(file)!r}))['parts']))"
    stage = Stage(
        [Part("quick", says("x"), 60), Part("looks", [sys.executable, "-c", f"{look}; raise SystemExit(1)"], 60)], 2
    )
    carry_out([stage], file, tmp_path / "log", 60, {})
    assert json.loads(file.read_text())["parts"][1]["output"] == "1\n"


def test_a_part_that_hangs_is_killed_with_its_children(tmp_path):
    child = tmp_path / "child"
    hang = f"sleep 600 & echo $! > {child}; wait"
    assert run(Part("hang", ["bash", "-c", hang], 5), tmp_path / "log", 100)["verdict"] == "failed: not done after 5 s"
    status = Path(f"/proc/{child.read_text().strip()}/status")
    deadline = time.monotonic() + 10
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.1)


def test_the_worst_time_of_a_stage_is_that_of_its_busiest_worker():
    parts = [Part(str(i), [], seconds) for i, seconds in enumerate((60, 30, 30, 10))]
    assert [Stage(parts, n).worst for n in (1, 2, 4, 9)] == [130, 70, 60, 60]
    assert list(plan([Stage(parts, 2)], 50))[-1] == "in all 70 s at most, and broken off after 50"


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("arguments", [["bench.gpu_check", "check", "--out", "nowhere"], ["bench.gpu", "norm"]])
def test_without_a_gpu_it_says_so(arguments):
    done = python(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no GPU" in done.stderr
    assert not (REPOSITORY / "nowhere").exists()


@pytest.mark.parametrize("what", ["check", "sanitize", "bench"])
def test_a_dry_run_tells_every_part_and_its_limit(what):
    done = python("bench.gpu_check", what, "--dry-run")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "build" in lines[1] and lines[-1].endswith("and broken off after 232")
    ops = sorted(path.stem.removeprefix("test_") for path in (REPOSITORY / "tests/gpu").glob("test_*.py"))
    for op in ops:
        assert any(f" {op} " in line for line in lines), f"{op} is in no part"


def test_a_rehearsal_takes_its_time_and_collects_the_tests():
    lines = python("bench.gpu_check", "sanitize", "--rehearse", "--dry-run").stdout.splitlines()
    assert any("--collect-only" in line for line in lines)
    assert lines[-1] == "in all 630 s at most, and broken off after 630"


@pytest.mark.parametrize("word, most", [("8b", 24), ("smallest", 2)])
def test_every_op_has_tests_for_both_commands_and_they_are_few(word, most):
    done = python("pytest", "-q", "--collect-only", "-k", word, "-p", "no:cacheprovider", "tests/gpu")
    assert done.returncode == 0, done.stdout
    found = Counter(line.split("::")[0] for line in done.stdout.splitlines() if "::test_" in line)
    files = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests/gpu").glob("test_*.py")}
    assert found.keys() == files and max(found.values()) <= most, found
