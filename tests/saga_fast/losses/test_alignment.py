"""ᾱ and L_KL against plain loops, and at zeros."""

from __future__ import annotations

import math

import pytest
import torch

from saga_fast.encoder import AttributePooler
from saga_fast.losses.alignment import alignment_kl, attention_targets


def one(attention: torch.Tensor) -> torch.Tensor:
    """ᾱ of the paper's pooler, whose one query learns from all tokens."""
    return attention_targets(attention, torch.zeros(len(attention), dtype=torch.int64), 1)[0]


def test_target_renormalises_each_token_before_averaging():
    attention = torch.tensor([[0.1, 0.3, 0.0], [0.002, 0.001, 0.001]], dtype=torch.float64)
    expected = torch.tensor([(0.25 + 0.5) / 2, (0.75 + 0.25) / 2, 0.25 / 2], dtype=torch.float64)
    torch.testing.assert_close(one(attention), expected)


def test_target_leaves_out_tokens_without_mass():
    attention = torch.tensor([[0.0, 0.0], [0.1, 0.3]])
    torch.testing.assert_close(one(attention), torch.tensor([0.25, 0.75]))
    for empty in (torch.zeros(2, 4), torch.zeros(0, 4)):
        target = one(empty)
        assert torch.equal(target, torch.zeros(4))
        assert alignment_kl(target[None, None], torch.full((1, 1, 4), 0.25)).item() == 0


def test_target_in_fp32_survives_tiny_mass():
    torch.testing.assert_close(one(torch.tensor([[1e-30, 3e-30]])), torch.tensor([0.25, 0.75]))


def test_kl_is_the_sum_in_this_direction():
    torch.manual_seed(0)
    target, beta = torch.randn(2, 3, 1, 7, dtype=torch.float64).softmax(-1)
    rows = [list(zip(*row, strict=True)) for row in zip(target[:, 0].tolist(), beta[:, 0].tolist(), strict=True)]
    expected = [sum(p * math.log(p / q) for p, q in row) for row in rows]
    assert alignment_kl(target, beta).tolist() == pytest.approx(expected, rel=1e-12)
    assert alignment_kl(beta, beta).tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_kl_of_each_attribute_is_a_double_loop():
    """Attention → targets → L_KL of two images, four queries, one of which is described of neither image."""
    torch.manual_seed(0)
    query = [[0, 2, 2, 0, 0], [2, 3, 3]]
    attention = [0.3 * torch.rand(len(q), 6, dtype=torch.float64) for q in query]
    beta = torch.randn(2, 4, 6, dtype=torch.float64).softmax(-1)
    targets = torch.stack([attention_targets(a, torch.tensor(q), 4) for a, q in zip(attention, query)])
    expected = []
    for image in range(2):
        divergences = []
        for m in sorted(set(query[image])):
            mean = [0.0] * 6
            rows = [row for row, q in zip(attention[image].tolist(), query[image]) if q == m]
            for row in rows:
                for n in range(6):
                    mean[n] += row[n] / sum(row) / len(rows)
            divergences.append(sum(p * math.log(p / q) for p, q in zip(mean, beta[image, m].tolist())))
        expected.append(sum(divergences) / len(divergences))
    assert alignment_kl(targets, beta).tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_goes_into_the_pooler_only():
    torch.manual_seed(0)
    pooler, tokens = AttributePooler(8, 8, ("a", "b")), torch.randn(3, 5, 8, requires_grad=True)
    target = torch.randn(3, 2, 5).softmax(-1).requires_grad_()
    alignment_kl(target, pooler.attention(tokens.detach())).sum().backward()
    assert tokens.grad is None and target.grad is None
    moved = {name for name, parameter in pooler.named_parameters() if parameter.grad is not None}
    assert moved == {"query", "key"}, "the projections are bypassed"


def test_gradient_goes_into_beta_only_and_pulls_logits_to_the_target():
    torch.manual_seed(0)
    target = torch.randn(3, 1, 7, dtype=torch.float64).softmax(-1).requires_grad_()
    logits = torch.randn(3, 1, 7, dtype=torch.float64, requires_grad=True)
    alignment_kl(target, logits.softmax(-1)).sum().backward()
    assert target.grad is None
    torch.testing.assert_close(logits.grad, logits.softmax(-1).detach() - target.detach())


def test_zeros_on_either_side_are_finite():
    beta = torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]], [[0.0, 1.0]]], requires_grad=True)
    target = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    loss = alignment_kl(target, beta)
    assert loss[:2].tolist() == pytest.approx([0.0, math.log(2)])
    assert 80 < loss[2] < 100
    loss.sum().backward()
    assert beta.grad.isfinite().all()


def test_bf16_beta_is_reduced_in_fp32():
    beta = torch.randn(1, 1, 49).softmax(-1)
    half = alignment_kl(torch.full((1, 1, 49), 1 / 49), beta.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, alignment_kl(torch.full((1, 1, 49), 1 / 49), beta.bfloat16().float()))
