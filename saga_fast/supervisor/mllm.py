"""Loading a multimodal model, and taking it apart: the tower to be trained, the language model that stays frozen.

A model is a folder or a hub id, of one of `families`. What cannot be run is told from the configuration, before any
weight is read.

A model's folder may come from anywhere, and loading it runs nothing of it: weights are safetensors, never pickles, and
code that it brings is refused. No flag trusts it: `FrozenDecoder` runs the layers, so such code could not be obeyed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from saga_fast.supervisor.decoder import FrozenDecoder, activation
from saga_fast.supervisor.families import FAMILIES, KINDS, Family, ImageText
from saga_fast.supervisor.gates import GATES
from saga_fast.towers import TOWERS
from saga_fast.utils.errors import InputError, first_line
from saga_kernels import NF4Weight, nf4_dequantize
from saga_kernels.nf4 import BLOCK

LAYERS = ("full_attention", "sliding_attention")
ROTARY = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the sequence's length


class Mllm(NamedTuple):
    """visual: the vision model with its projector, see `tower_of`. image_token: stands for one visual token in the
    prompt. image_text, newline, whole_images: see `Family`, of which newline (D,) is the vector itself."""

    visual: PreTrainedModel
    decoder: FrozenDecoder
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    image_token: str
    image_text: ImageText = ImageText()
    newline: Tensor | None = None
    whole_images: bool = False


def load_mllm(
    name: str | Path,
    quantize: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantize_head: bool = False,
) -> Mllm:
    """Load a model and take it apart. Weights come shard by shard, and each is quantised before the next is read.

    quantize: the language model's linear layers in NF4 with nested absmax (bitsandbytes); norms, tower, embedding and
    head stay in `dtype`. quantize_head: embedding and head in NF4 too. A checkpoint in NF4 stays as it is.
    Raises InputError for a model that is missing, gated, not whole, or of a kind this engine cannot run.
    """
    config = configuration(name)
    for reason in chain(objections(config), pickles(name)):
        raise InputError(f"supervisor.model: {name} {reason}")
    family = KINDS[config.model_type]
    if quantize_head and config.text_config.hidden_size % BLOCK:
        raise InputError(
            f"supervisor.quantize-head: hidden states of {name} are {config.text_config.hidden_size} wide; "
            f"it needs a multiple of {BLOCK}: leave it out"
        )
    try:
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config)
        settings = {"dtype": dtype, "device_map": device, "trust_remote_code": False, "use_safetensors": True}
        if quantize and not hasattr(config, "quantization_config"):
            parts = [name for name, _ in skeleton.model.named_children()]
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=[
                    *(f"model.{part}" for part in parts if part != family.language_model),
                    "lm_head",
                ],
            )
        model, loaded = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **settings)
        if missing := sorted(loaded["missing_keys"]):
            raise OSError(f"{len(missing)} of its weights are in no file, the first is {missing[0]}")
        _expect_shapes(model, skeleton)
        tokenizer = load_tokenizer(name)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "file named model.safetensors" in str(error):
            raise InputError(f"supervisor.model: {name} has no weights in safetensors files; {_SAFETENSORS}") from None
        raise InputError(f"supervisor.model: {name} is not whole ({first_line(error)}); restore the file") from None
    eos = model.generation_config.eos_token_id
    eos = eos if eos is not None else tokenizer.eos_token_id
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    return take_apart(model, pixel_statistics(name), tokenizer, eos, quantize_head)


def take_apart(
    model: PreTrainedModel,
    statistics: dict[str, list[float]],
    tokenizer: Any,
    eos_token_ids: tuple[int, ...],
    quantize_head: bool = False,
) -> Mllm:
    """The parts of a model of one of `families`, which is of no use afterwards. On the meta device too."""
    family = KINDS[model.config.model_type]
    decoder = FrozenDecoder(getattr(model.model, family.language_model), model.lm_head, quantize_head)
    newline = getattr(model.model, family.newline).detach() if family.newline else None
    return Mllm(
        _visual(model, family, statistics),
        decoder,
        tokenizer,
        eos_token_ids,
        tokenizer.convert_ids_to_tokens(model.config.image_token_id),
        family.image_text(tokenizer),
        newline,
        family.whole_images,
    )


def load_tokenizer(name: str | Path) -> Any:
    """With the chat template of the release, wherever that keeps it. Raises OSError or ValueError without one."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.chat_template = tokenizer.chat_template or _chat_template(name)
    return tokenizer


def configuration(name: str | Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        # Where transformers knows the type it passes over the folder's code: not the model that its author meant.
        if getattr(config, "auto_map", None) or "AutoTokenizer" in get_tokenizer_config(name).get("auto_map", {}):
            raise ValueError("trust_remote_code")
        return config
    except (OSError, ValueError, ImportError) as error:
        if "gated" in str(error):
            mend = "is gated; accept its terms on its page, then log in with `hf auth login`"
        elif "trust_remote_code" in str(error):
            mend = _OWN_CODE
        elif isinstance(error, ImportError):
            mend = f"needs a package that is not here ({first_line(error)}); {_TIMM}"
        else:
            mend = f"is no model ({first_line(error)}); give a folder or hub id"
        raise InputError(f"supervisor.model: {name} {mend}") from None


_OWN_CODE = (
    "brings code of its own, which is not run; "
    "take the release that transformers reads (of InternVL the one whose name ends in -HF)"
)
_TIMM = "towers that transformers takes from timm are not read: give a model whose tower is transformers' own"
_SAFETENSORS = (
    "pickles (pytorch_model.bin) run what they hold and are not read: take a release in safetensors, "
    "or convert it by transformers' save_pretrained if you trust it"
)


def pickles(name: str | Path) -> Iterator[str]:
    """Weight files that the index of a sharded checkpoint names, if they are not safetensors."""
    if index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False):
        try:
            files = set(json.loads(Path(index).read_text())["weight_map"].values())
            bad = sorted(file for file in files if not file.endswith(".safetensors"))
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"is not whole ({SAFE_WEIGHTS_INDEX_NAME} is malformed); restore the file"
        else:
            if bad:
                yield f"names {bad[0]!r} among its weights; {_SAFETENSORS}"


def objections(config: PretrainedConfig) -> Iterator[str]:
    """Why this model would not be run as it was trained, if it would not; of what it is first, then of its details."""
    kind = config.model_type
    text = getattr(config, "text_config", None)
    if text is None or not (hasattr(config, "image_token_id") or hasattr(config, "video_token_id")):
        names = ", ".join(family.name for family in FAMILIES)
        yield f"is a {kind!r}, which reads no images; a vision-language model is needed, of {names}"
        return
    if getattr(config, "image_token_id", None) is None:
        yield f"is a {kind!r}, which reads videos only; a model that reads images is needed"
    if experts := getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        yield f"is a {kind!r} with {experts} experts a layer; a dense model is needed, such as Qwen3-VL 2B, 4B or 8B"
    layers = set(getattr(text, "layer_types", None) or ()) - set(LAYERS)
    if layers:
        yield f"is a {kind!r} whose layers are of {', '.join(sorted(layers))} too; accepted are {', '.join(LAYERS)}"
    family = KINDS.get(kind)
    decoders = family.decoders if family else sorted({name for known in FAMILIES for name in known.decoders})
    if text.model_type not in decoders:
        yield f"is a {kind!r} whose language model is a {text.model_type!r}; accepted are {', '.join(decoders)}"
    for rotary in _rotary(text):
        if rotary not in ROTARY:
            yield f"scales its rotary positions by {rotary!r}; accepted are {', '.join(ROTARY)}"
    if (gate := activation(text)) not in GATES:
        yield f"has {gate!r} for its activation; accepted are {', '.join(GATES)}"
    if getattr(getattr(config, "vision_config", None), "model_type", None) == "timm_wrapper":
        yield f"has {getattr(config.vision_config, 'architecture', 'a model')!r} of timm for its tower; {_TIMM}"
    if family is None:
        yield f"is a {kind!r}; accepted are {', '.join(KINDS)}"
    else:
        yield from family.objections(config)
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored and not (stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"):
        yield (
            f"is quantised already, by {stored.get('quant_method')!r}; "
            "of quantised checkpoints those of bitsandbytes in NF4 are read: take one, or the unquantised release"
        )


def _rotary(text: PretrainedConfig) -> list[str]:
    """How rotary positions are scaled: once, or for each kind of layer."""
    said = text.rope_parameters
    nested = [value for value in said.values() if isinstance(value, dict)]
    return [parameters.get("rope_type", "default") for parameters in nested or [said]]


def _expect_shapes(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Raises OSError: while transformers quantises, it takes a weight of any shape."""
    expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "quant_state", parameter).shape)
        if shape != expected[name]:
            raise OSError(f"{name} is {shape}, its configuration says {expected[name]}")


def _visual(model: PreTrainedModel, family: Family, statistics: dict[str, list[float]]) -> PreTrainedModel:
    """The vision model with its projector, dense, and with a configuration that stands without the language model."""
    base = model.model
    if family.visual:
        visual = getattr(base, family.visual)
    else:
        visual, text = base, base.config.text_config
        for part in TOWERS[base.config.model_type].not_vision:
            delattr(visual, part)
        tokens = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        layers = {"num_hidden_layers": 0, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
        visual.config.text_config = type(text)(hidden_size=text.hidden_size, **tokens, **layers)
        visual.config.__dict__.pop("quantization_config", None)
    visual.config.update(statistics)
    for name, module in list(visual.named_modules()):
        if hasattr(getattr(module, "weight", None), "quant_state"):  # a checkpoint whose tower is in NF4 too
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = nn.Parameter(nf4_dequantize(NF4Weight.from_bitsandbytes(module.weight)))
            dense.bias = module.bias
            visual.set_submodule(name, dense)
    return visual


def pixel_statistics(name: str | Path) -> dict[str, list[float]]:
    """`image_mean` and `image_std`, where the model's image processor says them."""
    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    return {key: said[key] for key in ("image_mean", "image_std") if key in said}


def _chat_template(name: str | Path) -> str | None:
    """The template of releases that kept it beside the tokenizer."""
    file = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text())["chat_template"] if file else None
