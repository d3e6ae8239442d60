"""The supervisor's prompt, the answer it should give, and the token ids of the prompt with both images in it.

The structured prompt names an expert role and a fixed attribute list; the answer is one JSON object whose keys come in
an order that makes the model describe before it judges: both descriptions, the differences, and only then the verdict.
The generic prompt (an ablation) has neither role nor attributes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from saga_fast.supervisor.families.base import PLAIN, ImageText
from saga_fast.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # seconds to import

IMAGE_PAD = "<|image_pad|>"
THINK, THOUGHT = "<think>", "</think>"  # around a model's reasoning before its answer
Order = Literal["images_first", "instruction_first"]

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")  # item and verdict_key, which the prompt contains literally
_TEXT = 200  # characters of a role or an attribute at most
_ATTRIBUTES = 100


@dataclass(frozen=True)
class Prompt:
    """A prompt about a pair of images.

    Raises InputError, naming the field, for what cannot be part of a prompt or of its answer: text that is empty,
    longer than a line, not printable or looks like a model's control tokens; keys that are not plain words or collide;
    `generic` and `attributes` that contradict each other.
    """

    role: str
    item: str
    verdict_key: str
    attributes: tuple[str, ...]
    generic: bool = False

    def __post_init__(self) -> None:
        for field, key in (("item", self.item), ("verdict_key", self.verdict_key)):
            if not _KEY.fullmatch(key):
                raise InputError(
                    f"prompt.{field}: {key!r}; accepted is a letter, then up to 39 letters, digits, _ and - (ASCII)"
                )
        texts = [("role", self.role)] * (not self.generic) + [("attributes", name) for name in self.attributes]
        for field, text in texts:
            _check_text(f"prompt.{field}", text)
            if field == "attributes" and "," in text:
                raise InputError(f"prompt.attributes: {text!r} holds a comma; give one attribute a string")
        if len(self.attributes) > _ATTRIBUTES:
            raise InputError(f"prompt.attributes: {len(self.attributes)} given; accepted are up to {_ATTRIBUTES}")
        if self.generic == bool(self.attributes):
            raise InputError(
                f"prompt.attributes: {len(self.attributes)} given with generic={self.generic}; "
                "a structured prompt needs at least one, a generic prompt takes none"
            )
        if self.verdict_key in self.attributes:
            raise InputError(f"prompt.attributes: {self.verdict_key!r} is the verdict_key too; rename one of them")
        for field, names in (("attributes", self.attributes), ("verdict_key", self.keys)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError(f"prompt.{field}: {twice[0]!r} is used twice in one JSON object; rename one of them")

    @property
    def item_keys(self) -> tuple[str, ...]:
        """Keys of the two attribute objects, in order; none in the generic prompt."""
        return () if self.generic else (f"{self.item}_1", f"{self.item}_2")

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the answer, in the order the model is asked to write them."""
        notes = ("differences", "reasoning") if self.generic else ("differences", "confidence", "reasoning")
        return (*self.item_keys, *notes, self.verdict_key)

    def as_generic(self) -> Prompt:
        """The same decision without role and attribute list."""
        return replace(self, role="", attributes=(), generic=True)

    def instruction(self) -> str:
        """The text of the prompt beside the two images; short, as it is prefilled for every pair."""
        decide = f"then decide: {self.verdict_key.replace('_', ' ')} or not."
        reply = "Reply with one JSON object, keys in order:"
        if self.generic:
            return (
                f"Compare the {self.item} of image 1 with that of image 2: summarise the differences, {decide} "
                f"{reply} differences, reasoning, {self.verdict_key} (yes/no)."
            )
        first, second = self.item_keys
        return (
            f"Role: {self.role}. Attributes: {', '.join(self.attributes)}. "
            f"Describe {self.item} 1 by attribute, describe {self.item} 2 by attribute, summarise the differences, "
            f"{decide} {reply} {first} (attribute: text), {second} (same attributes), "
            f"differences, confidence (high/medium/low), reasoning, {self.verdict_key} (yes/no)."
        )

    def answer(
        self,
        attributes_a: dict[str, str],
        attributes_b: dict[str, str],
        differences: str,
        confidence: str,
        reasoning: str,
        same: bool,
    ) -> str:
        """The correct answer as one line of JSON. Raises KeyError if a description lacks an attribute."""
        notes = {"differences": differences, "confidence": confidence, "reasoning": reasoning}
        values: dict[str, object] = {**notes, self.verdict_key: "yes" if same else "no"}
        if not self.generic:
            for key, item_values in zip(self.item_keys, (attributes_a, attributes_b), strict=True):
                values[key] = {name: item_values[name] for name in self.attributes}
        return json.dumps({key: values[key] for key in self.keys}, ensure_ascii=False)


def _check_text(field: str, text: str) -> None:
    if not text.strip():
        raise InputError(f"{field}: empty; say it in a word or more")
    if len(text) > _TEXT:
        raise InputError(f"{field}: {text[:40]!r}… has {len(text):,} characters; accepted are up to {_TEXT}")
    if not text.isprintable():
        odd = next(character for character in text if not character.isprintable())
        raise InputError(f"{field}: {text!r} holds the unprintable character {odd!r}; take it out")
    if "<" in text or ">" in text:
        raise InputError(f"{field}: {text!r} holds < or >, which mark a model's control tokens; take them out")


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


PROMPTS = {
    "birds": Prompt(
        role="ornithologist",
        item="bird",
        verdict_key="same_species",
        attributes=_names("""
            bill shape, bill length, bill color, head pattern, crown color, forehead color, eye color, nape color,
            throat color, breast color, breast pattern, belly color, belly pattern, back color, back pattern,
            upperparts color, wing color, wing pattern, wing shape, tail shape, tail pattern, upper tail color,
            under tail color, underparts color, shape, size, primary color, leg color"""),
    ),
    "cars": Prompt(
        role="automotive expert",
        item="car",
        verdict_key="same_model",
        attributes=_names("""
            body style, number of doors, front grille, headlights, front bumper, side profile, roofline, greenhouse,
            wheels, fenders and wheel arches, rear lights, rear bumper, exhaust, badging, overall proportions,
            apparent era, paint finish"""),
    ),
    "aircraft": Prompt(
        role="aviation expert",
        item="aircraft",
        verdict_key="same_variant",
        attributes=_names("""
            number of engines, engine type, engine mount position, engine nacelle shape and size, wing configuration,
            wing planform, winglets or wingtip shape, tail configuration, vertical stabilizer shape,
            fuselage length and proportions, nose shape, cockpit window layout, cabin window count and spacing,
            landing gear layout, overall size class, apparent era, livery and markings"""),
    ),
    "drawn-birds": Prompt(
        role="ornithologist",
        item="bird",
        verdict_key="same_species",
        attributes=_names("""
            bill shape, bill length, crown color, breast color, belly color, back color, wing pattern, wing color,
            tail shape, tail pattern, leg color, eye ring"""),
    ),
}


class Prefix(NamedTuple):
    """input_ids: everything before the completion. image_spans: half-open ranges of each image's pads in input_ids.
    thinks: the template opens a reasoning block, which the completion closes before its answer."""

    input_ids: list[int]
    image_spans: tuple[tuple[int, int], tuple[int, int]]
    thinks: bool = False


class ImageMarkup(NamedTuple):
    """An image in the prompt. pad: the token that is repeated, once per visual token. text: the template's text for an
    image, and the processor's replacement of it. newline: one more pad after each image, outside its span."""

    pad: str = IMAGE_PAD
    text: ImageText = PLAIN
    newline: bool = False


DEFAULT_MARKUP = ImageMarkup()


def build_prefix(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    tokens_per_image: int,
    order: Order = "images_first",
    image: ImageMarkup = DEFAULT_MARKUP,
) -> Prefix:
    """Chat-templated token ids of one pair, with `tokens_per_image` pads for each image.

    `images_first` is the paper's Eq. 1; `instruction_first` its Fig. 2. A template with a switch for reasoning has it
    off. Raises InputError for an unknown order, a tokenizer without a chat template, a template that fails or does not
    write one image per image, and an instruction that holds one of the tokenizer's special tokens.
    """
    images, text = [{"type": "image"}] * 2, [{"type": "text", "text": instruction}]
    contents = {"images_first": images + text, "instruction_first": text + images}
    if order not in contents:
        raise InputError(f"supervisor.order: {order!r} is unknown; use one of {', '.join(contents)}")
    name = tokenizer.name_or_path or "tokenizer"
    if tokenizer.chat_template is None:
        raise InputError(f"{name}: has no chat template; use an instruction-tuned model, or add chat_template.jinja")
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content in instruction:
            raise InputError(f"prompt: the instruction holds the special token {token.content!r}; take it out")

    placeholder = image.text.placeholder or image.pad
    try:
        rendered = _render(tokenizer, [{"role": "user", "content": contents[order]}])
        # Like the models' processors: render the text, then tokenise it; the tokenizer adds the BOS token where the
        # template does not.
        rendered = rendered.replace(placeholder, f"{image.text.before}{image.pad}{image.text.after}")
        has_bos = tokenizer.bos_token is not None and rendered.startswith(tokenizer.bos_token)
        ids = tokenizer.encode(rendered, add_special_tokens=not has_bos)
    except Exception as error:  # of any kind: a template is a program in the model's files
        raise InputError(
            f"{name}: chat template cannot write two images and a question ({type(error).__name__}: "
            f"{first_line(error)}); use the vision-language model's own template, chat_template.jinja"
        ) from error
    pad = tokenizer.convert_tokens_to_ids(image.pad)
    pads = [position for position, token in enumerate(ids) if token == pad]
    if len(pads) != 2:
        raise InputError(
            f"{name}: chat template wrote {len(pads)} {placeholder} for two images; "
            "use the vision-language model's own template"
        )
    first, second = pads
    run = [pad] * (tokens_per_image + image.newline)
    input_ids = [*ids[:first], *run, *ids[first + 1 : second], *run, *ids[second + 1 :]]
    second += len(run) - 1
    spans = (first, first + tokens_per_image), (second, second + tokens_per_image)
    return Prefix(input_ids, spans, rendered.rfind(THINK) > rendered.rfind(THOUGHT))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], next_turn: bool = True) -> str:
    """next_turn: whether the template writes the start of the assistant's next turn."""
    settings: dict[str, Any] = {"tokenize": False, "enable_thinking": False, "add_generation_prompt": next_turn}
    return str(tokenizer.apply_chat_template(messages, **settings))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after the model's turn; None where it writes none, or fails:
    `build_prefix` reports the failures that matter."""
    reply = "Yes"
    for content in ([{"type": "text", "text": reply}], reply):
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "text", "text": "?"}]},
            {"role": "assistant", "content": content},
        ]
        try:
            _, found, after = _render(tokenizer, turns, next_turn=False).rpartition(reply)
            ids = tokenizer.encode(after.lstrip(), add_special_tokens=False) if found else []
        except Exception:  # of any kind, as in `build_prefix`
            continue
        if ids and (token := tokenizer.added_tokens_decoder.get(ids[0])) is not None and token.special:
            return ids[0]
    return None
