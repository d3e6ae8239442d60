"""The frozen language model of an MLLM, run by our ops over packed tokens.

`FrozenDecoder` holds the weights of a loaded transformers model (NF4 where bitsandbytes quantised them) and runs packed
hidden states (tokens, D) through the layers. The caller decides which token attends to which: prefill and decode step
differ in the `attend` they pass. Tests compare it with transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from transformers import PretrainedConfig

from saga_fast.supervisor.gates import GATES
from saga_kernels import NF4Weight, add_rms_norm, linear, nf4_dequantize, nf4_matmul, rms_norm, rope
from saga_kernels.nf4 import BLOCK

# Model types of language models whose norms multiply by 1 + weight.
UNIT_OFFSET_NORMS = ("gemma3_text",)

# Up to this many rows NF4's fused product is faster than a dense one, on an H200 (bench/results/nvidia-h200/nf4.json:
# at 32 rows and not at 64); a CPU dequantises for each product.
FUSED_ROWS = {"cuda": 48, "cpu": 0}


class Norm(Protocol):
    weight: Tensor


class Attention(Protocol):
    """The interface of a transformers attention module; only some models have `q_norm` and `k_norm`."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    scaling: float


class Mlp(Protocol):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class Layer(Protocol):
    """The common interface of transformers decoder layers. Layers with four norms name those around the MLP
    differently."""

    self_attn: Attention
    mlp: Mlp
    input_layernorm: Norm
    post_attention_layernorm: Norm


class LanguageModel(Protocol):
    """The parts of a transformers decoder that `FrozenDecoder` reads."""

    config: PretrainedConfig
    embed_tokens: nn.Embedding
    layers: Iterable[Layer]
    norm: Norm
    rotary_emb: nn.Module


# attend(layer, q (tokens, heads, head_dim), k, v (tokens, kv_heads, head_dim)) -> o like q
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Projection:
    """A frozen linear map, or several of the same input whose outputs are concatenated.

    weights: one (out, in) matrix per map, NF4 or dense; a single matrix where they are concatenated: dense ones always,
    NF4 ones where `NF4Weight.concatenate` supports it. bias: (out,) of all maps, or None. resident: a dense copy of all
    maps, kept for products of many rows, or None.
    """

    weights: tuple[NF4Weight | Tensor, ...]
    bias: Tensor | None
    resident: Tensor | None = None

    @classmethod
    def of(cls, *linears: nn.Linear) -> Projection:
        weights = tuple(_frozen(linear.weight) for linear in linears)
        dense = [weight for weight in weights if isinstance(weight, Tensor)]
        packed = [weight for weight in weights if isinstance(weight, NF4Weight)]
        if len(dense) == len(linears) > 1:
            whole = torch.cat(dense)
            rows = whole.split([linear.out_features for linear in linears])
            for linear, row in zip(linears, rows):  # the model's weights become views: no weight is in memory twice
                linear.weight.data = row
            weights = (whole,)
        elif len(packed) == len(linears) > 1:
            weights = _concatenated([cast(Params4bit, linear.weight) for linear in linears], packed)
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        return cls(weights, torch.cat(biases).detach() if len(biases) == len(linears) else None)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the concatenation."""
        return sum(weight.shape[0] for weight in self.weights), self.weights[0].shape[1]

    @property
    def matrix(self) -> Tensor | None:
        """`weights` where they are one dense matrix, None where they are not."""
        first, *others = self.weights
        return first if isinstance(first, Tensor) and not others else None

    @property
    def is_dense(self) -> bool:
        """Whether `weights` is one dense matrix."""
        return self.matrix is not None

    def __call__(self, x: Tensor) -> Tensor:
        if (matrix := self.matrix) is not None:
            return linear(x, matrix, self.bias)
        if self.resident is not None and len(x) > FUSED_ROWS.get(x.device.type, 0):
            return linear(x, self.resident, self.bias)
        parts = [linear(x, w) if isinstance(w, Tensor) else nf4_matmul(x, w) for w in self.weights]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias

    def dense(self, buffer: Tensor) -> Tensor:
        """`buffer` (out, in), filled with the dequantised weights."""
        for weight, rows in zip(self.weights, buffer.split([weight.shape[0] for weight in self.weights])):
            rows.copy_(weight) if isinstance(weight, Tensor) else nf4_dequantize(weight, out=rows)
        return buffer

    def reside(self, dtype: torch.dtype) -> Projection:
        """A copy with `resident` in `dtype`; unchanged where it is dense already."""
        if self.is_dense:
            return self
        weight = self.weights[0]
        device = weight.device if isinstance(weight, Tensor) else weight.packed.device
        return replace(self, resident=self.dense(torch.empty(self.shape, dtype=dtype, device=device)))


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's frozen weights. None in models without them: `q_norm` and `k_norm` (head_dim,); `o_norm` and
    `down_norm` (D,), of the outputs of attention and MLP before the residual addition."""

    input_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    o_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    down_norm: Tensor | None

    @classmethod
    def of(cls, layer: Layer, offset: float = 0.0) -> DecoderLayer:
        """offset: is added to the norms' weights. All our ops scale scores by head_dim ** -0.5; for a model with
        another scale, the ratio goes into its q_norm. Raises ValueError for a model without q_norm."""
        attention, mlp = layer.self_attn, layer.mlp

        def norm(of: object, name: str) -> Tensor | None:
            return _norm_weight(getattr(of, name), offset) if hasattr(of, name) else None

        q_norm, k_norm = norm(attention, "q_norm"), norm(attention, "k_norm")
        if attention.scaling != attention.head_dim**-0.5:
            if q_norm is None:
                raise ValueError(f"scores are scaled by {attention.scaling}, and no q_norm can take that")
            q_norm = q_norm * (attention.scaling * attention.head_dim**0.5)
        before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
        return cls(
            _norm_weight(layer.input_layernorm, offset),
            Projection.of(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm,
            k_norm,
            Projection.of(attention.o_proj),
            norm(layer, "post_attention_layernorm") if before_mlp else None,
            _norm_weight(before_mlp or layer.post_attention_layernorm, offset),
            Projection.of(mlp.gate_proj, mlp.up_proj),
            Projection.of(mlp.down_proj),
            norm(layer, "post_feedforward_layernorm") if before_mlp else None,
        )

    def reside(self, dtype: torch.dtype) -> DecoderLayer:
        projections = {name: getattr(self, name).reside(dtype) for name in ("qkv", "o", "gate_up", "down")}
        return replace(self, **projections)


class FrozenDecoder:
    """Embedding, decoder layers, final norm and head of a language model. No weight of it ever gets a gradient.

    embedding, head: (V, D), dense or NF4. Hidden states are (tokens, D): sequences lie packed end to end, without
    padding. dtype: of hidden states. mrope: rotary positions have three axes (Qwen-VL); else the first of them counts.
    window: the shortest sliding window in tokens, itself included; None without sliding windows. Callers keep
    sequences within it, as nothing here masks.

    quantize_head: embedding and head in NF4 too, one matrix where they are tied. Raises ValueError where their
    width is not a multiple of NF4's block of 64.
    """

    embedding: NF4Weight | Tensor
    head: NF4Weight | Tensor
    eps: float
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None

    def __init__(self, language_model: LanguageModel, head: nn.Linear, quantize_head: bool = False) -> None:
        config = language_model.config
        embedding = language_model.embed_tokens.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        # Gemma's norms store their weight minus one; here the sum is rounded to bf16, in transformers it stays float32.
        offset = 1.0 if config.model_type in UNIT_OFFSET_NORMS else 0.0
        scale = getattr(language_model.embed_tokens, "scalar_embed_scale", 1.0)
        self.embedding_scale = torch.tensor(scale, dtype=self.dtype, device="cpu").item()
        tied = head.weight is embedding
        self.embedding = _quantized(embedding) if quantize_head else embedding.detach()
        self.head = self.embedding if tied else _quantized(head.weight) if quantize_head else _frozen(head.weight)
        self.layers = [DecoderLayer.of(layer, offset) for layer in language_model.layers]
        self.norm = _norm_weight(language_model.norm, offset)
        self.gate = GATES[activation(config)]
        self.rotary = language_model.rotary_emb
        kinds = getattr(config, "layer_types", None)
        self.rotary_kinds = kinds if hasattr(self.rotary, "layer_types") else None
        self.window = config.sliding_window if sliding(config) else None
        self.mrope = hasattr(self.rotary, "mrope_section")
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    @property
    def depth(self) -> int:
        return len(self.layers)

    def reside(self) -> None:
        """Keeps a dense copy of NF4 layers in `dtype` in memory, so that products of many rows and replays need not
        dequantise. The values are those of NF4, so the policy is the same."""
        self.layers = [layer.reside(self.dtype) for layer in self.layers]

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """(tokens,) int64 → (tokens, D). Visual positions hold pads here; the caller overwrites them."""
        table = self.embedding
        rows = F.embedding(input_ids, table) if isinstance(table, Tensor) else _dequantize_rows(table, input_ids)
        return rows if self.embedding_scale == 1 else rows * self.embedding_scale

    def logits(self, h: Tensor) -> Tensor:
        """(tokens, D) → (tokens, V)."""
        return linear(h, self.head) if isinstance(self.head, Tensor) else nf4_matmul(h, self.head)

    def dense_head(self) -> Tensor:
        """(V, D) in `dtype`: the head itself, or a dequantised copy of it."""
        return self.head if isinstance(self.head, Tensor) else nf4_dequantize(self.head, dtype=self.dtype)

    def forward(
        self,
        h: Tensor,
        positions: Tensor,
        attend: Attend,
        deepstack: Sequence[Tensor] = (),
        visual: Tensor | None = None,
        output_rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states h (tokens, D) at rotary `positions` (3, tokens) → final normed hidden states (tokens, D).

        deepstack: per level a tensor (visual tokens, D), added after layers 0, 1, … at the rows `visual` (int64).
        output_rows: (n,) int64, the rows to return, none of them visual; the last layer computes only theirs, and the
        result is (n, D). All rows by default.
        """
        rotations = self.rotate(positions, h.dtype)
        norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        x = rms_norm(h, self.layers[0].input_norm, self.eps)
        for i, (layer, norm) in enumerate(zip(self.layers, norms)):
            rows = output_rows if i == self.depth - 1 else None
            o = self.norm_branch(self._attention(i, layer, x, rotations[i], attend, rows), layer.o_norm)
            h, x = add_rms_norm(h if rows is None else h[rows], o, layer.mlp_norm, self.eps)
            out = self.norm_branch(layer.down(self.gate.forward(layer.gate_up(x))), layer.down_norm)
            if i < len(deepstack) and rows is None:
                assert visual is not None, "a DeepStack level is added at the rows `visual`"
                h = (h + out).index_add(0, visual, deepstack[i])
                x = rms_norm(h, norm, self.eps)
            else:
                h, x = add_rms_norm(h, out, norm, self.eps)
        return x

    def norm_branch(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """The output of a layer's attention or MLP, normed in models that norm it before the residual addition."""
        return x if weight is None else rms_norm(x, weight, self.eps)

    def rotate(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """cos and sin (tokens, head_dim) of positions (3, tokens), for each layer; layers of a kind share theirs."""
        like = torch.empty(0, dtype=dtype, device=self.device)
        at = positions[:, None] if self.mrope else positions[:1]
        if self.rotary_kinds is None:
            cos, sin = self.rotary(like, at)
            return [(cos[0], sin[0])] * self.depth
        angles = {kind: self.rotary(like, at, kind) for kind in set(self.rotary_kinds)}
        return [(cos[0], sin[0]) for cos, sin in map(angles.__getitem__, self.rotary_kinds)]

    def _attention(
        self,
        i: int,
        layer: DecoderLayer,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: Attend,
        output_rows: Tensor | None,
    ) -> Tensor:
        qkv = layer.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), -2)
        cos, sin = rotation
        k = rope(k, cos, sin, layer.k_norm, self.eps)
        if output_rows is not None:
            q, cos, sin = q[output_rows], cos[output_rows], sin[output_rows]
        q = rope(q, cos, sin, layer.q_norm, self.eps)
        return layer.o(attend(i, q, k, v).flatten(-2))

    def fingerprint(self) -> str:
        """SHA-256 over every byte of the frozen weights, as hexadecimal digits. A run leaves it unchanged. Resident
        copies do not count."""
        digest = hashlib.sha256()
        for tensor in self._tensors():
            digest.update(tensor.flatten().view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> Iterator[Tensor]:
        def tensors(value: object) -> Iterator[Tensor]:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, tuple):
                for part in value:
                    yield from tensors(part)
            elif isinstance(value, Projection | NF4Weight | DecoderLayer):
                for name, field in vars(value).items():
                    if name != "resident":
                        yield from tensors(field)

        for value in (self.embedding, *self.layers, self.norm, self.head):
            yield from tensors(value)


def _norm_weight(norm: Norm, offset: float) -> Tensor:
    return norm.weight.detach() + offset if offset else norm.weight.detach()


def activation(config: PretrainedConfig) -> str:
    """The name of the gate's activation; empty where the configuration has none."""
    return getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or ""


def sliding(config: PretrainedConfig) -> bool:
    """Whether a layer attends within a sliding window."""
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return "sliding_attention" in kinds and getattr(config, "sliding_window", None) is not None


def _frozen(weight: Tensor) -> NF4Weight | Tensor:
    return NF4Weight.from_bitsandbytes(weight) if hasattr(weight, "quant_state") else weight.detach()


def _concatenated(parameters: Sequence[Params4bit], weights: Sequence[NF4Weight]) -> tuple[NF4Weight, ...]:
    """The weights in one matrix, of which the `Params4bit` become views; unchanged where NF4 cannot concatenate
    them."""
    try:
        whole = NF4Weight.concatenate(weights)
    except ValueError:
        return tuple(weights)

    def parts(joined: Tensor, of: Sequence[Tensor]) -> Sequence[Tensor]:
        return joined.split([x.numel() for x in of])

    for parameter, packed in zip(parameters, parts(whole.packed, [weight.packed for weight in weights])):
        parameter.data = packed.view(parameter.dtype).view(parameter.shape)
    states = [parameter.quant_state for parameter in parameters]
    for state, absmax in zip(states, parts(whole.absmax, [weight.absmax for weight in weights])):
        state.absmax = absmax.view(state.absmax.shape)
    if whole.absmax2 is not None:
        for state, absmax in zip(states, parts(whole.absmax2, [state.state2.absmax for state in states])):
            state.state2.absmax = absmax.view(state.state2.absmax.shape)
    return (whole,)


def _quantized(weight: Tensor) -> NF4Weight:
    """A (V, D) matrix in NF4 whose absmax is not nested, so that rows can be dequantised separately."""
    if hasattr(weight, "quant_state"):
        return NF4Weight.from_bitsandbytes(weight)
    if weight.shape[1] % BLOCK:
        raise ValueError(f"quantize_head: hidden states of width {weight.shape[1]}, accepted are multiples of {BLOCK}")
    packed, state = quantize_4bit(weight.detach(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return NF4Weight(packed.view(-1), state.absmax, None, None, None, tuple(weight.shape), weight.dtype)


def _dequantize_rows(weight: NF4Weight, rows: Tensor) -> Tensor:
    """(n, D): the dequantised `rows` (n,) int64 of a matrix from `_quantized`."""
    packed, absmax = (values.view(weight.shape[0], -1)[rows].flatten() for values in (weight.packed, weight.absmax))
    return nf4_dequantize(NF4Weight(packed, absmax, None, None, None, (len(rows), weight.shape[1]), weight.dtype))
