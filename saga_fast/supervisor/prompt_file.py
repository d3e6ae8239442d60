"""A run's prompt: a built-in one by its name, the user's own from a TOML file, or a stored run's from its config.json.

    role = "mycologist"
    item = "mushroom"
    verdict_key = "same_species"
    attributes = ["cap color", "cap shape", "gill spacing"]

The file is read once, when a run begins: the run's config.json holds the prompt itself, and a resumed run uses that.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

from saga_fast.supervisor.prompt import PROMPTS, Prompt
from saga_fast.utils.errors import InputError
from saga_fast.utils.files import read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 2**16
_FIELDS = {"role": str, "item": str, "verdict_key": str, "attributes": list}


def load_prompt(name: str) -> Prompt:
    """The built-in prompt `name`, or that of the file `name`, which ends in .toml. Whitespace in it is normalised.

    Raises InputError, naming file and field, for anything else.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    if not name.endswith(".toml"):
        raise InputError(
            f"supervisor.prompt: {name!r} is unknown; use one of {', '.join(PROMPTS)}, or a file that ends in .toml"
        )
    place = f"supervisor.prompt: {name!r}"
    try:
        values = tomllib.loads(read_regular(name, MAX_BYTES).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (OSError, ValueError, RecursionError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{place}: cannot be read ({cause}); accepted is a TOML file of {', '.join(_FIELDS)}"
        ) from None
    return _prompt(values, place)


def stored_prompt(config_file: Path) -> Prompt:
    """The prompt in a run's config.json. Raises InputError if that holds none."""
    try:
        values = json.loads(config_file.read_bytes())["prompt"]
        return Prompt(**{**values, "attributes": tuple(values["attributes"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cause = str(error) if isinstance(error, InputError) else "missing or malformed"
        raise InputError(f"{str(config_file)!r}: prompt: {cause}; restore the file, or start a new run") from None


def _kinds(value: Any) -> str:
    """Describes a value by its type, not itself: a number may have more digits than Python prints."""
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(inner).__name__ for inner in value}))}"
    return f"of type {type(value).__name__}"


def _prompt(values: dict[str, Any], place: str) -> Prompt:
    for field in values:
        if field not in _FIELDS:
            close = difflib.get_close_matches(field, _FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"accepted are {', '.join(_FIELDS)}"
            raise InputError(f"{place}: {field!r} is an unknown field; {hint}")
    for field, kind in _FIELDS.items():
        if field not in values:
            raise InputError(f"{place}: {field} is missing; a prompt has {', '.join(_FIELDS)}")
        given = values[field]
        if not isinstance(given, kind) or (kind is list and not all(isinstance(name, str) for name in given)):
            wanted = "a list of strings" if kind is list else "a string"
            raise InputError(f"{place}: {field} is {_kinds(given)}; accepted is {wanted}")
    role, item, verdict_key = (" ".join(values[field].split()) for field in ("role", "item", "verdict_key"))
    if not values["attributes"]:
        raise InputError(
            f"{place}: attributes: empty; a prompt needs at least one (--supervisor.generic asks for none)"
        )
    try:
        return Prompt(role, item, verdict_key, tuple(" ".join(name.split()) for name in values["attributes"]))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
