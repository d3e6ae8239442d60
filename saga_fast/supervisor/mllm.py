"""Loading a multimodal model, and taking it apart: the tower to be trained, the language model that stays frozen.

A model is a folder or a hub id, of one of `families`. A model that cannot be run is refused by its configuration,
before any weight is read.

A model's folder may come from anywhere, and loading it runs no code of it: weights are safetensors, never pickles, and
models with code of their own are refused. No flag changes that: `FrozenDecoder` runs the layers, and would not use it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from saga_fast.supervisor import checkpoint_files as files
from saga_fast.supervisor.decoder import FrozenDecoder, activation
from saga_fast.supervisor.families import FAMILIES, KINDS, PLAIN, Family, ImageText
from saga_fast.supervisor.gates import GATES
from saga_fast.supervisor.prompt import end_of_turn
from saga_fast.supervisor.weights import expect_keys, expect_shapes
from saga_fast.towers import timm, tower_class, tower_of
from saga_fast.utils.devices import expect_device
from saga_fast.utils.errors import InputError, first_line
from saga_fast.utils.releases import OWN_CODE, SAFE_LOADING, Release, quiet
from saga_kernels import NF4Weight, nf4_dequantize
from saga_kernels.nf4 import BLOCK

FLAG = "supervisor.model"
LAYERS = ("full_attention", "sliding_attention")
TIMM = "timm_wrapper"  # the model type of towers that transformers takes from timm
DEPTH = 512  # more layers than any model has: the configuration's model is built before its weights are checked
# Kinds whose frequencies do not depend on the sequence's length, the last two up to `_max_positions`.
ROTARY = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


class Mllm(NamedTuple):
    """visual: the vision model with its projector, see `tower_of`. eos_token_ids: all that end a turn, perhaps none.
    image_token: stands for one visual token in the prompt. image_text, newline, bidirectional_images: see `Family`;
    newline is the vector itself, (D,). max_positions: rotary positions that a run may use, None without a limit."""

    visual: PreTrainedModel
    decoder: FrozenDecoder
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    image_token: str
    image_text: ImageText = PLAIN
    newline: Tensor | None = None
    bidirectional_images: bool = False
    max_positions: int | None = None


class Pretrained(NamedTuple):
    """What can be known of a model before its weights are read. statistics: of pixels, see `pixel_statistics`.
    mllm: its parts on the meta device, where weights have shapes and no values."""

    name: str | Path
    config: PretrainedConfig
    statistics: dict[str, list[float]]
    mllm: Mllm


def read_pretrained(name: str | Path, dtype: torch.dtype = torch.float32) -> Pretrained:
    """All of a model but its weights, which on the meta device are dense, in `dtype`. Raises InputError for one that is
    missing, gated, not whole, or of a kind that this engine cannot run, and for a file of it that is malformed."""
    release = Release(name, FLAG)
    release.expect_files()
    config = _configuration(release)
    release.expect_no_adapter()
    built = "has a config.json of which no model can be built ({})"
    with release.telling(built):
        if reasons := list(_objections(config)):
            raise release.refused("; it ".join(reasons))
        max_positions = _max_positions(config.text_config)
        _normalise_flags(release, config)
    release.expect_safetensors()
    family = KINDS[config.model_type]
    statistics = release.pixel_statistics()
    with release.telling("has a tokenizer that cannot be read ({}); restore its files"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.chat_template = files.chat_template(release, tokenizer)
    image_token = _image_token(release, config, tokenizer)
    image_text = family.image_text(*_marks(release, config.model_type, tokenizer, image_token))
    end_token_ids = files.end_tokens(release, config, tokenizer)
    if (end := end_of_turn(tokenizer)) is not None and end < config.text_config.vocab_size:
        end_token_ids = tuple(dict.fromkeys((*end_token_ids, end)))
    with release.telling(built):
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype)
        visual, decoder, newline = _split_model(skeleton, statistics)
        tower_of(visual).grid(0, 0)  # what its configuration says of pixels
    mllm = Mllm(
        visual,
        decoder,
        tokenizer,
        end_token_ids,
        image_token,
        image_text,
        newline,
        family.bidirectional_images,
        max_positions,
    )
    return Pretrained(name, config, statistics, mllm)


def load_mllm(
    model: str | Path | Pretrained,
    quantize: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantize_head: bool = False,
) -> Mllm:
    """Load a model and take it apart. Weights come shard by shard, and each is quantised before the next is read.

    quantize: the language model's linear layers in NF4 with nested absmax (bitsandbytes); norms, tower, embedding and
    head stay in `dtype`. quantize_head: embedding and head in NF4 too. A checkpoint in NF4 stays as it is.
    Raises InputError as `read_pretrained` does, and for weights that are not those the configuration asks for.
    """
    pretrained = model if isinstance(model, Pretrained) else read_pretrained(model)
    name, config, release = pretrained.name, pretrained.config, Release(pretrained.name, FLAG)
    language_model = KINDS[config.model_type].language_model
    if quantize_head:
        expect_head_in_blocks(pretrained)
    expect_device(device)
    release.expect_weights()
    skeleton = expect_keys(release, config, dtype)
    settings: dict[str, Any] = {"dtype": dtype, "device_map": device, **SAFE_LOADING}
    if quantize and not hasattr(config, "quantization_config"):
        parts = [part for part, _ in skeleton.model.named_children()]
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[*(f"model.{part}" for part in parts if part != language_model), "lm_head"],
        )
    with release.telling(f"could not be loaded on {device} ({{}})"), quiet():
        whole = AutoModelForImageTextToText.from_pretrained(name, config=config, **settings)
    expect_shapes(release, whole, skeleton)
    if pretrained.mllm.max_positions is not None:
        _fix_rotary(getattr(whole.model, language_model).rotary_emb)
    return pretrained.mllm._replace(**_split_model(whole, pretrained.statistics, quantize_head)._asdict())


def expect_head_in_blocks(known: Pretrained) -> None:
    """Raises InputError for a head that cannot be in NF4 row by row."""
    if (width := known.config.text_config.hidden_size) % BLOCK:
        raise InputError(
            f"supervisor.quantize-head: hidden states of {known.name} are {width} wide; "
            f"it needs a multiple of {BLOCK}: leave it out"
        )


def _configuration(release: Release) -> PretrainedConfig:
    accepted = "give a folder or hub id"
    release.expect_configuration(accepted)
    if _uses_timm(release):
        timm.import_timm(f"supervisor.model: {release.name}")
    try:
        config = AutoConfig.from_pretrained(release.name, trust_remote_code=False)
    except Exception as error:  # of any kind: a configuration's class computes with what it finds
        if "trust_remote_code" in str(error):
            reason = OWN_CODE
        elif isinstance(error, ImportError):
            reason = f"needs a package that is not here ({first_line(error)}); {_TIMM}"
        else:
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            reason = f"is no model ({kind}{first_line(error)}); {accepted}"
        raise release.refused(reason) from error
    # Where transformers knows the type it passes over the folder's code: not the model that its author meant.
    auto_map = (release.read_json("tokenizer_config.json") or {}).get("auto_map") or {}
    if getattr(config, "auto_map", None) or "AutoTokenizer" in auto_map:
        raise release.refused(OWN_CODE)
    return config


def _uses_timm(release: Release) -> bool:
    """Whether transformers will want timm for the tower. Where nothing can be read, transformers is to say so."""
    try:
        said = release.read_json("config.json") or {}
    except InputError:
        return False
    vision = said.get("vision_config")
    return said.get("model_type") == "fast_vlm" or (isinstance(vision, dict) and vision.get("model_type") == TIMM)


_TIMM = "of the models whose tower transformers takes from timm, FastVLM is accepted"


def _objections(config: PretrainedConfig) -> Iterator[str]:
    """Reasons why this model cannot be run as it was trained; none for one that can."""
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
        yield (
            f"is a {kind!r} whose layers are of {', '.join(sorted(layers))} too; accepted are {', '.join(LAYERS)}: "
            "take a model of these alone, such as Qwen3-VL"
        )
    if (family := KINDS.get(kind)) is None:
        yield f"is a {kind!r}; accepted are {', '.join(KINDS)}"
        return
    if text.model_type not in family.decoders:
        yield f"is a {kind!r} whose language model is a {text.model_type!r}; accepted are {', '.join(family.decoders)}"
    for rotary in sorted({section.get("rope_type", "default") for section in _rotary(text)} - set(ROTARY)):
        yield f"scales its rotary positions by {rotary!r}; accepted are {', '.join(ROTARY)}"
    for part in ("text_config", "vision_config"):
        section = getattr(config, part, None)
        if (count := getattr(section, "num_hidden_layers", None) or getattr(section, "depth", None) or 0) > DEPTH:
            yield f"has {count} layers in the {part} of its config.json; accepted are up to {DEPTH}"
    vision: Any = getattr(config, "vision_config", None)
    if (depth := getattr(vision, "num_hidden_layers", None)) is not None:
        layer = getattr(config, "vision_feature_layer", -1)
        for chosen in layer if isinstance(layer, list | tuple) else (layer,):
            if not -depth - 1 <= chosen <= depth:
                yield f"reads vision_feature_layer {chosen} of a tower that has {depth} layers; restore its config.json"
    if (gate := activation(text)) not in GATES:
        yield f"has {gate!r} for its activation; accepted are {', '.join(GATES)}"
    if (getattr(vision, "model_type", None) == TIMM) != (kind == "fast_vlm"):
        tower = getattr(vision, "architecture", None) or getattr(vision, "model_type", None)
        yield f"is a {kind!r} with {tower!r} for its tower, whose features it cannot read; {_TIMM}"
    elif kind == "fast_vlm":
        for fault in timm.faults(vision.architecture, vision.model_args):
            yield f"has a tower whose {fault}"
    yield from family.objections(config)
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored and not (stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"):
        yield (
            f"is quantised already, by {stored.get('quant_method')!r}; "
            "of quantised checkpoints those of bitsandbytes in NF4 are read: take one, or the unquantised release"
        )


def _rotary(text: PretrainedConfig) -> list[dict[str, Any]]:
    """The scaling parameters of rotary positions: one dict, or one for each kind of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _max_positions(text: PretrainedConfig) -> int | None:
    """The number of positions for which the rotary frequencies are constant; None without a limit."""
    limits = []
    for parameters in _rotary(text):
        match parameters.get("rope_type"):
            case "dynamic":
                limits.append(text.max_position_embeddings)
            case "longrope":
                limits.append(parameters["original_max_position_embeddings"])
    return min(limits, default=None)


def _fix_rotary(rotary: Any) -> None:
    """Turns off updates of the rotary frequencies, which are constant up to `_max_positions`."""
    kinds = rotary.rope_type
    rotary.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"


def _normalise_flags(release: Release, config: PretrainedConfig) -> None:
    """Reads flags that moved between versions of transformers from both places."""
    raw = release.read_json("config.json") or {}
    inner = raw.get("text_config") or {}
    flags = [place["tie_word_embeddings"] for place in (raw, inner) if place.get("tie_word_embeddings") is not None]
    if flags:  # tied weights that are both in the files, and differ, stay two all the same
        config.tie_word_embeddings = any(flags)
    if "image_token_index" in raw and "image_token_id" not in raw:
        config.image_token_id = raw["image_token_index"]


def _image_token(release: Release, config: PretrainedConfig, tokenizer: Any) -> str:
    """The token of `image_token_id`, which stands in the prompt and is embedded before an image takes its place."""
    number, vocabulary = config.image_token_id, config.text_config.vocab_size
    token = tokenizer.convert_ids_to_tokens(number) if 0 <= number < vocabulary else None
    if token is None or tokenizer.convert_tokens_to_ids(token) != number:
        raise release.refused(
            f"has image_token_id {number} in its config.json, which its embedding ({vocabulary} tokens) or its "
            "tokenizer does not know; restore config.json and the tokenizer's files"
        )
    return token


def _marks(release: Release, kind: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> list[str]:
    """The family's `marks`, by the tokenizer's names for them, else by the vocabulary."""
    known, family = tokenizer.get_vocab(), KINDS[kind]
    marks = [getattr(tokenizer, attribute, None) or usual for attribute, usual in family.marks]
    for (attribute, _), mark in zip(family.marks, marks):
        if mark not in known or mark == image_token:
            fault = "is its image token" if mark == image_token else "is not in its tokenizer's vocabulary"
            raise release.refused(
                f"puts {mark!r} beside an image, as a {kind!r} does, which {fault}; "
                f"restore the tokenizer's files, or name the token as {attribute} in tokenizer_config.json"
            )
    return marks


class _Parts(NamedTuple):
    visual: PreTrainedModel
    decoder: FrozenDecoder
    newline: Tensor | None


def _split_model(model: PreTrainedModel, statistics: dict[str, list[float]], quantize_head: bool = False) -> _Parts:
    """Vision model, decoder and newline of a model of one of `families`, which is unusable afterwards. Works on the
    meta device too."""
    family = KINDS[model.config.model_type]
    decoder = FrozenDecoder(getattr(model.model, family.language_model), model.lm_head, quantize_head)
    newline = getattr(model.model, family.newline).detach() if family.newline else None
    return _Parts(_visual(model, family, statistics), decoder, newline)


def _visual(model: PreTrainedModel, family: Family, statistics: dict[str, list[float]]) -> PreTrainedModel:
    """The vision model with its projector, dense, and with a configuration that stands without the language model."""
    base = model.model
    if family.visual:
        visual = getattr(base, family.visual)
    else:
        visual, text = base, base.config.text_config
        for part in tower_class(base.config.model_type).not_vision:
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
