"""The lengths reported at the start of a run against tokens counted here."""

from __future__ import annotations

import dataclasses
import json

import pytest

from saga_fast.supervisor.lengths import measure
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.prompt import PROMPTS
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.tiny import SUPERVISOR


@pytest.fixture(scope="module")
def mllm():
    return load_mllm(SUPERVISOR)


@pytest.mark.parametrize("prompt", [PROMPTS["drawn-birds"], PROMPTS["cars"].as_generic()])
@pytest.mark.parametrize("order", ["images_first", "instruction_first"])
def test_lengths_are_those_of_the_tokens(mllm, prompt, order):
    lengths = measure(Supervisor(mllm, prompt, order, (7, 5), Sampling()))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": prompt.instruction()}]
    asked = [{"role": "user", "content": content}]
    ids = mllm.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert lengths.images == 70 and lengths.prefix == len(ids) + 68
    assert lengths.instruction == len(mllm.tokenizer(prompt.instruction())["input_ids"])

    def written(value: str) -> int:
        described = dict.fromkeys(prompt.attributes, value)
        items = {} if prompt.generic else {f"{prompt.item}_1": described, f"{prompt.item}_2": described}
        notes = {"differences": value} | ({} if prompt.generic else {"confidence": "medium"}) | {"reasoning": value}
        text = json.dumps({**items, **notes, prompt.verdict_key: "no"})
        return len(mllm.tokenizer(f"{text}<|im_end|>")["input_ids"])

    assert (lengths.answer, lengths.minimum) == (written("short red"), written(""))
    line = lengths.line(192)
    assert "\n" not in line and all(str(number) in line for number in (*lengths[:4], 192))


def test_what_does_not_fit_is_said(mllm):
    lengths = measure(Supervisor(mllm, PROMPTS["drawn-birds"], "images_first", (7, 7), Sampling()))
    answer, least = lengths.answer, lengths.minimum
    assert 0 < least < answer <= 192, "the default's answers fit"
    assert lengths.shortage(answer) is None
    assert f"{answer - 1}; an answer of two words a value takes {answer} tokens" in lengths.shortage(answer - 1)
    assert f"{least - 1}; an answer even of empty values takes {least} tokens" in lengths.shortage(least - 1)
    assert f"give {answer} or more" in lengths.shortage(least - 1)
    assert "two words" in lengths.shortage(least)


def test_more_attributes_take_more(mllm):
    prompt = PROMPTS["drawn-birds"]
    fewer = dataclasses.replace(prompt, attributes=prompt.attributes[:3])
    few, many = (measure(Supervisor(mllm, p, "images_first", (7, 7), Sampling())) for p in (fewer, prompt))
    assert few.answer < many.answer and few.instruction < many.instruction and few.prefix < many.prefix
