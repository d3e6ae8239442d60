"""The frozen language model of an MLLM, run by our ops over packed tokens.

`FrozenDecoder` holds the weights of a loaded transformers model (NF4 where bitsandbytes quantised them) and knows one
thing: how to carry packed hidden states (tokens, D) through the layers. Which token may attend to which is the
caller's: a prefill, a decode step and a replay differ only in the `attend` they pass. Its oracle is transformers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from saga_fast.errors import InputError
from saga_kernels import NF4Weight, add_rms_norm, nf4_matmul, rms_norm, rope, swiglu

# At import it warns that an optional package for its own CPU forward is missing; our ops do not use that forward.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# attend(layer, q (tokens, heads, head_dim), k, v (tokens, kv_heads, head_dim)) -> o like q
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Mllm(NamedTuple):
    """A loaded multimodal model, taken apart: the tower to be trained, the language model that stays frozen."""

    visual: Qwen3VLVisionModel
    decoder: FrozenDecoder
    tokenizer: object
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Projection:
    """A frozen linear map: weight (out, in), NF4 or dense; bias (out,) or None."""

    weight: NF4Weight | Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear) -> Projection:
        weight = linear.weight
        frozen = NF4Weight.from_bitsandbytes(weight) if hasattr(weight, "quant_state") else weight.detach()
        return cls(frozen, None if linear.bias is None else linear.bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, Tensor):
            return F.linear(x, self.weight, self.bias)
        y = nf4_matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's frozen weights. `q_norm` and `k_norm` (head_dim,) are None in models without them."""

    input_norm: Tensor
    q: Projection
    k: Projection
    v: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    mlp_norm: Tensor
    gate: Projection
    up: Projection
    down: Projection

    @classmethod
    def of(cls, layer: nn.Module) -> DecoderLayer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = [
            norm.weight.detach() if (norm := getattr(attention, name, None)) else None for name in ("q_norm", "k_norm")
        ]
        return cls(
            layer.input_layernorm.weight.detach(),
            *(Projection.of(getattr(attention, f"{name}_proj")) for name in "qkv"),
            *head_norm,
            Projection.of(attention.o_proj),
            layer.post_attention_layernorm.weight.detach(),
            *(Projection.of(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")),
        )


class FrozenDecoder:
    """Embedding, decoder layers, final norm and head of a language model. No weight of it ever gets a gradient.

    embedding, head: (V, D). Hidden states are (tokens, D): sequences lie packed end to end, without padding.
    """

    def __init__(self, language_model: nn.Module, head: nn.Linear) -> None:
        config = language_model.config
        self.embedding = language_model.embed_tokens.weight.detach()
        self.layers = [DecoderLayer.of(layer) for layer in language_model.layers]
        self.norm = language_model.norm.weight.detach()
        self.head = head.weight.detach()
        self.rotary = language_model.rotary_emb
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    @property
    def depth(self) -> int:
        return len(self.layers)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(tokens,) int64 → (tokens, D). Visual positions hold pads here; the caller overwrites them."""
        return F.embedding(input_ids, self.embedding)

    def forward(
        self,
        h: Tensor,
        positions: Tensor,
        attend: Attend,
        deepstack: Sequence[Tensor] = (),
        visual: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Hidden states h (tokens, D) at rotary `positions` (3, tokens) → final normed hidden states (tokens, D).

        deepstack: per level a tensor (visual tokens, D), added after layers 0, 1, … at the rows `visual` (int64).
        recompute: keep only each layer's input for the backward pass, and run the layer again there.
        """
        rotation = self.rotate(positions, h.dtype)
        for i, layer in enumerate(self.layers):
            if recompute and torch.is_grad_enabled():
                h = checkpoint(self._layer, i, layer, h, rotation, attend, use_reentrant=False)
            else:
                h = self._layer(i, layer, h, rotation, attend)
            if i < len(deepstack):
                h = h.index_add(0, visual, deepstack[i])
        return rms_norm(h, self.norm, self.eps)

    def rotate(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (tokens, head_dim) of M-RoPE positions (3, tokens)."""
        cos, sin = self.rotary(self.embedding.new_empty(0, dtype=dtype), positions[:, None])
        return cos[0], sin[0]

    def _layer(self, i: int, layer: DecoderLayer, h: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = rms_norm(h, layer.input_norm, self.eps)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (layer.q, layer.k, layer.v))
        q, k = rope(q, *rotation, layer.q_norm, self.eps), rope(k, *rotation, layer.k_norm, self.eps)
        h, x = add_rms_norm(h, layer.o(attend(i, q, k, v).flatten(-2)), layer.mlp_norm, self.eps)
        return h + layer.down(swiglu(layer.gate(x), layer.up(x)))

    def fingerprint(self) -> str:
        """SHA-256 over every byte of the frozen weights: equal before and after a run, or the run was not SAGA."""
        digest = hashlib.sha256()
        for tensor in self._tensors():
            digest.update(tensor.flatten().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def _tensors(self) -> Iterator[Tensor]:
        def tensors(value: object) -> Iterator[Tensor]:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Projection | NF4Weight | DecoderLayer):
                for field in vars(value).values():
                    yield from tensors(field)

        for value in (self.embedding, *self.layers, self.norm, self.head):
            yield from tensors(value)


def load_mllm(name: str | Path, quantize: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Mllm:
    """Load a Qwen3-VL from a folder or the hub and take it apart.

    quantize: the language model's linear layers in NF4 with nested absmax (bitsandbytes); embedding, head and tower
    stay in `dtype`. Raises InputError for a missing folder, one that holds no model, or a model of another kind.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"supervisor.model: {name} is no model ({_first_line(error)}); give a folder or hub id"
        ) from None
    if config.model_type != "qwen3_vl":
        raise InputError(f"supervisor.model: {name} is a {config.model_type!r}; a multimodal 'qwen3_vl' is needed")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    try:
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            name, dtype=dtype, device_map=device, quantization_config=quantization if quantize else None
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"supervisor.model: {name} is not whole ({_first_line(error)}); restore the file") from None
    generation: GenerationConfig = model.generation_config
    eos = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    decoder = FrozenDecoder(model.model.language_model, model.lm_head)
    return Mllm(model.model.visual, decoder, tokenizer, tuple(eos) if isinstance(eos, list) else (eos,))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
