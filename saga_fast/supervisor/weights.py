"""Checks of a model's weights by the headers of their files: every weight of the configuration is there, in its shape,
and there are no others. Reading headers takes a second; reading the weights takes minutes.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from saga_fast.utils.releases import SAFE_LOADING, Release, quiet

_PACKING = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$")


def expect_keys(release: Release, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device, by the headers of its files alone. Raises InputError for weights that are missing,
    of another shape, or unknown to the model, which transformers would ignore."""
    config = copy.deepcopy(config)
    packed = hasattr(config, "quantization_config")
    if packed:  # the headers of packed weights do not give their shapes
        del config.quantization_config
    with release.errors_as("has weights that do not load ({}); restore its files"), quiet(progress=False):
        # A pair, because of `output_loading_info`, which the type stubs lack.
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            release.name,
            config=config,
            dtype=dtype,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **SAFE_LOADING,
        )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    unknown = sorted(key for key in found["unexpected_keys"] if not (packed and _PACKING.search(key)))
    mismatched = sorted((key, tuple(actual), tuple(expected)) for key, actual, expected in found["mismatched_keys"])
    release.expect_no_adapter(unknown)
    if missing:
        some = f"{len(missing)} of its weights are in no file, the first is {missing[0]}"
        raise release.error(f"is not whole ({some}); restore it")
    if unknown:
        some = ", ".join(unknown[:3])
        raise release.error(
            f"holds {len(unknown)} weights that a {config.model_type!r} has no place for, such as {some}; "
            "it is another model than its config.json says: restore it, or take those weights out"
        )
    if mismatched and not packed:
        key, actual, expected = mismatched[0]
        raise release.error(f"is not whole ({key} is {actual}, its configuration says {expected}); restore the file")
    return model


def expect_shapes(release: Release, model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """For packed weights, whose shapes are in no header: when it quantises, transformers accepts weights of any
    shape."""
    expected = {key: tuple(parameter.shape) for key, parameter in skeleton.named_parameters()}
    for key, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "quant_state", parameter).shape)
        if shape != expected[key]:
            raise release.error(f"is not whole ({key} is {shape}, its configuration says {expected[key]})")
