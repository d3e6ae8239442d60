"""The scaling model: its sizes are those of the real architecture, and its limits are correct."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel, Qwen3VLVisionConfig, Qwen3VLVisionModel

from bench import ranks, roofline


def size(kind, config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(config).parameters())


def test_sizes_are_those_of_the_model():
    vision = Qwen3VLVisionConfig(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096)
    assert len(vision.deepstack_visual_indexes) == ranks.DEEPSTACK
    assert pytest.approx(size(Qwen3VLVisionModel, vision), rel=0.02) == ranks.TOWER
    text = Qwen3VLTextConfig(
        num_hidden_layers=36,
        hidden_size=4096,
        intermediate_size=12_288,
        num_attention_heads=32,
        vocab_size=1,
        num_key_value_heads=8,
        head_dim=128,
    )
    assert pytest.approx(size(Qwen3VLTextModel, text), rel=0.001) == roofline.LANGUAGE_MODEL


def test_phases_take_what_the_roofline_says_and_nothing_twice():
    whole = roofline.GROUPS * (ranks.PREFIX + ranks.COMPLETIONS * ranks.LENGTH)
    assert ranks.replay_seconds(whole) == pytest.approx(roofline.step()["replay"])
    tokens = 8 * ranks.PREFIX + 64 * ranks.LENGTH // 2  # of keys and values in bf16
    cache = tokens * 36 * 2 * 8 * 128 * 2 / roofline.BANDWIDTH
    lines = list(roofline.decode(64))
    kernels = sum(line.calls * line.floor for line in lines if line.kernel != "decode_attention")
    assert ranks.decode_seconds(8, 64) == pytest.approx(kernels + cache)
    assert ranks.decode_seconds(8, 64) == pytest.approx(sum(line.calls * line.floor for line in lines), rel=0.01)


def test_one_rank_waits_for_nobody_and_many_send_twice_the_gradient():
    one, many = (ranks.mean_step(count, 64, 8) for count in (1, 512))
    assert (one.communicate, one.idle_roll_out, one.idle_replay, one.sent) == pytest.approx((0, 0, 0, 0), abs=1e-9)
    assert many.sent > 2 * 4 * ranks.TRAINED * 511 / 512
    assert many.idle_replay >= 1 - 8 / 512 and many.seconds < one.seconds
