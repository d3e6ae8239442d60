"""The whole of `bench.full_size` at a small shape, on a CPU; a step within a card, and a phase that takes too long."""

from __future__ import annotations

import json
import signal
import time

import pytest

from bench import full_size
from bench.full_size import Phases, TookTooLong, within


@pytest.fixture(scope="module")
def rig():
    return full_size.Rig(full_size.SHAPES["small"])


@pytest.mark.parametrize("part", ["check", "decode, 64 rows, resident", "rollout", "replay", "generate", "step"])
def test_every_part_gives_its_figures(rig, part, monkeypatch):
    monkeypatch.setattr(full_size, "STEPS", 2)
    found = full_size.PARTS[part](rig)
    if part == "check":
        assert found["log_prob_difference"] <= 2 * found["transformers_own"] + 1e-4
        return
    assert found.get("tokens_per_second", 1) > 0 and found["seconds"] > 0
    if part == "step":
        assert list(found["phases"]) == ["embed", "roll out", "replay", "update"]
        assert found["replayed_tokens"] < found["drawn_tokens"] and len(found["every_step"]) == 2


def test_a_step_within_a_card_runs_by_the_plans_choice_and_is_told_phase_by_phase(rig):
    notes = []
    found = full_size.on_card(rig, 0.2, 60, lambda found: notes.append(json.loads(json.dumps(found))))
    assert all(note["card_gib"] == 0.2 for note in notes)
    assert found["room_bytes"] < 0.2 * 2**30 and found["foretold"]["peak_bytes"] <= 0.9 * found["room_bytes"]
    assert [list(run) for run in found["every_step"]] == [["embed", "roll out", "replay", "update"]] * 2
    assert found["every_step"][0]["roll out"]["decode_steps"] >= max(map(max, rig.shape.lengths(rig.shape.long, 4))) - 1
    assert not found["halved"] and rig.supervisor.slots == found["slots"]
    assert [sum(map(len, note["every_step"])) for note in notes[1:9]] == [1, 2, 3, 4, 5, 6, 7, 8], (
        "written after each phase"
    )
    assert found["seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["every_step"][1].values()))


def test_a_phase_that_takes_too_long_is_broken_off_and_what_was_found_is_kept(rig):
    noted, handler = [], signal.getsignal(signal.SIGALRM)
    phases = Phases(rig, 0.3, lambda: noted.append(dict(phases.found)))
    phases.run("quick", lambda: None)
    with pytest.raises(TookTooLong, match="slow: not done after 0.3 s"):
        phases.run("slow", lambda: time.sleep(30), lambda: {"decode_steps": 7})
    assert noted[-1]["slow"]["broken_off"] and noted[-1]["slow"]["decode_steps"] == 7 and "quick" in noted[-1]
    assert 0.2 < noted[-1]["slow"]["seconds"] < 5 and signal.getsignal(signal.SIGALRM) is handler
    with within(None, "no limit"):
        time.sleep(0.01)
