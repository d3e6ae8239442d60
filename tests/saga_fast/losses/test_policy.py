"""Token coefficients against the loss written out token by token."""

from __future__ import annotations

import pytest
import torch

from saga_fast.losses.policy import token_coefficients


def test_coefficients_give_the_loss():
    torch.manual_seed(0)
    advantages, lengths = torch.tensor([1.5, -0.5, 0.0, -1.0], dtype=torch.float64), [3, 1, 2, 4]
    logp = torch.randn(10, dtype=torch.float64)
    total, at = 0.0, 0
    for advantage, length in zip(advantages.tolist(), lengths, strict=True):
        for _ in range(length):
            total += advantage * logp[at].item()
            at += 1
    loss = (token_coefficients(advantages, lengths, total_tokens=10) * logp).sum()
    assert loss.item() == pytest.approx(-total / 10)


def test_slices_of_a_buffer_add_up_to_the_whole():
    advantages, lengths = torch.tensor([1.0, -2.0, 3.0]), [2, 5, 1]
    whole = token_coefficients(advantages, lengths, 8)
    slices = [token_coefficients(advantages[i : i + 1], lengths[i : i + 1], 8) for i in range(3)]
    assert torch.equal(whole, torch.cat(slices))


def test_descent_makes_the_rewarded_completion_likelier():
    logits = torch.zeros(2, requires_grad=True)  # one token each: token 0 was rewarded, token 1 was not
    logp = logits.log_softmax(0)
    (token_coefficients(torch.tensor([1.0, -1.0]), [1, 1], 2) * logp).sum().backward()
    assert logits.grad[0] < 0 < logits.grad[1]
