"""The verdict parser against hostile text, and attribute spans against json and the tokenizer's own offsets."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saga_fast.supervisor.prompt import PROMPTS, Prompt
from saga_fast.supervisor.verdict import (
    Span,
    Verdict,
    attribute_spans,
    parse,
    reward,
    tokens_by_attribute,
)
from saga_fast.tiny import SUPERVISOR
from saga_fast.utils.errors import InputError

from ..test_fuzz import depth

PROMPT = Prompt(role="ornithologist", item="bird", verdict_key="same", attributes=("bill", "leg color"))
RED, BLUE = {"bill": "long", "leg color": "red"}, {"bill": "long", "leg color": "blue"}


def answer(same: bool = True, a: dict = RED, b: dict = BLUE, prompt: Prompt = PROMPT) -> str:
    return prompt.answer(a, b, "none", "high", "alike", same)


LAYOUTS = {
    "one line": lambda text: text,
    "minified": lambda text: json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False),
    "pretty": lambda text: json.dumps(json.loads(text), indent=2, ensure_ascii=False),
    "ascii": lambda text: json.dumps(json.loads(text), indent="\t"),
    "fenced": lambda text: f"```json\n{json.dumps(json.loads(text), indent=4, ensure_ascii=False)}\n```",
    "in prose": lambda text: f' Here "it" is: {text}\nThat\'s all.<|im_end|>',
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prompt", [*PROMPTS.values(), *(p.as_generic() for p in PROMPTS.values())])
def test_every_layout_of_a_good_answer_is_read(layout, prompt):
    words = dict.fromkeys(prompt.attributes, "a word")
    for same in (True, False):
        text = LAYOUTS[layout](answer(same, words, words, prompt))
        assert parse(text, prompt) == Verdict(same, well_formed=True)
        assert (reward(parse(text, prompt), same), reward(parse(text, prompt), not same)) == (1.0, 0.0)


@pytest.mark.parametrize("said, same", [("yes", True), (" YES\\n", True), ("No", False)])
def test_verdict_word_is_read_loosely(said, same):
    assert parse(f'{{"same": "{said}"}}', PROMPT) == Verdict(same, well_formed=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.pop("confidence"),
        lambda o: o.update(confidence="sure"),
        lambda o: o.update(differences=["leg color"]),
        lambda o: o.update(extra="text"),
        lambda o: o.update(bird_1="a long red bill"),
        lambda o: o.update(bird_2={"bill": "long"}),
        lambda o: o.update(bird_2={"leg color": "blue", "bill": "long"}),
        lambda o: o.update(bird_2={"bill": "long", "leg color": 3}),
        lambda o: o.update(differences=o.pop("differences")),
    ],
)
def test_an_answer_in_another_form_is_paid_but_not_well_formed(change):
    changed = json.loads(answer())
    change(changed)
    assert parse(json.dumps(changed), PROMPT) == Verdict(same=True, well_formed=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yes",
        '"same": "yes"',
        "{}",
        '{"same": true}',
        '{"same": null}',
        '{"same": "maybe"}',
        '{"same": ["yes"]}',
        '{"same": "yes, no"}',
        '{"Same": "yes"}',
        '{"answer": {"same": "yes"}}',
        '[{"same": "yes"}]',
        '{"answer": {"same": "yes"}',
        '{"same": "yes"',
        '{"same": "yes',
        '{"same": "yes",}',
        '{"same" "yes"}',
        '{same: "yes"}',
        "{'same': 'yes'}",
        '{"same": "yes" "x": "y"}',
        '{"same": "yes"}}',
        '{"same": "yes", "n": NaN}',
        '{"same": "yes", "n": -Infinity}',
        '{"same": "yes", "n": 01}',
        '{"same": "yes", "n": \u0663}',
        '{"same": "yes", "n": "raw\nnewline"}',
        '{"same": "yes", "n": "\\x"}',
        '{"same": "no", "same": "yes"}',
        '{"same": "yes", "s\\u0061me": "yes"}',
        '{"same": "yes", "bird_1": {"bill": "a", "bill": "b"}}',
        '{"same": "yes", "list": [{"a": 1, "a": 1}]}',
        '{"same": "no"} {"same": "yes"}',
        '{"same": "yes"} {"other": 1}',
        '{"same": "yes"} {"same": "n',
        '{draft} {"same": "yes"}',
        '"same": "no" {"same": "yes"}',
        '{"same": "yes"}\n**Same**: no',
        '{"same": "yes"} same\t= yes',
        '{"same": "yes", "bird_1": {"same": "no"}}',
        '{"same": "yes", "list": [{"same": "yes"}]}',
    ],
)
def test_no_single_answer_is_no_verdict(text):
    assert parse(text, PROMPT) is None
    assert reward(parse(text, PROMPT), True) == reward(parse(text, PROMPT), False) == 0.0
    attribute_spans(text, PROMPT)


def test_odd_but_legal_json_is_read():
    digits = "9" * 100_000
    assert reward(parse(f'{{"n": {digits}, "m": -0.5e+{digits}, "s": "\\ud800", "same": "no"}}', PROMPT), False) == 1.0
    nested = '{"a": [[], {}, [1, true, false, null]], "\ud800": "\udfff", "same": "no"}'
    assert reward(parse(nested, PROMPT), False) == 1.0


@pytest.mark.parametrize(
    "unit", ["[", "{", '{"a":', '{"a":[', '{"same": "yes", "a": ', "]", "}", '"', "[]", "{}", "\\", '{"']
)
def test_a_megabyte_of_nesting_is_refused_without_recursion(unit):
    bomb = unit * (2**20 // len(unit))
    for text in (bomb, '{"same": "yes", "a": ' + bomb, '{"same": "yes"}' + bomb):
        if unit in ('"', "\\") and text.startswith('{"same": "yes"}'):
            continue  # prose without brackets
        assert reward(parse(text, PROMPT), True) == 0.0
        assert attribute_spans(text, PROMPT) == ({}, {})


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet='{}[]":,\\ yesno0-\n'))
def test_random_text_never_raises_and_never_pays(text):
    assert reward(parse(text, PROMPT), True) == reward(parse(text, PROMPT), False) == 0.0
    attribute_spans(text, PROMPT)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_answer_never_pays_for_the_verdict_it_did_not_give(data):
    text = answer(same=True)
    cut = data.draw(st.integers(0, len(text) - 1))
    assert reward(parse(text[:cut], PROMPT), True) == 0.0
    noise = data.draw(st.text(alphabet='{}[]":, \\yesno', min_size=1, max_size=8))
    assert reward(parse(text[:cut] + noise + text[cut:], PROMPT), False) == 0.0


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text(), JSON_VALUES, max_size=4), st.sampled_from(["yes", "no", "maybe", 1, None]), st.booleans()
)
def test_agrees_with_json_on_any_object(found, said, pretty):
    found = {**found, "same": said}
    text = json.dumps(found, indent=1 if pretty else None)
    verdict = parse(text, PROMPT)
    assert (verdict and verdict.same) == ({"yes": True, "no": False}.get(said) if depth(found) <= 8 else None)
    forged = text[:-1].rstrip() + ', "same": "yes"}'
    assert parse(forged, PROMPT) is None


HARD_TEXT = st.text(max_size=12) | st.text(alphabet='"\\/{}[]:,é猫🐦\u0301\n\t\x7f ', max_size=12)
VALUES = st.fixed_dictionaries(dict.fromkeys(PROMPT.attributes, HARD_TEXT))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(a=VALUES, b=VALUES)
def test_spans_cut_out_exactly_the_values(layout, a, b):
    text = LAYOUTS[layout](answer(True, a, b))
    assert reward(parse(text, PROMPT), True) == 1.0
    for spans, values in zip(attribute_spans(text, PROMPT), (a, b), strict=True):
        assert {name: json.loads(f'"{text[start:end]}"') for name, (start, end) in spans.items()} == values
        assert list(spans) == list(PROMPT.attributes)


@pytest.mark.parametrize("opened", ["<think>", " \n<think>\n", ""])
def test_thoughts_before_an_answer_are_passed_over(opened):
    plain = answer(True, {"bill": "long", "leg color": "red"}, {"bill": "short", "leg color": "red"})
    thought = f'{opened}Same? {{"same": "no"}} is the form. same: no [1]</think>'
    assert reward(parse(f"{thought}\n\n{plain}", PROMPT), True) == 1.0
    text = f"{thought}```json\n{plain}\n```"
    assert [text[slice(*span)] for span in attribute_spans(text, PROMPT)[1].values()] == ["short", "red"]
    assert parse(f"{thought}{plain}{plain}", PROMPT) is None, "two verdicts are none, wherever they stand"
    assert parse(f"{thought}{plain}</think>{plain}", PROMPT) is None
    if opened:
        assert parse(f"{opened}{plain}", PROMPT) is None, "thoughts that do not end hold no answer"


def test_spans_leave_out_what_is_not_a_described_attribute():
    text = '{"bird_1": {"bill": 3, "song": "loud", "leg color": ""}, "bird_2": "red", "bill": "x", "same": "no"}'
    first, second = attribute_spans(text, PROMPT)
    assert list(first) == ["leg color"] and second == {}
    assert attribute_spans(text, PROMPT.as_generic()) == ({}, {})


def bpe(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with a corpus, its merges run across quotes, colons and spaces."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<|im_end|>"],
        show_progress=False,
        max_token_length=6,
    )
    model.train_from_iterator(corpus, trainer)
    model.add_tokens(["猫 cat"])  # stands in the vocabulary as itself, not in the byte alphabet
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")


TOKENIZERS = {
    "single bytes": bpe([]),
    "merged": bpe(['": "long", ', '": "long"}, ', '"leg color": "red"}', 'blue"}, "', "long é", "é猫", "\\né"] * 9),
}


def attribute_tokens(ids, tokenizer, prompt) -> tuple[list[int], ...]:
    """Of both items, positions that write part of any attribute's value."""
    items = tokens_by_attribute(ids, tokenizer, prompt)
    return tuple(sorted({at for tokens in item.values() for at in tokens}) for item in items)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*TOKENIZERS, "tiny supervisor"])
@settings(max_examples=40, deadline=None)
@given(a=VALUES | st.just(RED), b=VALUES | st.just({**BLUE, "bill": "a 猫 cat's"}))
def test_attribute_tokens_are_those_the_tokenizers_offsets_name(layout, name, a, b):
    tokenizer, text = TOKENIZERS.get(name, TINY), LAYOUTS[layout](answer(True, a, b))
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    for spans, tokens in zip(attribute_spans(text, PROMPT), tokens_by_attribute(ids, tokenizer, PROMPT), strict=True):
        expected = {
            attribute: [
                i for i, (s, e) in enumerate(encoded["offset_mapping"]) if any(start <= c < end for c in range(s, e))
            ]
            for attribute, (start, end) in spans.items()
        }
        assert tokens == expected


SPELLED = Prompt(role="expert", item="bird", verdict_key="same", attributes=("bill", "Größe 猫", 'the "leg"'))
TINY = AutoTokenizer.from_pretrained(SUPERVISOR)


def spelled(a: dict, b: dict, layout: str, chance: random.Random) -> tuple[bytes, list[dict[str, Span]]]:
    """A completion as UTF-8, and of each item attribute -> the bytes of its value, noted down while writing.

    Each character of a value stands as itself or in one of its JSON escapes, by chance.
    """
    colon, comma = {"minified": (":", ","), "pretty": (" : ", ",\n\t")}.get(layout, (": ", ", "))
    out = bytearray(b"Here it is:\n```json\n" if layout == "fenced" else b"")
    spans: list[dict[str, Span]] = [{}, {}]

    def character(c: str) -> str:
        units = c.encode("utf-16-be").hex()
        ways = ["".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))]
        ways += [short for short, meant in (('\\"', '"'), ("\\\\", "\\"), ("\\/", "/"), ("\\n", "\n")) if meant == c]
        ways += [c] * 3 if c >= " " and c not in '"\\' else []
        return chance.choice(ways)

    for number, (item, described) in enumerate((("bird_1", a), ("bird_2", b))):
        out += f'{"{" if number == 0 else comma}"{item}"{colon}'.encode() + b"{"
        for i, (name, value) in enumerate(described.items()):
            out += f'{comma if i else ""}{json.dumps(name, ensure_ascii=False)}{colon}"'.encode()
            start = len(out)
            out += "".join(map(character, value)).encode()
            spans[number][name] = (start, len(out))
            out += b'"'
        out += b"}"
    out += f'{comma}"same"{colon}"yes"'.encode() + b"}" + (b"\n```" if layout == "fenced" else b"")
    return bytes(out), spans


def cut(text: bytes, tokenizer, chance: random.Random) -> tuple[list[int], list[int]]:
    """One of the many ways to write `text` in the vocabulary, seldom the tokenizer's own: ids, and where each ends."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = "".join(byte_level.pre_tokenize_str(c)[0][0] for c in text.decode())  # one a byte
    vocabulary, ids, ends = tokenizer.get_vocab(), [], [0]
    while (at := ends[-1]) < len(text):
        ends.append(chance.choice([end for end in range(at + 1, at + 9) if symbols[at:end] in vocabulary]))
        ids.append(vocabulary[symbols[at : ends[-1]]])
    return ids, ends[1:]


@pytest.mark.parametrize("layout", ["one line", "minified", "pretty", "fenced"])
@pytest.mark.parametrize("name", [*TOKENIZERS, "tiny supervisor"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), chance=st.randoms(use_true_random=False))
def test_attribute_tokens_of_sampled_ids_are_those_a_walk_over_the_bytes_finds(layout, name, data, chance):
    values = st.fixed_dictionaries(dict.fromkeys(SPELLED.attributes, HARD_TEXT | st.sampled_from(["long red", "né"])))
    text, spans = spelled(data.draw(values), data.draw(values), layout, chance)
    tokenizer = TOKENIZERS.get(name, TINY)
    ids, ends = cut(text, tokenizer, chance)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text.decode()
    expected = tuple(
        {
            attribute: [i for i, (s, e) in enumerate(zip([0, *ends], ends)) if max(s, start) < min(e, end)]
            for attribute, (start, end) in item.items()
        }
        for item in spans
    )
    assert tokens_by_attribute(ids, tokenizer, SPELLED) == expected


def test_sampled_ids_are_seldom_the_tokenizers_own():
    text, _ = spelled(dict.fromkeys(SPELLED.attributes, "long red"), {}, "minified", random.Random(0))
    for name in ("merged", "tiny supervisor"):
        tokenizer = TOKENIZERS.get(name, TINY)
        ways = {tuple(cut(text, tokenizer, random.Random(i))[0]) for i in range(20)}
        assert len(ways) == 20 and tuple(tokenizer(text.decode())["input_ids"]) not in ways


def test_merges_that_straddle_a_quote_are_exercised():
    tokenizer = TOKENIZERS["merged"]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(answer())["input_ids"])
    assert any('"' in token and token.strip('Ġ":,{}') for token in tokens)


def test_attribute_tokens_survive_broken_utf8_and_unknown_ids():
    tokenizer = TOKENIZERS["single bytes"]
    ids = tokenizer(answer(a={"bill": "é", "leg color": "red"}), add_special_tokens=False)["input_ids"]
    whole = attribute_tokens(ids, tokenizer, PROMPT)
    bill = whole[0][0]
    broken = [*ids[: bill + 1], 10**6, *ids[bill + 2 :]]  # the character's second byte gives way to an id of no token
    first, second = attribute_tokens(broken, tokenizer, PROMPT)
    assert first == [i for i in whole[0] if i != bill + 1] and second == whole[1]
    assert attribute_tokens([], tokenizer, PROMPT) == ([], [])


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    model = Tokenizer(models.WordLevel({"▁bird": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match="▁.*pass --lambda.kl 0"):
        attribute_tokens([0], PreTrainedTokenizerFast(tokenizer_object=model), PROMPT)
