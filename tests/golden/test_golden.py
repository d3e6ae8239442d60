"""The comparison: equal files, differences and their places, and files that are not compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from saga_fast.config import parse
from saga_fast.supervisor.frozen_pass import Recompute

from . import __main__ as golden
from . import compare
from .compare import Left

NOW = {"processor": "a chip", "torch": "2.13.0"}


def left(loss: float = 0.1 + 0.2, steps: int = 3, recall: float = 0.5, sha: str = "ab") -> Left:
    metrics = [{"step": i, "loss_dml": loss if i == 1 else 1.0, "pairs_drawn": 4} for i in range(steps)]
    return Left(metrics, {"after": {"recall_at_1": recall}, "skipped": 0}, sha)


def write_run(folder: Path, left: Left, seconds: float = 1.0) -> None:
    (folder / "encoder").mkdir(parents=True)
    (folder / "checkpoint/step-000003").mkdir(parents=True)
    (folder / "checkpoint/step-000006").mkdir()
    lines = [json.dumps({**line, "seconds_replay_and_update": seconds}) for line in left.metrics]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "final.json").write_text(json.dumps(left.final))
    hashes = {"config.json": "x", "model.safetensors": left.encoder_sha256}
    (folder / "encoder/manifest.json").write_text(json.dumps({"sha256": hashes}))


def test_times_do_not_count(tmp_path):
    write_run(tmp_path / "slow", left(), seconds=9.0)
    write_run(tmp_path / "fast", left(), seconds=0.1)
    assert compare.read(tmp_path / "slow") == compare.read(tmp_path / "fast") == left()


def test_what_is_written_compares_equal(tmp_path):
    compare.write("birds", left(), NOW, tmp_path)
    outcome = compare.against_golden("birds", left(), NOW, tmp_path)
    assert outcome == (True, [], "birds: equal to birds.json, 3 steps and the encoder's bytes")
    assert (tmp_path / "birds.json").read_text().count("\n  {") == 3, "a step a line, for a diff that can be read"


@pytest.mark.parametrize(
    "changed,said",
    [
        (left(loss=0.3), ["birds: step 1: loss_dml is 0.3, was 0.30000000000000004"]),  # one bit
        (left(steps=2), ["birds: metrics.jsonl has 2 steps, was 3"]),
        (left(steps=4), ["birds: metrics.jsonl has 4 steps, was 3"]),
        (left(recall=0.25), ["birds: final.json: after.recall_at_1 is 0.25, was 0.5"]),
        (left(sha="cd"), ["birds: the encoder's weights: SHA-256 cd, was ab"]),
        (
            left()._replace(metrics=[{"step": 0, "loss_dml": 1.0, "loss_lm": float("nan")}, *left().metrics[1:]]),
            ["birds: step 0: pairs_drawn is \"nothing\", was 4", "birds: step 0: loss_lm is NaN, was \"nothing\""],
        ),
    ],
)  # fmt: skip
def test_a_difference_is_named(tmp_path, changed, said):
    compare.write("birds", left(), NOW, tmp_path)
    outcome = compare.against_golden("birds", changed, NOW, tmp_path)
    assert outcome.compared and outcome.differences == said and outcome.line == "birds: differs from birds.json"


def test_of_the_steps_the_first_that_differs_is_named():
    ours = left()._replace(metrics=[{**line, "loss_dml": 7.0} for line in left().metrics])
    assert [line.split(":")[1] for line in compare.differences("birds", ours, left())] == [" step 0"]


def test_values_that_are_not_finite_are_compared(tmp_path):
    compare.write("birds", left(loss=float("nan")), NOW, tmp_path)
    assert not compare.against_golden("birds", left(loss=float("nan")), NOW, tmp_path).differences
    assert compare.against_golden("birds", left(loss=float("inf")), NOW, tmp_path).differences


def test_another_machine_or_version_compares_nothing_and_says_so(tmp_path):
    compare.write("birds", left(), NOW, tmp_path)
    outcome = compare.against_golden("birds", left(sha="cd"), {**NOW, "torch": "2.14.0"}, tmp_path)
    assert outcome == (False, [], 'birds: compared NOTHING with birds.json: torch is "2.14.0", was "2.13.0"')
    outcome = compare.against_golden("ranks", left(), NOW, tmp_path)
    assert outcome == (False, [], "ranks: compared NOTHING, there is no ranks.json")


def test_the_environment_names_processor_and_versions():
    found = compare.environment()
    assert found == compare.environment() and found["processor"] and found["torch"] and found["vectors"]


@pytest.fixture
def files(tmp_path) -> Path:
    for name in ("birds", "ranks"):
        compare.write(name, left(), compare.environment(), tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize(
    "broken,code",
    [({}, golden.EQUAL), ({"resumed": left(sha="cd")}, golden.DIFFERENT), ({"ranks": left(loss=2)}, golden.DIFFERENT)],
)
def test_exit_code_says_whether_all_is_equal(files, broken, code, capsys):
    runs = dict.fromkeys(("birds", "resumed", "ranks"), left()) | broken
    assert golden.check(runs, files) == code
    said = capsys.readouterr().out
    assert all(f"{name}: differs from" in said for name in broken) and said.count("equal to") == 3 - len(broken)


def test_exit_code_says_that_something_was_not_compared(files, capsys):
    (files / "ranks.json").unlink()
    runs = dict.fromkeys(("birds", "resumed", "ranks"), left())
    assert golden.check(runs, files) == golden.NOT_COMPARED
    assert "ranks: compared NOTHING" in capsys.readouterr().out
    assert golden.check({**runs, "birds": left(sha="cd")}, files) == golden.DIFFERENT, "a difference weighs more"


def test_the_resumed_run_begins_where_a_kill_would_leave_it(tmp_path):
    """Without training anything: what is asked of the trainer, and what it finds."""
    asked = []

    def run(arguments: list[str], log: Path) -> None:
        out = Path(arguments[arguments.index("--out") + 1])
        asked.append((out.name, "--resume" in arguments, "torch.distributed.run" in arguments))
        if "--resume" in arguments:
            assert [path.name for path in (out / "checkpoint").iterdir()] == ["step-000003"]
            assert not (out / "encoder").exists() and not (out / "final.json").exists()
            shutil.rmtree(out)
        write_run(out, left())

    found = golden.train_all(tmp_path, run)
    assert asked == [("birds", False, False), ("resumed", True, False), ("ranks", False, True)]
    assert found == dict.fromkeys(("birds", "resumed", "ranks"), left())


def test_the_commands_are_the_trainers_and_leave_no_plan_to_the_memory_that_is_free(tmp_path):
    arguments = golden.command(tmp_path / "run", 6)
    config, out, resume = parse(arguments[arguments.index("saga_fast.train") + 1 :])
    assert (config.optim.steps, out, resume) == (6, tmp_path / "run", False)
    assert config.rollout.slots and config.rollout.token_budget and config.uses_supervisor
    assert {config.rollout.recompute, config.rollout.prefix_recompute} <= set(get_args(Recompute))


def test_a_failing_run_is_shown(tmp_path):
    with pytest.raises(SystemExit, match=r"exit code 3\nwords of its own"):
        golden.execute(["sh", "-c", "echo words of its own; exit 3"], tmp_path / "log")


@pytest.mark.slow
def test_the_runs_leave_the_bytes_that_they_left(tmp_path, capsys):
    """The golden runs themselves. With no golden file to compare, the resumed run still is with the whole one."""
    code = golden.check(golden.train_all(tmp_path))
    said = capsys.readouterr().out
    assert code != golden.DIFFERENT, said
    if code == golden.NOT_COMPARED:
        pytest.skip("; ".join(line for line in said.splitlines() if "compared NOTHING" in line))


@pytest.mark.parametrize("name,steps", [("birds", 6), ("ranks", 3)])
def test_a_golden_file_is_of_these_runs(name, steps):
    if not (file := compare.FILES / f"{name}.json").exists():
        pytest.skip(f"there is no {file.name}; python -m tests.golden --write makes it")
    golden_file = json.loads(file.read_text())
    assert golden_file["environment"].keys() == compare.environment().keys()
    assert [line["step"] for line in golden_file["metrics"]] == list(range(steps))
    assert len(golden_file["encoder_sha256"]) == 64 and file.stat().st_size < 64 * 1024
