import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from bench import step
from bench.record import supervisor
from saga_fast.utils.errors import InputError

from ..saga_fast.supervisor.tiny_models import tower_gives
from .tiny import SHAPE


def dumped(folder, advantages):
    """What TRL would dump: every rollout by itself through transformers, log π at 0.7, mean over the step's tokens."""
    encoder, judge = supervisor(SHAPE, folder, 1)
    rival = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    lengths = sum(SHAPE.lengths(SHAPE.short), [])
    features = encoder.tower(SHAPE.pixels())
    prompt, width = judge.prefix.input_ids, max(lengths)
    completions = torch.randint(300, 400, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    log_probs, loss = torch.zeros(len(lengths), width), 0.0
    for row, length in enumerate(lengths):
        pair = row // SHAPE.group
        ids = torch.cat([prompt, completions[row, :length]])[None]
        images = features.select(torch.tensor([2 * pair, 2 * pair + 1]))
        with tower_gives(images, rival):
            logits = rival(
                input_ids=ids,
                mm_token_type_ids=(ids == rival.config.image_token_id).int(),
                image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
                pixel_values=torch.empty(0),
            ).logits[0, len(prompt) - 1 : -1]
        log_prob = (logits / 0.7).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        log_probs[row, :length] = log_prob.detach()
        loss = loss - advantages[row] * log_prob.sum() / sum(lengths)
    loss.backward()
    return {
        "prompt_ids": prompt.expand(len(lengths), -1),
        "completion_ids": completions,
        "completion_mask": torch.arange(width) < torch.tensor(lengths)[:, None],
        "advantages": torch.tensor(advantages),
        "log_probs": log_probs,
        "gradients": {name: p.grad for name, p in encoder.tower.model.named_parameters() if p.grad is not None},
    }


def test_comparison_agrees_with_transformers_and_sees_a_difference(folder, tmp_path):
    theirs, file = dumped(folder, [0.5, -0.5, 1.0, -0.25]), tmp_path / "trl.pt"

    def compared(**changed):
        torch.save({**theirs, **changed}, file)
        return step.compare(str(file), folder, "tiny", SHAPE.pairs, SHAPE.short)()

    found = compared()
    assert found["same_prompts"] and found["same_lengths"] and found["same_parameters"]
    assert found["log_prob"] < 1e-4 and found["gradient"] < 1e-4
    assert compared(advantages=-theirs["advantages"])["gradient"] == pytest.approx(2, abs=1e-3)
    assert compared(log_probs=theirs["log_probs"] + 0.01)["log_prob"] == pytest.approx(0.01, rel=0.02)
    mask = theirs["completion_mask"].clone()
    mask[0, 1:] = False
    assert not compared(completion_mask=mask)["same_lengths"]
    assert not compared(prompt_ids=theirs["prompt_ids"].roll(1, 1))["same_prompts"]
    assert not compared(gradients=dict(list(theirs["gradients"].items())[1:]))["same_parameters"]


def test_a_step_of_ours_moves_the_tower_and_tells_its_parts(folder, monkeypatch):
    built = []
    monkeypatch.setattr(step, "supervisor", lambda *a, **named: built.append(supervisor(*a, **named)) or built[0])
    work = step.step(folder, "tiny", SHAPE.short)
    encoder, judge = built[0]
    before = [p.clone() for p in encoder.tower.parameters()]
    frozen = judge.decoder.fingerprint()
    spent = work()
    assert spent.keys() == {"rollout", "replay"} and min(spent.values()) > 0
    assert any((p != old).any() for p, old in zip(encoder.tower.parameters(), before))
    assert judge.decoder.fingerprint() == frozen


def test_report_holds_the_goal_and_the_ratio_of_medians(tmp_path, capsys):
    def run(seconds, peak):
        figures = dict(seconds=seconds, rollout=seconds / 2, replay=seconds / 2, growth_bytes=peak, peak_bytes=peak)
        return {**figures, "versions": {"trl": "1"}}

    found = {"ours": [run(1.0, 10), run(2.0, 10), run(9.0, 10)], "TRL": [run(8.0, 20)], "slow": [run(90.0, 5)]}
    step.report(tmp_path / "f.json", tmp_path / "f.svg", "small", found, "TRL", {"log_prob": 0.0}, {"commit": "1"})
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["ratios"]["step"] == 4.0 and written["ratios"]["peak_bytes"] == 2.0 and written["goals"]["step"] == 5
    assert written["slower, or not tried"] == ["TRL, checkpointed", "TRL, static cache"]
    assert (tmp_path / "f.svg").read_text().count("<rect") == 4 * len(found)
    assert written["rival"] == {"fastest": "TRL", "trl": "1"}
    assert "step 4.00 (goal 5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "python, found",
    [(None, "not given"), (Path("nowhere"), "nowhere does not run"), (Path(sys.executable), "lacks TRL")],
)
def test_without_trl_one_line_says_how_to_get_it(python, found):
    with pytest.raises(InputError, match=found) as error:
        step.expect_trl(python)
    assert "pip install torch torchvision trl" in str(error.value) and "\n" not in str(error.value)
