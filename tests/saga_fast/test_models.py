"""`models check`: its output against the loaded model, without weights; one-line errors for unsupported models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saga_fast import models
from saga_fast.config import CheckArguments, SupervisorConfig
from saga_fast.encoder import Encoder
from saga_fast.runtime.memory import size_of
from saga_fast.supervisor.mllm import load_mllm, read_pretrained
from saga_fast.supervisor.prompt import PROMPTS
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.utils import releases
from saga_fast.utils.errors import InputError

from ..sweep import sweep
from .supervisor.families import save

SMALL = ["--data.image-size", "32", "--encoder.embedding-dim", "16", "--rollout.max-new-tokens", "100"]


def check(folder: Path, capsys, *flags: str) -> list[str]:
    models.main(["check", str(folder), *SMALL, *flags])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "family", sweep(["qwen2.5-vl", "smolvlm-tied", "llava-onevision", "gemma3-tied", "internvl", "fastvlm-tied"])
)
@pytest.mark.parametrize("head", [False, True])
def test_what_is_said_is_what_is_loaded(family, head, tmp_path, capsys):
    folder = save(family, tmp_path / family)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = None if family != "gemma3-tied" else 8192
    (folder / "config.json").write_text(json.dumps(config))
    mllm = load_mllm(folder, dtype=torch.bfloat16, quantize_head=head)
    encoder = Encoder.from_tower(mllm.visual, "attention", 16, 32)
    grid = encoder.tower.grid(32, 32)
    supervisor = Supervisor(mllm, PROMPTS["birds"], "images_first", grid, Sampling(max_new_tokens=100))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    lines = check(folder, capsys, *(["--supervisor.quantize-head"] if head else []))
    said = "\n".join(lines)
    assert f"({config['model_type']}), which can be used" in lines[0]
    assert f"at 32 pixels {grid[0] * grid[1]} tokens an image ({grid[0]} x {grid[1]} of 64 numbers)" in said
    assert f"prompt: {len(supervisor.prefix)} tokens, of them {2 * grid[0] * grid[1]} of images" in said
    assert any(line.startswith("warning: rollout.max-new-tokens: 100; an answer") for line in lines)
    config = CheckArguments(supervisor=SupervisorConfig(quantize_head=head))
    shaped = models.shapes(read_pretrained(folder, torch.bfloat16), config).decoder
    for parts in (("layers", "norm"), ("embedding", "head")):
        ours, theirs = (size_of([getattr(decoder, part) for part in parts]) for decoder in (shaped, mllm.decoder))
        # Matrices this small do not merge in NF4; each that stays apart has a codebook of 1 KB to itself.
        assert 0 <= theirs - ours <= (4 * 3 * 1100 if parts[0] == "layers" else 0)
    assert sum(line.startswith(f"{card} GiB: peak") for line in lines for card in (8, 16, 24, 40, 80)) == 5


def test_a_tower_for_images_of_one_size_is_refused_at_another(tmp_path):
    folder = save("fastvlm-tied", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {"architecture": "vit_tiny_patch16_224", "model_args": {}, "hidden_size": 192}
    (folder / "config.json").write_text(json.dumps(config))
    message = "data.image-size: 32 is no size for timm's vit_tiny_patch16_224, the tower .* match model .224."
    with pytest.raises(InputError, match=message):
        models.main(["check", str(folder), *SMALL])


def test_a_query_for_each_of_the_prompts_attributes_is_planned_with(tmp_path, capsys):
    folder = save("qwen3-vl", tmp_path / "m")
    lines = check(folder, capsys, "--encoder.pooler", "attributes", "--supervisor.prompt", "drawn-birds")
    assert "which can be used" in lines[0]
    with pytest.raises(InputError, match="encoder.embedding-dim: 16 cannot be divided among 28 attributes"):
        check(folder, capsys, "--encoder.pooler", "attributes")


def test_a_card_that_is_too_small_is_said_to_be(tmp_path, capsys):
    lines = check(save("qwen2-vl", tmp_path / "m"), capsys, "--cards", "0.001", "24")
    assert lines[-2].startswith("0.001 GiB: too little; a step takes ") and lines[-1].startswith("24 GiB: peak ")


@pytest.mark.parametrize(
    "change, flags, message",
    [
        ({"hidden_activation": "gelu"}, [], r"supervisor.model: .* has 'gelu' for its activation; accepted are silu"),
        ({"sliding_window": 300}, [], r"rollout.max-new-tokens: 100 after a prompt of \d+ tokens; .* no more than 300"),
        (
            {"hidden_size": 96, "num_attention_heads": 6},
            ["--supervisor.quantize-head"],
            "supervisor.quantize-head: hidden states of .* are 96 wide; it needs a multiple of 64",
        ),
        ({}, ["--data.image-size", "36"], r"pixels: got 36x36; both sides must be multiples of patch x merge = 8"),
        ({}, ["--supervisor.prompt", "fish"], r"supervisor.prompt: 'fish' is unknown"),
        ({}, ["--cards", "24", "nan"], "cards: nan; give a finite number, more than 0"),
        ({}, ["--cards", "-3"], "cards: -3.0; give more than 0"),
        ({}, ["--rollout.pears", "3"], r"--rollout.pears: unknown flag; did you mean --rollout.pairs\?"),
    ],
)
def test_what_cannot_be_used_is_refused(change, flags, message, tmp_path):
    folder = save("gemma3", tmp_path / "gemma3")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"sliding_window": 8192, **change}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        models.main(["check", str(folder), *SMALL, *flags])


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_folder_that_is_not_whole_ends_with_code_2_and_one_line(missing, tmp_path):
    folder = save("llava-llama", tmp_path / "llava")
    (folder / missing).unlink()
    run = subprocess.run(
        [sys.executable, "-m", "saga_fast.models", "check", str(folder), *SMALL], capture_output=True, text=True
    )
    assert run.returncode == 2 and re.fullmatch(r"error: [^\n]+\n", run.stderr.splitlines(True)[-1]), run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "name, message",
    [
        ("{tmp}/nothing", "is no model .neither a folder here nor a hub id, OWNER/NAME.; give a folder or hub id"),
        ("", "give `check`, a model.s folder or hub id"),
        ("{tmp}", "{tmp} has no config.json, so it is no model; give a folder or hub id"),
        ("{tmp}/file", "/file is a file, no model; give a folder or hub id"),
        ("{tmp}/adapter", "/adapter holds an adapter that is not merged"),
        ("runs/photo", "runs/photo is no model .no folder here; of the hub: .* not connect.; give a folder or hub id"),
    ],
)
def test_what_is_no_model_is_told_from_what_is_missing(name, message, tmp_path, monkeypatch):
    def offline(name, file, **_):
        raise OSError("Could not connect")

    (tmp_path / "file").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    if "{tmp}" not in name:
        monkeypatch.setattr(releases, "cached_file", offline)
    with pytest.raises(InputError, match=message.replace("{tmp}", str(tmp_path))):
        models.main(["check", name.format(tmp=tmp_path)])


def test_several_reasons_are_all_named(tmp_path):
    text = {"model_type": "llama", "hidden_act": "relu", "rope_parameters": {"rope_type": "proportional"}}
    config = {"model_type": "llava", "text_config": text, "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="'proportional'; accepted .*; it has 'relu' for its activation"):
        models.main(["check", str(tmp_path)])


@pytest.mark.parametrize("arguments", [[], ["chek", "x"], ["check"], ["check", "--cards"]])
def test_the_command_line_says_what_it_wants(arguments):
    with pytest.raises(InputError, match="give `check`, a model's folder or hub id"):
        models.main(arguments)
