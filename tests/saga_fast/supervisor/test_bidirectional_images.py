"""Images read in both directions against a masked softmax, and the gates by hand against autograd, in float64."""

from __future__ import annotations

import pytest
import torch

from saga_fast.supervisor.bidirectional_images import (
    Attention,
    ImageRows,
    add_bidirectional,
    bidirectional_backward,
)
from saga_fast.supervisor.gates import GATES
from saga_kernels import GroupLayout, group_attention


def test_later_tokens_of_an_image_are_seen_forward_and_back():
    """Two images in a prefix of which the first two tokens have no query; a completion behind it, causal as ever."""
    torch.manual_seed(0)
    prefix, length, skipped, heads, kv_heads, dim = 12, 15, 2, 4, 2, 8
    layout = GroupLayout([prefix], [[length - prefix]], [prefix - skipped])
    columns = torch.tensor([[3, 4, 5], [8, 9, 10]])
    images = ImageRows(columns - skipped, columns)
    q = torch.randn(length - skipped, heads, dim, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(length, kv_heads, dim, dtype=torch.float64, requires_grad=True) for _ in range(2))

    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for image in columns:
        seen[image[:, None], image] = True
    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * dim**-0.5
    scores = scores.masked_fill(~seen[skipped:], -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    d_o = torch.randn_like(expected)
    expected.backward(d_o)

    with torch.no_grad():
        o, lse = group_attention(q, k, v, layout)
        attention = Attention(q, k, v, o, lse)
        add_bidirectional(attention, images)
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(lse, scores.logsumexp(-1))
        scale, onto = dim**-0.5, (None, None, None)
        d = torch.ops.saga_kernels.group_attention_backward(d_o, *attention, *layout.offsets, scale, *onto)
        bidirectional_backward(d_o, attention, d, images)
    for mine, x in zip(d, (q, k, v)):
        torch.testing.assert_close(mine, x.grad)


@pytest.mark.parametrize("name", GATES)
def test_gates_backward_is_autograds(name):
    torch.manual_seed(0)
    gate_up = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    out = GATES[name].forward(gate_up)
    d = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, gate_up, d)
    torch.testing.assert_close(GATES[name].backward(d, gate_up.detach()), expected)
