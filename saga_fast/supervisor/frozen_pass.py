"""Forward and backward of packed tokens through the frozen decoder, without autograd.

No weight of the decoder has a gradient, so the backward pass is one matmul for each of the forward's, and it needs only
the inputs of norms, rotation, attention and gate, never of a matmul. Without autograd a layer's weights are dequantised
once per visit, where a visit of the backward pass covers recomputation and gradient; past keys and values take part as
constants, or collect a gradient for the pass that computed them; and the last layer computes only its output rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saga_fast.supervisor.bidirectional_images import Attention, ImageRows, add_bidirectional, bidirectional_backward
from saga_fast.supervisor.decoder import DecoderLayer, FrozenDecoder, Projection
from saga_kernels import GroupLayout, group_attention, rms_norm, rope

Recompute = Literal["none", "mlp", "full"]
"""What the backward pass recomputes. full: all of a layer, from its input (4,096 numbers saved per token and layer in
the 8B); mlp: gate and up; q, k, v, o and the residual stream are saved too (18,432); none: nothing (43,008)."""

MLP_ROWS = 8192  # rows whose gate and up are in memory at a time where they are recomputed

# observe(layer, layout, q, keys, lse): as `attention_onto` takes them
Observe = Callable[[int, GroupLayout, Tensor, Tensor, Tensor], None]
KeysValues = list[tuple[Tensor, Tensor]]
ops = torch.ops.saga_kernels


class WeightBuffers:
    """Buffers for one layer's dequantised weights, shared by all layers and passes of a replay."""

    def __init__(self, decoder: FrozenDecoder) -> None:
        self._like = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
        self._buffers: dict[str, Tensor] = {}

    def weights(self, layer: DecoderLayer) -> Weights:
        return Weights(*(self._dense(name, getattr(layer, name)) for name in Weights._fields))

    def _dense(self, name: str, projection: Projection) -> Tensor:
        if (matrix := projection.matrix) is not None:
            return matrix
        if projection.resident is not None:
            return projection.resident
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(projection.shape)
        return projection.dense(self._buffers[name])


class Weights(NamedTuple):
    """A layer's four matrices (out, in), dense."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor


class FirstHalf(NamedTuple):
    """What the backward of one layer reads of its attention half. attention_out: the output projection of attention,
    before its norm, in models that have that norm. residual: the residual stream after attention."""

    q: Tensor  # (query rows, heads, head_dim) before norm and rotation
    kv: Tensor  # (rows, 2 kv_heads, head_dim), k before them
    o: Tensor
    lse: Tensor
    attention_out: Tensor | None
    residual: Tensor


class SavedActivations(NamedTuple):
    """What one layer saves for its backward: its input h (rows, D), and what the recompute policy adds."""

    h: Tensor
    half: FirstHalf | None = None
    gate_up: Tensor | None = None


class PastKV(NamedTuple):
    """The keys and values of tokens that have no query in a pass, in packed order.

    read: layer → keys and values, each (tokens - rows, kv_heads, head_dim). gradient: of the same shapes, per layer;
    the backward pass adds to it. None where keys and values are constants.
    """

    read: Callable[[int], tuple[Tensor, Tensor]]
    gradient: KeysValues | None = None


class PassRows(NamedTuple):
    """The rows of a pass: the queries of `layout`, at rotary `positions` (3, rows).

    output_rows: (n,) int64, the rows that the last layer computes, which are the queries of `last_layout`; None for
    all. images: the image tokens that attend to each other in both directions, none of them in `output_rows`; None
    where attention is causal throughout.
    """

    layout: GroupLayout
    positions: Tensor
    output_rows: Tensor | None = None
    last_layout: GroupLayout | None = None
    images: ImageRows | None = None


class FrozenPass:
    """One forward pass over the hidden states (rows, D) of `rows`, and its backward pass.

    save_kv: keep every layer's keys and values in `saved_kv`, for later passes. The caller puts the gradient that these
    passes give into `saved_kv_gradient` before `backward`.
    """

    def __init__(
        self,
        decoder: FrozenDecoder,
        weight_buffers: WeightBuffers,
        rows: PassRows,
        past_kv: PastKV,
        recompute: Recompute,
        save_kv: bool = False,
    ) -> None:
        self.decoder, self.weight_buffers, self.past_kv = decoder, weight_buffers, past_kv
        self.recompute, self.save_kv = recompute, save_kv
        self.layout, positions, self.output_rows, self.last_layout, self.images = rows
        self.rotations = decoder.rotate(positions, decoder.dtype)
        self.query_rows, self.cached_rows = self.layout.key_rows()
        self.saved_kv: KeysValues = []
        self.saved_kv_gradient: KeysValues = []
        self._saved: list[SavedActivations] = []

    def forward(
        self,
        h: Tensor,
        deepstack: Sequence[Tensor] = (),
        visual: Tensor | None = None,
        observe: Observe | None = None,
        save_for_backward: bool = True,
    ) -> Tensor:
        """Final normed hidden states (n, D) of `output_rows`, as `FrozenDecoder.forward` gives them. save_for_backward:
        a backward will follow."""
        decoder = self.decoder
        self._levels, self._visual = len(deepstack), visual
        for i, layer in enumerate(decoder.layers):
            weights = self.weight_buffers.weights(layer)
            output_rows = self.output_rows if i == decoder.depth - 1 else None
            half, attention = self._attend(i, layer, weights, h, output_rows, observe)
            x = rms_norm(half.residual, layer.mlp_norm, decoder.eps)
            parts = []
            for rows in _chunks(len(x), self.recompute):
                gate_up = F.linear(x[rows], weights.gate_up, layer.gate_up.bias)
                out = F.linear(decoder.gate.forward(gate_up), weights.down, layer.down.bias)
                parts.append(decoder.norm_branch(out, layer.down_norm))
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
            if save_for_backward:
                again = self.recompute
                self._saved.append(
                    SavedActivations(h)
                    if again == "full"
                    else SavedActivations(h, half, gate_up if again == "none" else None)
                )
            if self.save_kv:
                self.saved_kv.append((attention.k, attention.v))
            h = out.add_(half.residual)
            if i < len(deepstack) and output_rows is None:
                assert visual is not None, "a DeepStack level is added at the rows `visual`"
                h.index_add_(0, visual, deepstack[i])
        if save_for_backward:
            self._last = h
        return rms_norm(h, decoder.norm, decoder.eps)

    def backward(self, d: Tensor, input_rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of h's rows `input_rows`, and of each DeepStack level, from d, the gradient of `forward`'s
        result."""
        decoder = self.decoder
        d = ops.rms_norm_backward(d, None, self._last, decoder.norm, decoder.eps)
        levels: list[Tensor] = []
        for i, layer in reversed(list(enumerate(decoder.layers))):
            output_rows = self.output_rows if i == decoder.depth - 1 else None
            if i < self._levels and output_rows is None:
                levels.insert(0, d[self._visual])
            d = self._layer_backward(i, layer, self._saved.pop(), d, output_rows, input_rows if i == 0 else None)
        return d, levels

    def _attend(
        self,
        i: int,
        layer: DecoderLayer,
        weights: Weights,
        h: Tensor,
        output_rows: Tensor | None,
        observe: Observe | None,
    ) -> tuple[FirstHalf, Attention]:
        """The attention half of a layer, and its attention over all tokens of the layout."""
        decoder = self.decoder
        x = rms_norm(h, layer.input_norm, decoder.eps)
        split, bias = decoder.heads * decoder.head_dim, layer.qkv.bias
        if output_rows is None:
            q, kv = F.linear(x, weights.qkv, bias).tensor_split((split,), -1)
        else:
            q_bias, kv_bias = (None, None) if bias is None else (bias[:split], bias[split:])
            q = F.linear(x[output_rows], weights.qkv[:split], q_bias)
            kv = F.linear(x, weights.qkv[split:], kv_bias)
        q, kv = (y.unflatten(-1, (-1, decoder.head_dim)) for y in (q, kv))
        rotated, keys, values = self._rotate(i, layer, q, kv, output_rows)
        o, lse = group_attention(rotated, keys, values, self._layout(output_rows))
        attention = Attention(rotated, keys, values, o, lse)
        if self.images is not None and output_rows is None:
            add_bidirectional(attention, self.images)
        if observe is not None:
            observe(i, self._layout(output_rows), rotated, keys, lse)
        attention_out, shortcut = (
            F.linear(o.flatten(-2), weights.o, layer.o.bias),
            h if output_rows is None else h[output_rows],
        )
        if layer.o_norm is None:
            return FirstHalf(q, kv, o, lse, None, attention_out.add_(shortcut)), attention
        residual = rms_norm(attention_out, layer.o_norm, decoder.eps).add_(shortcut)
        return FirstHalf(q, kv, o, lse, attention_out, residual), attention

    def _rotate(
        self, i: int, layer: DecoderLayer, q: Tensor, kv: Tensor, output_rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q; keys and values of all tokens of the layout, past ones included."""
        decoder, (cos, sin) = self.decoder, self.rotations[i]
        q = rope(q, *self._angles(i, output_rows), layer.q_norm, decoder.eps)
        k, v = kv.chunk(2, -2)
        k = rope(k, cos, sin, layer.k_norm, decoder.eps)
        if len(self.cached_rows) == 0:
            return q, k, v
        both = []
        for new, past_kv in zip((k, v), self.past_kv.read(i)):
            packed = new.new_empty(self.layout.tokens, *new.shape[1:])
            both.append(packed.index_copy_(0, self.query_rows, new).index_copy_(0, self.cached_rows, past_kv))
        return q, *both

    def _layer_backward(
        self,
        i: int,
        layer: DecoderLayer,
        saved: SavedActivations,
        d: Tensor,
        output_rows: Tensor | None,
        input_rows: Tensor | None,
    ) -> Tensor:
        """The gradient of a layer's input: of all rows, or of `input_rows`."""
        decoder, weights, (cos, sin) = self.decoder, self.weight_buffers.weights(layer), self.rotations[i]
        if (half := saved.half) is None:
            half, attention = self._attend(i, layer, weights, saved.h, output_rows, None)
        else:
            attention = Attention(*self._rotate(i, layer, half.q, half.kv, output_rows), half.o, half.lse)

        # The MLP, in chunks of rows where gate and up are recomputed.
        d_residual = torch.empty_like(half.residual)
        for rows in _chunks(len(d), self.recompute):
            residual = half.residual[rows]
            if (gate_up := saved.gate_up) is None:
                x = rms_norm(residual, layer.mlp_norm, decoder.eps)
                gate_up = F.linear(x, weights.gate_up, layer.gate_up.bias)
            d_out = d[rows]
            if layer.down_norm is not None:
                out = F.linear(decoder.gate.forward(gate_up), weights.down, layer.down.bias)
                d_out = ops.rms_norm_backward(d_out, None, out, layer.down_norm, decoder.eps)
            d_x = decoder.gate.backward(d_out @ weights.down, gate_up) @ weights.gate_up
            d_residual[rows] = ops.rms_norm_backward(d_x, d[rows], residual, layer.mlp_norm, decoder.eps)

        # Attention.
        d_attention_out = d_residual
        if layer.o_norm is not None:
            d_attention_out = ops.rms_norm_backward(d_residual, None, half.attention_out, layer.o_norm, decoder.eps)
        d_o = (d_attention_out @ weights.o).view_as(half.o)
        offsets, scale, no_capture = self._layout(output_rows).offsets, decoder.head_dim**-0.5, (None, None, None)
        d_q, d_keys, d_values = ops.group_attention_backward(d_o, *attention, *offsets, scale, *no_capture)
        if self.images is not None and output_rows is None:
            bidirectional_backward(d_o, attention, (d_q, d_keys, d_values), self.images)
        if self.saved_kv_gradient:
            later_kv_gradient = self.saved_kv_gradient.pop()
            d_keys, d_values = (
                (own + extra).to(own.dtype) for own, extra in zip((d_keys, d_values), later_kv_gradient)
            )
        if self.past_kv.gradient is not None:
            for total, own in zip(self.past_kv.gradient[i], (d_keys, d_values)):
                total += own[self.cached_rows]
        d_k, d_v = (
            (d_keys, d_values) if len(self.cached_rows) == 0 else (d_keys[self.query_rows], d_values[self.query_rows])
        )
        d_q = self._unrotate(d_q, half.q, layer.q_norm, *self._angles(i, output_rows)).flatten(1)
        d_k = self._unrotate(d_k, half.kv[:, : decoder.kv_heads], layer.k_norm, cos, sin).flatten(1)
        d_v = d_v.flatten(1)
        if output_rows is not None:  # other rows get zeros: the last layer computes nothing for them
            d_q, d_residual = (
                x.new_zeros(len(saved.h), x.shape[1]).index_copy_(0, output_rows, x) for x in (d_q, d_residual)
            )
        d_qkv, h = torch.cat((d_q, d_k, d_v), 1), saved.h
        if input_rows is not None:
            d_qkv, d_residual, h = d_qkv[input_rows], d_residual[input_rows], h[input_rows]
        return ops.rms_norm_backward(d_qkv @ weights.qkv, d_residual, h, layer.input_norm, decoder.eps)

    def _unrotate(self, d: Tensor, x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.rope_backward(d, None if norm is None else x, cos, sin, norm, self.decoder.eps)

    def _angles(self, i: int, output_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotations[i]
        return (cos, sin) if output_rows is None else (cos[output_rows], sin[output_rows])

    def _layout(self, output_rows: Tensor | None) -> GroupLayout:
        return self.layout if output_rows is None else self.last_layout


def _chunks(rows: int, recompute: Recompute) -> list[slice]:
    """Chunks of rows that go through the MLP together: one chunk where gate and up are saved anyway."""
    size = rows if recompute == "none" else MLP_ROWS
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
