"""Checks of a model's weights by the headers of their files: every weight of the configuration is there, in its shape,
and there are no others. Reading headers takes a second; reading the weights takes minutes.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from saga_fast.supervisor.checkpoint_files import (
    UNMERGED_ADAPTER,
    find_file,
    malformed_file,
    model_error,
    read_json,
    reraising,
)
from saga_fast.utils.errors import first_line

SAFE_LOADING = {"trust_remote_code": False, "use_safetensors": True}
_SAFETENSORS = (
    "pickles (pytorch_model.bin) run what they hold and are not read: take a release in safetensors, "
    "or convert it by transformers' save_pretrained if you trust it"
)
_PACKING = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_l|oft_\w+|vera_lambda_\w+|hada_w\w+)(\.|$)")


def expect_safetensors(name: str | Path) -> None:
    """Raises InputError where the index of a sharded checkpoint names files that are not safetensors."""
    if bad := sorted(file for file in _shards(name) or () if not file.endswith(".safetensors")):
        raise model_error(name, f"names {bad[0]!r} among its weights; {_SAFETENSORS}")


def expect_weights(name: str | Path) -> None:
    """Raises InputError for a file of weights that is missing, or not as long as its header says."""
    shards = _shards(name)
    for file in shards or (SAFE_WEIGHTS_NAME,):
        if (path := find_file(name, file)) is None:
            if shards:
                raise model_error(name, f"is not whole ({SAFE_WEIGHTS_INDEX_NAME} names {file}, which is missing)")
            raise model_error(name, f"has no weights in safetensors files; {_SAFETENSORS}")
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise model_error(name, f"is not whole ({file}: {first_line(error)}); restore the file") from error


def _shards(name: str | Path) -> list[str] | None:
    """The files in a sharded checkpoint's index; None where there is no index."""
    if (index := read_json(name, SAFE_WEIGHTS_INDEX_NAME)) is None:
        return None
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise malformed_file(name, SAFE_WEIGHTS_INDEX_NAME, "its weight_map does not name a file for each weight")
    if out := sorted(file for file in files.values() if Path(file).is_absolute() or ".." in Path(file).parts):
        raise malformed_file(name, SAFE_WEIGHTS_INDEX_NAME, f"{out[0]!r} lies outside of the model")
    return sorted(set(files.values()))


def expect_keys(name: str | Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, by the headers of its files alone. Raises InputError for weights that are missing,
    of another shape, or unknown to the model, which transformers would ignore."""
    config = copy.deepcopy(config)
    packed = hasattr(config, "quantization_config")
    if packed:  # the headers of packed weights do not hold their shapes
        del config.quantization_config
    with reraising(name, "is not whole ({}); restore the file"), quiet(progress=False):
        model, found = AutoModelForImageTextToText.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **SAFE_LOADING,
        )
    missing = sorted(found["missing_keys"])
    unknown = sorted(key for key in found["unexpected_keys"] if not (packed and _PACKING.search(key)))
    mismatched = sorted((key, tuple(actual), tuple(expected)) for key, actual, expected in found["mismatched_keys"])
    if adapter := next((key for key in unknown if _ADAPTER.search(key)), None):
        raise model_error(name, f"holds {UNMERGED_ADAPTER} (its weights have {adapter})")
    if missing:
        raise model_error(
            name, f"is not whole ({len(missing)} of its weights are in no file, the first is {missing[0]}); restore it"
        )
    if unknown:
        some = ", ".join(unknown[:3])
        raise model_error(
            name,
            f"holds {len(unknown)} weights that a {config.model_type!r} has no place for, such as {some}; "
            "it is another model than its config.json says: restore it, or take those weights out",
        )
    if mismatched and not packed:
        key, actual, expected = mismatched[0]
        raise model_error(
            name, f"is not whole ({key} is {actual}, its configuration says {expected}); restore the file"
        )
    return model


def expect_shapes(name: str | Path, model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Raises InputError for packed weights of another shape: headers do not hold theirs, and transformers, while it
    quantises, accepts any shape."""
    expected = {key: tuple(parameter.shape) for key, parameter in skeleton.named_parameters()}
    for key, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "quant_state", parameter).shape)
        if shape != expected[key]:
            raise model_error(name, f"is not whole ({key} is {shape}, its configuration says {expected[key]})")


@contextmanager
def quiet(progress: bool = True) -> Iterator[None]:
    """Within it transformers logs nothing, as errors here are one line; without `progress` there is no progress bar."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
