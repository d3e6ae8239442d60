"""The prefix of one pair of images, ready to be packed, and the cached keys and values of its static part.

The prefix's text is the same for every pair of a run; only the visual tokens differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saga_fast.supervisor.bidirectional_images import ImageRows
from saga_fast.supervisor.decoder import FrozenDecoder
from saga_fast.supervisor.prompt import Prefix
from saga_kernels import GroupLayout, group_attention


@dataclass(frozen=True)
class PairPrefix:
    """input_ids: (P,) int64. images: (2, N) int64, the rows of both images' visual tokens. positions: (3, P), rotary.

    next_position: where every completion's positions begin, on all three axes.
    static_length: C, number of tokens before the first image; they are the same for every pair, see `PrefixCache`.
    newline: (D,), the embedding in the row after each image, in models that have one.
    bidirectional_images: whether the tokens of an image attend to each other in both directions.
    """

    input_ids: Tensor
    images: Tensor
    positions: Tensor
    next_position: int
    static_length: int
    newline: Tensor | None = None
    bidirectional_images: bool = False

    @classmethod
    def of(
        cls,
        prefix: Prefix,
        grid: tuple[int, int] | None,
        device: torch.device | str = "cpu",
        newline: Tensor | None = None,
        bidirectional_images: bool = False,
    ) -> PairPrefix:
        """`grid`: merged tokens per column and row of an image; their product is the length of each image span. None
        for a model without M-RoPE, where positions count tokens of images and text alike."""
        if grid is None:
            return cls(
                torch.tensor(prefix.input_ids, device=device),
                torch.stack([torch.arange(*span) for span in prefix.image_spans]).to(device),
                torch.arange(len(prefix.input_ids), device=device).expand(3, -1),
                len(prefix.input_ids),
                prefix.image_spans[0][0],
                newline,
                bidirectional_images,
            )
        text, images, start, position = [], [], 0, 0
        for span in prefix.image_spans:
            before = span[0] - start
            text.append(torch.arange(before).expand(3, -1) + position)
            position += before
            # Qwen's M-RoPE: an image has one time position; its rows and columns count from there, and the text after
            # it continues behind the larger of the two.
            row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
            text.append(torch.stack([torch.zeros_like(row), row, column]).flatten(1) + position)
            position += max(grid)
            images.append(torch.arange(*span))
            start = span[1]
        after = len(prefix.input_ids) - start
        text.append(torch.arange(after).expand(3, -1) + position)
        return cls(
            torch.tensor(prefix.input_ids, device=device),
            torch.stack(images).to(device),
            torch.cat(text, dim=1).to(device),
            position + after,
            prefix.image_spans[0][0],
            newline,
            bidirectional_images,
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    def visual_rows(self, starts: Tensor) -> Tensor:
        """Packed rows (n·2·N,) of the visual tokens of pairs whose first image begins at `starts` (n,); image a, then
        b."""
        return (starts[:, None, None] + self.images - self.static_length).flatten()

    def images_of(self, pairs: int, static_length: int) -> ImageRows | None:
        """The rows of the images of `pairs` packed prefixes, whose first `static_length` tokens have keys but no
        queries; None where attention is causal throughout."""
        if not self.bidirectional_images:
            return None
        starts = torch.arange(pairs, device=self.images.device)[:, None, None]
        rows, columns = (self.images - skipped + starts * (len(self) - skipped) for skipped in (static_length, 0))
        return ImageRows(rows.flatten(0, 1), columns.flatten(0, 1))

    def input_embeddings(
        self, decoder: FrozenDecoder, input_ids: Tensor, visual_rows: Tensor, tokens: Tensor
    ) -> Tensor:
        """(tokens, D): embeddings of packed `input_ids` (tokens,), with visual `tokens` (2n, N, D) in their rows."""
        h = decoder.embed_tokens(input_ids).index_copy_(0, visual_rows, tokens.flatten(0, 1).to(decoder.dtype))
        if self.newline is not None:
            h[visual_rows.view(len(tokens), -1)[:, -1] + 1] = self.newline
        return h


class PrefixCache:
    """A pair's prefix, and the keys and values of its static part (all before the first image), computed once.

    keys, values: a (C, kv_heads, head_dim) tensor per layer. With `instruction_first` they cover the whole instruction,
    with `images_first` the template's first few tokens.
    """

    @torch.no_grad()
    def __init__(self, decoder: FrozenDecoder, prefix: PairPrefix) -> None:
        self.decoder, self.prefix = decoder, prefix
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        count = prefix.static_length
        if count == 0:
            empty = torch.empty(0, decoder.kv_heads, decoder.head_dim, dtype=decoder.dtype, device=decoder.device)
            self.keys = self.values = [empty] * decoder.depth
            return
        layout = GroupLayout([count], [[]], device=decoder.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys.append(k)
            self.values.append(v)
            return group_attention(q, k, v, layout)[0]

        decoder.forward(decoder.embed_tokens(prefix.input_ids[:count]), prefix.positions[:, :count], attend)

    def with_static_prefix(self, layer: int, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        """k, v (pairs·(P - C), kv_heads, head_dim) of the rest of each prefix → (pairs·P, kv_heads, head_dim), after
        the cached ones."""

        def whole(first: Tensor, rest: Tensor) -> Tensor:
            return torch.cat([first.expand(pairs, *first.shape), rest.unflatten(0, (pairs, -1))], 1).flatten(0, 1)

        return whole(self.keys[layer], k), whole(self.values[layer], v)
