"""Model folders in practice: valid ones load with their settings; invalid ones raise a one-line error that names the
file, before any weight is read."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from saga_fast import train as trainer
from saga_fast.supervisor.families import ImageText
from saga_fast.supervisor.lengths import measure
from saga_fast.supervisor.mllm import load_mllm, read_pretrained
from saga_fast.supervisor.prompt import Prompt
from saga_fast.supervisor.rollout import Sampling
from saga_fast.supervisor.supervisor import Supervisor, prompt_prefix
from saga_fast.tiny import SUPERVISOR
from saga_fast.towers import tower_of
from saga_fast.utils.errors import InputError

from ..small import changed, small
from .families import LLAVA_TEMPLATE, QWEN_TEMPLATE, save
from .test_mllm import edit

PROMPT = Prompt("expert", "bird", "same", ("bill",))
Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        return root / family if (root / family).exists() else save(family, root / family)

    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Copy:
    """A folder of one's own of a family's model."""
    return lambda family: shutil.copytree(saved(family), tmp_path / family)


def refused(folder: Path, message: str, load: Callable = read_pretrained) -> InputError:
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"supervisor.model: {folder} ")
    return caught.value


def asked(folder: Path, tokens: int = 16, order: str = "images_first"):
    """The question to the model of `folder`, whose weights are not read."""
    return prompt_prefix(read_pretrained(folder).mllm, PROMPT, order, (2, 2), Sampling(max_new_tokens=tokens))[0]


def head_of(folder: Path) -> bool:
    """Whether embedding and head are one."""
    decoder = load_mllm(folder, quantize=False).decoder
    return decoder.head.data_ptr() == decoder.embedding.data_ptr()


# ── Flags that moved ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "top, text, tied",
    [(None, True, True), (True, None, True), (False, True, True), (True, False, True), (None, False, False)],
)
@pytest.mark.parametrize("family", ["qwen3-vl-tied", "llava-qwen2-tied"])
def test_tied_embeddings_count_wherever_they_are_said(family, top, text, tied, copy):
    folder = copy(family)

    def say(config: dict) -> None:
        for place, value in ((config, top), (config["text_config"], text)):
            place.pop("tie_word_embeddings", None)
            if value is not None:
                place["tie_word_embeddings"] = value

    edit(folder / "config.json", say)
    if tied:
        assert head_of(folder)
    else:
        refused(folder, r"is not whole \(1 of its weights are in no file, the first is lm_head.weight\)", load_mllm)


def test_a_head_that_is_lost_is_not_made_of_the_embedding(copy):
    """InternVL's own class takes heads for tied where its configuration does not speak of it, but its text's does."""
    folder = copy("internvl")
    edit(folder / "config.json", lambda config: config.pop("tie_word_embeddings"))
    edit(folder / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=False))
    assert not head_of(folder)
    with_weights(folder, lambda t: t.pop(next(key for key in t if key.endswith("lm_head.weight"))))
    refused(folder, "is not whole .* lm_head.weight", load_mllm)


def test_the_image_token_counts_under_its_older_name(copy):
    folder = copy("internvl")
    edit(folder / "config.json", lambda config: config.update(image_token_index=config.pop("image_token_id")))
    assert read_pretrained(folder).mllm.image_token == "<IMG_CONTEXT>"


# ── Positions ───────────────────────────────────────────────────────────────────────────────────────────────────────

SCALED = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 4 for i in range(8)],
        "long_factor": [9.0] * 8,
        "original_max_position_embeddings": 128,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_rotary_scaling_by_length_is_taken_up_to_where_it_begins(kind, copy):
    folder = copy("internvl")

    def scale(limit: int) -> None:
        scaling = {**SCALED[kind], "rope_theta": 1e4, "original_max_position_embeddings": limit}
        if kind == "dynamic":
            del scaling["original_max_position_embeddings"]
        text = {"rope_parameters": scaling, "max_position_embeddings": limit if kind == "dynamic" else 4096}
        edit(folder / "config.json", lambda config: config["text_config"].update(text))

    scale(1000)
    known = read_pretrained(folder).mllm
    assert known.max_positions == 1000
    question = prompt_prefix(known, PROMPT, "images_first", (2, 2), Sampling(max_new_tokens=1))[1].next_position
    scale(question + 50)
    mllm = load_mllm(folder, quantize=False)
    Supervisor(mllm, PROMPT, "images_first", (2, 2), Sampling(max_new_tokens=49))
    with pytest.raises(InputError, match="rollout.max-new-tokens: 50; the question takes .* give 49 or fewer"):
        Supervisor(mllm, PROMPT, "images_first", (2, 2), Sampling(max_new_tokens=50))

    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.language_model
    positions = torch.arange(question + 50)
    cos, sin = theirs.rotary_emb(torch.empty(0), positions[None])
    ours = mllm.decoder.rotate(positions.expand(3, -1), torch.float32)
    assert all(torch.equal(layer[0], cos[0]) and torch.equal(layer[1], sin[0]) for layer in ours)
    beyond = theirs.rotary_emb(torch.empty(0), torch.arange(question + 51)[None])
    assert not torch.equal(beyond[0][0, :-1], cos[0]), "one position more and the model is another"


def test_a_question_longer_than_the_positions_says_so(copy):
    folder = copy("internvl")
    edit(folder / "config.json", lambda c: c["text_config"].update(rope_parameters=SCALED["dynamic"]))
    edit(folder / "config.json", lambda c: c["text_config"].update(max_position_embeddings=8))
    with pytest.raises(InputError, match="fixed for 8 in all: take smaller images, fewer attributes or another model"):
        asked(folder)


# ── Tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_image_marks_follow_from_the_family_and_the_vocabulary(copy):
    folder = copy("internvl")
    assert read_pretrained(folder).mllm.image_text == ImageText(None, "<img>", "</img>")

    def unname(config: dict) -> None:
        config["extra_special_tokens"] = ["<img>", "</img>", "<IMG_CONTEXT>"]
        for attribute in ("start_image_token", "end_image_token", "context_image_token"):
            config.pop(attribute, None)

    edit(folder / "tokenizer_config.json", unname)
    known = read_pretrained(folder).mllm
    assert not hasattr(known.tokenizer, "start_image_token") and known.image_text == ImageText(None, "<img>", "</img>")
    text = known.tokenizer.decode(asked(folder).input_ids)
    assert text.count("<img>" + "<IMG_CONTEXT>" * 4 + "</img>") == 2

    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((folder / file).read_text().replace("</img>", "</picture>"))
    refused(folder, "puts '</img>' beside an image, .* is not in its tokenizer's vocabulary; .* as end_image_token")
    edit(folder / "tokenizer_config.json", lambda config: config.update(end_image_token="</picture>"))
    assert read_pretrained(folder).mllm.image_text == ImageText(None, "<img>", "</picture>")
    edit(folder / "tokenizer_config.json", lambda config: config.update(end_image_token="<IMG_CONTEXT>"))
    refused(folder, "puts '<IMG_CONTEXT>' beside an image, .* is its image token")


def test_all_that_end_a_turn_end_it(copy):
    folder = copy("qwen3-vl")
    end, start = (
        read_pretrained(folder).mllm.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|im_start|>")
    )
    assert read_pretrained(folder).mllm.eos_token_ids == (end,)
    for said, found in ((start, (start, end)), ([start, 7], (start, 7, end)), ([], (end,)), (None, (end,))):
        edit(folder / "generation_config.json", lambda config, said=said: config.update(eos_token_id=said))
        assert read_pretrained(folder).mllm.eos_token_ids == found

    # The template alone: neither generation_config.json nor the tokenizer names its end of a turn.
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", lambda config: config.update(eos_token="<|im_start|>"))
    assert read_pretrained(folder).mllm.eos_token_ids == (start, end)
    edit(folder / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    assert read_pretrained(folder).mllm.eos_token_ids == (end,)

    # config.json itself says, not the default of its class, which is another model's token.
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE.replace("<|im_end|>", ""))
    assert read_pretrained(folder).mllm.eos_token_ids == ()
    with pytest.raises(InputError, match="names no token that ends a turn; add eos_token_id to its generation_config"):
        asked(folder)
    edit(folder / "config.json", lambda config: config["text_config"].update(eos_token_id=9))
    assert read_pretrained(folder).mllm.eos_token_ids == (9,)


@pytest.mark.parametrize("said", ["<|im_end|>", [1, "2"], -1, 288, True, {"id": 1}, [[1]], 1.0])
def test_end_tokens_are_tokens(said, copy):
    folder = copy("qwen3-vl")
    edit(folder / "generation_config.json", lambda config, said=said: config.update(eos_token_id=said))
    refused(folder, "has a malformed generation_config.json .eos_token_id is .*accepted are token ids from 0 to 287")


def test_a_model_that_thinks_first_is_told_and_read(copy):
    folder = copy("qwen3-vl")
    opens = "<|im_start|>assistant\n<think>\n"
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE.replace("<|im_start|>assistant\n", opens))
    supervisor = Supervisor(load_mllm(folder), PROMPT, "images_first", (2, 2), Sampling())
    assert "give some thousands, as its chat template has it think first" in measure(supervisor).shortage(16)
    shortage = measure(supervisor).shortage(1024)
    assert "its chat template has it think first, and of rollout.max-new-tokens 1024 its thoughts may take" in shortage
    answer = PROMPT.answer({"bill": "long"}, {"bill": "short"}, "bill", "high", "", same=False)
    said = supervisor.tokenizer.encode(f"The JSON needs {{same}}.\n</think>\n\n{answer}", add_special_tokens=False)
    rewards, well_formed = supervisor.judge([[said]], [False])
    assert rewards.item() == 1 and well_formed.item()

    # A template that lets it answer at once is asked to.
    closed = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE.replace("assistant\n", f"assistant\n{closed}"))
    supervisor = Supervisor(load_mllm(folder), PROMPT, "images_first", (2, 2), Sampling())
    assert supervisor.text(supervisor.prefix.input_ids).endswith("<think>\n\n</think>\n\n")
    assert measure(supervisor).shortage(1024) is None
    assert measure(Supervisor(load_mllm(SUPERVISOR), PROMPT, "images_first", (2, 2), Sampling())).thinks is False


@pytest.mark.parametrize("number", [288, 10**9, -1])
def test_an_image_token_that_the_embedding_lacks_is_refused(number, copy):
    folder = copy("qwen3-vl")
    edit(folder / "config.json", lambda config: config.update(image_token_id=number))
    refused(
        folder, f"has image_token_id {number} in its config.json, which its embedding .288 tokens. or its tokenizer"
    )
    edit(folder / "config.json", lambda config: config.update(image_token_id=280))  # a padded row of the embedding
    refused(folder, "has image_token_id 280")


def test_a_tokenizer_of_another_release_is_refused(copy):
    folder = copy("llava-llama")
    edit(folder / "config.json", lambda config: config["text_config"].update(vocab_size=258))  # up to <image>
    edit(
        folder / "tokenizer.json",
        lambda t: t["added_tokens"].append({**t["added_tokens"][1], "id": 258, "content": "Same", "special": False}),
    )
    same = dataclasses.replace(PROMPT, role="Sameness")
    with pytest.raises(InputError, match="writes the prompt with token 258, where its embedding has 258; restore"):
        prompt_prefix(read_pretrained(folder).mllm, same, "images_first", (2, 2), Sampling())


# ── Chat templates ──────────────────────────────────────────────────────────────────────────────────────────────────

WRONG = {
    "text only": (
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
        "cannot write two images .*TypeError",
    ),
    "raises": ("{{ raise_exception('Only text\nis supported') }}", "cannot write .*TemplateError: Only text"),
    "syntax": ("{% for m in messages %}", "cannot write .*TemplateSyntaxError"),
    "divides": ("{{ 1 / 0 }}", "cannot write .*ZeroDivisionError"),
    "undefined": ("{{ messages[3].content }}", "cannot write .*UndefinedError"),
    "surrogate": ("{{ '\\ud800' }}", "cannot write"),
    "no images": ("{% for m in messages %}{{ m.role }}{% endfor %}", "chat template wrote 0 <|image_pad|> for two"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_template_that_cannot_ask_is_refused(case, copy):
    folder = copy("qwen3-vl")
    template, message = WRONG[case]
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=message.replace("|", r"\|")) as caught:
        asked(folder)
    assert "own template" in str(caught.value)


def test_of_named_templates_default_is_taken(copy):
    folder = copy("qwen3-vl")
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": QWEN_TEMPLATE}, {"name": "tool_use", "template": "{{ 1 / 0 }}"}]
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    assert read_pretrained(folder).mllm.tokenizer.chat_template == QWEN_TEMPLATE
    named[0]["name"] = "images"
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    refused(folder, "has chat templates named images, tool_use and none named default: rename")


@pytest.mark.parametrize("file", ["processor_config.json", "chat_template.json"])
def test_the_processors_template_comes_before_the_tokenizers(file, copy):
    """Some releases keep the language model's own, for text, beside the tokenizer."""
    folder = copy("llava-llama")
    (folder / "chat_template.jinja").unlink()
    text_only = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=text_only))
    edit(folder / file, lambda config: config.update(chat_template=LLAVA_TEMPLATE))
    assert read_pretrained(folder).mllm.tokenizer.chat_template == LLAVA_TEMPLATE
    assert len(asked(folder).image_spans) == 2


# ── Missing is not malformed ────────────────────────────────────────────────────────────────────────────────────────

MALFORMED = {
    "preprocessor_config.json": ['{"image_mean": [0.5', "[]", '{"image_mean": "half"}', '{"image_std": [0.5, 0.5]}',
                                 '{"image_std": [0.5, 0, 0.5]}', '{"image_mean": [NaN, 0, 0]}', '{"image_mean": 1e300}',
                                 '{"do_normalize": "no"}', '{"rescale_factor": -1}', '{"image_mean": [true, 0, 0]}', "", "\xff"],  # noqa: E501
    "processor_config.json": ["{", '{"image_processor": "x"}', '{"image_processor": {"image_std": {}}}',
                              '{"chat_template": 3}'],
    "chat_template.json": ["{", "{}", '{"chat_template": 3}', '{"chat_template": [1]}', "[" * 100_000],
    "generation_config.json": ["{", '"x"', '{"eos_token_id": "x"}'],
    "model.safetensors.index.json": ["{", "{}", '{"weight_map": {"a": "../model.safetensors"}}'],
}  # fmt: skip


@pytest.mark.parametrize("file", MALFORMED)
def test_a_malformed_file_is_named(file, copy):
    folder = copy("qwen3-vl")
    for content in MALFORMED[file]:
        (folder / file).write_bytes(content.encode("latin-1"))
        refused(folder, f"has a malformed {file} .*; restore the file")
    (folder / file).unlink()
    read_pretrained(folder)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "config.json"])
def test_what_a_copy_left_behind_is_not_taken_for_missing(file, copy, tmp_path):
    """A hub's cache is links to blobs elsewhere; a clone without Git LFS has pointers. Without the file
    preprocessor_config.json a model would see other pixels."""
    folder = copy("qwen3-vl")
    content = (folder / file).read_bytes() if (folder / file).exists() else b'{"image_mean": 0.25}'
    (folder / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, f"has of its {file} the pointer of Git LFS alone; fetch it with git lfs pull")
    (folder / file).unlink()
    (folder / file).symlink_to(tmp_path / "blob")
    refused(folder, f"has a {file} that is no file; copy the folder with what its links lead to")
    (tmp_path / "blob").write_bytes(content)
    read_pretrained(folder)


def test_pixels_are_scaled_and_normalised_as_the_processor_says(copy):
    folder = copy("internvl")

    def normalised(**said) -> torch.Tensor:
        """A picture of one value, 51, as the tower sees it."""
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
        tower = tower_of(read_pretrained(folder).mllm.visual)
        return tower.normalize(torch.full((1, 3, 1, 1), 51, dtype=torch.uint8), torch.float32).flatten()

    torch.testing.assert_close(normalised(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4]),
                               torch.tensor([0.1, 0.0, -0.025]))  # fmt: skip
    torch.testing.assert_close(normalised(image_mean=0.1, image_std=0.5), torch.full((3,), 0.2))
    torch.testing.assert_close(normalised(image_mean=1, image_std=2, rescale_factor=1 / 51), torch.zeros(3))
    torch.testing.assert_close(normalised(image_mean=50, image_std=2, do_rescale=False), torch.full((3,), 0.5))
    torch.testing.assert_close(normalised(image_mean=9, image_std=9, do_normalize=False), torch.full((3,), 0.2))
    refused_at = r"rescales channels by 0.00784314 in its preprocessor_config.json, which lacks image_mean or image_std"
    (folder / "preprocessor_config.json").write_text(json.dumps({"rescale_factor": 2 / 255}))
    refused(folder, refused_at)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": 0.2, "image_std": 1}}))
    assert read_pretrained(folder).statistics == {"image_mean": [0.2] * 3, "image_std": [1.0] * 3}


# ── Weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("peft", [False, True])
def test_an_adapter_that_is_not_merged_is_refused(peft, copy, monkeypatch):
    if peft:
        monkeypatch.setitem(sys.modules, "peft", types.ModuleType("peft"))
        monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: True)
        monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: True)
    folder = copy("qwen3-vl")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(folder, r"an adapter that is not merged, .* merge it first .*\(adapter_config.json is there\)")
    (folder / "config.json").unlink()
    refused(folder, "merge it first")


ADAPTED = "model.language_model.layers.0.self_attn.q_proj"


def test_weights_that_have_no_place_are_named(copy):
    folder = copy("qwen3-vl")
    whole = (folder / "model.safetensors").read_bytes()
    for quantize in (True, False):

        def load(path: Path, quantize=quantize) -> None:
            load_mllm(path, quantize)

        with_weights(folder, lambda t: t.update({f"{ADAPTED}.lora_{x}.weight": torch.zeros(4, 64) for x in "AB"}))
        refused(folder, rf"merge it first .*\(its weights have {ADAPTED}.lora_A.weight\)", load)
        (folder / "model.safetensors").write_bytes(whole)
        with_weights(folder, lambda t: t.update({f"{ADAPTED}.base_layer.weight": t.pop(f"{ADAPTED}.weight")}))
        refused(folder, "merge it first .*base_layer", load)
        (folder / "model.safetensors").write_bytes(whole)
        with_weights(folder, lambda t: t.update({f"model.extra.{i}": torch.zeros(2) for i in range(5)}))
        refused(
            folder, "holds 5 weights that a 'qwen3_vl' has no place for, such as model.extra.0, model.extra.1", load
        )
        (folder / "model.safetensors").write_bytes(whole)
    # Buffers that older releases stored are no weights.
    with_weights(
        folder, lambda t: t.update({"model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    load_mllm(folder)


def test_what_is_wrong_is_told_before_weights_are_read(copy, monkeypatch):
    folder, read = copy("qwen3-vl"), []
    ordinary = AutoModelForImageTextToText.from_pretrained

    def watched(*arguments, **settings):
        read.append(settings["device_map"])
        return ordinary(*arguments, **settings)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watched)
    with_weights(folder, lambda t: t.update({f"{ADAPTED}.weight": torch.zeros(2, 2)}))
    refused(folder, rf"{ADAPTED}.weight is \(2, 2\), its configuration says \(64, 64\)", load_mllm)
    with_weights(folder, lambda t: t.pop(f"{ADAPTED}.weight"))
    refused(folder, f"is not whole .*{ADAPTED}.weight", load_mllm)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    refused(folder, r"is not whole \(model.safetensors: .*\); restore the file", load_mllm)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(folder, "model.safetensors.index.json names model-1.safetensors, which is missing", load_mllm)
    assert set(read) == {"meta"}


def test_what_the_device_says_is_not_told_of_the_files(copy, monkeypatch):
    folder = copy("qwen3-vl")
    if not torch.cuda.is_available():
        with pytest.raises(
            InputError, match="device: cuda:0 does not run with PyTorch .*CUDA_VISIBLE_DEVICES="
        ) as caught:
            load_mllm(folder, device="cuda:0")
        assert caught.value.__cause__ is not None
    ordinary = AutoModelForImageTextToText.from_pretrained

    def fails(*arguments, **settings):
        if settings["device_map"] == "meta":
            return ordinary(*arguments, **settings)
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device", 209)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", fails)
    error = refused(folder, "could not be loaded on cpu .*no kernel image is available", load_mllm)
    assert "restore" not in str(error) and isinstance(error.__cause__, torch.AcceleratorError)


def test_a_configuration_of_which_no_model_can_be_built_is_refused(copy):
    folder = copy("llava-llama")
    whole = (folder / "config.json").read_text()
    for part, change in (
        ("text_config", {"hidden_size": 65}), ("text_config", {"num_attention_heads": 0}),
        ("text_config", {"num_hidden_layers": 10**9}), ("vision_config", {"patch_size": 0}),
        ("vision_config", {"num_hidden_layers": 10**9}), ("text_config", {"hidden_size": "64"}),
        ("vision_config", {"hidden_act": "none"}), ("vision_config", {"model_type": ["clip_vision_model"]}),
        ("text_config", {"rope_parameters": "x"}),
    ):  # fmt: skip
        edit(folder / "config.json", lambda config, part=part, change=change: config[part].update(change))
        refused(folder, "config.json|is no model")
        (folder / "config.json").write_text(whole)
    for layer in (4, -5, [-1, 4]):
        edit(folder / "config.json", lambda config, layer=layer: config.update(vision_feature_layer=layer))
        refused(folder, "reads vision_feature_layer .* of a tower that has 3 layers")
    edit(folder / "config.json", lambda config: config.update(vision_feature_layer=-4))
    read_pretrained(folder)


@pytest.mark.parametrize("ratio", [-10.5, -0.5, 100.0])
def test_a_token_of_no_pixels_is_refused(ratio, copy):
    """Found by the hunt: a division by zero."""
    folder = copy("internvl")
    edit(folder / "config.json", lambda config: config.update(downsample_ratio=ratio))
    with pytest.raises(InputError, match=r"token of -?\d+x-?\d+ pixels, by its configuration; restore config.json"):
        read_pretrained(folder)


# ── The trainer ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_stops_before_weights_and_before_its_folder(copy, tmp_path, monkeypatch):
    folder, out = copy("qwen3-vl"), tmp_path / "run"
    monkeypatch.setattr(trainer, "load_mllm", lambda *_: pytest.fail("weights were read"))
    config = small(supervisor={"model": str(folder)})

    def stops(message: str, config=config) -> None:
        with pytest.raises(InputError, match=message):
            trainer.train(config, out)
        assert not out.exists()

    stops("supervisor.anchor-layer: 4; the model's layers are 0 to 3",
          changed(config, supervisor={"anchor_layer": 4}))  # fmt: skip
    stops("pixels: got 110x110; both sides must be multiples",
          changed(config, data={"image_size": 110}))  # fmt: skip
    (folder / "chat_template.jinja").write_text(WRONG["text only"][0])
    stops("chat template cannot write two images")
    edit(folder / "config.json", lambda config: config.update(image_token_id=10**6))
    stops("has image_token_id 1000000")
