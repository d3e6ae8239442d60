"""Random malformed input, each kind against its own oracle: nothing crashes, hangs or gets a wrong reward.

    pytest -m fuzz -s tests/saga_fast/test_fuzz.py      # all cases; `make test-all` tries the first hundreds

Cases are grown from good input by the grammar of what is read, not from random characters alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat, savemat
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from saga_fast.config import PRESETS, Config, stored
from saga_fast.data import ClassBalancedSampler, aircraft, cars, cub, split
from saga_fast.report import write_report
from saga_fast.runtime import checkpoint
from saga_fast.runtime import run as run_module
from saga_fast.supervisor.prompt import PROMPTS, Prompt
from saga_fast.supervisor.prompt_file import load_prompt, stored_prompt, tomllib
from saga_fast.supervisor.verdict import attribute_spans, parse, reward, tokens_by_attribute
from saga_fast.tiny import SUPERVISOR
from saga_fast.utils.errors import InputError
from saga_fast.utils.images import as_rgb, open_rgb

from .data import released
from .report.runs import make_run

HANG = 30  # seconds: no case takes a thousandth of it


BATCH = 10  # cases that are grown from one that hypothesis draws


def hunt(count: int, batches: st.SearchStrategy, holds: Callable[[Any], object]) -> None:
    """`holds` for `count` cases, in batches. A few hundred are the same every time. Prints what became of them."""
    tried = Counter()

    def hangs(*_):
        raise AssertionError(f"still at it after {HANG} s")

    @settings(
        max_examples=count // BATCH, derandomize=count <= 1000, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(batches)
    def batch(values):
        for value in values:
            tried["cases"] += 1
            signal.alarm(HANG)
            try:
                tried[holds(value)] += 1
            finally:
                signal.alarm(0)

    before = signal.signal(signal.SIGALRM, hangs)
    try:
        batch()
    finally:
        signal.signal(signal.SIGALRM, before)
        print(dict(tried))


def cases(few: int, many: int):
    slow, fuzz = pytest.param(few, marks=pytest.mark.slow), pytest.param(many, marks=pytest.mark.fuzz)
    return pytest.mark.parametrize("count", [max(BATCH, few // 10), slow, fuzz])


def refused(error: InputError) -> str:
    assert (line := str(error)).isprintable() and 0 < len(line) < 3000
    return "refused"


# ── Completions ─────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = "same_species"
PROMPT = Prompt("ornithologist", "bird", KEY, ("bill", "leg color"))
FRAGMENTS = [
    *(f'{before}"{KEY}"{colon}"{word}"' for before in ("", ", ") for colon in (":", " : ") for word in ("yes", "no")),
    *(f'{{"{KEY}": "{word}"}}' for word in ("yes", "no")),
    *(f', "x": {{"{KEY}": "{word}"}}' for word in ("yes", "no")),
    *(f"{KEY}{sign} no. " for sign in (":", " =", "`:", "**:", "")),
    *(f'"{KEY.upper()}": "no"', ', "s\\u0061me_species": "no"', f', "{KEY}\\u0000": "no"', f'\\"{KEY}\\": \\"no\\"'),
    *('"yes"', '"no"', "yes", "no", "maybe", "true", "null", "NaN", "-Infinity", "9" * 5000, "-0.0e+99999", "01", "٣"),
    *("{", "}", "[", "]", "[]", "{}", '"', "\\", ":", ",", "[" * 60, '{"a":' * 60, "]" * 9, "}" * 9, "//", "/* { */"),
    *("<think>", "</think>", "<think>{}</think>"),
    *("```json\n", "```", "<|im_end|>", "<script>alert(1)</script>", "</textarea><img src=x onerror=1>", "&quot;"),
    *(
        "\\u0000",
        "\\ud83d\\udc26",
        "\\ud800",
        "\ud800",
        "\\u12",
        "\\x41",
        "\0",
        "\n",
        "\u2028",
        "\ufeff",
        "é猫🐦\u0301",
    ),
]
KEYS = st.sampled_from(
    [KEY, "bird_1", "bird_2", "bill", "leg color", "differences", "confidence", "reasoning", "", "x"]
)
TEXTS = st.sampled_from(["yes", "no", " YES ", "long", "high", "maybe", ""]) | st.text(max_size=6)
ATOMS = TEXTS | st.none() | st.booleans() | st.integers() | st.floats()
TREES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(KEYS, inner), max_size=5).map(tuple),
    max_leaves=12,
)


def write(tree: Any, space: str) -> str:
    """JSON of a tree whose objects are tuples of pairs, so that a key may come twice."""
    if isinstance(tree, tuple):
        return (
            f"{{{space}{f',{space}'.join(f'{json.dumps(key)}:{space}{write(inner, space)}' for key, inner in tree)}}}"
        )
    if isinstance(tree, list):
        return f"[{f',{space}'.join(write(inner, space) for inner in tree)}{space}]"
    return json.dumps(tree)


def grown(draw, text: str, fragments: list[str]) -> list[str]:
    """`text`, and copies of it changed up to four times each: cut, doubled, wrapped, pieces of the grammar put in."""
    chance, texts = random.Random(draw(st.integers(0, 2**32))), [text]
    for _ in range(BATCH - 1):
        changed = text
        for _ in range(chance.randint(1, 4)):
            at, end = sorted(chance.choices(range(len(changed) + 1), k=2))
            match chance.randrange(7):
                case 0:
                    put = chance.choice(
                        [chance.choice(fragments), chr(chance.choice([*range(128), 0x85, 0x3000, 0xDC80]))]
                    )
                    changed = changed[:at] + put + changed[at:]
                case 1 | 2:  # where the grammar turns
                    at = chance.choice([turn.end() for turn in re.finditer(r'[{}",:=\n\[\]]', changed)] or [0])
                    changed = changed[:at] + chance.choice(fragments) + changed[at:]
                case 3:
                    end = min(end, at + chance.choice([1, 9, 99]))
                    changed = changed[:at] + changed[end:]
                case 4:
                    changed = changed[:end] + changed[at:end] + changed[end:]
                case 5:
                    pair = chance.choice(
                        [("yes", "no"), ("no", "yes"), ("[", "]"), ('{"a":', "}"), ("```json\n", "\n```")]
                    )
                    changed = changed.replace(*pair, 1) if pair[0].isalpha() else pair[0] + changed + pair[1]
                case 6:
                    changed = chance.choice(fragments) + changed + chance.choice(["", chance.choice(fragments)])
        texts.append(changed)
    return texts


@st.composite
def completions(draw) -> list[str]:
    """Grown from a good answer or from a tree of its keys."""
    if draw(st.integers(0, 3)):
        described = {name: draw(TEXTS) for name in PROMPT.attributes}
        text = PROMPT.answer(described, described, draw(TEXTS), "high", draw(TEXTS), draw(st.booleans()))
        if draw(st.booleans()):
            layout = {"indent": draw(st.sampled_from([None, 0, 2])), "ensure_ascii": draw(st.booleans())}
            text = json.dumps(json.loads(text), **layout)
    else:
        pairs = draw(st.lists(st.tuples(KEYS, TREES), max_size=6).map(tuple))
        text = write(pairs, draw(st.sampled_from(["", " ", "\n"])))
    return grown(draw, text, FRAGMENTS)


class Refused(ValueError):
    pass


def read(text: str) -> dict | None:
    """`read_answer` behind thoughts that lead `text`."""
    _, closed, rest = text.partition("</think>")
    if text.lstrip().startswith("<think>"):
        return read_answer(rest) if closed else None
    found = read_answer(text)
    return read_answer(rest) if found is None and closed else found


def read_answer(text: str) -> dict | None:
    """The one object in `text` by the json module and the rules as the documentation has them; None if it is none."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len({key for key, _ in pairs}) < len(pairs):
            raise Refused
        return dict(pairs)

    def constant(_: str) -> None:
        raise Refused

    number = dict.fromkeys(("parse_int", "parse_float"), lambda _: 0)
    try:
        before, brace, rest = text.partition("{")
        found, length = json.JSONDecoder(object_pairs_hook=once, parse_constant=constant, **number).raw_decode(
            brace + rest
        )
    except (ValueError, RecursionError):
        return None
    around = f"{before}\n{(brace + rest)[length:]}"
    if set(around) & set("[]{}") or depth(found) > 8 or any(KEY in inner for inner in objects(found)[1:]):
        return None
    for after in around.casefold().split(KEY)[1:]:
        while after and (after[0].isspace() or after[0] in "\"'`*"):
            after = after[1:]
        if after[:1] in (":", "="):
            return None
    return found


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 1 if inner is None else 1 + max(map(depth, inner), default=0)


def objects(value: Any) -> list[dict]:
    """`value` and all in it that are objects, outermost first."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * isinstance(value, dict) + [found for part in inner for found in objects(part)]


def verdict_is_right(text: str) -> str:
    found = read(text)
    said = found.get(KEY) if found else None
    word = said.strip().lower() if isinstance(said, str) else None
    expected = {"yes": True, "no": False}.get(word)
    verdict = parse(text, PROMPT)
    assert (verdict.same if verdict else None) is expected
    for truth in (True, False):
        assert reward(verdict, truth) == float(expected is truth)
    if verdict and verdict.well_formed:
        assert tuple(found) == PROMPT.keys and all(tuple(found[item]) == PROMPT.attributes for item in PROMPT.item_keys)
    return f"paid {word}" if verdict else "unpaid"


@cases(1000, 55_000)
def test_a_verdict_is_paid_only_if_it_is_the_only_one(count):
    hunt(count, completions(), verdict_is_right)


def check_spans(text: str) -> tuple[dict, dict]:
    """Each span, overwritten, changes the value of its own attribute and nothing else in what json reads."""
    found, spans = read(text) or {}, attribute_spans(text, PROMPT)
    for item, described in zip(PROMPT.item_keys, spans, strict=True):
        inner = found.get(item)
        values = {name: inner.get(name) for name in PROMPT.attributes} if isinstance(inner, dict) else {}
        assert described.keys() == {name for name, value in values.items() if isinstance(value, str)}
        for name, (start, end) in described.items():
            assert read(f"{text[:start]}MARK{text[end:]}") == {**found, item: {**inner, name: "MARK"}}
    return spans


TOKENIZER = AutoTokenizer.from_pretrained(SUPERVISOR)
SPELLING = {i: piece for piece, i in TOKENIZER.get_vocab().items()}
BYTES = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
ADDED = {i: token.content.encode() for i, token in TOKENIZER.added_tokens_decoder.items()}


@st.composite
def sampled(draw) -> list[list[int]]:
    """Ids of completions as they are encoded, some of them then lost, doubled, or others: also ones of no token."""
    samples, chance = [], random.Random(draw(st.integers(0, 2**32)))
    for text in draw(completions()):
        ids = TOKENIZER(text.encode("utf-8", "replace").decode())["input_ids"]
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            at = chance.randint(0, len(ids))
            ids[at : at + chance.randrange(3)] = chance.choices(range(len(SPELLING) + 4), k=chance.randrange(3))
        samples.append(ids)
    return samples


def tokens_are_right(ids: list[int]) -> str:
    pieces = [ADDED.get(i) or bytes(BYTES[symbol] for symbol in SPELLING.get(i, "")) for i in ids]
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    spans, found, some = check_spans(text), tokens_by_attribute(ids, TOKENIZER, PROMPT), 0
    for described, tokens in zip(spans, found, strict=True):
        assert described.keys() == tokens.keys()
        for name, (start, end) in described.items():
            first, last = (len(text[:position].encode("utf-8", "surrogateescape")) for position in (start, end))
            ranges, at = [], 0
            for piece in pieces:
                ranges.append(range(max(at, first), min(at + len(piece), last)))
                at += len(piece)
            assert tokens[name] == [i for i, inside in enumerate(ranges) if inside]
            some += 1
    return f"{some} spans"


@cases(300, 20_000)
def test_attribute_tokens_are_those_of_the_values(count):
    hunt(count, sampled(), tokens_are_right)


# ── Prompt files ────────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = [
    "bird",
    "a bird",
    "same_species",
    "bird_1",
    "reasoning",
    "",
    " ",
    "x" * 300,
    "{0.__class__}",
    "%s",
    "<|im_end|>",
    "a, b",
]
WORDS += [
    "bill",
    "leg  color",
    "leg color",
    "leg\u00a0color",
    "\u202e",
    "\x1b[2J",
    "a\nb",
    "Größe",
    "猫",
    "\u200b",
    '"',
    "\\",
    "'''",
]
TOML_TEXT = (st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)).map(json.dumps)
TOML_VALUES = st.recursive(
    TOML_TEXT
    | st.sampled_from(
        ["1", "-0.5", "nan", "true", "1979-05-27", "0x" + "f" * 5000, "9" * 5000, '"""x\ny"""', "'", "{}", "1__0"]
    ),
    lambda inner: st.lists(inner, max_size=4).map(lambda values: f"[{', '.join(values)}]"),
    max_leaves=6,
)
NAMES = st.sampled_from(['"bill"', '"leg  color"', '"Größe"', '"{0.__class__}"', '"a \\"b\\""', "'%s'"])
FIELDS = ("role", "item", "verdict_key", "attributes")


PIECES = [
    *map(json.dumps, WORDS),
    "[" * 3000,
    "[[a]]\n",
    "\ufeff",
    "'",
    '"""',
    "#",
    ",",
    "[",
    "]",
    "{",
    "}",
    "=",
    ".",
    "\r",
    "\udcff",
]
PIECES += [
    'role = "x"\n',
    "item.x = 1\n",
    '"item" = "x"\n',
    "attributes = []\n",
    "[role]\n",
    "generic = true\n",
    "0x" + "f" * 5000,
]


@st.composite
def prompt_files(draw) -> list[bytes]:
    fields = {
        "role": draw(NAMES),
        "item": draw(st.sampled_from(['"bird"', '"x-1"'])),
        "verdict_key": draw(st.sampled_from(['"same"', '"bill"'])),
        "attributes": f"[{', '.join(draw(st.lists(NAMES | NAMES | TOML_TEXT, min_size=1, max_size=4, unique=True)))}]",
    }
    if draw(st.booleans()):
        fields[draw(st.sampled_from([*FIELDS, "rôle", '"a.b"', "role.x", "generic", "__class__"]))] = draw(TOML_VALUES)
    text = "\n".join(f"{name} = {value}" for name, value in fields.items())
    return [content.encode("utf-8", "surrogateescape") for content in grown(draw, text, PIECES)]


def prompt_is_right(folder: Path) -> Callable[[bytes], str]:
    path = folder / "my.toml"

    def holds(content: bytes) -> str:
        path.write_bytes(content)
        try:
            prompt = load_prompt(str(path))
        except InputError as error:
            assert str(error).startswith(f"supervisor.prompt: {str(path)!r}: ")
            return refused(error)
        values = tomllib.loads(content.decode())
        assert set(values) == set(FIELDS)
        given = [values[name] for name in FIELDS[:3]] + values["attributes"]
        asked = [prompt.role, prompt.item, prompt.verdict_key, *prompt.attributes]
        assert asked == [" ".join(text.split()) for text in given]
        assert all(text.isprintable() and 0 < len(text) <= 200 and not set("<>") & set(text) for text in asked)
        for key in (prompt.item, prompt.verdict_key):
            assert key.isascii() and key[0].isalpha() and key.replace("_", "a").replace("-", "a").isalnum()
        assert len(set(prompt.attributes)) == len(prompt.attributes) > 0 and len(set(prompt.keys)) == 6
        assert f"Role: {prompt.role}. Attributes: {', '.join(prompt.attributes)}. " in prompt.instruction()
        described = dict.fromkeys(prompt.attributes, "{0}")
        assert parse(prompt.answer(described, described, "%s", "high", "", True), prompt).well_formed
        return "read"

    return holds


@cases(500, 15_000)
def test_a_prompt_file_is_read_as_it_stands_or_refused(count, tmp_path):
    hunt(count, prompt_files(), prompt_is_right(tmp_path))


# ── Checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────────

PARTS, STATE = {"encoder": {"w": torch.arange(6.0)}, "rng": {}}, {"step": 7, "lr": 0.1}
FILES = ("manifest.json", "state.json", "encoder.safetensors", "rng.safetensors")
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["sha256", "state.json"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "sha256", *FILES]), inner),
    max_leaves=6,
)
BYTES_OF = [b"[" * 5000, b'{"format": ' + b"9" * 5000 + b"}", b'{"format": NaN}', b"\xff" * 8 + b"{}"]
BYTES_OF += [(2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b'{"sha256": {}, "format": 1}']
RAW = st.binary(max_size=20) | JUNK.map(lambda value: json.dumps(value).encode()) | st.sampled_from(BYTES_OF)


@st.composite
def damages(draw) -> list[tuple[str, str, Any]]:
    """What is done to a checkpoint's files, in order: (kind, file, value)."""
    done = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(
            st.sampled_from(["flip", "cut", "replace", "forge", "drop", "folder", "pipe", "loop", "add", "manifest"])
        )
        file = draw(st.sampled_from(FILES))
        if kind == "manifest":
            value = draw(st.dictionaries(st.sampled_from(["format", "run", "sha256"]), JUNK, min_size=1))
        else:
            value = draw(RAW) if kind in ("replace", "forge", "add") else draw(st.integers(0, 2**16))
        done.append((kind, file, value))
    return done


def checkpoint_is_right(folder: Path) -> Callable[[list], str]:
    whole = [checkpoint.save(folder / "whole", step, PARTS, STATE) for step in (1, 2)]
    content = {file: (whole[1] / file).read_bytes() for file in FILES}
    case = folder / "case"

    def damage(path: Path, kind: str, file: str, value: Any) -> None:
        target = path / file
        if kind in ("drop", "folder", "pipe", "loop", "replace", "forge"):
            if target.is_dir():
                target.rmdir()
            target.unlink(missing_ok=True)
        if kind == "folder":
            target.mkdir()
        elif kind == "pipe":
            os.mkfifo(target)
        elif kind == "loop":
            target.symlink_to(target.name)
        elif kind in ("replace", "forge"):
            target.write_bytes(value)
        elif kind == "add":
            (path / "more").write_bytes(value)
        elif kind in ("flip", "cut") and target.is_file() and (held := bytearray(target.read_bytes())):
            held[value % len(held)] ^= 1 << value % 8
            target.write_bytes(held if kind == "flip" else held[: value % len(held)])
        elif kind == "manifest" and target.is_file():
            recorded = json.loads(content["manifest.json"]) | value
            (path / "manifest.json").unlink(missing_ok=True)
            (path / "manifest.json").write_text(json.dumps(recorded))
        if kind == "forge":
            hashes = {name: sha for name in FILES[1:] if (sha := digest(path / name))}
            manifest = path / "manifest.json"
            if manifest.is_file() or not os.path.lexists(manifest):
                manifest.write_text(json.dumps({"format": 1, "run": "", "sha256": hashes}))

    def digest(path: Path) -> str | None:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None

    def is_whole(path: Path) -> bool:
        try:
            recorded = json.loads((path / "manifest.json").read_bytes()) if (path / "manifest.json").is_file() else {}
            files = {file.name: digest(file) for file in path.iterdir() if file.name != "manifest.json"}
            known = recorded["format"] == 1 and recorded["run"] == ""
            return known and recorded["sha256"] == files and None not in files.values()
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    def holds(done: list[tuple[str, str, Any]]) -> str:
        shutil.rmtree(case, ignore_errors=True)
        for path in whole:
            shutil.copytree(path, case / path.name)
        newest = case / whole[1].name
        for kind, file, value in done:
            if newest.is_dir() and not (kind == "manifest" and (newest / "manifest.json").is_dir()):
                damage(newest, kind, file, value)
        chosen = newest if is_whole(newest) else case / whole[0].name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert checkpoint.latest(case) == chosen
        outcomes = set()
        for path in (newest, chosen):
            forged = path == newest and any(
                not (path / file).is_file() or (path / file).read_bytes() != content[file] for file in FILES[1:]
            )
            try:
                parts, state = checkpoint.load(path)
            except InputError as error:
                assert path != chosen or forged
                outcomes.add(refused(error))
                continue
            assert path == chosen and isinstance(state, dict)
            outcomes.add("forged" if forged else "whole")
            if not forged:
                assert state == STATE and torch.equal(parts["encoder"]["w"], PARTS["encoder"]["w"])
        return " or ".join(sorted(outcomes))

    return holds


@cases(100, 5_000)
def test_a_checkpoint_is_whole_or_refused(count, tmp_path):
    hunt(count, st.lists(damages(), min_size=BATCH, max_size=BATCH), checkpoint_is_right(tmp_path))


# ── Lists of data sets ──────────────────────────────────────────────────────────────────────────────────────────────

PLACES = [
    "../x.jpg",
    "/etc/passwd",
    "a/../../x",
    "out/x.jpg",
    "loop/x.jpg",
    "in/../../../x",
    "x" * 300,
    "a\0b",
    "~/x",
    ".",
    "",
    " ",
]
PLACES += [
    "é猫.jpg",
    "a\u2028b",
    "a\tb",
    "\x1b[2J",
    "C:\\x",
    "%2e%2e/x",
    "here/x.jpg",
    "a//b",
    "./a",
    "\u202e",
    "{0}",
    "'",
    "\x0b1",
]
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "4",
    "5",
    "99999999999999999999",
    "9" * 5000,
    "1.0",
    "\u0661",
    "1e3",
    "nan",
    "+1",
    "1_0",
    "²",
]
LISTS = {
    "cub": (cub.load_cub, ("images.txt", "image_class_labels.txt", "classes.txt")),
    "aircraft": (aircraft.load_aircraft, tuple(f"data/images_variant_{part}.txt" for part in ("train", "val", "test"))),
    "cars, whole": (cars.load_cars, ("cars_annos.mat",)),
}
Change = tuple[str, int, int, Any]


@st.composite
def edits(draw) -> tuple[str, list[Change]]:
    """A released layout, and what is done to its lists: (file, line or entry, where in it, put what)."""
    layout = draw(st.sampled_from(list(LISTS)))
    done = []
    for _ in range(draw(st.integers(0, 4))):
        put = draw(st.sampled_from([*PLACES, *NUMBERS]) | st.text(max_size=4) | st.none() | st.binary(max_size=4))
        if layout == "cars, whole" and draw(st.booleans()):
            put = draw(
                st.integers(-1, 5) | st.floats() | st.lists(st.integers(0, 3), max_size=2) | st.complex_numbers()
            )
        done.append((draw(st.sampled_from(LISTS[layout][1])), draw(st.integers(0, 13)), draw(st.integers(0, 3)), put))
    return layout, done


def edit_lines(path: Path, line: int, where: int, put: Any) -> None:
    lines = path.read_bytes().split(b"\n")
    line %= len(lines)
    put = put if isinstance(put, bytes) else str(put or "").encode("utf-8", "surrogatepass")
    words = lines[line].split(b" ")
    words[where % len(words)] = put
    lines[line : line + 1] = {0: [b" ".join(words)], 1: [lines[line], b" ".join(words)], 2: [], 3: [lines[line] + put]}[
        where
    ]
    path.write_bytes(b"\n".join(lines))


def edit_mat(path: Path, entry: int, where: int, put: Any) -> None:
    if isinstance(put, bytes):  # in the file itself
        content = bytearray(path.read_bytes())
        at = entry * len(content) // 14 + where
        content[at : at + len(put)] = put
        path.write_bytes(content)
        return
    try:
        held = {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
        annotations = held["annotations"]
        field = ("relative_im_path", "class", "test", "relative_im_path")[where]
        annotations[0, entry % annotations.shape[1]][field] = np.zeros(0) if put is None else put
        if entry == 13:
            held.pop(("annotations", "class_names", "other", "annotations")[where], None)
        if entry == 12:
            held["class_names"] = held["class_names"][:, :where]
        savemat(path, held)
    except Exception:  # what an earlier edit of its bytes made unreadable here is read, or refused, by ours
        return


def lists_are_right(folder: Path) -> Callable[[tuple[str, list[Change]]], str]:
    roots = {layout: released.RELEASES[layout][1](folder / layout) for layout in LISTS}
    for root in roots.values():
        for images in (root / "images", root / "data" / "images", root):
            if images.is_dir():
                (images / "out").symlink_to("/etc")
                (images / "loop").symlink_to("loop")
                (images / "here").symlink_to(".")
    originals = {(layout, file): (roots[layout] / file).read_bytes() for layout in LISTS for file in LISTS[layout][1]}

    def holds(case: tuple[str, list[Change]]) -> str:
        layout, done = case
        root, (load, files) = roots[layout], LISTS[layout]
        for file in files:
            (root / file).write_bytes(originals[layout, file])
        for file, line, where, put in done:
            (edit_mat if file.endswith(".mat") else edit_lines)(root / file, line, where, put)
        try:
            halves = load(root)
        except InputError as error:
            assert layout in str(error)
            return refused(error)
        seen = []
        for half in halves:
            assert half.classes and len(half.paths) == len(half.labels)
            assert set(half.labels) == set(range(len(half.classes))) and min(Counter(half.labels).values()) >= 2
            seen += [os.path.realpath(path) for path in half.paths]
        assert len(set(seen)) == len(seen) and all(path.startswith(f"{os.path.realpath(root)}/") for path in seen)
        return "read"

    return holds


@cases(100, 5_000)
def test_lists_name_images_within_their_root_or_are_refused(count, tmp_path):
    hunt(count, st.lists(edits(), min_size=BATCH, max_size=BATCH), lists_are_right(tmp_path))


# ── Run folders ─────────────────────────────────────────────────────────────────────────────────────────────────────

ODD = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]
ODD += ["", "x", "mean", "\ud800", "\x1b[2J", "<script>", "a" * 3000, [], {}, [[]], [0] * 50, {"a": {}}, "../../x", "0"]
JSON_FILES = ("config.json", "final.json", "gallery/gallery.json", "samples/step-000000.json")
LINE_FILES = ("metrics.jsonl", "telemetry.jsonl")
STATE_FILES = ("checkpoint/step-000001/state.json", "checkpoint/step-000001/manifest.json")
CONFIG = PRESETS["drawn-birds"]


@st.composite
def run_damages(draw) -> list[tuple[str, str, int, int, Any]]:
    """What is done to a run's files: (kind, file, where, how, value). Numbers pick a place whatever the file holds."""
    some = st.integers(0, 2**16)
    files = st.sampled_from(JSON_FILES + LINE_FILES + STATE_FILES)
    kinds = st.sampled_from(
        ["put", "put", "put", "put", "drop key", "rename key", "swap", "flip", "cut", "bytes", "gone"]
    )
    one = st.tuples(kinds, files, some, some, st.sampled_from(ODD))
    return draw(st.lists(one, min_size=1, max_size=3))


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree of JSON."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places(value[key])]


def run_is_right(folder: Path, monkeypatch) -> Callable[[list], str]:
    """The run is resumed and shown as it was left, or one line says what is wrong with it."""
    whole = make_run(folder / "whole")
    monkeypatch.setattr(run_module, "Tracker", lambda *_: None)
    prompt = dataclasses.asdict(PROMPTS["drawn-birds"])
    begun = make_resumable(whole)
    described = json.loads((whole / "config.json").read_text())
    described |= {"run": "1", "prompt": prompt, "supervisor_sha256": "abc", "config": CONFIG.to_dict()}
    (whole / "config.json").write_text(json.dumps(described))
    begun.id, begun.step, begun.before = "1", 1, {"recall_at_1": 0.25}
    assert begun.save()
    content = {name: (whole / name).read_bytes() for name in JSON_FILES + LINE_FILES + STATE_FILES}
    case = shutil.copytree(whole, folder / "case")

    def damage(kind: str, name: str, where: int, how: int, value: Any) -> None:
        path = case / name
        if kind == "gone":
            path.unlink(missing_ok=True)
        if not path.is_file():
            return
        held = path.read_bytes()
        if kind in ("flip", "cut", "bytes"):
            at = where % max(1, len(held))
            put = {"flip": bytes([how % 256]), "cut": b"", "bytes": repr(value).encode(errors="replace")}[kind]
            path.write_bytes(held[:at] + put + (b"" if kind == "cut" else held[at + (kind == "flip") :]))
            return
        lines = held.decode(errors="replace").split("\n") if name in LINE_FILES else [held.decode(errors="replace")]
        try:
            tree = json.loads(lines[how % len(lines)])
        except (ValueError, RecursionError):
            return
        if found := places(tree):
            container, key = found[where % len(found)]
            if kind == "put":
                container[key] = value
            elif kind == "swap":
                other, its = found[how % len(found)]
                container[key], other[its] = copy.deepcopy(other[its]), copy.deepcopy(container[key])
            elif isinstance(container, dict):
                moved = container.pop(key)
                if kind == "rename key":
                    container[f"{key}s"] = moved
        with contextlib.suppress(ValueError):  # more digits than Python prints
            lines[how % len(lines)] = json.dumps(tree)
        path.write_text("\n".join(lines))
        if name == STATE_FILES[0]:  # as if its writer had meant it
            manifest = json.loads(content[STATE_FILES[1]])
            manifest["sha256"]["state.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
            (case / STATE_FILES[1]).write_text(json.dumps(manifest))

    def resumed() -> None:
        config = stored(case)
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert stored_prompt(case / "config.json").attributes
        config_before = json.loads((case / "config.json").read_text())["config"]
        again = make_resumable(case, config)
        again.restore("abc")
        assert again.step == 1 or "state" in damaged
        assert stored(case) == config and (config_before == config.to_dict() or "config" in damaged)

    damaged = ""

    def holds(done: list) -> str:
        nonlocal damaged
        damaged = " ".join(name for _, name, *_ in done)
        (case / "report.html").unlink(missing_ok=True)
        for name, original in content.items():
            (case / name).write_bytes(original)
        for one in done:
            damage(*one)
        outcomes = []
        for what, call in (("resume", resumed), ("report", lambda: write_report(case))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    call()
                    outcomes.append(what)
                except InputError as error:
                    refused(error)
        if "report" in outcomes:
            page = (case / "report.html").read_text(encoding="utf-8")
            assert page.rstrip().endswith("</html>") and page.count("<script") == 1
        assert ("report" in outcomes) == (case / "report.html").exists() and not list(case.glob(".*"))
        return " and ".join(outcomes) or "refused"

    return holds


def make_resumable(out: Path, config: Config | None = None) -> run_module.Run:
    """A run in `out` whose encoder is a matrix."""
    encoder, dml = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *dml.parameters()])
    encoder(torch.ones(2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    sampler = ClassBalancedSampler([0, 0, 1, 1], 2, 2)
    return run_module.Run(out, config or CONFIG, run_module.State(encoder, dml, optimizer, schedule, sampler), 1)


@cases(100, 5_000)
def test_a_run_folder_is_resumed_and_shown_or_refused(count, tmp_path, monkeypatch):
    hunt(count, st.lists(run_damages(), min_size=BATCH, max_size=BATCH), run_is_right(tmp_path, monkeypatch))


# ── Lists of one's own ──────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [(f"{name}/{i}.jpg", name, half) for name, half in (("a", "train"), ("b", "test"), ("c", "val")) for i in (1, 2)]
ROWS += [("x, y.jpg", "a", "train"), ("é猫.jpg", "b", "TEST"), ("../out.jpg", "7", "train"), ("/z.jpg", "7", "train")]
CELLS = [
    *('"', '""', ",", ";", "\t", "\n", "\r", "\r\n", " ", "\0", "\ufeff", "\u2028", "\x1c", "'", "\\", "\\,", "=1+1"),
    *("path", "label", "split", "train", "test", "val", "trian", "NaN", "null", "1", "1.0", "true", "x" * 140_000),
    *("a/1.jpg", "./a/1.jpg", "a/../a/1.jpg", "..", "~", "/", "a//b", "{", "}", "[", "]", "[" * 3000, "9" * 5000),
    *('"path": ', '"path": "a/1.jpg", ', '"label": ["a"]', '"split": null', '{"path": "q"}\n', "{0}"),
    *("\\ud800", "\\u0000", "\udcff"),
]


@st.composite
def splits(draw) -> list[tuple[str, bytes]]:
    """(suffix, content) of lists grown from good ones, in any of the encodings that are read, and in others."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    rows = chance.sample(ROWS, len(ROWS) - chance.choice([0, 0, 0, 1, 5]))
    if draw(st.booleans()):
        suffix, separator = chance.choice([(".csv", ","), (".csv", ";"), (".tsv", "\t")])
        order = chance.sample(range(3), 3)
        quoted = [[f'"{cell}"' if set(cell) & set(",;\t ") else cell for cell in row] for row in rows]
        table = [["path", "label", "split"], *quoted]
        text = chance.choice(["\n", "\r\n"]).join(separator.join(row[i] for i in order) for row in table)
    else:
        suffix = ".jsonl"
        text = "\n".join(json.dumps(dict(zip(split.COLUMNS, row)), ensure_ascii=chance.random() < 0.5) for row in rows)
    encodings = [("utf-8", "surrogateescape")] * 20
    encodings += [(name, "replace") for name in ("utf-8-sig", "utf-16", "latin-1", "utf-16-be")]
    return [(suffix, content.encode(*chance.choice(encodings))) for content in grown(draw, text, CELLS)]


def listed(suffix: str, text: str) -> list[dict[str, Any]]:
    """The rows by the json module, or by the grammar of CSV as RFC 4180 has it, spaces before a value left out."""
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    separator = max(",;\t", key=text.lstrip("\r\n").partition("\n")[0].count)
    value = re.compile(
        rf' *(?:"((?:[^"]|"")*)"|((?:[^"{separator}\r\n][^{separator}\r\n]*)?))({separator}|\r\n|\r|\n|\Z)'
    )
    rows: list[list[str]] = [[]]
    at = 0
    while at < len(text):
        quoted, plain, end = (found := value.match(text, at)).groups()
        rows[-1].append(plain if quoted is None else quoted.replace('""', '"'))
        at = found.end()
        if end != separator:
            rows.append([])
        elif at == len(text):
            rows[-1].append("")
    header, *rows = [row for row in rows if any(cell.strip() for cell in row)]
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip((name.strip().casefold() for name in header), row)) for row in rows]


def splits_are_right(folder: Path) -> Callable[[tuple[str, bytes]], str]:
    halves_of = {"train": "train", "training": "train", "test": "test", "testing": "test"}
    halves_of |= dict.fromkeys(("val", "valid", "validation"), "val")

    def holds(case: tuple[str, bytes]) -> str:
        suffix, content = case
        (path := folder / f"my{suffix}").write_bytes(content)
        try:
            halves = split.load_list(path)
        except InputError as error:
            assert str(path) in str(error)
            return refused(error)
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        found = [
            (r["path"], str(r["label"]).strip(), halves_of[r["split"].strip().casefold()]) for r in listed(suffix, text)
        ]
        test = "test" if any(half == "test" for *_, half in found) else "val"
        for half, data in zip(("train", test), halves):
            rows = [(os.fspath(image), data.classes[label]) for image, label in zip(data.paths, data.labels)]
            assert rows == [(os.fspath(folder / image), label) for image, label, its in found if its == half]
            assert data.classes == sorted(set(data.classes)) and min(Counter(data.labels).values()) >= 2
        images = [os.path.realpath(folder / image) for image, *_ in found]
        assert len(set(images)) == len(images)
        return f"read {suffix}"

    return holds


@cases(200, 6_000)
def test_a_list_of_ones_own_is_read_as_it_stands_or_refused(count, tmp_path):
    hunt(count, splits(), splits_are_right(tmp_path))


# ── EXIF ────────────────────────────────────────────────────────────────────────────────────────────────────────────

UPRIGHT = [lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1], lambda a: a.swapaxes(0, 1)]
UPRIGHT += [lambda a: np.rot90(a, -1), lambda a: a.swapaxes(0, 1)[::-1, ::-1], lambda a: np.rot90(a)]
TAGS = [0x10E, 0x10F, 0x11A, 0x11A, 0x11B, 0x128, 0x128, 0x131, 0x132, 0x13B, 0x213, 0x8769, 0x8825, 0xA005, 0x927C]
TAGS += [0x9286]
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
EDGES = [b"\0", b"\xff", b"6\0", b"\x80"]
EDGES += [struct.pack("<d", np.nan), struct.pack("<f", np.inf), struct.pack("<ii", -1, 0)]
Block = tuple[str, bytes, int | None]


@st.composite
def exif_blocks(draw) -> list[Block]:
    """(suffix, EXIF, its orientation) of blocks of odd tags; None where damage may have changed the orientation too."""
    chance, blocks = random.Random(draw(st.integers(0, 2**32))), []
    for _ in range(BATCH):
        order = chance.choice("<>")
        orientation = chance.randint(1, 8)
        entries = [(0x112, 3, 1, struct.pack(f"{order}H", orientation))]
        for _ in range(chance.randint(0, 5)):
            kind = chance.choice([*SIZES, 0, 99, 65535])
            value = b"".join(chance.choice([*EDGES, chance.randbytes(8)]) for _ in range(chance.randint(0, 4)))
            count = len(value) // SIZES.get(kind, 1)
            count = chance.choice([count] * 6 + [0, 1, 2**31, 2**32 - 1])
            entries.append((chance.choice([*TAGS, chance.randrange(0x113, 2**16)]), kind, count, value))
        rows, data, start = b"", b"", 14 + 12 * len(entries)
        for tag, kind, count, value in sorted(entries):
            held = value[:4].ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", start + len(data))
            rows += struct.pack(f"{order}HHI", tag, kind, count) + held
            data += value if len(value) > 4 else b""
        head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
        block: Any = head + rows + struct.pack(f"{order}I", chance.choice([0, 0, 8, 2**32 - 1])) + data
        known: int | None = orientation
        if chance.random() < 0.4:
            block, known = bytearray(block), None
            for _ in range(chance.randint(1, 4)):
                match chance.randrange(3):
                    case 0 if block:
                        block[chance.randrange(len(block))] = chance.choice([0, 1, 3, 8, 127, 255])
                    case 1:
                        del block[chance.randint(0, len(block)) :]
                    case _:
                        at = chance.randint(0, len(block))
                        block[at:at] = chance.choice(EDGES)
        blocks.append((chance.choice(["jpg", "png", "webp"]), bytes(block), known))
    return blocks


def exif_is_right(folder: Path) -> Callable[[Block], str]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    picture = picture.resize((24, 18), Image.Resampling.NEAREST)
    settings = {"jpg": {"quality": 100, "subsampling": 0}, "png": {}, "webp": {"lossless": True, "method": 0}}
    plain = {}
    for suffix in settings:
        picture.save(folder / f"plain.{suffix}", **settings[suffix])
        plain[suffix] = np.asarray(Image.open(folder / f"plain.{suffix}").convert("RGB"))

    def holds(case: Block) -> str:
        suffix, exif, orientation = case
        picture.save(path := folder / f"a.{suffix}", exif=b"Exif\0\0" + exif, **settings[suffix])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = np.asarray(open_rgb(path))
            assert np.array_equal(as_rgb(open_rgb(path)), found)
            image = None
            with warnings.catch_warnings(), contextlib.suppress(UnidentifiedImageError):
                warnings.simplefilter("ignore")  # Pillow's own, of what it opens, or refuses, without us
                image = Image.open(path)
            assert image is None or np.array_equal(as_rgb(image), found)
        turned = [number for number, turn in enumerate(UPRIGHT, 1) if np.array_equal(turn(plain[suffix]), found)]
        assert turned == [orientation] if orientation else len(turned) == 1
        return f"{'turned' if orientation else 'damaged'} {suffix}{'' if image else ', refused by Pillow'}"

    return holds


@cases(200, 6_000)
def test_exif_turns_a_picture_or_is_passed_over_but_never_refuses_it(count, tmp_path):
    hunt(count, exif_blocks(), exif_is_right(tmp_path))
