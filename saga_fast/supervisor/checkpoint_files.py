"""Reads the small files beside a model's weights, before the weights.

A malformed file raises InputError with its name, and never counts as missing. A folder may come from anywhere: no code
of it is run but its chat template, in transformers' sandbox.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    cached_file,
)

from saga_fast.utils.errors import InputError, first_line
from saga_fast.utils.files import read_regular

MAX_BYTES = 2**26
BYTE = 1 / 255  # the default rescale_factor of image processors

UNMERGED_ADAPTER = (
    "an adapter that is not merged, without which the model would be its base: merge it first "
    "(peft's merge_and_unload, then save_pretrained of model and tokenizer), and name that folder"
)


def model_error(name: str | Path, what: str) -> InputError:
    return InputError(f"supervisor.model: {name} {what}")


def malformed_file(name: str | Path, file: str, what: str) -> InputError:
    return model_error(name, f"has a malformed {file} ({what}); restore the file")


@contextmanager
def reraising(name: str | Path, message: str) -> Iterator[None]:
    """Around another library's work on a model's files: raises InputError with `message`, whose {} becomes the cause,
    for any of its exceptions. InputError and torch.OutOfMemoryError pass."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind, as anything may be in those files
        raise model_error(name, message.format(f"{type(error).__name__}: {first_line(error)}")) from error


def find_file(name: str | Path, file: str) -> str | None:
    """The local path of `file` of the model `name`, a folder or a hub id; None where the model has none."""
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise model_error(name, f"gives no {file} ({first_line(error)})") from error


def read_json(name: str | Path, file: str) -> dict[str, Any] | None:
    """The JSON object in `file`, None where the model has none. Raises InputError for anything else."""
    if (path := find_file(name, file)) is None:
        return None
    try:
        values = json.loads(read_regular(path, MAX_BYTES))
    except OSError as error:
        raise model_error(name, f"has a {file} that cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise malformed_file(name, file, first_line(error)) from error
    if not isinstance(values, dict):
        raise malformed_file(name, file, f"it holds a {type(values).__name__}, not an object")
    return values


def expect_no_adapter(name: str | Path) -> None:
    """Raises InputError for an adapter: without peft, transformers ignores it and runs the base model alone."""
    if find_file(name, ADAPTER_CONFIG_NAME):
        raise model_error(name, f"holds {UNMERGED_ADAPTER} ({ADAPTER_CONFIG_NAME} is there)")


def pixel_statistics(name: str | Path) -> dict[str, list[float]]:
    """`image_mean` and `image_std` of channels in 0..1, as far as the model's image processor holds them.

    A processor that does not rescale by 1/255, or does not normalise, is converted to equivalent statistics.
    """
    file = PROCESSOR_NAME
    settings = (read_json(name, file) or {}).get("image_processor")
    if settings is None:
        file = IMAGE_PROCESSOR_NAME
        settings = read_json(name, file) or {}
    if not isinstance(settings, dict):
        raise malformed_file(name, file, f"image_processor is a {type(settings).__name__}")

    def numbers(key: str, least: float) -> list[float] | None:
        if (value := settings.get(key)) is None:
            return None
        values = value if isinstance(value, list) else [value] * 3
        if len(values) != 3 or not all(_number(x) and x > least for x in values):
            raise malformed_file(name, file, f"{key} is {value!r}; accepted are three finite numbers above {least}")
        return [float(x) for x in values]

    def flag(key: str) -> bool:
        if not isinstance(value := settings.get(key), bool | None):
            raise malformed_file(name, file, f"{key} is {value!r}; accepted are true and false")
        return value is not False

    mean, std = numbers("image_mean", -math.inf), numbers("image_std", 0)
    rescale = numbers("rescale_factor", 0)
    unit = 255 * (rescale[0] if rescale else BYTE) if flag("do_rescale") else 255.0
    if not flag("do_normalize"):
        mean, std = [0.0] * 3, [1.0] * 3
    if abs(unit - 1) > 1e-3:
        if mean is None or std is None:
            raise model_error(
                name,
                f"rescales channels by {unit / 255:g} in its {file}, which lacks image_mean or image_std: add them",
            )
        mean, std = [x / unit for x in mean], [x / unit for x in std]
    return {key: values for key, values in (("image_mean", mean), ("image_std", std)) if values is not None}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def chat_template(name: str | Path, tokenizer) -> str | None:
    """The processor's chat template, which supports images, else the tokenizer's; of named templates `default`."""
    file = PROCESSOR_NAME
    template = (read_json(name, file) or {}).get("chat_template")
    if template is None and (legacy := read_json(name, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)) is not None:
        file = LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE
        if (template := legacy.get("chat_template")) is None:
            raise malformed_file(name, file, "it holds no chat_template")
    if template is None:
        file, template = "chat template", tokenizer.chat_template
    if isinstance(template, list) and all(
        isinstance(one, dict) and {"name", "template"} <= one.keys() for one in template
    ):
        template = {str(one["name"]): one["template"] for one in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise model_error(
                name,
                f"has chat templates named {', '.join(sorted(map(str, template)))} and none named default: "
                "rename the one for images, or put it into chat_template.jinja",
            )
        template = template["default"]
    if not isinstance(template, str | None):
        raise malformed_file(name, file, f"chat_template is a {type(template).__name__}, not text")
    return template


def end_tokens(name: str | Path, config: PretrainedConfig, tokenizer) -> tuple[int, ...]:
    """The model's EOS token ids: of generation_config.json, else config.json, and of the tokenizer; perhaps none.

    The caller adds the chat template's own end of a turn.
    """
    vocabulary, found = config.text_config.vocab_size, []
    file = GENERATION_CONFIG_NAME
    eos = (read_json(name, file) or {}).get("eos_token_id")
    if eos is None:  # of config.json itself, not the default of its class, which is another model's
        file, raw = "config.json", read_json(name, "config.json") or {}
        eos = raw.get("eos_token_id")
        eos = (raw.get("text_config") or {}).get("eos_token_id") if eos is None else eos
    for token in eos if isinstance(eos, list) else [eos] * (eos is not None):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise malformed_file(
                name, file, f"eos_token_id is {eos!r}; accepted are token ids from 0 to {vocabulary - 1}"
            )
        found.append(token)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < vocabulary:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))
