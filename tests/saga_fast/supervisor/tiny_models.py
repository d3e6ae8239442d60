"""Random small models for oracle tests: transformers' own Qwen3-VL, in float64, and their adapters to our engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

from saga_fast.encoder import VisualFeatures
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.pair import PairPrefix
from saga_fast.supervisor.prompt import Prefix

GRID = (2, 3)
TOKENS = GRID[0] * GRID[1]
IMAGE, START, END, EOS = 7, 8, 9, 5


def float64_transformers(patch: pytest.MonkeyPatch) -> None:
    """transformers rounds to float32 inside its norm and its softmax; a float64 oracle must not."""

    def rms_norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        key, value = (qwen.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    patch.setattr(qwen.Qwen3VLTextRMSNorm, "forward", rms_norm)
    patch.setattr(qwen, "eager_attention_forward", attention)


def random_model(dtype: torch.dtype = torch.float64, layers: int = 4, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=6,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.15,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        ),
        vision_config=dict(
            depth=4, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, spatial_merge_size=2,
            out_hidden_size=48, num_position_embeddings=36, deepstack_visual_indexes=[0, 1, 2], initializer_range=0.15,
        ),
        image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = Qwen3VLForConditionalGeneration(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):  # ones would hide a norm's weight that is never applied
            parameter.data.uniform_(0.5, 1.5)
    return model.requires_grad_(False)


def decoder_of(model: Qwen3VLForConditionalGeneration) -> FrozenDecoder:
    return FrozenDecoder(model.model.language_model, model.lm_head)


def pair_prefix() -> PairPrefix:
    ids = [1, START, *[IMAGE] * TOKENS, END, 2, 3, START, *[IMAGE] * TOKENS, END, 11, 12, 13, 14]
    first, second = 2, 2 + TOKENS + 4
    return PairPrefix.of(Prefix(ids, ((first, first + TOKENS), (second, second + TOKENS))), GRID)


def random_features(images: int, levels: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1) -> VisualFeatures:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(images, TOKENS, 48, generator=generator, dtype=dtype) * 0.5 for _ in range(1 + levels)]
    return VisualFeatures(draw[0], tuple(draw[1:]))


def as_leaves(features: VisualFeatures) -> VisualFeatures:
    """A copy that requires gradients."""
    tokens, *deepstack = (level.detach().clone().requires_grad_() for level in (features.tokens, *features.deepstack))
    return VisualFeatures(tokens, tuple(deepstack))


def nf4(*skipped: str) -> BitsAndBytesConfig:
    """What transformers quantises the weights of our tests' oracles by, but for the modules `skipped`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(skipped),
    )


@contextmanager
def tower_gives(features: VisualFeatures, model: PreTrainedModel) -> Iterator[None]:
    """Inside, `features`, with their gradients, are what transformers' model makes of any pixels.

    Its tower's last part is replaced. What comes after that differs between versions of transformers, and 5.17 has no
    `mm_encoder_outputs`.
    """
    tokens, *deepstack = (level.flatten(0, 1) for level in features.levels)
    parts = {
        "visual": qwen.BaseModelOutputWithDeepstackFeatures(pooler_output=tokens, deepstack_features=deepstack),
        "multi_modal_projector": features.tokens,
        "connector": features.tokens,
    }
    (name,) = parts.keys() & dict(model.model.named_children()).keys()
    with patch.object(getattr(model.model, name), "forward", lambda *_, **__: parts[name]):
        yield


@contextmanager
def oracle_inputs(
    model: PreTrainedModel, prefix: PairPrefix, features: VisualFeatures, completion: list[int]
) -> Iterator[dict]:
    """What transformers wants, inside, for one pair (features of its two images) and one completion."""
    ids = torch.cat([prefix.input_ids, torch.tensor(completion, dtype=torch.int64)])[None]
    with tower_gives(features, model):
        yield dict(
            input_ids=ids,
            mm_token_type_ids=(ids == IMAGE).int(),
            image_grid_thw=torch.tensor([[1, 2 * GRID[0], 2 * GRID[1]]] * 2),
            pixel_values=torch.empty(0),
        )
