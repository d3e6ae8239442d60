"""The prompt: published attribute lists, order of keys, and where the two images stand in the token ids."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saga_fast.supervisor.families import ImageText
from saga_fast.supervisor.prompt import PROMPTS, ImageMarkup, Prompt, build_prefix
from saga_fast.utils.errors import InputError

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges, with Qwen's special tokens."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", extra_special_tokens=SPECIAL, chat_template=template
    )


@pytest.mark.parametrize("name, count", [("birds", 28), ("cars", 17), ("aircraft", 17), ("drawn-birds", 12)])
def test_attribute_lists_and_instruction(name, count):
    prompt = PROMPTS[name]
    assert len(prompt.attributes) == count
    text = prompt.instruction()
    assert prompt.role in text and all(attribute in text for attribute in prompt.attributes)
    asked = text[text.index("keys in order:") :]
    positions = [asked.index(key) for key in prompt.keys]
    assert positions == sorted(positions)


def test_answer_is_one_line_with_keys_in_order():
    prompt = PROMPTS["drawn-birds"]
    a = {name: f"a{i}" for i, name in enumerate(reversed(prompt.attributes))}
    text = prompt.answer(a, {**a, "leg color": "a “red” \\ one"}, "leg color", "high", "legs\ndiffer", same=False)
    assert "\n" not in text and text.startswith('{"bird_1": {"bill shape": "a11", "bill length": ')
    answer = json.loads(text)
    assert tuple(answer) == ("bird_1", "bird_2", "differences", "confidence", "reasoning", "same_species")
    assert tuple(answer["bird_1"]) == tuple(answer["bird_2"]) == prompt.attributes
    assert answer["bird_2"]["leg color"] == "a “red” \\ one" and answer["same_species"] == "no"


def test_generic_has_no_role_no_attributes():
    prompt = PROMPTS["cars"].as_generic()
    assert prompt.keys == ("differences", "reasoning", "same_model")
    assert "expert" not in prompt.instruction() and "headlights" not in prompt.instruction()
    assert json.loads(prompt.answer({}, {}, "none", "high", "alike", same=True)) == {
        "differences": "none", "reasoning": "alike", "same_model": "yes",
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"attributes": ()}, "attributes"),
        ({"generic": True}, "attributes"),
        ({"attributes": ("size", "size")}, "size"),
        ({"verdict_key": "bird_1"}, "bird_1"),
    ],
)
def test_contradicting_prompt_is_refused(fields, named):
    with pytest.raises(InputError, match=named):
        Prompt(**{"role": "expert", "item": "bird", "verdict_key": "same", "attributes": ("size",), **fields})


@pytest.mark.parametrize("order", ["images_first", "instruction_first"])
@pytest.mark.parametrize("tokens_per_image", [1, 9])
def test_prefix_expands_each_image_where_the_template_put_it(order, tokens_per_image):
    tokenizer = byte_tokenizer()
    prefix = build_prefix(tokenizer, "Same?", tokens_per_image, order)
    image = "<|vision_start|>" + "<|image_pad|>" * tokens_per_image + "<|vision_end|>"
    content = image * 2 + "Same?" if order == "images_first" else "Same?" + image * 2
    expected = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prefix.input_ids, skip_special_tokens=False) == expected
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    inside = [position for start, end in prefix.image_spans for position in range(start, end)]
    assert inside == [position for position, token in enumerate(prefix.input_ids) if token == pad]
    assert all(end - start == tokens_per_image for start, end in prefix.image_spans)


def test_marks_stand_around_each_image_and_the_text_begins_once():
    """InternVL's template leaves <img> and </img> to its processor; LLaVA's leaves <s> to its tokenizer."""
    for begin in ("", "<|im_start|>"):
        tokenizer = byte_tokenizer(
            begin + "{% for part in messages[0].content %}{{ part.text or '<|image_pad|>' }}{% endfor %}"
        )
        tokenizer.bos_token = "<|im_start|>"
        start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
        )
        marks = ImageText(None, "<|vision_start|>", "<|vision_end|>")
        prefix = build_prefix(tokenizer, "Same?", 3, "images_first", ImageMarkup(text=marks))
        image = "<|vision_start|>" + "<|image_pad|>" * 3 + "<|vision_end|>"
        assert tokenizer.decode(prefix.input_ids) == f"<|im_start|>{image * 2}Same?"
        assert prefix.image_spans == ((2, 5), (7, 10))


def test_marks_are_tokenised_with_the_text_around_them_and_a_newline_is_no_part_of_the_image():
    """Gemma's template writes the mark that begins an image; its processor, text before and tokens behind it."""
    tokenizer = byte_tokenizer("{% for part in messages[0].content %}{{ part.text or '<|vision_start|>' }}{% endfor %}")
    marks = ImageText("<|vision_start|>", "\n\n<|vision_start|>", "<|vision_end|>\n\n")
    prefix = build_prefix(tokenizer, "Same?", 3, "instruction_first", ImageMarkup(text=marks, newline=True))
    image = "\n\n<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>\n\n"
    assert tokenizer.decode(prefix.input_ids) == "Same?" + image * 2
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for start, end in prefix.image_spans:
        assert end - start == 3 and prefix.input_ids[start - 1] != pad == prefix.input_ids[end]


def test_unusable_tokenizer_or_instruction_is_refused():
    with pytest.raises(InputError, match="no chat template"):
        build_prefix(byte_tokenizer(template=None), "Same?", 4)
    with pytest.raises(InputError, match="wrote 0"):
        build_prefix(byte_tokenizer("{% for m in messages %}{{ m.role }}{% endfor %}"), "Same?", 4)
    with pytest.raises(InputError, match="image_pad"):
        build_prefix(byte_tokenizer(), "Same <|image_pad|>?", 4)
    with pytest.raises(InputError, match="images_last"):
        build_prefix(byte_tokenizer(), "Same?", 4, "images_last")
