"""One packed run through the frozen decoder and back, by hand.

No weight of the decoder has a gradient, so its backward is one matmul for each of the forward's, and what must be kept
for it is little: the inputs of norms, rotation, attention and gate, never of a matmul. By hand, a layer's weights are
dequantised once a visit, the visit of the backward being one for recomputation and gradient together; keys and values
that an earlier run computed take part as constants, or give their gradient back to it; the last layer goes no further
than the rows somebody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saga_fast.supervisor.decoder import DecoderLayer, FrozenDecoder, Projection
from saga_fast.supervisor.whole_images import Images, add_later, later_backward
from saga_kernels import GroupLayout, group_attention, rms_norm, rope

Recompute = Literal["none", "mlp", "full"]
"""What the backward computes again. full: all of a layer, from its input (4,096 numbers a token in the 8B); mlp: gate
and up, as q, k, v, o and the residual between are kept too (18,432); none: nothing (43,008)."""

MLP_ROWS = 8192  # rows whose gate and up stand at a time where they are not kept

# observe(layer, layout, q, keys, lse): as `attention_onto` takes them
Observe = Callable[[int, GroupLayout, Tensor, Tensor, Tensor], None]
KeysValues = list[tuple[Tensor, Tensor]]
Earlier = Callable[[int], tuple[Tensor, Tensor]]
ops = torch.ops.saga_kernels


class Scratch:
    """Buffers for one layer's dequantised weights, shared by all layers and runs of a replay."""

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
    """Of one layer, what its backward reads of its first half. attended: what attention gives, before its norm, where
    it has one."""

    q: Tensor  # (asking, heads, head_dim) before norm and rotation
    kv: Tensor  # (rows, 2 kv_heads, head_dim), k before them
    o: Tensor
    lse: Tensor
    attended: Tensor | None
    middle: Tensor


class Kept(NamedTuple):
    """Of one layer, between forward and backward: its input h, and what the policy keeps."""

    h: Tensor
    half: FirstHalf | None = None
    gate_up: Tensor | None = None


class FrozenPass:
    """A run of hidden states (rows, D) that stand at the queries of `layout` and at rotary `positions` (3, rows).

    earlier: of a layer, keys and values (tokens - rows, kv_heads, head_dim) of the tokens that have no query, in packed
    order. earlier_gradient: alike, and the backward adds to it; None where they are constants. asking: the rows (n,)
    int64 of the last layer that are read, which are all queries of `last_layout`; None for all. hold: keep every
    layer's keys and values, in `held`, for later runs, whose gradient is to be put into `held_gradient` before the
    backward. whole_images: N, of an image's visual tokens, which then see each other in both directions; they are not
    among `asking`.
    """

    def __init__(
        self,
        decoder: FrozenDecoder,
        scratch: Scratch,
        layout: GroupLayout,
        positions: Tensor,
        recompute: Recompute,
        earlier: Earlier,
        earlier_gradient: KeysValues | None = None,
        asking: Tensor | None = None,
        last_layout: GroupLayout | None = None,
        hold: bool = False,
        whole_images: int | None = None,
    ) -> None:
        self.decoder, self.scratch, self.layout, self.recompute = decoder, scratch, layout, recompute
        self.earlier, self.earlier_gradient = earlier, earlier_gradient
        self.asking, self.last_layout = asking, last_layout
        self.rotations = decoder.rotate(positions, decoder.dtype)
        self.own, self.before = layout.key_rows()
        self.hold, self.whole_images = hold, whole_images
        self._images: Images | None = None
        self.held: KeysValues = []
        self.held_gradient: KeysValues = []
        self._kept: list[Kept] = []

    def forward(
        self,
        h: Tensor,
        deepstack: Sequence[Tensor] = (),
        visual: Tensor | None = None,
        observe: Observe | None = None,
        keep: bool = True,
    ) -> Tensor:
        """Final normed hidden states of the rows that ask, as `FrozenDecoder.forward`. keep: a backward will follow."""
        decoder = self.decoder
        self._levels, self._visual = len(deepstack), visual
        if self.whole_images and visual is not None:
            places = visual.view(-1, self.whole_images)
            self._images = Images(places, self.own[places])
        for i, layer in enumerate(decoder.layers):
            weights = self.scratch.weights(layer)
            asking = self.asking if i == decoder.depth - 1 else None
            half, (_, keys, values) = self._attend(i, layer, weights, h, asking, observe)
            x = rms_norm(half.middle, layer.mlp_norm, decoder.eps)
            parts = []
            for rows in _chunks(len(x), self.recompute):
                gate_up = F.linear(x[rows], weights.gate_up, layer.gate_up.bias)
                out = F.linear(decoder.gate.forward(gate_up), weights.down, layer.down.bias)
                parts.append(decoder.norm_branch(out, layer.down_norm))
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
            if keep:
                again = self.recompute
                self._kept.append(Kept(h) if again == "full" else Kept(h, half, gate_up if again == "none" else None))
            if self.hold:
                self.held.append((keys, values))
            h = out.add_(half.middle)
            if i < len(deepstack) and asking is None:
                assert visual is not None, "a DeepStack level is added at the rows `visual`"
                h.index_add_(0, visual, deepstack[i])
        if keep:
            self._last = h
        return rms_norm(h, decoder.norm, decoder.eps)

    def backward(self, d: Tensor, wanted: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient of what `forward` gave to that of h's rows `wanted`, and of each level of deepstack."""
        decoder = self.decoder
        d = ops.rms_norm_backward(d, None, self._last, decoder.norm, decoder.eps)
        levels: list[Tensor] = []
        for i, layer in reversed(list(enumerate(decoder.layers))):
            asking = self.asking if i == decoder.depth - 1 else None
            if i < self._levels and asking is None:
                levels.insert(0, d[self._visual])
            d = self._layer_backward(i, layer, self._kept.pop(), d, asking, wanted if i == 0 else None)
        return d, levels

    def _attend(
        self, i: int, layer: DecoderLayer, weights: Weights, h: Tensor, asking: Tensor | None, observe: Observe | None
    ) -> tuple[FirstHalf, tuple[Tensor, Tensor, Tensor]]:
        """The first half of a layer, and what met in its attention: q, keys and values."""
        decoder = self.decoder
        x = rms_norm(h, layer.input_norm, decoder.eps)
        split, bias = decoder.heads * decoder.head_dim, layer.qkv.bias
        if asking is None:
            q, kv = F.linear(x, weights.qkv, bias).tensor_split((split,), -1)
        else:
            q_bias, kv_bias = (None, None) if bias is None else (bias[:split], bias[split:])
            q = F.linear(x[asking], weights.qkv[:split], q_bias)
            kv = F.linear(x, weights.qkv[split:], kv_bias)
        q, kv = (y.unflatten(-1, (-1, decoder.head_dim)) for y in (q, kv))
        rotated, keys, values = self._rotate(i, layer, q, kv, asking)
        o, lse = group_attention(rotated, keys, values, self._layout(asking))
        if self._images is not None and asking is None:
            add_later(rotated, keys, values, o, lse, self._images)
        if observe is not None:
            observe(i, self._layout(asking), rotated, keys, lse)
        attended, residual = F.linear(o.flatten(-2), weights.o, layer.o.bias), h if asking is None else h[asking]
        if layer.o_norm is None:
            return FirstHalf(q, kv, o, lse, None, attended.add_(residual)), (rotated, keys, values)
        middle = rms_norm(attended, layer.o_norm, decoder.eps).add_(residual)
        return FirstHalf(q, kv, o, lse, attended, middle), (rotated, keys, values)

    def _rotate(
        self, i: int, layer: DecoderLayer, q: Tensor, kv: Tensor, asking: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q normed and rotated; keys and values of all tokens of the layout, the earlier ones among them."""
        decoder, (cos, sin) = self.decoder, self.rotations[i]
        q = rope(q, *self._angles(i, asking), layer.q_norm, decoder.eps)
        k, v = kv.chunk(2, -2)
        k = rope(k, cos, sin, layer.k_norm, decoder.eps)
        if len(self.before) == 0:
            return q, k, v
        both = []
        for own, earlier in zip((k, v), self.earlier(i)):
            every = own.new_empty(self.layout.tokens, *own.shape[1:])
            both.append(every.index_copy_(0, self.own, own).index_copy_(0, self.before, earlier))
        return q, *both

    def _layer_backward(
        self, i: int, layer: DecoderLayer, kept: Kept, d: Tensor, asking: Tensor | None, wanted: Tensor | None
    ) -> Tensor:
        """The gradient of a layer's input, of all rows or of those that are wanted."""
        decoder, weights, (cos, sin) = self.decoder, self.scratch.weights(layer), self.rotations[i]
        if (half := kept.half) is None:
            half, (q, keys, values) = self._attend(i, layer, weights, kept.h, asking, None)
        else:
            q, keys, values = self._rotate(i, layer, half.q, half.kv, asking)

        # The MLP, in runs of rows where gate and up are computed again.
        d_middle = torch.empty_like(half.middle)
        for rows in _chunks(len(d), self.recompute):
            middle = half.middle[rows]
            if (gate_up := kept.gate_up) is None:
                x = rms_norm(middle, layer.mlp_norm, decoder.eps)
                gate_up = F.linear(x, weights.gate_up, layer.gate_up.bias)
            d_out = d[rows]
            if layer.down_norm is not None:
                out = F.linear(decoder.gate.forward(gate_up), weights.down, layer.down.bias)
                d_out = ops.rms_norm_backward(d_out, None, out, layer.down_norm, decoder.eps)
            d_x = decoder.gate.backward(d_out @ weights.down, gate_up) @ weights.gate_up
            d_middle[rows] = ops.rms_norm_backward(d_x, d[rows], middle, layer.mlp_norm, decoder.eps)

        # Attention.
        d_attended = d_middle
        if layer.o_norm is not None:
            d_attended = ops.rms_norm_backward(d_middle, None, half.attended, layer.o_norm, decoder.eps)
        d_o = (d_attended @ weights.o).view_as(half.o)
        where, scale, onto = self._layout(asking).offsets, decoder.head_dim**-0.5, (None, None, None)
        met = q, keys, values, half.o, half.lse
        d_q, d_keys, d_values = ops.group_attention_backward(d_o, *met, *where, scale, *onto)
        if self._images is not None and asking is None:
            later_backward(d_o, *met, (d_q, d_keys, d_values), self._images)
        if self.held_gradient:
            later = self.held_gradient.pop()
            d_keys, d_values = ((mine + its).to(mine.dtype) for mine, its in zip((d_keys, d_values), later))
        if self.earlier_gradient is not None:
            for total, own in zip(self.earlier_gradient[i], (d_keys, d_values)):
                total += own[self.before]
        d_k, d_v = (d_keys, d_values) if len(self.before) == 0 else (d_keys[self.own], d_values[self.own])
        d_q = self._unrotate(d_q, half.q, layer.q_norm, *self._angles(i, asking)).flatten(1)
        d_k = self._unrotate(d_k, half.kv[:, : decoder.kv_heads], layer.k_norm, cos, sin).flatten(1)
        d_v = d_v.flatten(1)
        if asking is not None:  # zeros for the others: of their attention and MLP nothing was computed
            d_q, d_middle = (x.new_zeros(len(kept.h), x.shape[1]).index_copy_(0, asking, x) for x in (d_q, d_middle))
        d_qkv, h = torch.cat((d_q, d_k, d_v), 1), kept.h
        if wanted is not None:
            d_qkv, d_middle, h = d_qkv[wanted], d_middle[wanted], h[wanted]
        return ops.rms_norm_backward(d_qkv @ weights.qkv, d_middle, h, layer.input_norm, decoder.eps)

    def _unrotate(self, d: Tensor, x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.rope_backward(d, None if norm is None else x, cos, sin, norm, self.decoder.eps)

    def _angles(self, i: int, asking: Tensor | None) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotations[i]
        return (cos, sin) if asking is None else (cos[asking], sin[asking])

    def _layout(self, asking: Tensor | None) -> GroupLayout:
        return self.layout if asking is None else self.last_layout


def _chunks(rows: int, recompute: Recompute) -> list[slice]:
    """Runs of rows that go through the MLP together: all where gate and up are kept anyway."""
    size = rows if recompute == "none" else MLP_ROWS
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
