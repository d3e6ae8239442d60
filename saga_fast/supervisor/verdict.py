"""Parsing the supervisor's answer: its verdict, the reward, and the value and position of each attribute.

A completion is untrusted text. It counts only if it has exactly one JSON object, strictly by RFC 8259, without
duplicate keys in any object, and with the verdict's key only at its top level. A code fence or prose may surround that
object, but no other bracket of any kind, and no second verdict (`same_species: no`): so a verdict can be neither hidden
in a larger structure nor given twice. Everything else counts as no answer, and nothing raises. Reasoning before an
answer, up to the first `</think>`, is skipped, whether the text or the prompt opened it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from saga_fast.supervisor.prompt import THINK, THOUGHT, Prompt
from saga_fast.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # seconds to import

Span = tuple[int, int]
Value: TypeAlias = "dict[str, Value] | _String | None"  # of JSON, as `_Scanner` reads it
Found = TypeVar("Found")

MAX_DEPTH = 8  # an answer needs 2
_ATOM = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_SPACE = re.compile(r"[ \t\n\r]+")
_BRACKETS = re.compile(r"[\[\]{}]")
_SAYS = r"[\s\"'`*]*[:=]"  # after the verdict's key, quoted or bold, in prose: a second verdict


class _String(NamedTuple):
    """A JSON string: its value, and the half-open range of its source between the quotes."""

    value: str
    start: int
    end: int


class _Scanner:
    """Reads JSON from `text`, recording the positions of strings. Objects become dicts; other values than strings,
    None.

    Numbers are never converted (a completion may hold a million digits), and depth is bounded. ValueError if malformed,
    or if an object within another has `top_key`.
    """

    def __init__(self, text: str, at: int, top_key: str):
        self.text, self.at, self.top_key = text, at, top_key

    def peek(self) -> str:
        if space := _SPACE.match(self.text, self.at):
            self.at = space.end()
        return self.text[self.at : self.at + 1]

    def take(self, symbol: str) -> None:
        if self.peek() != symbol:
            raise ValueError(f"expected {symbol} at {self.at}")
        self.at += 1

    def string(self) -> _String:
        self.take('"')
        start = self.at
        value, self.at = scanstring(self.text, start, True)
        return _String(value, start, self.at - 1)

    def members(self, opening: str, closing: str) -> Iterator[None]:
        """Yields with the scanner before each member."""
        self.take(opening)
        if self.peek() != closing:
            yield
            while self.peek() == ",":
                self.take(",")
                yield
        self.take(closing)

    def object(self, depth: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for _ in self.members("{", "}"):
            key = self.string().value
            if key in found or (key == self.top_key and depth < MAX_DEPTH):
                raise ValueError(f"key {key!r} again")
            self.take(":")
            found[key] = self.value(depth - 1)
        return found

    def value(self, depth: int) -> Value:
        if depth == 0:
            raise ValueError("nested too deep")
        match self.peek():
            case '"':
                return self.string()
            case "{":
                return self.object(depth)
            case "[":
                for _ in self.members("[", "]"):
                    self.value(depth - 1)
            case _:
                if not (atom := _ATOM.match(self.text, self.at)):
                    raise ValueError(f"no JSON value at {self.at}")
                self.at = atom.end()
        return None


def _read(text: str, prompt: Prompt) -> dict[str, Value] | None:
    """The one JSON object in `text`, or None."""
    end = text.find(THOUGHT)
    if text.lstrip().startswith(THINK):
        return _read_answer(text, end + len(THOUGHT), prompt) if end >= 0 else None
    answer = _read_answer(text, 0, prompt)
    if answer is None and end >= 0:  # the prompt opened the reasoning that ends here
        answer = _read_answer(text, end + len(THOUGHT), prompt)
    return answer


def _read_answer(text: str, begin: int, prompt: Prompt) -> dict[str, Value] | None:
    """The one JSON object in text[begin:], or None."""
    start = text.find("{", begin)
    if start < 0:
        return None
    scanner = _Scanner(text, start, prompt.verdict_key)
    try:
        answer = scanner.object(MAX_DEPTH)
    except ValueError:
        return None
    around = f"{text[begin:start]}\n{text[scanner.at :]}".casefold()
    second = _BRACKETS.search(around) or re.search(re.escape(prompt.verdict_key.casefold()) + _SAYS, around)
    return None if second else answer


@dataclass(frozen=True)
class Verdict:
    """same: whether the answer is yes. well_formed: the answer has exactly the prompt's keys and attributes, in order
    and all text, and a confidence of high, medium or low."""

    same: bool
    well_formed: bool


def parse(text: str, prompt: Prompt) -> Verdict | None:
    """The verdict in a completion, or None where there is no single, unambiguous yes or no (any letter case)."""
    answer = _read(text, prompt)
    if answer is None:
        return None
    verdict_value = answer.get(prompt.verdict_key)
    word = verdict_value.value.strip().lower() if isinstance(verdict_value, _String) else None
    return Verdict(word == "yes", _well_formed(answer, prompt)) if word in ("yes", "no") else None


def _well_formed(answer: dict[str, Any], prompt: Prompt) -> bool:
    if tuple(answer) != prompt.keys:
        return False
    items = [answer[key] for key in prompt.item_keys]
    if not all(isinstance(item, dict) and tuple(item) == prompt.attributes for item in items):
        return False
    notes = [answer[key] for key in prompt.keys[len(items) :]]
    if not all(isinstance(text, _String) for text in (*notes, *(text for item in items for text in item.values()))):
        return False
    return prompt.generic or answer["confidence"].value in ("high", "medium", "low")


def reward(verdict: Verdict | None, same: bool) -> float:
    """1.0 if the verdict that `parse` found equals the truth, else 0.0; 0.0 where it found none."""
    return float(verdict is not None and verdict.same == same)


def attribute_values(text: str, prompt: Prompt) -> tuple[dict[str, str], dict[str, str]]:
    """Attribute → value in the completion, for item 1 and for item 2. Attributes without a text value are left out;
    unreadable text gives empty dicts."""
    return _of_items(text, prompt, lambda string: string.value)


def attribute_spans(text: str, prompt: Prompt) -> tuple[dict[str, Span], dict[str, Span]]:
    """For item 1 and item 2: attribute → half-open character range of its value in `text`, between the quotes.
    Attributes without a text value are left out; unreadable text gives empty dicts."""
    return _of_items(text, prompt, lambda string: (string.start, string.end))


def _of_items(text: str, prompt: Prompt, what: Callable[[_String], Found]) -> tuple[dict[str, Found], dict[str, Found]]:
    """For item 1 and item 2: attribute → `what` of the string that describes it."""
    answer = _read(text, prompt) or {}

    def found(key: str) -> dict[str, Found]:
        described = answer.get(key)
        values = {name: described.get(name) for name in prompt.attributes} if isinstance(described, dict) else {}
        return {name: what(value) for name, value in values.items() if isinstance(value, _String)}

    if prompt.generic:
        return {}, {}
    first, second = prompt.item_keys
    return found(first), found(second)


# Byte-level BPE spells each byte as one printable character (GPT-2's table): a printable Latin-1 byte as itself, the
# others as the characters from 256 up, in order.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


def token_bytes(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of each token. An id unknown to the tokenizer (a padded row of the head) has none."""
    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    try:
        return [
            added[i] if i in added else bytes(_BYTE_OF[symbol] for symbol in tokenizer.convert_ids_to_tokens(i) or "")
            for i in token_ids
        ]
    except KeyError as error:
        raise InputError(
            f"{tokenizer.name_or_path or 'tokenizer'}: symbol {error.args[0]!r} is not of a byte-level BPE; "
            "lambda.kl needs one (Qwen, Llama 3, GPT-2 style): take such a model, or pass --lambda.kl 0"
        ) from None


def tokens_by_attribute(
    token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, prompt: Prompt
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """For item 1 and item 2: attribute -> ascending positions in `token_ids` of the tokens that write its value.

    Works on the sampled ids, never on re-encoded text, which may split differently. A character may be split over
    several tokens, and a token may contain a quote and the start of a value: it counts. A token of quotes alone does
    not. Raises InputError if the tokenizer is not byte-level.
    """
    pieces = token_bytes(token_ids, tokenizer)
    ends = list(accumulate(map(len, pieces)))
    text = b"".join(pieces).decode("utf-8", "surrogateescape")  # one character per stray byte
    byte_at = [0, *accumulate(len(character.encode("utf-8", "surrogateescape")) for character in text)]

    def positions(span: Span) -> list[int]:
        start, end = byte_at[span[0]], byte_at[span[1]]
        return [i for i, piece in enumerate(pieces) if max(ends[i] - len(piece), start) < min(ends[i], end)]

    items = attribute_spans(text, prompt)
    first, second = ({name: positions(span) for name, span in item.items()} for item in items)
    return first, second
