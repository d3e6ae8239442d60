"""Parses a command line or a JSON file into (nested) dataclasses, with ranges of numbers.

A dataclass defines its flags: `Annotated[int, Range(1)]` is type and range, the field's docstring the help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

from saga_fast.utils.errors import InputError

Arguments = TypeVar("Arguments")


@dataclass(frozen=True)
class Range:
    """The accepted range of a field's number: `low` to `high`, both included; with `above`, `low` excluded.

    why: the reason, for the message, where it is not obvious.
    """

    low: float
    high: float = math.inf
    above: bool = False
    why: str = ""

    def fault(self, value: float) -> str | None:
        """The message for `value`, None if it is accepted. Infinity and nan never are."""
        if self.low <= value <= self.high and value != math.inf and not (self.above and value == self.low):
            return None
        accepted = f"more than {self.low}" if self.above else f"{self.low} or more"
        if self.high < math.inf and (value > self.high or self.high < 10):
            accepted = f"more than {self.low}, up to {self.high}" if self.above else f"{self.low} to {self.high}"
        elif isinstance(value, float) and not math.isfinite(value):
            accepted = f"a finite number, {accepted}"
        return f"{value}; {self.why + ': ' if self.why else ''}give {accepted}"


COUNT, WEIGHT = Range(1, 2**31 - 1), Range(0)
SEED, WORKERS = Range(0, 2**63 - 1), Range(0, 1024)


class Field(NamedTuple):
    """A leaf of nested dataclasses. name: dotted, as in its flag; metadata: the annotations of its type."""

    name: str
    hint: Any
    metadata: tuple[Any, ...]
    value: Any


def fields_of(config: Any, prefix: str = "") -> Iterator[Field]:
    """The leaves of nested dataclasses, in order."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for part in dataclasses.fields(config):
        name, value = prefix + _flag_name(part.name), getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{name}.")
        else:
            yield Field(name, *_unwrap_annotated(hints[part.name]), value)


def _flag_name(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _unwrap_annotated(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(type, annotations) of a type hint."""
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raises InputError, naming the field, for the first number of nested dataclasses that is not in its Range; of a
    tuple, each of its numbers counts."""
    for field in fields_of(config):
        values = field.value if isinstance(field.value, tuple) else (field.value,)
        for accepted in field.metadata:
            for value in values if isinstance(accepted, Range) else ():
                if value is not None and (fault := accepted.fault(value)):
                    raise InputError(f"{prefix}{field.name}: {fault}")


def from_dict(kind: type[Arguments], values: Any, prefix: str = "") -> Arguments:
    """The nested dataclass `kind` from JSON values; a missing field has its default.

    Raises InputError, naming the field, for one that is unknown or of the wrong type.
    """
    if not isinstance(values, dict):
        raise InputError(f"{prefix.rstrip('.') or 'config'}: a {type(values).__name__}, where fields are expected")
    declared = typing.get_type_hints(kind, include_extras=True)
    hints = {name.rstrip("_"): (name, *_unwrap_annotated(hint)) for name, hint in declared.items()}
    given = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {close[0]}?" if close else "another version may have written it"
            raise InputError(f"{prefix}{key}: unknown field; {hint}")
        name, hint, _ = hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            given[name] = from_dict(hint, value, f"{prefix}{key}.")
        else:
            given[name] = _typed(hint, value, f"{prefix}{_flag_name(key)}")
    return kind(**given)


def _typed(hint: Any, value: Any, name: str) -> Any:
    """A JSON value as type `hint`. Raises InputError if it has another type."""
    accepted = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for one in accepted:
        if typing.get_origin(one) is Literal:
            if value in typing.get_args(one):
                return value
        elif one is Path and isinstance(value, str):
            return Path(value)
        elif one is float and type(value) is int and abs(value) < 2**53:
            return float(value)
        elif type(value) is one:
            return value
    names = {type(None): "null", Path: "path", bool: "true or false"}
    wanted = " or ".join(names.get(one) or str(getattr(one, "__name__", one)) for one in accepted)
    raise InputError(f"{name}: {json.dumps(value)[:80]} is no {wanted.replace('typing.', '')}")


def parse_flags(default: Arguments, arguments: Sequence[str], program: str, description: str) -> Arguments:
    """`default`, with the values of the flags in `arguments`. Raises InputError, in one line, for what tyro rejects."""
    _expect_values(default, arguments)
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            parsed, unknown = tyro.cli(
                type(default),
                default=default,
                args=list(arguments),
                return_unknown_args=True,
                prog=program,
                description=description,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws the frame of its message in one of two ways, by the terminal's encoding.
        frame = re.compile(r"[─-╿]|^ *-+ *$", re.MULTILINE)
        words = " ".join(frame.sub(" ", re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())).split())
        words = re.sub(r"^.*?Error parsing (\w*Arguments: )?| Argument helptext:.*| For full helptext.*", "", words)
        raise InputError(_plain(words)) from None
    if unknown:
        word, flags = unknown[0], [f"--{field.name}" for field in fields_of(default)]
        close = difflib.get_close_matches(word.split("=")[0], flags, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
        raise InputError(f"{word}: {'unknown flag' if word.startswith('-') else 'belongs to no flag'}; {hint}")
    check_ranges(parsed, "--")
    return parsed


def _plain(words: str) -> str:
    """tyro's message about a value that is no number, in the words of the other messages."""
    either = r"no type matching \{None\}\|(?:INT|FLOAT) could be .*? - <class '(int|float)'>: "
    words = re.sub(either, "", words)
    words = re.sub(r"invalid literal for int\(\) with base 10: ('.*')$", r"\1; give a whole number", words)
    return re.sub(r"could not convert string to float: ('.*')$", r"\1; give a number", words)


def _expect_values(default: Any, arguments: Sequence[str]) -> None:
    """Raises InputError for a switch with a value, which tyro would take for a separate word, naming both forms of the
    switch; and for an empty path or text, as from an unset shell variable, which would mean the working directory or
    the default."""
    switches: dict[str, tuple[str, str]] = {}
    texts: set[str] = set()
    for field in fields_of(default):
        if field.hint is bool:
            section, dot, name = field.name.rpartition(".")
            forms = f"--{field.name}", f"--{section}{dot}no-{name}"
            switches |= dict.fromkeys(forms, forms)
        elif {Path, str} & {field.hint, *typing.get_args(field.hint)}:
            texts.add(f"--{field.name}")
    for word, after in zip(arguments, [*arguments[1:], None]):
        flag, equals, given = word.partition("=")
        value = given if equals else after
        name = flag.replace("_", "-")
        if name in switches and (equals or str(value).lower() in ("true", "false")):
            yes, no = switches[name]
            raise InputError(f"{flag} {value}: a switch takes no value; pass {yes} for yes, {no} for no")
        if name in texts and value == "":
            raise InputError(f"{flag}: empty; give a value, or leave the flag out")
