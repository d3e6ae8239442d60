"""Random small models of each family, saved to disk as a release is: weights, tokenizer, template, processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from saga_fast.towers.timm import import_timm

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTERN_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GEMMA_TEMPLATE = (
    "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ONEVISION_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n")
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TEXT = dict(
    vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.15,
)  # fmt: skip


def tokenizer(special: list[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges. named: special tokens that the tokenizer knows by an attribute."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([*special, *named.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=special[0], extra_special_tokens=named or special, chat_template=template
    )


def qwen_vl(
    kind: type[PretrainedConfig], model: type[PreTrainedModel], text: dict, tower: dict
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    tokens = tokenizer(
        ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"], QWEN_TEMPLATE
    )
    start, image, end = tokens.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    config = kind(
        text_config=dict(**TEXT, rope_parameters=rope, **text),
        vision_config=dict(
            depth=4, num_heads=2, patch_size=4, spatial_merge_size=2, initializer_range=0.15, **tower
        ),
        image_token_id=image, vision_start_token_id=start, vision_end_token_id=end, video_token_id=287,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )  # fmt: skip
    return model(config), tokens, {}


def qwen3_vl(**text) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    tower = dict(
        hidden_size=32, intermediate_size=64, out_hidden_size=64, num_position_embeddings=36,
        deepstack_visual_indexes=[0, 1, 2],
    )  # fmt: skip
    return qwen_vl(Qwen3VLConfig, Qwen3VLForConditionalGeneration, dict(head_dim=16, **text), tower)


def qwen2_5_vl(**text) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    tower = dict(
        hidden_size=32, intermediate_size=64, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1, 3]
    )  # fmt: skip
    return qwen_vl(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, text, tower)


def qwen2_vl() -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    return qwen_vl(Qwen2VLConfig, Qwen2VLForConditionalGeneration, {}, dict(embed_dim=32, mlp_ratio=2, hidden_size=64))


def internvl(text: PretrainedConfig | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    """text: by default Qwen3's, as in InternVL3.5."""
    tokens = tokenizer(
        ["<|im_end|>", "<|im_start|>"], INTERN_TEMPLATE,
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
    )  # fmt: skip
    config = InternVLConfig(
        text_config=text or Qwen3Config(**TEXT, head_dim=16),
        vision_config=InternVLVisionConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=4, attention_bias=True, layer_scale_init_value=1.0, initializer_range=0.15,
        ),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return InternVLForConditionalGeneration(config), tokens, statistics


def llava_llama() -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    tokens = tokenizer(["</s>", "<image>"], LLAVA_TEMPLATE)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16,
            patch_size=4, initializer_factor=3.0,
        ),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), tokens, {}


def llava_qwen(text: PretrainedConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    tokens = tokenizer(["<|im_end|>", "<image>"], LLAVA_TEMPLATE)
    config = LlavaConfig(
        text_config=text,
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        ),
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), tokens, {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}


def fast_vlm(text: PretrainedConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    """timm's smallest EfficientNet, of whose strides the last two are dilations: 4 x 4 tokens at 32 pixels."""
    import_timm()
    tokens = tokenizer(["<|im_end|>", "<|im_start|>", "<image>"], ONEVISION_TEMPLATE)
    tower = dict(
        model_type="timm_wrapper", architecture="test_efficientnet", hidden_size=256, do_pooling=False,
        model_args={"output_stride": 8},
    )  # fmt: skip
    config = FastVlmConfig(
        text_config=text, vision_config=tower, image_token_index=tokens.convert_tokens_to_ids("<image>")
    )
    return FastVlmForConditionalGeneration(config), tokens, {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def llava_onevision(**text) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    tokens = tokenizer(["<|im_end|>", "<|im_start|>", "<image>", "<video>"], ONEVISION_TEMPLATE)
    image, video = tokens.convert_tokens_to_ids(["<image>", "<video>"])
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT, **text),
        vision_config=SiglipVisionConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=4, vision_use_head=False,
        ),
        image_token_index=image, video_token_index=video, image_grid_pinpoints=[[32, 32], [64, 32]],
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), tokens, {}


def idefics3(smol: bool, **text) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    """As released the tokenizer of SmolVLM names its marks by attributes, that of Idefics3 does not."""
    marks = dict(
        fake_image_token="<fake_token_around_image>", global_image_token="<global-img>", image_token="<image>",
        end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    if smol:
        tokens = tokenizer(["<end_of_utterance>", "<|im_start|>"], IDEFICS_TEMPLATE, **marks)
    else:
        tokens = tokenizer(["<end_of_utterance>", "<|im_start|>", *marks.values()], IDEFICS_TEMPLATE)
    kind, model = (
        (SmolVLMConfig, SmolVLMForConditionalGeneration) if smol else (Idefics3Config, Idefics3ForConditionalGeneration)
    )
    config = kind(
        text_config=LlamaConfig(**TEXT, **text),
        vision_config=dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=48,
            patch_size=4, initializer_range=0.15,
        ),
        scale_factor=2, image_token_id=tokens.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )  # fmt: skip
    return model(config), tokens, {}


def gemma3(**text) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, dict]:
    """Windowed layers and whole ones, with rotary bases of their own; scores that are not scaled by head_dim."""
    tokens = tokenizer(
        ["<end_of_turn>", "<start_of_turn>", "<bos>"], GEMMA_TEMPLATE,
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
    )  # fmt: skip
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = Gemma3Config(
        text_config=dict(
            **TEXT, head_dim=16, query_pre_attn_scalar=24, sliding_window=1024, rope_parameters=rope,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"], **text,
        ),
        vision_config=dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=4, vision_use_head=False,
        ),
        mm_tokens_per_image=16, image_token_index=tokens.convert_tokens_to_ids("<image_soft_token>"),
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config), tokens, {}


FAMILIES: dict[str, Callable] = {
    "qwen3-vl": qwen3_vl,
    "qwen3-vl-tied": lambda: qwen3_vl(tie_word_embeddings=True),
    "qwen2.5-vl": qwen2_5_vl,
    "qwen2.5-vl-tied": lambda: qwen2_5_vl(tie_word_embeddings=True),
    "qwen2-vl": qwen2_vl,
    "internvl": internvl,
    "internvl-qwen2": lambda: internvl(Qwen2Config(**TEXT)),
    "llava-llama": llava_llama,
    "llava-qwen2-tied": lambda: llava_qwen(Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "llava-qwen3": lambda: llava_qwen(Qwen3Config(**TEXT, head_dim=16)),
    "llava-mistral": lambda: llava_qwen(MistralConfig(**TEXT, sliding_window=None)),
    "llava-onevision": llava_onevision,
    "llava-onevision-tied": lambda: llava_onevision(tie_word_embeddings=True),
    "fastvlm-llama": lambda: fast_vlm(LlamaConfig(**TEXT)),
    "fastvlm-tied": lambda: fast_vlm(Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "smolvlm-tied": lambda: idefics3(True, tie_word_embeddings=True),
    "idefics3": lambda: idefics3(False),
    "gemma3": lambda: gemma3(tie_word_embeddings=False),
    "gemma3-tied": gemma3,
}


def save(family: str, folder: Path, **save_settings) -> Path:
    """The family's random model in `folder`. Norms and biases are drawn too: ones and zeros would hide their loss."""
    torch.manual_seed(1)
    model, tokens, statistics = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.2)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "projection" in name:
            parameter.data.normal_(std=0.2)
        elif any(part in name for part in ("cls_token", "class_embedding", "position", "newline")):
            parameter.data.normal_(std=0.5)
        elif parameter.ndim == 4 and "timm_model" in name:
            parameter.data.normal_(std=(2 / parameter[0].numel()) ** 0.5)
        elif "bn" in name:
            parameter.data.uniform_(0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    model.get_output_embeddings().weight.data[model.config.image_token_id] = 0  # a model does not write it
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, **save_settings)
    tokens.save_pretrained(folder)
    if statistics:
        (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder
